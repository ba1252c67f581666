//! One launch for all maps, forward and backward, and for the fused form.

use super::Problem;
use crate::driver::seam::Address;
use crate::gpu::{FLOATS, Geometry, Gpu, Kernel, Signature};
use crate::{DType, Result, Tensor};

use super::MOST_MAPS as MOST;

type Addresses = [Address; MOST];
type Numbers = [u32; MOST];
/// features or their gradient, batch, cells, features of an image, maps, heights, widths, channels, first features
type Grouped = (Address, u32, u32, u32, Addresses, Numbers, Numbers, Numbers, Numbers);
const FORWARD: Kernel<Grouped> = Kernel::new("pooled_features", "pooled_features_forward", FLOATS);
const BACKWARD: Kernel<Grouped> = Kernel::new("pooled_features", "pooled_features_backward", FLOATS);
/// output, features, input, residual, batch, cells, (height, width, channels)
const FUSED: Kernel<(Address, Address, Address, Address, u32, u32, [u32; 3])> =
    Kernel::new("pooled_features", "add_relu_gap_forward", FLOATS);
/// gradient, that of the features or null, that of the output or null, output, batch, cells, (height, width, channels)
const FUSED_BACKWARD: Kernel<(Address, Address, Address, Address, u32, u32, [u32; 3])> =
    Kernel::new("pooled_features", "add_relu_gap_backward", FLOATS);

pub(crate) static KERNELS: &[Signature] =
    &[FORWARD.signature(), BACKWARD.signature(), FUSED.signature(), FUSED_BACKWARD.signature()];

/// As in the kernel file.
const THREADS: u32 = 256;

/// Values that a thread loads at once.
fn group(channels: usize, dtype: DType) -> usize {
    let widest = 16 / dtype.size();
    if channels.is_multiple_of(widest) { widest } else { 1 }
}

/// A block for each image, cell and tile of channels.
fn forward_blocks(problem: &Problem, [_, _, channels]: [usize; 3], dtype: DType) -> usize {
    let group = group(channels, dtype);
    let tile = group * channels.div_ceil(group).next_power_of_two().min(32);
    problem.batch * problem.cells * problem.cells * channels.div_ceil(tile)
}

/// A thread for each group of channels of a position.
fn backward_items(problem: &Problem, [height, width, channels]: [usize; 3], dtype: DType) -> usize {
    problem.batch * height * width * channels / group(channels, dtype)
}

fn arguments(
    problem: &Problem,
    features: Address,
    addresses: impl Iterator<Item = Result<Address>>,
) -> Result<Grouped> {
    let mut maps = [Address::NULL; MOST];
    for (map, address) in maps.iter_mut().zip(addresses) {
        *map = address?;
    }
    let (mut extents, mut first) = ([[0; MOST]; 3], [0; MOST]);
    for (number, shape) in problem.maps.iter().enumerate() {
        (0..3).for_each(|axis| extents[axis][number] = shape[axis] as u32);
        first[number] = problem.first(number) as u32;
    }
    let [heights, widths, channels] = extents;
    let (batch, cells, pitch) = (problem.batch as u32, problem.cells as u32, problem.features() as u32);
    Ok((features, batch, cells, pitch, maps, heights, widths, channels, first))
}

fn by_map(geometry: Geometry, problem: &Problem) -> Geometry {
    Geometry { grid: [geometry.grid[0], problem.maps.len() as u32, 1], ..geometry }
}

pub(super) fn forward(gpu: &'static Gpu, problem: &Problem, maps: &[&Tensor]) -> Result<Tensor> {
    let dtype = maps[0].dtype();
    let features = Tensor::empty_on(gpu, [problem.batch, problem.features()], DType::F32)?;
    let blocks = problem.maps.iter().map(|&shape| forward_blocks(problem, shape, dtype)).max().unwrap_or(0);
    let geometry = by_map(Geometry::blocks(blocks, THREADS), problem);
    let arguments = arguments(problem, features.address()?, maps.iter().map(|map| map.address()))?;
    FORWARD.launch(gpu, dtype.name(), geometry, arguments)?;
    Ok(features)
}

pub(super) fn backward(gpu: &'static Gpu, problem: &Problem, dtype: DType, grad: &Tensor) -> Result<Vec<Tensor>> {
    let gradients = problem.shapes().map(|shape| Tensor::empty_on(gpu, shape, dtype)).collect::<Result<Vec<_>>>()?;
    let items = problem.maps.iter().map(|&shape| backward_items(problem, shape, dtype)).max().unwrap_or(0);
    let geometry = by_map(Geometry::for_items(items, THREADS), problem);
    let arguments = arguments(problem, grad.address()?, gradients.iter().map(Tensor::address))?;
    BACKWARD.launch(gpu, dtype.name(), geometry, arguments)?;
    Ok(gradients)
}

/// relu(input + residual), and its features.
pub(super) fn add_relu_gap(
    gpu: &'static Gpu,
    problem: &Problem,
    input: &Tensor,
    residual: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let (dtype, shape) = (input.dtype(), problem.maps[0]);
    let output = Tensor::empty_on(gpu, input.shape(), dtype)?;
    let features = Tensor::empty_on(gpu, [problem.batch, problem.features()], DType::F32)?;
    let arguments = (
        output.address()?,
        features.address()?,
        input.address()?,
        residual.address()?,
        problem.batch as u32,
        problem.cells as u32,
        shape.map(|extent| extent as u32),
    );
    let geometry = Geometry::blocks(forward_blocks(problem, shape, dtype), THREADS);
    FUSED.launch(gpu, dtype.name(), geometry, arguments)?;
    Ok((output, features))
}

/// The gradient of the sum, from that of the output or that of the features.
pub(super) fn add_relu_gap_backward(
    gpu: &'static Gpu,
    problem: &Problem,
    output: &Tensor,
    grad: Option<&Tensor>,
    features: Option<&Tensor>,
) -> Result<Tensor> {
    let (dtype, shape) = (output.dtype(), problem.maps[0]);
    let gradient = Tensor::empty_on(gpu, output.shape(), dtype)?;
    let address = |tensor: Option<&Tensor>| tensor.map_or(Ok(Address::NULL), Tensor::address);
    let arguments = (
        gradient.address()?,
        address(features)?,
        address(grad)?,
        output.address()?,
        problem.batch as u32,
        problem.cells as u32,
        shape.map(|extent| extent as u32),
    );
    let geometry = Geometry::for_items(backward_items(problem, shape, dtype), THREADS);
    FUSED_BACKWARD.launch(gpu, dtype.name(), geometry, arguments)?;
    Ok(gradient)
}
