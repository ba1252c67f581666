//! A warp for each row of the table; one launch forward, and one backward with another that adds its blocks' sums.

use super::cpu::Problem;
use crate::driver::seam::Address;
use crate::gpu::{FLOATS, Geometry, Gpu, Kernel, Signature};
use crate::tensor::Shape;
use crate::{DType, Error, Result, Tensor};

/// As `TENSORS` in the kernel file.
const TENSORS: usize = 14;
type Parameters = [Address; TENSORS];
/// As `Network` in the kernel file; the last is the bits of an `f32`.
type Description = [u32; 7];

/// table, parameters, network
const FORWARD: Kernel<(Address, Parameters, Description)> =
    Kernel::new("position_bias", "position_bias_forward", FLOATS);
/// blocks' sums, gradient of the table, parameters, network
const BACKWARD: Kernel<(Address, Address, Parameters, Description)> =
    Kernel::new("position_bias", "position_bias_backward", FLOATS);
/// gradients of the parameters, blocks' sums, blocks, network
const ADD_PARTIALS: Kernel<(Parameters, Address, u32, Description)> =
    Kernel::new("position_bias", "position_bias_add_partials", FLOATS);

pub(crate) static KERNELS: &[Signature] = &[FORWARD.signature(), BACKWARD.signature(), ADD_PARTIALS.signature()];

/// The most warps of a block: rows that it computes side by side.
const MOST_WARPS: usize = 8;
/// The most blocks. Fixed, so that sums do not depend on the device.
const MOST_BLOCKS: usize = 1024;
/// The backward pass writes as many sums of every parameter.
const MOST_BACKWARD_BLOCKS: usize = 64;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Forward,
    Backward,
}

/// How a pass is launched, and the network as its kernel sees it.
struct Plan {
    geometry: Geometry,
    description: Description,
}

impl Plan {
    /// Weights are staged in shared memory where they leave room for all warps' rows; otherwise there may be fewer
    /// warps.
    fn new(gpu: &Gpu, problem: &Problem, direction: Direction) -> Result<Self> {
        let Problem { width, heads, group, residual, eps } = *problem;
        let room = gpu.properties().shared_memory_per_block as usize / size_of::<f32>();
        let row = match direction {
            Direction::Forward => 4 * width,
            Direction::Backward => 13 * width + heads,
        };
        let weights = (2 * width + heads) * (width | 1);
        let staged = weights + MOST_WARPS * row <= room;
        let warps = if staged { MOST_WARPS } else { (room / row.max(1)).min(MOST_WARPS) };
        if warps == 0 {
            let message = format!(
                "width {width} with {heads} heads needs {} bytes of shared memory; {} has {}",
                row * size_of::<f32>(),
                gpu.device(),
                room * size_of::<f32>()
            );
            return Err(Error::argument("dynamic_position_bias", message));
        }
        let most_blocks = if direction == Direction::Forward { MOST_BLOCKS } else { MOST_BACKWARD_BLOCKS };
        let blocks = problem.rows().div_ceil(warps).min(most_blocks);
        let floats = if staged { weights } else { 0 } + warps * row;
        let [group_height, group_width] = group.map(|extent| extent as u32);
        let flags = [u32::from(residual), u32::from(staged)];
        Ok(Plan {
            geometry: Geometry::blocks(blocks, 32 * warps as u32).with_shared(floats * size_of::<f32>()),
            description: [
                width as u32,
                heads as u32,
                group_height,
                group_width,
                flags[0],
                flags[1],
                (eps as f32).to_bits(),
            ],
        })
    }
}

fn addresses<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> Result<Parameters> {
    let mut addresses = [Address::NULL; TENSORS];
    for (address, tensor) in addresses.iter_mut().zip(tensors) {
        *address = tensor.address()?;
    }
    Ok(addresses)
}

/// The table, (rows, heads).
pub(super) fn forward(gpu: &'static Gpu, problem: &Problem, parameters: &[&Tensor]) -> Result<Tensor> {
    let dtype = parameters[0].dtype();
    let plan = Plan::new(gpu, problem, Direction::Forward)?;
    let table = Tensor::empty_on(gpu, [problem.rows(), problem.heads], dtype)?;
    let arguments = (table.address()?, addresses(parameters.iter().copied())?, plan.description);
    FORWARD.launch(gpu, dtype.name(), plan.geometry, arguments)?;
    Ok(table)
}

/// The gradients of all parameters, in their order.
pub(super) fn backward(
    gpu: &'static Gpu,
    problem: &Problem,
    parameters: &[&Tensor],
    grad: &Tensor,
) -> Result<Vec<Tensor>> {
    let dtype = grad.dtype();
    let plan = Plan::new(gpu, problem, Direction::Backward)?;
    let blocks = plan.geometry.grid[0];
    let elements = parameters.iter().map(|parameter| parameter.elements()).sum::<usize>();
    let partials = Tensor::empty_on(gpu, [blocks as usize, elements], DType::F32)?;
    let given = addresses(parameters.iter().copied())?;
    let arguments = (partials.address()?, grad.address()?, given, plan.description);
    BACKWARD.launch(gpu, dtype.name(), plan.geometry, arguments)?;

    let shapes = parameters.iter().map(|parameter| parameter.shape().clone());
    let gradients = shapes.map(|shape: Shape| Tensor::empty_on(gpu, shape, dtype)).collect::<Result<Vec<_>>>()?;
    let largest = parameters.iter().map(|parameter| parameter.elements()).max().unwrap_or(0);
    let items = Geometry::for_items(largest, 256);
    let geometry = Geometry { grid: [items.grid[0], TENSORS as u32, 1], ..items };
    let arguments = (addresses(&gradients)?, partials.address()?, blocks, plan.description);
    ADD_PARTIALS.launch(gpu, dtype.name(), geometry, arguments)?;
    Ok(gradients)
}
