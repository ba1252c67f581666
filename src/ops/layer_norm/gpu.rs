//! A group of threads for each row, which it holds in registers.

use crate::driver::seam::Address;
use crate::gpu::{FLOATS, Geometry, Gpu, Kernel, Signature};
use crate::{DType, Result, Tensor};

/// output, statistics, input, weight, bias, rows, width, lanes, eps
type Forward = (Address, Address, Address, Address, Address, u64, u32, u32, f32);
const FORWARD: Kernel<Forward> = Kernel::new("layer_norm", "layer_norm_forward", FLOATS);
const FORWARD_STREAMED: Kernel<Forward> = Kernel::new("layer_norm", "layer_norm_forward_streamed", FLOATS);
/// input gradient or null, partial sums or null, input, output gradient, weight, statistics, rows, width, lanes
type BackwardArguments = (Address, Address, Address, Address, Address, Address, u64, u32, u32);
const BACKWARD: Kernel<BackwardArguments> = Kernel::new("layer_norm", "layer_norm_backward", FLOATS);
const BACKWARD_STREAMED: Kernel<BackwardArguments> = Kernel::new("layer_norm", "layer_norm_backward_streamed", FLOATS);
/// partial sums, input, output gradient, statistics, rows, width, rows per part
const PARAMETER_GRADIENTS: Kernel<(Address, Address, Address, Address, u64, u32, u64)> =
    Kernel::new("layer_norm", "layer_norm_parameter_gradients", FLOATS);
/// weight gradient, bias gradient, partial sums, parts, width
const FINISH: Kernel<(Address, Address, Address, u32, u32)> = Kernel::new("layer_norm", "layer_norm_finish", FLOATS);

pub(crate) static KERNELS: &[Signature] = &[
    FORWARD.signature(),
    FORWARD_STREAMED.signature(),
    BACKWARD.signature(),
    BACKWARD_STREAMED.signature(),
    PARAMETER_GRADIENTS.signature(),
    FINISH.signature(),
];

// As in the kernel file.
const HELD_FORWARD: usize = 32;
const HELD_BACKWARD: usize = 16;
const THREADS: usize = 256;
const COLUMNS: usize = 32;
const SLICES: usize = 8;
/// The widest row that registers hold.
const WIDEST: usize = 8192;
/// Parts of the rows whose parameter gradients are summed apart. It does not depend on the device, so neither do the
/// sums.
const PARTS: usize = 256;

/// Rows that groups of threads walk over.
struct Rows {
    count: usize,
    width: usize,
    /// Threads of a group.
    lanes: usize,
    /// Registers hold a row.
    held: bool,
}

impl Rows {
    /// The smallest groups whose threads hold `held` values each.
    fn new(input: &Tensor, width: usize, held: usize) -> Self {
        let lanes = width.min(WIDEST).div_ceil(held).next_power_of_two();
        let vector = 16 / input.dtype().size();
        let held = width <= WIDEST && width.is_multiple_of(vector);
        Rows { count: input.elements() / width.max(1), width, lanes, held }
    }

    fn geometry(&self, most: usize) -> Geometry {
        // A group wider than a warp has a block to itself.
        let threads = if self.lanes > 32 { self.lanes } else { THREADS };
        let rows_per_block = threads / self.lanes;
        Geometry::blocks(self.count.div_ceil(rows_per_block).min(most), threads as u32)
    }
}

/// The output, and the statistics that [`backward`] reads: (rows, 3) in `f32`.
pub(super) fn forward(
    gpu: &'static Gpu,
    input: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
) -> Result<(Tensor, Tensor)> {
    let rows = Rows::new(input, weight.elements(), HELD_FORWARD);
    let output = Tensor::empty_on(gpu, input.shape(), input.dtype())?;
    let statistics = Tensor::empty_on(gpu, [rows.count * super::cpu::SAVED], DType::F32)?;
    let arguments = (
        output.address()?,
        statistics.address()?,
        input.address()?,
        weight.address()?,
        bias.address()?,
        rows.count as u64,
        rows.width as u32,
        rows.lanes as u32,
        eps as f32,
    );
    let kernel = if rows.held { FORWARD } else { FORWARD_STREAMED };
    kernel.launch(gpu, input.dtype().name(), rows.geometry(usize::MAX), arguments)?;
    Ok((output, statistics))
}

/// Gradients of input, weight and bias: the first if `wanted.0`, the others if `wanted.1`.
pub(super) fn backward(
    gpu: &'static Gpu,
    input: &Tensor,
    weight: &Tensor,
    statistics: &Tensor,
    grad: &Tensor,
    wanted: (bool, bool),
) -> Result<[Option<Tensor>; 3]> {
    let (dtype, rows) = (input.dtype(), Rows::new(input, weight.elements(), HELD_BACKWARD));
    let dx = wanted.0.then(|| Tensor::empty_on(gpu, input.shape(), dtype)).transpose()?;
    // Of rows that are not held, a kernel of its own sums up the parameters' gradients.
    let geometry = rows.geometry(if rows.held { PARTS } else { usize::MAX });
    let parts = if rows.held { geometry.grid[0] as usize } else { PARTS.min(rows.count.div_ceil(SLICES)) };
    let partials = wanted.1.then(|| Tensor::empty_on(gpu, [parts, 2, rows.width], DType::F32)).transpose()?;
    let address = |tensor: &Option<Tensor>| tensor.as_ref().map_or(Ok(Address::NULL), Tensor::address);
    let (x, dy, saved) = (input.address()?, grad.address()?, statistics.address()?);
    if rows.held || wanted.0 {
        let (dx, partials) = (address(&dx)?, address(&partials)?);
        let arguments =
            (dx, partials, x, dy, weight.address()?, saved, rows.count as u64, rows.width as u32, rows.lanes as u32);
        let kernel = if rows.held { BACKWARD } else { BACKWARD_STREAMED };
        kernel.launch(gpu, dtype.name(), geometry, arguments)?;
    }
    let Some(partials) = partials else { return Ok([dx, None, None]) };
    if !rows.held {
        let tiles = rows.width.div_ceil(COLUMNS) as u32;
        let tiles = Geometry { grid: [tiles, parts as u32, 1], block: [COLUMNS as u32, SLICES as u32, 1], shared: 0 };
        let rows_per_part = rows.count.div_ceil(parts.max(1));
        let arguments = (partials.address()?, x, dy, saved, rows.count as u64, rows.width as u32, rows_per_part as u64);
        PARAMETER_GRADIENTS.launch(gpu, dtype.name(), tiles, arguments)?;
    }
    let dw = Tensor::empty_on(gpu, weight.shape(), dtype)?;
    let db = Tensor::empty_on(gpu, weight.shape(), dtype)?;
    let arguments = (dw.address()?, db.address()?, partials.address()?, parts as u32, rows.width as u32);
    let blocks = (2 * rows.width).div_ceil(COLUMNS) as u32;
    let tiles = Geometry { grid: [blocks, 1, 1], block: [COLUMNS as u32, SLICES as u32, 1], shared: 0 };
    FINISH.launch(gpu, dtype.name(), tiles, arguments)?;
    Ok([dx, Some(dw), Some(db)])
}
