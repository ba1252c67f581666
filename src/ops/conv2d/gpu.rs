//! Convolutions as matrix products that read their patches where they lie. Pointwise ones are products as they are, in
//! the room of `matmul`; depthwise ones are in [`super::depthwise_gpu`].

use super::{Geometry as Convolution, depthwise_gpu};
use crate::driver::seam::{Address, Epilogue};
use crate::gpu::{FLOATS, Geometry, Gpu, Kernel, Signature};
use crate::ops::matmul::Transposed;
use crate::ops::matmul::gpu::Product;
use crate::tensor::Shape;
use crate::{DType, Error, Result, Tensor};

/// Extents of a convolution as kernels take them: `Convolution` of kernels/common/convolution.cuh.
pub(super) type Extents = [u32; 16];

/// output, source, packed weight, bias or null, extents of one model, whether it is the input gradient
const GATHER: Kernel<(Address, Address, Address, Address, Extents, u32)> =
    Kernel::new("conv2d", "conv2d_gather", &["f32", "bf16", "bf16_narrow", "f16", "f16_narrow"]);
/// partial sums, input, output gradient, extents of one model, positions of a part
const WEIGHT: Kernel<(Address, Address, Address, Extents, u32)> = Kernel::new("conv2d_weight", "conv2d_weight", FLOATS);
/// Four extents, or strides.
type Axes = [u32; 4];
/// output, input, extents, the input's strides, how many elements along the last axis are there
const PACK: Kernel<(Address, Address, Axes, Axes, u32)> = Kernel::new("conv2d_weight", "conv2d_pack", FLOATS);
/// output, partial sums, extents, their strides, parts, elements of a part
const SUM: Kernel<(Address, Address, Axes, Axes, u32, u64)> = Kernel::new("conv2d_weight", "conv2d_sum", FLOATS);
/// output, input, rows, channels of a row
const PAD: Kernel<(Address, Address, u64, u32)> = Kernel::new("conv2d_weight", "conv2d_pad", FLOATS);

pub(crate) static KERNELS: &[Signature] =
    &[GATHER.signature(), WEIGHT.signature(), PACK.signature(), SUM.signature(), PAD.signature()];

/// A block's tile of a product, as in the kernel files.
#[derive(Clone, Copy)]
struct Tile {
    rows: usize,
    columns: usize,
    /// Terms of a step.
    depth: usize,
    threads: u32,
    /// Elements of a copy: channels of a group are padded to a multiple of it.
    run: usize,
    /// Bytes of dynamic shared memory.
    shared: usize,
}

/// `GATHER` in f32.
const SIMT_TILE: Tile =
    Tile { rows: 128, columns: 64, depth: 16, threads: 128, run: 1, shared: 128 * 16 + 3 * (132 + 68) * 16 * 4 };
/// `GATHER` on tensor cores, for many blocks.
const WIDE_TILE: Tile =
    Tile { rows: 128, columns: 128, depth: 32, threads: 256, run: 8, shared: 128 * 16 + 3 * (128 + 128) * 32 * 2 };
/// `GATHER` on tensor cores, for few columns or few blocks.
const NARROW_TILE: Tile =
    Tile { rows: 128, columns: 64, depth: 32, threads: 128, run: 8, shared: 128 * 16 + 3 * (128 + 64) * 32 * 2 };

/// `WEIGHT`'s tile.
fn weight_tile(dtype: DType) -> Tile {
    match dtype {
        DType::F32 => Tile { rows: 64, columns: 64, depth: 16, threads: 128, run: 4, shared: 0 },
        _ => Tile { rows: 64, columns: 128, depth: 32, threads: 128, run: 8, shared: 0 },
    }
}

/// One of the two passes that gather.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Pass {
    Forward,
    InputGradient,
}

/// The kernels count positions, windows and weights in 31 bits; elements of maps in 64.
pub(super) fn extents(g: &Convolution) -> Result<Extents> {
    const MOST: usize = 1 << 30;
    let options = g.options;
    let padded = [0, 1].map(|axis| g.input[axis].saturating_add(options.padding[axis].saturating_mul(2)));
    // A stride beyond the padded input has one window, as any other such stride.
    let stride = [0, 1].map(|axis| options.stride[axis].min(padded[axis].saturating_add(1)));
    // A single tap has no distance to another.
    let dilation = [0, 1].map(|axis| if g.kernel[axis] == 1 { 1 } else { options.dilation[axis] });
    let counts = [
        g.batch.saturating_mul(g.input[0]).saturating_mul(g.input[1]),
        g.batch.saturating_mul(g.output[0]).saturating_mul(g.output[1]),
        // Padded to whole copies, channels of a group are at most 8 times as many.
        g.weight_shape().elements().saturating_mul(if g.group_inputs().min(g.group_outputs()) < 8 { 8 } else { 2 }),
        padded[0].saturating_add(stride[0]),
        padded[1].saturating_add(stride[1]),
        g.in_channels.max(g.out_channels),
    ];
    if counts.iter().any(|&count| count > MOST) {
        let message = format!(
            "input {}, weight {}, output {}: more than 2^30 positions or weights are not supported on a GPU",
            g.input_shape(),
            g.weight_shape(),
            g.output_shape()
        );
        return Err(Error::shape("conv2d", message));
    }
    let (input, output, kernel, padding) = (g.input, g.output, g.kernel, options.padding);
    let extents = [
        g.batch,
        input[0],
        input[1],
        output[0],
        output[1],
        g.in_channels,
        g.out_channels,
        kernel[0],
        kernel[1],
        stride[0],
        stride[1],
        padding[0],
        padding[1],
        dilation[0],
        dilation[1],
        options.groups,
    ];
    Ok(extents.map(|extent| extent as u32))
}

/// The output or the input gradient. With `models`, all tensors have them as their first axis, `g` is the convolution of
/// one, and nothing but `g` decides how it is computed: neither the number of models nor a library.
pub(super) fn gather(
    gpu: &'static Gpu,
    g: &Convolution,
    pass: Pass,
    [source, weight]: [&Tensor; 2],
    bias: Option<&Tensor>,
    models: Option<usize>,
) -> Result<Tensor> {
    if g.is_depthwise() && models.is_none() {
        return depthwise_gpu::gather(gpu, g, pass, [source, weight], bias);
    }
    // With a bias, the room of `matmul` has products with the transpose of the right operand alone.
    if g.is_pointwise() && (bias.is_none() || pass == Pass::Forward) && models.is_none() {
        return pointwise_gather(gpu, g, pass, [source, weight], bias);
    }
    let (dtype, groups) = (source.dtype(), g.options.groups);
    let (inputs, outputs, taps) = (g.group_inputs(), g.group_outputs(), g.taps());
    let (shape, columns, channels) = match pass {
        Pass::Forward => (g.output_shape(), outputs, inputs),
        Pass::InputGradient => (g.input_shape(), inputs, outputs),
    };
    let output = Tensor::empty_on(gpu, with_models(shape, models), dtype)?;
    let extents = extents(g)?;
    let axis = |axis: usize| match pass {
        Pass::Forward => (1, g.output[axis]),
        // Phases, and positions of the largest.
        Pass::InputGradient => {
            let stride = extents[9 + axis] as usize;
            (stride.min(g.input[axis]), g.input[axis].div_ceil(stride))
        }
    };
    let [(phases_y, lines), (phases_x, places)] = [axis(0), axis(1)];
    let rows = g.batch * lines * places;
    let blocks = |tile: Tile| {
        let tiles = rows.div_ceil(tile.rows).saturating_mul(columns.div_ceil(tile.columns));
        tiles.saturating_mul(phases_y * phases_x).saturating_mul(groups)
    };
    let enough = 2 * gpu.properties().multiprocessors as usize;
    let (tile, instance) = match dtype {
        DType::F32 => (SIMT_TILE, dtype.name().to_owned()),
        _ if columns > NARROW_TILE.columns && (models.is_some() || blocks(WIDE_TILE) >= enough) => {
            (WIDE_TILE, dtype.name().to_owned())
        }
        _ => (NARROW_TILE, format!("{dtype}_narrow")),
    };
    let depth = channels.next_multiple_of(tile.run);
    let packed = match pass {
        Pass::Forward => {
            let strides = [outputs * inputs * taps, inputs * taps, 1, taps];
            pack(gpu, weight, [groups * models.unwrap_or(1), outputs, taps, depth], strides, channels)?
        }
        Pass::InputGradient => {
            let strides = [outputs * inputs * taps, taps, 1, inputs * taps];
            pack(gpu, weight, [groups * models.unwrap_or(1), inputs, taps, depth], strides, channels)?
        }
    };
    let source = pad(gpu, source, groups, channels, tile.run)?;
    let bias = bias.map_or(Ok(Address::NULL), Tensor::address)?;
    let arguments = (
        output.address()?,
        source.address()?,
        packed.address()?,
        bias,
        extents,
        u32::from(pass == Pass::InputGradient),
    );
    let geometry = across(grid(blocks(tile), tile.threads)?, models).with_shared(tile.shared);
    GATHER.launch(gpu, &instance, geometry, arguments)?;
    Ok(output)
}

/// The shape of one model's tensor behind the axis of the models.
fn with_models(shape: Shape, models: Option<usize>) -> Shape {
    models.map_or(shape.clone(), |models| [&[models], &shape[..]].concat().into())
}

/// A grid for one model, for all of them: they are numbered along y.
fn across(geometry: Geometry, models: Option<usize>) -> Geometry {
    let [blocks, ..] = geometry.grid;
    Geometry { grid: [blocks, models.unwrap_or(1) as u32, 1], ..geometry }
}

/// A product of matrices in `transposed` order, to `output`; the bias belongs to its columns.
fn product(
    gpu: &'static Gpu,
    output: &Tensor,
    operands: [&Tensor; 2],
    transposed: Transposed,
    extents: [usize; 3],
    bias: Option<&Tensor>,
) -> Result<()> {
    let product = Product {
        dtype: output.dtype(),
        extents,
        transposed,
        batch: &[],
        a: operands[0].address()?,
        b: operands[1].address()?,
        c: output.address()?,
        epilogue: if bias.is_some() { Epilogue::Bias } else { Epilogue::None },
        bias: bias.map_or(Ok(Address::NULL), Tensor::address)?,
        auxiliary: Address::NULL,
    };
    if product.by_library(gpu)? { Ok(()) } else { product.by_kernel(gpu) }
}

/// Every position by itself: a product of all positions.
fn pointwise_gather(
    gpu: &'static Gpu,
    g: &Convolution,
    pass: Pass,
    operands: [&Tensor; 2],
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let rows = g.batch * g.input[0] * g.input[1];
    let (shape, extents, right) = match pass {
        Pass::Forward => (g.output_shape(), [rows, g.out_channels, g.in_channels], true),
        Pass::InputGradient => (g.input_shape(), [rows, g.in_channels, g.out_channels], false),
    };
    let output = Tensor::empty_on(gpu, shape, operands[0].dtype())?;
    product(gpu, &output, operands, Transposed { left: false, right }, extents, bias)?;
    Ok(output)
}

/// One block for each tile: these kernels do not stride over a grid.
pub(super) fn grid(blocks: usize, threads: u32) -> Result<Geometry> {
    if blocks > i32::MAX as usize {
        return Err(Error::shape("conv2d", format!("{blocks} tiles are more than a GPU's grid has blocks")));
    }
    Ok(Geometry::blocks(blocks, threads))
}

/// The weight with its axes in the order of `extents`, from `strides`; zeros behind `valid` elements of the last.
pub(super) fn pack(
    gpu: &'static Gpu,
    weight: &Tensor,
    extents: [usize; 4],
    strides: [usize; 4],
    valid: usize,
) -> Result<Tensor> {
    let (mut expected, mut in_order) = (1, valid == extents[3]);
    for (&extent, &stride) in extents.iter().zip(&strides).rev() {
        in_order &= extent == 1 || stride == expected;
        expected *= extent;
    }
    if in_order {
        return Ok(weight.detach());
    }
    let packed = Tensor::empty_on(gpu, Shape::from(extents), weight.dtype())?;
    let [extents, strides] = [extents, strides].map(|values| values.map(|value| value as u32));
    let geometry = Geometry::for_items(packed.elements(), 256);
    PACK.launch(
        gpu,
        weight.dtype().name(),
        geometry,
        (packed.address()?, weight.address()?, extents, strides, valid as u32),
    )?;
    Ok(packed)
}

/// A map whose groups begin at multiples of `run` elements.
fn pad(gpu: &'static Gpu, map: &Tensor, groups: usize, channels: usize, run: usize) -> Result<Tensor> {
    if channels.is_multiple_of(run) {
        return Ok(map.detach());
    }
    let (rows, channels_padded) = (map.elements() / channels, channels.next_multiple_of(run));
    let padded = Tensor::empty_on(gpu, [rows / groups, groups, channels_padded], map.dtype())?;
    // A thread stores 16 bytes.
    let geometry = Geometry::for_items(padded.elements() * map.dtype().size() / 16, 256);
    let arguments = (padded.address()?, map.address()?, rows as u64, channels as u32);
    PAD.launch(gpu, map.dtype().name(), geometry, arguments)?;
    Ok(padded)
}

/// Into how many parts of how many positions a sum over `positions` is cut: enough for `most` parts to have work, each
/// long enough to pay for its partial sums.
pub(super) fn parts(positions: usize, most: usize, step: usize) -> (usize, usize) {
    const LEAST: usize = 256;
    let parts = (positions / LEAST).min(most).max(1);
    let part = positions.div_ceil(parts).next_multiple_of(step).max(step);
    (positions.div_ceil(part).max(1), part)
}

/// Positions of a part where there is a model axis: a constant, so that a model's sums are cut the same way whatever the
/// others are, and padding adds parts of zeros behind its own.
const MODEL_PART: usize = 4096;

/// The gradient of the weight, of every model where there are `models`.
pub(super) fn weight_gradient(
    gpu: &'static Gpu,
    g: &Convolution,
    [input, grad]: [&Tensor; 2],
    models: Option<usize>,
) -> Result<Tensor> {
    if g.is_depthwise() && models.is_none() {
        return depthwise_gpu::weight_gradient(gpu, g, input, grad);
    }
    if g.is_pointwise() && models.is_none() {
        let gradient = Tensor::empty_on(gpu, g.weight_shape(), input.dtype())?;
        let extents = [g.out_channels, g.in_channels, g.batch * g.input[0] * g.input[1]];
        product(gpu, &gradient, [grad, input], Transposed { left: true, right: false }, extents, None)?;
        return Ok(gradient);
    }
    let (dtype, groups, taps) = (input.dtype(), g.options.groups, g.taps());
    let (inputs, outputs) = (g.group_inputs(), g.group_outputs());
    let extents = extents(g)?;
    let tile = weight_tile(dtype);
    let (features, channels) = (outputs.next_multiple_of(tile.run), inputs.next_multiple_of(tile.run));
    let tiles = groups * features.div_ceil(tile.rows) * (taps * channels).div_ceil(tile.columns);
    let positions = g.batch * g.output[0] * g.output[1];
    let (parts, part) = match models {
        Some(_) => (positions.div_ceil(MODEL_PART).max(1), MODEL_PART),
        // Two waves of the four blocks that a multiprocessor holds.
        None => parts(positions, (8 * gpu.properties().multiprocessors as usize).div_ceil(tiles), tile.depth),
    };

    let (input, grad) = (pad(gpu, input, groups, inputs, tile.run)?, pad(gpu, grad, groups, outputs, tile.run)?);
    let slices = groups * models.unwrap_or(1);
    let sums = Tensor::empty_on(gpu, [parts, slices, features, taps * channels], DType::F32)?;
    let arguments = (sums.address()?, input.address()?, grad.address()?, extents, part as u32);
    let geometry = across(grid(tiles.saturating_mul(parts), tile.threads)?, models);
    WEIGHT.launch(gpu, dtype.name(), geometry, arguments)?;
    let strides = [features * taps * channels, taps * channels, 1, channels];
    let shape = with_models(g.weight_shape(), models);
    sum_parts(gpu, shape, dtype, &sums, ([slices, outputs, inputs, taps], strides))
}

/// Adds `sums` (part, …) in the order of the parts, to the weight's gradient (model and group, out, in, tap) of given
/// extents and of `shape`. The strides of a part are those of (model and group, out, tap, in).
pub(super) fn sum_parts(
    gpu: &'static Gpu,
    shape: Shape,
    dtype: DType,
    sums: &Tensor,
    (extents, [group, out, unit, tap]): ([usize; 4], [usize; 4]),
) -> Result<Tensor> {
    let gradient = Tensor::empty_on(gpu, shape, dtype)?;
    let parts = sums.shape()[0];
    let [extents, strides] = [extents, [group, out, unit, tap]].map(|values| values.map(|value| value as u32));
    let geometry = Geometry::for_items(gradient.elements(), 256);
    let part = (sums.elements() / parts) as u64;
    SUM.launch(
        gpu,
        dtype.name(),
        geometry,
        (gradient.address()?, sums.address()?, extents, strides, parts as u32, part),
    )?;
    Ok(gradient)
}
