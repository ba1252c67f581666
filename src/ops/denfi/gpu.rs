//! Blocks of cells by channels forward; backward a sort of the taps, and a kernel for each gradient.

use super::cpu::Problem;
use super::points::TAPS;
use crate::driver::seam::Address;
use crate::gpu::{FLOATS, Geometry, Gpu, Kernel, Signature};
use crate::ops::gather::gpu::Readers;
use crate::{DType, Result, Tensor};

/// As `BoundaryMap` in kernels/common/boundary.cuh; the last three are the bits of `f32`.
type Description = [u32; 10];

/// output, input, regression map, weight, description
const FORWARD: Kernel<(Address, Address, Address, Address, Description)> =
    Kernel::new("denfi_conv", "denfi_conv_forward", FLOATS);
/// keys, fractional parts, regression map, description
const KEYS: Kernel<(Address, Address, Address, Description)> =
    Kernel::new("denfi_conv_backward", "denfi_conv_keys", FLOATS);
/// gradient of the input, of the output, weight, fractional parts, readers, starts, description
const INPUT: Kernel<(Address, Address, Address, Address, Address, Address, Description)> =
    Kernel::new("denfi_conv_backward", "denfi_conv_input_gradient", FLOATS);
/// blocks' sums, input, regression map, gradient of the output, cells of a block, description
const WEIGHT: Kernel<(Address, Address, Address, Address, u64, Description)> =
    Kernel::new("denfi_conv_backward", "denfi_conv_weight_partials", FLOATS);
/// gradient of the weight, blocks' sums, blocks, channels
const WEIGHT_SUM: Kernel<(Address, Address, u32, u32)> =
    Kernel::new("denfi_conv_backward", "denfi_conv_weight_sum", FLOATS);
/// gradient of the regression map, input, regression map, weight, gradient of the output, description
const BOUNDARY: Kernel<(Address, Address, Address, Address, Address, Description)> =
    Kernel::new("denfi_conv_backward", "denfi_conv_boundary_gradient", FLOATS);

pub(crate) static KERNELS: &[Signature] = &[
    FORWARD.signature(),
    KEYS.signature(),
    INPUT.signature(),
    WEIGHT.signature(),
    WEIGHT_SUM.signature(),
    BOUNDARY.signature(),
];

// As in the kernel files.
const THREADS: u32 = 256;
const CELLS: usize = 32;
const CHANNELS: usize = 256;
const WEIGHT_LANES: usize = 32;
const WEIGHT_SLICES: u32 = 8;
const WEIGHT_GROUP: usize = 4;

/// The most blocks whose sums of the weight's gradient are added. Fixed, so that they do not depend on the device.
const MOST_WEIGHT_BLOCKS: usize = 256;

fn description(problem: &Problem, raw: &Tensor) -> Description {
    let options = &problem.options;
    let [rows, columns] = options.cells_per_metre();
    let bits = |value: f64| (value as f32).to_bits();
    [
        problem.batch as u32,
        problem.height as u32,
        problem.width as u32,
        problem.channels as u32,
        options.bins as u32,
        options.clamp_residual.into(),
        (raw.dtype() == DType::F32).into(),
        bits(rows),
        bits(columns),
        bits(options.scale),
    ]
}

/// Blocks of cells by blocks of channels.
fn geometry(problem: &Problem) -> Geometry {
    let cells = Geometry::blocks(problem.cells().div_ceil(CELLS), THREADS);
    Geometry { grid: [cells.grid[0], problem.channels.div_ceil(CHANNELS) as u32, 1], ..cells }
}

pub(super) fn forward(
    gpu: &'static Gpu,
    problem: &Problem,
    input: &Tensor,
    raw: &Tensor,
    weight: &Tensor,
) -> Result<Tensor> {
    let output = Tensor::empty_on(gpu, input.shape(), input.dtype())?;
    let arguments = (output.address()?, input.address()?, raw.address()?, weight.address()?, description(problem, raw));
    FORWARD.launch(gpu, input.dtype().name(), geometry(problem), arguments)?;
    Ok(output)
}

pub(super) fn input_gradient(
    gpu: &'static Gpu,
    problem: &Problem,
    raw: &Tensor,
    weight: &Tensor,
    grad: &Tensor,
) -> Result<Tensor> {
    let (dtype, map) = (grad.dtype(), description(problem, raw));
    let count = problem.cells() * TAPS;
    let neighbours = problem.batch * (problem.height + 1) * (problem.width + 1);
    Readers::expect_sortable(gpu, super::OP, count, neighbours)?;
    let keys = gpu.allocate(count * size_of::<u32>())?;
    let parts = gpu.allocate(count * size_of::<[f32; 2]>())?;
    let arguments = (keys.address(), parts.address(), raw.address()?, map);
    KEYS.launch(gpu, dtype.name(), Geometry::for_items(count, THREADS), arguments)?;
    let sorted = Readers::of_keys(gpu, keys, count, neighbours)?;
    let gradient = Tensor::empty_on(gpu, grad.shape(), dtype)?;
    let arguments = (
        gradient.address()?,
        grad.address()?,
        weight.address()?,
        parts.address(),
        sorted.readers.address(),
        sorted.starts.address(),
        map,
    );
    INPUT.launch(gpu, dtype.name(), geometry(problem), arguments)?;
    Ok(gradient)
}

pub(super) fn weight_gradient(
    gpu: &'static Gpu,
    problem: &Problem,
    input: &Tensor,
    raw: &Tensor,
    grad: &Tensor,
) -> Result<Tensor> {
    let (dtype, channels) = (grad.dtype(), problem.channels);
    let tiles = problem.cells().div_ceil(CELLS);
    let tiles_per_block = tiles.div_ceil(MOST_WEIGHT_BLOCKS).max(1);
    let blocks = tiles.div_ceil(tiles_per_block);
    let partials = Tensor::empty_on(gpu, [blocks, TAPS, channels], DType::F32)?;
    let group = if channels.is_multiple_of(WEIGHT_GROUP) { WEIGHT_GROUP } else { 1 };
    let geometry = Geometry {
        grid: [blocks as u32, channels.div_ceil(group * WEIGHT_LANES) as u32, 1],
        block: [WEIGHT_LANES as u32, WEIGHT_SLICES, 1],
        shared: 0,
    };
    let cells_per_block = (tiles_per_block * CELLS) as u64;
    let arguments = (
        partials.address()?,
        input.address()?,
        raw.address()?,
        grad.address()?,
        cells_per_block,
        description(problem, raw),
    );
    WEIGHT.launch(gpu, dtype.name(), geometry, arguments)?;
    let gradient = Tensor::empty_on(gpu, [channels, 1, 3, 3], dtype)?;
    let arguments = (gradient.address()?, partials.address()?, blocks as u32, channels as u32);
    WEIGHT_SUM.launch(gpu, dtype.name(), Geometry::for_items(channels * TAPS, THREADS), arguments)?;
    Ok(gradient)
}

/// The gradient of the regression map, in its dtype.
pub(super) fn boundary_gradient(
    gpu: &'static Gpu,
    problem: &Problem,
    input: &Tensor,
    raw: &Tensor,
    weight: &Tensor,
    grad: &Tensor,
) -> Result<Tensor> {
    let gradient = Tensor::empty_on(gpu, raw.shape(), raw.dtype())?;
    let arguments = (
        gradient.address()?,
        input.address()?,
        raw.address()?,
        weight.address()?,
        grad.address()?,
        description(problem, raw),
    );
    BOUNDARY.launch(gpu, grad.dtype().name(), Geometry::for_items(problem.cells() * 32, THREADS), arguments)?;
    Ok(gradient)
}
