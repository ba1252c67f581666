//! Tiles of channels over parts of the rows.

use super::{BatchStatistics, Layer};
use crate::driver::seam::Address;
use crate::gpu::{FLOATS, Geometry, Gpu, Kernel, Signature};
use crate::{DType, Error, Result, Tensor};

/// partial moments, input, counts or null, rows of a sample, rows, channels, rows per part
const PARTIAL_STATISTICS: Kernel<(Address, Address, Address, u64, u64, u32, u64)> =
    Kernel::new("batch_norm", "batch_norm_partial_statistics", FLOATS);
/// mean, scale, unbiased variance, partial moments, parts, channels, eps
const FINISH_STATISTICS: Kernel<(Address, Address, Address, Address, u32, u32, f32)> =
    Kernel::new("batch_norm", "batch_norm_finish_statistics", &[]);
/// scale, variance, eps, channels
const INVERSE_DEVIATION: Kernel<(Address, Address, f32, u32)> =
    Kernel::new("batch_norm", "batch_norm_inverse_deviation", &[]);
/// output, input, mean, scale, weight or null, its dtype, bias or null, its dtype, whether a ReLU follows, counts or null,
/// rows of a sample, rows, channels, rows per part
type ApplyArguments =
    (Address, Address, Address, Address, Address, u32, Address, u32, u32, Address, u64, u64, u32, u64);
const APPLY: Kernel<ApplyArguments> = Kernel::new("batch_norm", "batch_norm_apply", FLOATS);
/// partial sums, input, output gradient, mean, scale, weight or null, its dtype, bias or null, its dtype, whether a ReLU
/// follows, counts or null, rows of a sample, rows, channels, rows per part
type PartialSumsArguments =
    (Address, Address, Address, Address, Address, Address, u32, Address, u32, u32, Address, u64, u64, u32, u64);
const PARTIAL_SUMS: Kernel<PartialSumsArguments> = Kernel::new("batch_norm", "batch_norm_partial_sums", FLOATS);
/// weight gradient, bias gradient, partial sums, scale, parts, channels
const FINISH_SUMS: Kernel<(Address, Address, Address, Address, u32, u32)> =
    Kernel::new("batch_norm", "batch_norm_finish_sums", &[]);
/// input gradient, input, output gradient, mean, scale, weight or null, its dtype, bias or null, its dtype, whether a ReLU
/// follows, weight and bias gradients or null, counts or null, rows of a sample, rows, channels, rows per part
type InputGradientArguments = (
    Address,
    Address,
    Address,
    Address,
    Address,
    Address,
    u32,
    Address,
    u32,
    u32,
    Address,
    Address,
    Address,
    u64,
    u64,
    u32,
    u64,
);
const INPUT_GRADIENT: Kernel<InputGradientArguments> = Kernel::new("batch_norm", "batch_norm_input_gradient", FLOATS);
/// mean, variance, old mean, old variance, the batch's mean, the batch's variance, momentum, channels
type UpdateArguments = (Address, Address, Address, Address, Address, Address, f32, u32);
const UPDATE: Kernel<UpdateArguments> = Kernel::new("batch_norm", "batch_norm_update", FLOATS);

pub(crate) static KERNELS: &[Signature] = &[
    PARTIAL_STATISTICS.signature(),
    FINISH_STATISTICS.signature(),
    INVERSE_DEVIATION.signature(),
    APPLY.signature(),
    PARTIAL_SUMS.signature(),
    FINISH_SUMS.signature(),
    INPUT_GRADIENT.signature(),
    UPDATE.signature(),
];

// As in the kernel file.
const THREADS: usize = 256;
const WIDE: usize = 4;
const CHUNK: usize = 8;
const COLUMNS: usize = 32;
const SLICES: usize = 8;
/// Values of a partial result: count, mean, deviations; or two sums.
const MOMENTS: usize = 3;
const SUMS: usize = 2;
/// Blocks of a reduction, about. It does not depend on the device, so neither do the results.
const REDUCING_BLOCKS: usize = 512;
/// Blocks of the other kernels along the rows, at most.
const MOST_PARTS: usize = 16_384;

/// Rows of a part in a reduction where there is a model axis: a constant, so that a model's sums are cut the same way
/// whatever the others are.
const MODEL_PART: usize = 512;

/// Rows of channels, of each model where there are several.
#[derive(Clone, Copy)]
struct Rows<'a> {
    count: usize,
    channels: usize,
    /// Whether there is a model axis.
    each: bool,
    models: usize,
    /// Of samples, where some are padding.
    counts: Option<&'a Tensor>,
    /// Rows of a sample.
    positions: usize,
}

/// Blocks over tiles of channels and parts of the rows.
struct Tiles {
    geometry: Geometry,
    parts: usize,
    rows_per_part: usize,
}

impl<'a> Rows<'a> {
    fn of(input: &Tensor, layer: Layer<'a>) -> Result<Self> {
        let channels = input.shape().last().copied().unwrap_or(1);
        let rows = input.elements() / channels.max(1);
        let Some(counts) = layer.counts else {
            return Ok(Rows { count: rows, channels, each: false, models: 1, counts: None, positions: 1 });
        };
        let (models, batch) = (counts.models(), input.shape()[1]);
        Ok(Rows {
            count: rows / models,
            channels,
            each: true,
            models,
            counts: counts.tensor(super::OP)?,
            positions: rows / models / batch.max(1),
        })
    }

    fn tiles(self, most_parts: impl Fn(usize) -> usize) -> Tiles {
        let (across, slices, tiles) = self.across();
        let parts = self.count.div_ceil(slices * CHUNK).min(most_parts(tiles)).max(1);
        self.cut([across, slices, tiles], self.count.div_ceil(parts))
    }

    /// Threads across the channels, slices of the rows, and tiles.
    fn across(self) -> (usize, usize, usize) {
        let vectors = self.channels / if self.channels.is_multiple_of(WIDE) { WIDE } else { 1 };
        let across = vectors.next_power_of_two().min(32);
        (across, THREADS / across, vectors.div_ceil(across))
    }

    fn cut(self, [across, slices, tiles]: [usize; 3], rows_per_part: usize) -> Tiles {
        let parts = if rows_per_part == 0 { 0 } else { self.count.div_ceil(rows_per_part) };
        let grid = [tiles as u32, parts as u32, self.models as u32];
        let geometry = Geometry { grid, block: [across as u32, slices as u32, 1], shared: 0 };
        Tiles { geometry, parts, rows_per_part }
    }

    fn reducing(self) -> Tiles {
        if !self.each {
            return self.tiles(|tiles| (REDUCING_BLOCKS / tiles).max(1));
        }
        let (across, slices, tiles) = self.across();
        self.cut([across, slices, tiles], MODEL_PART)
    }

    fn elementwise(self) -> Tiles {
        self.tiles(|_| MOST_PARTS)
    }

    /// One launch that ends a reduction over parts.
    fn finishing(self) -> Geometry {
        let blocks = self.channels.div_ceil(COLUMNS) as u32;
        Geometry { grid: [blocks, 1, self.models as u32], block: [COLUMNS as u32, SLICES as u32, 1], shared: 0 }
    }

    /// The counts and the rows of a sample, as kernels take them.
    fn samples(self) -> Result<(Address, u64)> {
        Ok((self.counts.map_or(Ok(Address::NULL), Tensor::address)?, self.positions as u64))
    }

    /// A vector for each model.
    fn vector(self, gpu: &'static Gpu) -> Result<Tensor> {
        let elements = self.models * self.channels;
        let vector = Tensor::empty_on(gpu, [elements], DType::F32)?;
        Ok(if self.each { vector.share([self.models, self.channels].into()) } else { vector })
    }
}

/// An optional vector as kernels take it: its address and the number of its dtype.
fn parameter(vector: Option<&Tensor>) -> Result<(Address, u32)> {
    let Some(vector) = vector else { return Ok((Address::NULL, 0)) };
    let dtype = match vector.dtype() {
        DType::F32 => 0,
        DType::Bf16 => 1,
        DType::F16 => 2,
        got => return Err(Error::DType { op: super::OP, got, expected: "f32, bf16 or f16".into() }),
    };
    Ok((vector.address()?, dtype))
}

/// The mean, 1 / √(biased variance + eps) and the unbiased variance of each channel, in `f32`.
pub(super) fn statistics(gpu: &'static Gpu, input: &Tensor, layer: Layer<'_>, eps: f64) -> Result<[Tensor; 3]> {
    let rows = Rows::of(input, layer)?;
    let channels = rows.channels;
    let Tiles { geometry, parts, rows_per_part } = rows.reducing();
    let partials = Tensor::empty_on(gpu, [rows.models, parts, channels, MOMENTS], DType::F32)?;
    let (counts, positions) = rows.samples()?;
    let (to, from) = (partials.address()?, input.address()?);
    let arguments = (to, from, counts, positions, rows.count as u64, channels as u32, rows_per_part as u64);
    PARTIAL_STATISTICS.launch(gpu, input.dtype().name(), geometry, arguments)?;
    let (mean, scale, unbiased) = (rows.vector(gpu)?, rows.vector(gpu)?, rows.vector(gpu)?);
    let addresses = (mean.address()?, scale.address()?, unbiased.address()?, to);
    let arguments = (addresses.0, addresses.1, addresses.2, addresses.3, parts as u32, channels as u32, eps as f32);
    FINISH_STATISTICS.launch(gpu, "", rows.finishing(), arguments)?;
    Ok([mean, scale, unbiased])
}

/// 1 / √(variance + eps), for `f32`.
pub(super) fn inverse_deviation(gpu: &'static Gpu, variance: &Tensor, eps: f64) -> Result<Tensor> {
    let channels = variance.elements();
    let scale = Tensor::empty_on(gpu, variance.shape(), DType::F32)?;
    let arguments = (scale.address()?, variance.address()?, eps as f32, channels as u32);
    INVERSE_DEVIATION.launch(gpu, "", Geometry::for_items(channels, THREADS as u32), arguments)?;
    Ok(scale)
}

/// (x − mean) · scale · weight + bias, and its ReLU where there is one.
pub(super) fn apply(
    gpu: &'static Gpu,
    input: &Tensor,
    [mean, scale]: [&Tensor; 2],
    layer: Layer<'_>,
) -> Result<Tensor> {
    let rows = Rows::of(input, layer)?;
    let tiles = rows.elementwise();
    let output = Tensor::empty_on(gpu, input.shape(), input.dtype())?;
    let ((weight, weight_dtype), (bias, bias_dtype)) = (parameter(layer.weight)?, parameter(layer.bias)?);
    let (counts, positions) = rows.samples()?;
    let arguments = (
        output.address()?,
        input.address()?,
        mean.address()?,
        scale.address()?,
        weight,
        weight_dtype,
        bias,
        bias_dtype,
        u32::from(layer.relu),
        counts,
        positions,
        rows.count as u64,
        rows.channels as u32,
        tiles.rows_per_part as u64,
    );
    APPLY.launch(gpu, input.dtype().name(), tiles.geometry, arguments)?;
    Ok(output)
}

/// Σ dy x̂ and Σ dy, in `f32`.
pub(super) fn parameter_gradients(
    gpu: &'static Gpu,
    input: &Tensor,
    grad: &Tensor,
    [mean, scale]: [&Tensor; 2],
    layer: Layer<'_>,
) -> Result<[Tensor; 2]> {
    let rows = Rows::of(input, layer)?;
    let channels = rows.channels;
    let Tiles { geometry, parts, rows_per_part } = rows.reducing();
    let partials = Tensor::empty_on(gpu, [rows.models, parts, channels, SUMS], DType::F32)?;
    let ((weight, weight_dtype), (bias, bias_dtype)) = (parameter(layer.weight)?, parameter(layer.bias)?);
    let (counts, positions) = rows.samples()?;
    let arguments = (
        partials.address()?,
        input.address()?,
        grad.address()?,
        mean.address()?,
        scale.address()?,
        weight,
        weight_dtype,
        bias,
        bias_dtype,
        u32::from(layer.relu),
        counts,
        positions,
        rows.count as u64,
        channels as u32,
        rows_per_part as u64,
    );
    PARTIAL_SUMS.launch(gpu, input.dtype().name(), geometry, arguments)?;
    let (dw, db) = (rows.vector(gpu)?, rows.vector(gpu)?);
    let sums = partials.address()?;
    let arguments = (dw.address()?, db.address()?, sums, scale.address()?, parts as u32, channels as u32);
    FINISH_SUMS.launch(gpu, "", rows.finishing(), arguments)?;
    Ok([dw, db])
}

/// scale · weight · (dy − ⟨dy⟩ − x̂ ⟨dy x̂⟩), with `sums` = (Σ dy x̂, Σ dy); without them scale · weight · dy.
pub(super) fn input_gradient(
    gpu: &'static Gpu,
    input: &Tensor,
    grad: &Tensor,
    [mean, scale]: [&Tensor; 2],
    layer: Layer<'_>,
    sums: Option<[&Tensor; 2]>,
) -> Result<Tensor> {
    let rows = Rows::of(input, layer)?;
    let tiles = rows.elementwise();
    let gradient = Tensor::empty_on(gpu, input.shape(), input.dtype())?;
    let ((weight, weight_dtype), (bias, bias_dtype)) = (parameter(layer.weight)?, parameter(layer.bias)?);
    let [along, total] = match sums {
        Some([along, total]) => [along.address()?, total.address()?],
        None => [Address::NULL; 2],
    };
    let (counts, positions) = rows.samples()?;
    let arguments = (
        gradient.address()?,
        input.address()?,
        grad.address()?,
        mean.address()?,
        scale.address()?,
        weight,
        weight_dtype,
        bias,
        bias_dtype,
        u32::from(layer.relu),
        along,
        total,
        counts,
        positions,
        rows.count as u64,
        rows.channels as u32,
        tiles.rows_per_part as u64,
    );
    INPUT_GRADIENT.launch(gpu, input.dtype().name(), tiles.geometry, arguments)?;
    Ok(gradient)
}

/// See [`BatchStatistics::updated`]; one launch.
pub(super) fn updated(
    gpu: &'static Gpu,
    old: &BatchStatistics,
    batch: &BatchStatistics,
    momentum: f64,
) -> Result<BatchStatistics> {
    let (dtype, channels) = (old.mean.dtype(), old.mean.elements());
    let vector = || Tensor::empty_on(gpu, old.mean.shape(), dtype);
    let updated = BatchStatistics { mean: vector()?, variance: vector()? };
    let [mean, variance] = [batch.mean.cast_values(DType::F32)?, batch.variance.cast_values(DType::F32)?];
    let arguments = (
        updated.mean.address()?,
        updated.variance.address()?,
        old.mean.address()?,
        old.variance.address()?,
        mean.address()?,
        variance.address()?,
        momentum as f32,
        channels as u32,
    );
    UPDATE.launch(gpu, dtype.name(), Geometry::for_items(channels, THREADS as u32), arguments)?;
    Ok(updated)
}
