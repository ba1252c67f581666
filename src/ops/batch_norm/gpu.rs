//! Tiles of channels over parts of the rows.

use super::BatchStatistics;
use crate::driver::seam::Address;
use crate::gpu::{FLOATS, Geometry, Gpu, Kernel, Signature};
use crate::{DType, Error, Result, Tensor};

/// partial moments, input, rows, channels, rows per part
const PARTIAL_STATISTICS: Kernel<(Address, Address, u64, u32, u64)> =
    Kernel::new("batch_norm", "batch_norm_partial_statistics", FLOATS);
/// mean, scale, unbiased variance, partial moments, parts, channels, eps
const FINISH_STATISTICS: Kernel<(Address, Address, Address, Address, u32, u32, f32)> =
    Kernel::new("batch_norm", "batch_norm_finish_statistics", &[]);
/// scale, variance, eps, channels
const INVERSE_DEVIATION: Kernel<(Address, Address, f32, u32)> =
    Kernel::new("batch_norm", "batch_norm_inverse_deviation", &[]);
/// output, input, mean, scale, weight or null, its dtype, bias or null, its dtype, rows, channels, rows per part
type ApplyArguments = (Address, Address, Address, Address, Address, u32, Address, u32, u64, u32, u64);
const APPLY: Kernel<ApplyArguments> = Kernel::new("batch_norm", "batch_norm_apply", FLOATS);
/// partial sums, input, output gradient, mean, rows, channels, rows per part
const PARTIAL_SUMS: Kernel<(Address, Address, Address, Address, u64, u32, u64)> =
    Kernel::new("batch_norm", "batch_norm_partial_sums", FLOATS);
/// weight gradient, bias gradient, partial sums, scale, parts, channels
const FINISH_SUMS: Kernel<(Address, Address, Address, Address, u32, u32)> =
    Kernel::new("batch_norm", "batch_norm_finish_sums", &[]);
/// input gradient, input, output gradient, mean, scale, weight or null, its dtype, weight and bias gradients or null,
/// rows, channels, rows per part
type InputGradientArguments =
    (Address, Address, Address, Address, Address, Address, u32, Address, Address, u64, u32, u64);
const INPUT_GRADIENT: Kernel<InputGradientArguments> = Kernel::new("batch_norm", "batch_norm_input_gradient", FLOATS);
/// mean, variance, old mean, old variance, the batch's mean, the batch's variance, momentum, channels
const UPDATE: Kernel<(Address, Address, Address, Address, Address, Address, f32, u32)> =
    Kernel::new("batch_norm", "batch_norm_update", FLOATS);

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

/// Rows of channels.
#[derive(Clone, Copy)]
struct Rows {
    count: usize,
    channels: usize,
}

/// Blocks over tiles of channels and parts of the rows.
struct Tiles {
    geometry: Geometry,
    parts: usize,
    rows_per_part: usize,
}

impl Rows {
    fn of(input: &Tensor, channels: usize) -> Self {
        Rows { count: input.elements() / channels, channels }
    }

    fn tiles(self, most_parts: impl Fn(usize) -> usize) -> Tiles {
        let vectors = self.channels / if self.channels.is_multiple_of(WIDE) { WIDE } else { 1 };
        let across = vectors.next_power_of_two().min(32);
        let slices = THREADS / across;
        let tiles = vectors.div_ceil(across);
        let parts = self.count.div_ceil(slices * CHUNK).min(most_parts(tiles)).max(1);
        let rows_per_part = self.count.div_ceil(parts);
        let parts = if rows_per_part == 0 { 0 } else { self.count.div_ceil(rows_per_part) };
        let geometry =
            Geometry { grid: [tiles as u32, parts as u32, 1], block: [across as u32, slices as u32, 1], shared: 0 };
        Tiles { geometry, parts, rows_per_part }
    }

    fn reducing(self) -> Tiles {
        self.tiles(|tiles| (REDUCING_BLOCKS / tiles).max(1))
    }

    fn elementwise(self) -> Tiles {
        self.tiles(|_| MOST_PARTS)
    }

    /// One launch that ends a reduction over parts.
    fn finishing(self) -> Geometry {
        let blocks = self.channels.div_ceil(COLUMNS) as u32;
        Geometry { grid: [blocks, 1, 1], block: [COLUMNS as u32, SLICES as u32, 1], shared: 0 }
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
pub(super) fn statistics(gpu: &'static Gpu, input: &Tensor, channels: usize, eps: f64) -> Result<[Tensor; 3]> {
    let rows = Rows::of(input, channels);
    let Tiles { geometry, parts, rows_per_part } = rows.reducing();
    let partials = Tensor::empty_on(gpu, [parts, channels, MOMENTS], DType::F32)?;
    let arguments = (partials.address()?, input.address()?, rows.count as u64, channels as u32, rows_per_part as u64);
    PARTIAL_STATISTICS.launch(gpu, input.dtype().name(), geometry, arguments)?;
    let vector = || Tensor::empty_on(gpu, [channels], DType::F32);
    let (mean, scale, unbiased) = (vector()?, vector()?, vector()?);
    let addresses = (mean.address()?, scale.address()?, unbiased.address()?, partials.address()?);
    let arguments = (addresses.0, addresses.1, addresses.2, addresses.3, parts as u32, channels as u32, eps as f32);
    FINISH_STATISTICS.launch(gpu, "", rows.finishing(), arguments)?;
    Ok([mean, scale, unbiased])
}

/// 1 / √(variance + eps), for `f32`.
pub(super) fn inverse_deviation(gpu: &'static Gpu, variance: &Tensor, eps: f64) -> Result<Tensor> {
    let channels = variance.elements();
    let scale = Tensor::empty_on(gpu, [channels], DType::F32)?;
    let arguments = (scale.address()?, variance.address()?, eps as f32, channels as u32);
    INVERSE_DEVIATION.launch(gpu, "", Geometry::for_items(channels, THREADS as u32), arguments)?;
    Ok(scale)
}

/// (x − mean) · scale · weight + bias
pub(super) fn apply(
    gpu: &'static Gpu,
    input: &Tensor,
    [mean, scale]: [&Tensor; 2],
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let rows = Rows::of(input, mean.elements());
    let tiles = rows.elementwise();
    let output = Tensor::empty_on(gpu, input.shape(), input.dtype())?;
    let ((weight, weight_dtype), (bias, bias_dtype)) = (parameter(weight)?, parameter(bias)?);
    let arguments = (
        output.address()?,
        input.address()?,
        mean.address()?,
        scale.address()?,
        weight,
        weight_dtype,
        bias,
        bias_dtype,
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
) -> Result<[Tensor; 2]> {
    let channels = mean.elements();
    let rows = Rows::of(input, channels);
    let Tiles { geometry, parts, rows_per_part } = rows.reducing();
    let partials = Tensor::empty_on(gpu, [parts, channels, SUMS], DType::F32)?;
    let (to, x, dy) = (partials.address()?, input.address()?, grad.address()?);
    let arguments = (to, x, dy, mean.address()?, rows.count as u64, channels as u32, rows_per_part as u64);
    PARTIAL_SUMS.launch(gpu, input.dtype().name(), geometry, arguments)?;
    let vector = || Tensor::empty_on(gpu, [channels], DType::F32);
    let (dw, db) = (vector()?, vector()?);
    let arguments = (dw.address()?, db.address()?, to, scale.address()?, parts as u32, channels as u32);
    FINISH_SUMS.launch(gpu, "", rows.finishing(), arguments)?;
    Ok([dw, db])
}

/// scale · weight · (dy − ⟨dy⟩ − x̂ ⟨dy x̂⟩), with `sums` = (Σ dy x̂, Σ dy); without them scale · weight · dy.
pub(super) fn input_gradient(
    gpu: &'static Gpu,
    input: &Tensor,
    grad: &Tensor,
    [mean, scale]: [&Tensor; 2],
    weight: Option<&Tensor>,
    sums: Option<[&Tensor; 2]>,
) -> Result<Tensor> {
    let rows = Rows::of(input, mean.elements());
    let tiles = rows.elementwise();
    let gradient = Tensor::empty_on(gpu, input.shape(), input.dtype())?;
    let (weight, weight_dtype) = parameter(weight)?;
    let [along, total] = match sums {
        Some([along, total]) => [along.address()?, total.address()?],
        None => [Address::NULL; 2],
    };
    let arguments = (
        gradient.address()?,
        input.address()?,
        grad.address()?,
        mean.address()?,
        scale.address()?,
        weight,
        weight_dtype,
        along,
        total,
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
