//! A warp for each row of a table, and one launch in each direction for the networks of up to 32 blocks.

use super::cpu::Problem;
use crate::driver::seam::Address;
use crate::gpu::{Geometry, Gpu, Kernel, Signature};
use crate::tensor::Shape;
use crate::{DType, Error, Result, Tensor};

/// As `TENSORS` in the kernel file.
const TENSORS: usize = 14;
/// As `MOST` in the kernel file.
const MOST: usize = 32;
type Networks = [[Address; TENSORS]; MOST];
type Tables = [Address; MOST];
type Groups = [[u32; 2]; MOST];
/// As `Description` in the kernel file; the last is the bits of an `f32`.
type Description = [u32; 5];

/// The dtype of the parameters, and that of the tables where it is another.
const INSTANCES: &[&str] = &["f32", "bf16", "f16", "f32_bf16", "f32_f16"];

/// tables, arrivals or null, parameters, groups, description
const FORWARD: Kernel<(Tables, Address, Networks, Groups, Description)> =
    Kernel::new("position_bias", "position_bias_forward", INSTANCES);
/// gradients of parameters, blocks' sums, arrivals, gradients of tables, parameters, groups, description
const BACKWARD: Kernel<(Networks, Address, Address, Tables, Networks, Groups, Description)> =
    Kernel::new("position_bias", "position_bias_backward", INSTANCES);

pub(crate) static KERNELS: &[Signature] = &[FORWARD.signature(), BACKWARD.signature()];

/// The most warps of a block: rows that it computes side by side.
const MOST_WARPS: usize = 8;
/// The most blocks of a network. Fixed, so that sums do not depend on the device.
const MOST_BLOCKS: usize = 1024;
/// The backward pass writes as many sums of every parameter.
const MOST_BACKWARD_BLOCKS: usize = 64;
/// Static shared memory of a block, and what its alignment may cost.
const STATIC_SHARED: usize = 128;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Forward,
    Backward,
}

/// How a pass over several networks is launched, and what their kernel is told of them.
struct Plan {
    geometry: Geometry,
    groups: Groups,
    description: Description,
}

impl Plan {
    /// Weights are staged in shared memory where they leave room for all warps' rows; otherwise there may be fewer
    /// warps. `problems` differ in nothing but the group.
    fn new(gpu: &Gpu, problems: &[Problem], direction: Direction) -> Result<Self> {
        let Problem { width, heads, residual, eps, .. } = problems[0];
        let limit = (gpu.properties().shared_memory_per_block as usize).saturating_sub(STATIC_SHARED);
        let room = limit / size_of::<f32>();
        let row = match direction {
            Direction::Forward => 4 * width,
            Direction::Backward => 13 * width + heads,
        };
        let weights = (2 * width + heads) * (width | 1);
        let staged = weights + MOST_WARPS * row <= room;
        let warps = if staged { MOST_WARPS } else { (room / row.max(1)).min(MOST_WARPS) };
        if warps == 0 {
            let message = format!(
                "width {width} with {heads} heads needs {} bytes of shared memory; {} has {limit}",
                row * size_of::<f32>(),
                gpu.device(),
            );
            return Err(Error::argument("dynamic_position_bias", message));
        }
        let most_blocks = if direction == Direction::Forward { MOST_BLOCKS } else { MOST_BACKWARD_BLOCKS };
        let most_rows = problems.iter().map(Problem::rows).max().unwrap_or(0);
        let blocks = most_rows.div_ceil(warps).min(most_blocks);
        let floats = if staged { weights } else { 0 } + warps * row;
        let one = Geometry::blocks(blocks, 32 * warps as u32).with_shared(floats * size_of::<f32>());
        let mut groups = [[0; 2]; MOST];
        for (group, problem) in groups.iter_mut().zip(problems) {
            *group = problem.group.map(|extent| extent as u32);
        }
        Ok(Plan {
            geometry: Geometry { grid: [one.grid[0], problems.len() as u32, 1], ..one },
            groups,
            description: [width as u32, heads as u32, residual.into(), staged.into(), (eps as f32).to_bits()],
        })
    }
}

/// Where the parameters of up to 32 networks are, 14 each.
fn networks<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> Result<Networks> {
    let mut addresses = [[Address::NULL; TENSORS]; MOST];
    for (address, tensor) in addresses.as_flattened_mut().iter_mut().zip(tensors) {
        *address = tensor.address()?;
    }
    Ok(addresses)
}

fn tables<'a>(tensors: impl IntoIterator<Item = Option<&'a Tensor>>) -> Result<Tables> {
    let mut addresses = [Address::NULL; MOST];
    for (address, tensor) in addresses.iter_mut().zip(tensors) {
        *address = tensor.map_or(Ok(Address::NULL), Tensor::address)?;
    }
    Ok(addresses)
}

fn instance(parameters: DType, table: DType) -> String {
    if parameters == table { table.name().to_owned() } else { format!("{}_{}", parameters.name(), table.name()) }
}

/// What the backward pass of the networks needs beside the parameters: for each a count of blocks, 0.
pub(super) fn arrivals(gpu: &'static Gpu, count: usize) -> Result<Tensor> {
    Tensor::empty_on(gpu, [count, size_of::<u32>()], DType::U8)
}

/// A table (rows, heads) for each of `problems`, whose parameters follow each other. Sets `arrivals`, where given, to 0.
pub(super) fn forward(
    gpu: &'static Gpu,
    problems: &[Problem],
    parameters: &[&Tensor],
    dtype: DType,
    arrivals: Option<&Tensor>,
) -> Result<Vec<Tensor>> {
    let empty = |problem: &Problem| Tensor::empty_on(gpu, [problem.rows(), problem.heads], dtype);
    let outputs = problems.iter().map(empty).collect::<Result<Vec<_>>>()?;
    let parts = problems.chunks(MOST).zip(parameters.chunks(MOST * TENSORS)).zip(outputs.chunks(MOST));
    for (part, ((problems, parameters), outputs)) in parts.enumerate() {
        let plan = Plan::new(gpu, problems, Direction::Forward)?;
        let arguments = (
            tables(outputs.iter().map(Some))?,
            arrivals.map_or(Ok(Address::NULL), |arrivals| arrivals_of(arrivals, part))?,
            networks(parameters.iter().copied())?,
            plan.groups,
            plan.description,
        );
        FORWARD.launch(gpu, &instance(parameters[0].dtype(), dtype), plan.geometry, arguments)?;
    }
    Ok(outputs)
}

fn arrivals_of(arrivals: &Tensor, part: usize) -> Result<Address> {
    Ok(arrivals.address()?.offset(part * MOST * size_of::<u32>()))
}

/// The gradients of all parameters, in their order; `None` for those of tables without a gradient.
pub(super) fn backward(
    gpu: &'static Gpu,
    problems: &[Problem],
    parameters: &[&Tensor],
    grads: &[Option<Tensor>],
    arrivals: &Tensor,
) -> Result<Vec<Option<Tensor>>> {
    let mut gradients = Vec::with_capacity(parameters.len());
    let parts = problems.chunks(MOST).zip(parameters.chunks(MOST * TENSORS)).zip(grads.chunks(MOST));
    for (part, ((problems, parameters), grads)) in parts.enumerate() {
        let Some(table_dtype) = grads.iter().flatten().map(Tensor::dtype).next() else {
            gradients.extend(parameters.iter().map(|_| None));
            continue;
        };
        let dtype = parameters[0].dtype();
        let plan = Plan::new(gpu, problems, Direction::Backward)?;
        let elements = parameters[..TENSORS].iter().map(|parameter| parameter.elements()).sum::<usize>();
        let blocks = plan.geometry.grid[0] as usize;
        let partials = Tensor::empty_on(gpu, [problems.len(), blocks, elements], DType::F32)?;
        let shapes = parameters.iter().map(|parameter| parameter.shape().clone());
        let targets = shapes.map(|shape: Shape| Tensor::empty_on(gpu, shape, dtype)).collect::<Result<Vec<_>>>()?;
        let arguments = (
            networks(&targets)?,
            partials.address()?,
            arrivals_of(arrivals, part)?,
            tables(grads.iter().map(Option::as_ref))?,
            networks(parameters.iter().copied())?,
            plan.groups,
            plan.description,
        );
        BACKWARD.launch(gpu, &instance(dtype, table_dtype), plan.geometry, arguments)?;
        let wanted = grads.iter().flat_map(|grad| [grad.is_some(); TENSORS]);
        gradients.extend(targets.into_iter().zip(wanted).map(|(target, wanted)| wanted.then_some(target)));
    }
    Ok(gradients)
}
