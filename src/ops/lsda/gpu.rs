//! One kernel for each direction; a block for each head and share of the groups.

use super::cpu::Problem;
use super::dropout::Dropout;
use crate::driver::seam::Address;
use crate::gpu::{FLOATS, Geometry, Gpu, Kernel, Signature};
use crate::{DType, Error, Result, Tensor};

/// Each dtype for head widths of up to 16, 32, 64 and 128.
const INSTANCES: &[&str] = &[
    "f32_16", "f32_32", "f32_64", "f32_128", "bf16_16", "bf16_32", "bf16_64", "bf16_128", "f16_16", "f16_32", "f16_64",
    "f16_128",
];

/// `Problem` of kernels/common/lsda.cuh
type Description = [u32; 15];

/// `Dropout` of kernels/common/lsda.cuh
type DropoutArgument = [u32; 16];

/// output, qkv, bias table or null, problem, dropout
const FORWARD: Kernel<(Address, Address, Address, Description, DropoutArgument)> =
    Kernel::new("lsda_forward", "lsda_forward", INSTANCES);
/// gradient of qkv, tables of the blocks, sums of query gradients, parked sums or null, qkv, bias table or null, output
/// gradient, problem, dropout
const BACKWARD: Kernel<(Address, Address, Address, Address, Address, Address, Address, Description, DropoutArgument)> =
    Kernel::new("lsda_backward", "lsda_backward", INSTANCES);
/// gradient of the bias table, tables of the blocks, rows, heads, blocks for each head
const TABLE_GRADIENT: Kernel<(Address, Address, u32, u32, u32)> =
    Kernel::new("lsda_backward", "lsda_table_gradient", FLOATS);

pub(crate) static KERNELS: &[Signature] = &[FORWARD.signature(), BACKWARD.signature(), TABLE_GRADIENT.signature()];

/// Blocks of a launch for each multiprocessor, at most. Each works on its groups in turn; one of the backward pass has
/// bias tables in device memory.
const FORWARD_BLOCKS: usize = 128;
const BACKWARD_BLOCKS: usize = 16;
/// As `STREAM_BYTES` of kernels/common/lsda.cuh.
const STREAM_BYTES: usize = 16;

/// How a problem is cut into tiles and blocks: `Tiling` and `Slot` of kernels/common/lsda.cuh.
struct Plan {
    /// The head width that the kernel is compiled for.
    width: usize,
    /// Tokens of a tile at most; twice as many threads of a block.
    tile: usize,
    /// Lines of a slot's tiles.
    rows: usize,
    /// Groups that a block works on at once.
    slots: usize,
    /// Tokens of a slot whose places are kept.
    capacity: usize,
    /// Rows of the bias table; 0 without one.
    table: usize,
    /// Lines of groups along y and x.
    lines: [usize; 2],
    /// Tokens of the largest group.
    tokens: usize,
    /// All groups of the batch.
    groups: usize,
}

impl Plan {
    fn new(gpu: &Gpu, problem: &Problem, dtype: DType, biased: bool) -> Result<Self> {
        let d = problem.head_width;
        let Some(width) = [16, 32, 64, 128].into_iter().find(|&width| d <= width) else {
            let message = format!("heads of {d} channels; {} takes at most 128", gpu.device());
            return Err(Error::argument("lsda", message));
        };
        let [batch, height, width_of_map] = problem.extents;
        let (grouping, extents) = (&problem.grouping, [height, width_of_map]);
        let tokens = problem.most_tokens();
        let lines = [0, 1].map(|axis| {
            let period = grouping.group[axis] * grouping.interval[axis];
            (extents[axis] + grouping.origin[axis]).div_ceil(period) * grouping.interval[axis]
        });
        let tile = if width * dtype.size() >= 256 { 32 } else { 64 };
        let rows = tokens.next_multiple_of(16).min(tile);
        let table = if biased { grouping.table_rows() } else { 0 };
        let plan = Plan {
            width,
            tile,
            rows,
            slots: tile / rows,
            capacity: tokens.next_multiple_of(rows),
            table,
            lines,
            tokens,
            groups: batch * lines[0] * lines[1],
        };
        let (needed, limit) = (plan.backward_bytes(dtype), gpu.properties().shared_memory_per_block as usize);
        if needed > limit {
            let [gh, gw] = grouping.group;
            let message = format!(
                "groups of {gh}×{gw} need {needed} bytes of shared memory; {} has {limit}: smaller groups fit",
                gpu.device()
            );
            return Err(Error::argument("lsda", message));
        }
        Ok(plan)
    }

    fn forward_bytes(&self, dtype: DType) -> usize {
        let tiles = 3 * self.rows * self.width * dtype.size();
        self.slots * (tiles + 2 * 4 * self.capacity) + STREAM_BYTES + 4 * self.table
    }

    /// Without what is parked.
    fn backward_bytes(&self, dtype: DType) -> usize {
        let tiles = (4 * self.rows * self.width + 2 * self.rows * self.tile) * dtype.size();
        let warps = self.tile / 16;
        self.slots * (tiles + 5 * 4 * self.capacity) + STREAM_BYTES + 4 * self.table * (1 + warps)
    }

    /// Sums that a block of the backward pass parks: dS of groups of one tile for the table's gradient, otherwise dK and
    /// dV between tiles.
    fn parked(&self) -> usize {
        if self.tokens > self.tile {
            2 * self.tile * self.width
        } else if self.table > 0 && self.width < 128 {
            self.tile * self.tile
        } else {
            0
        }
    }

    /// Blocks for each head.
    fn blocks(&self, gpu: &Gpu, heads: usize, per_multiprocessor: usize) -> usize {
        let most = gpu.properties().multiprocessors as usize * per_multiprocessor;
        self.groups.div_ceil(self.slots).min((most / heads).max(1))
    }

    fn geometry(&self, blocks: usize, heads: usize, shared: usize) -> Geometry {
        Geometry::blocks(blocks * heads, 2 * self.tile as u32).with_shared(shared)
    }

    fn instance(&self, dtype: DType) -> String {
        format!("{}_{}", dtype.name(), self.width)
    }

    fn describe(&self, problem: &Problem, blocks: usize) -> Result<Description> {
        let [batch, height, width] = problem.extents;
        let Problem { heads, head_width, grouping, .. } = *problem;
        let ([gh, gw], [ih, iw], [oh, ow]) = (grouping.group, grouping.interval, grouping.origin);
        let numbers = [batch, height, width, heads, head_width, gh, gw, ih, iw, oh, ow, self.lines[0], self.lines[1]];
        let numbers = numbers.into_iter().chain([self.tokens, blocks]);
        let mut description = [0; 15];
        for (entry, number) in description.iter_mut().zip(numbers) {
            *entry = number as u32;
        }
        // Positions and token numbers of a map are 32 bits wide; so is the number of blocks.
        if [batch, heads * blocks, (height + oh + gh * ih) * (width + ow + gw * iw)]
            .iter()
            .any(|&n| n > i32::MAX as usize)
        {
            let message =
                format!("a batch of {batch} maps of {height}×{width} in {grouping:?}, {heads} heads, is too large");
            return Err(Error::argument("lsda", message));
        }
        Ok(description)
    }
}

pub(super) fn forward(gpu: &'static Gpu, problem: &Problem, qkv: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let [batch, height, width] = problem.extents;
    let (dtype, heads) = (qkv.dtype(), problem.heads);
    let output = Tensor::empty_on(gpu, [batch, height, width, heads * problem.head_width], dtype)?;
    if output.elements() == 0 {
        return Ok(output);
    }
    let plan = Plan::new(gpu, problem, dtype, bias.is_some())?;
    let blocks = plan.blocks(gpu, heads, FORWARD_BLOCKS);
    let description = plan.describe(problem, blocks)?;
    let geometry = plan.geometry(blocks, heads, plan.forward_bytes(dtype));
    let dropout = Dropout::argument(problem.dropout);
    let arguments = (output.address()?, qkv.address()?, address(bias)?, description, dropout);
    FORWARD.launch(gpu, &plan.instance(dtype), geometry, arguments)?;
    Ok(output)
}

/// Gradients of qkv and of the bias table.
pub(super) fn backward(
    gpu: &'static Gpu,
    problem: &Problem,
    qkv: &Tensor,
    bias: Option<&Tensor>,
    grad: &Tensor,
) -> Result<(Tensor, Option<Tensor>)> {
    let (dtype, heads) = (qkv.dtype(), problem.heads);
    if qkv.elements() == 0 {
        return Ok((qkv.full_like(0.0)?, bias.map(|bias| bias.full_like(0.0)).transpose()?));
    }
    let plan = Plan::new(gpu, problem, dtype, bias.is_some())?;
    let blocks = plan.blocks(gpu, heads, BACKWARD_BLOCKS);
    let qkv_grad = Tensor::empty_on(gpu, qkv.shape(), dtype)?;
    let tables = Tensor::empty_on(gpu, [blocks, heads, plan.table], DType::F32)?;
    // Groups of one tile finish their query gradients at once.
    let query_sums = Tensor::empty_on(gpu, [if plan.tokens > plan.tile { grad.elements() } else { 0 }], DType::F32)?;
    // In device memory only where shared memory has no room.
    let (needed, parked) = (plan.backward_bytes(dtype), plan.parked());
    let fits = needed + 4 * parked <= gpu.properties().shared_memory_per_block as usize;
    let shared = if fits { needed + 4 * parked } else { needed };
    let parking = (!fits).then(|| Tensor::empty_on(gpu, [blocks * heads, parked], DType::F32)).transpose()?;
    let arguments = (
        qkv_grad.address()?,
        tables.address()?,
        query_sums.address()?,
        address(parking.as_ref())?,
        qkv.address()?,
        address(bias)?,
        grad.address()?,
        plan.describe(problem, blocks)?,
        Dropout::argument(problem.dropout),
    );
    let geometry = plan.geometry(blocks, heads, shared);
    BACKWARD.launch(gpu, &plan.instance(dtype), geometry, arguments)?;
    let table_grad = |bias: &Tensor| {
        let table_grad = Tensor::empty_on(gpu, bias.shape(), dtype)?;
        let arguments = (table_grad.address()?, tables.address()?, plan.table as u32, heads as u32, blocks as u32);
        let geometry = Geometry::blocks(plan.table.div_ceil(32) * heads, 256);
        TABLE_GRADIENT.launch(gpu, dtype.name(), geometry, arguments)?;
        Ok(table_grad)
    };
    Ok((qkv_grad, bias.map(table_grad).transpose()?))
}

fn address(tensor: Option<&Tensor>) -> Result<Address> {
    tensor.map_or(Ok(Address::NULL), Tensor::address)
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use super::*;
    use crate::Device;
    use crate::ops::lsda::Grouping;

    #[test]
    fn every_group_of_the_papers_fits_on_the_smallest_gpus() {
        // Of compute capability 8.6, 8.9 and 12.0.
        const SMALLEST: usize = 99 * 1024;
        let gpu = Gpu::open(Device::Emulated).unwrap();
        for (side, head_width) in (2..=16).flat_map(|side| [16, 32, 64, 128].map(|width| (side, width))) {
            for dtype in [DType::F32, DType::Bf16, DType::F16] {
                let grouping = Grouping::long(side, 2);
                let problem = Problem { extents: [1, 64, 64], heads: 1, head_width, grouping, dropout: None };
                let plan = Plan::new(gpu, &problem, dtype, true).unwrap();
                assert!(plan.backward_bytes(dtype) <= SMALLEST, "{side} {head_width} {dtype}");
                assert!(plan.forward_bytes(dtype) <= plan.backward_bytes(dtype), "{side} {head_width} {dtype}");
            }
        }
    }
}
