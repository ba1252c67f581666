//! All blocks in each launch: logits, losses and their sums; backward the differences, and products of them.

use super::{Forward, Problem};
use crate::driver::seam::Address;
use crate::gpu::{FLOATS, Geometry, Gpu, Kernel, Signature};
use crate::{DType, Result, Tensor};

use super::MOST_BLOCKS as MOST;

/// Rows, features, classes, blocks.
type Description = [u32; 4];
/// First features of the blocks, then the number of all.
type Offsets = [u32; MOST + 1];

type LogitsArguments = (Address, Address, Address, Address, Description, Offsets);
/// logits, features, weight, bias, description, offsets
const LOGITS_WIDE: Kernel<LogitsArguments> = Kernel::new("linear_probe", "linear_probe_logits_wide", FLOATS);
const LOGITS_NARROW: Kernel<LogitsArguments> = Kernel::new("linear_probe", "linear_probe_logits_narrow", FLOATS);
/// totals, logits, labels, description
const LOSSES: Kernel<(Address, Address, Address, Description)> =
    Kernel::new("linear_probe", "linear_probe_losses", &[]);
/// loss, correct, totals, weight, description, pieces, penalty, offsets
const FINISH: Kernel<(Address, Address, Address, Address, Description, u32, f32, Offsets)> =
    Kernel::new("linear_probe", "linear_probe_finish", FLOATS);
/// differences, logits, labels, gradient of the losses, description
const DIFFERENCES: Kernel<(Address, Address, Address, Address, Description)> =
    Kernel::new("linear_probe", "linear_probe_differences", FLOATS);
type WeightArguments = (Address, Address, Address, Description, u32, Offsets);
/// parts' sums, differences, features, description, rows of a part, offsets
const WEIGHT_WIDE: Kernel<WeightArguments> = Kernel::new("linear_probe", "linear_probe_weight_wide", FLOATS);
const WEIGHT_NARROW: Kernel<WeightArguments> = Kernel::new("linear_probe", "linear_probe_weight_narrow", FLOATS);
/// gradient of the weight, parts' sums, weight, gradient of the losses, description, parts, penalty, offsets
const WEIGHT_SUM: Kernel<(Address, Address, Address, Address, Description, u32, f32, Offsets)> =
    Kernel::new("linear_probe", "linear_probe_weight_sum", FLOATS);

pub(crate) static KERNELS: &[Signature] = &[
    LOGITS_WIDE.signature(),
    LOGITS_NARROW.signature(),
    LOSSES.signature(),
    FINISH.signature(),
    DIFFERENCES.signature(),
    WEIGHT_WIDE.signature(),
    WEIGHT_NARROW.signature(),
    WEIGHT_SUM.signature(),
];

// As in the kernel file.
const THREADS: u32 = 256;
const TILE: usize = 64;
const ROWS_OF_PIECE: usize = 1024;
/// Of a block that multiplies matrices.
const PRODUCT_THREADS: u32 = 128;
/// Bytes of a total: an `f64` and a count of 64 bits.
const TOTAL_BYTES: usize = 16;
/// Parts of the rows are made until there are about as many blocks. Fixed, so that sums do not depend on the device.
const ENOUGH_BLOCKS: usize = 1024;

impl Problem {
    fn description(&self) -> Description {
        [self.rows, self.features(), self.classes, self.widths.len()].map(|extent| extent as u32)
    }

    fn offsets(&self) -> Offsets {
        let mut offsets = [self.features() as u32; MOST + 1];
        for (block, offset) in offsets.iter_mut().enumerate().take(self.widths.len()) {
            *offset = self.first(block) as u32;
        }
        offsets
    }

    fn widest(&self) -> usize {
        self.widths.iter().copied().max().unwrap_or(0)
    }

    /// Whether all rows of features begin at multiples of 16 bytes.
    fn is_wide(&self, dtype: DType) -> bool {
        self.widths.iter().all(|width| width.is_multiple_of(16 / dtype.size()))
    }
}

pub(super) fn forward(
    gpu: &'static Gpu,
    problem: &Problem,
    features: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    labels: &Tensor,
) -> Result<Forward> {
    let (dtype, blocks) = (features.dtype(), problem.widths.len());
    let (all, offsets) = (problem.description(), problem.offsets());
    let logits = Tensor::empty_on(gpu, [blocks, problem.rows, problem.classes], DType::F32)?;
    let tiles = problem.rows.div_ceil(TILE) * problem.classes.div_ceil(TILE);
    let geometry = Geometry::blocks(tiles, PRODUCT_THREADS);
    let geometry = Geometry { grid: [geometry.grid[0], 1, blocks as u32], ..geometry };
    let arguments = (logits.address()?, features.address()?, weight.address()?, bias.address()?, all, offsets);
    let kernel = if problem.is_wide(dtype) { LOGITS_WIDE } else { LOGITS_NARROW };
    kernel.launch(gpu, dtype.name(), geometry, arguments)?;

    let pieces = problem.rows.div_ceil(ROWS_OF_PIECE);
    let totals = gpu.allocate(blocks * pieces * TOTAL_BYTES)?;
    let geometry = Geometry { grid: [pieces as u32, blocks as u32, 1], block: [THREADS, 1, 1], shared: 0 };
    LOSSES.launch(gpu, "", geometry, (totals.address(), logits.address()?, labels.address()?, all))?;
    let loss = Tensor::empty_on(gpu, [blocks], dtype)?;
    let correct = Tensor::empty_on(gpu, [blocks], DType::I64)?;
    let arguments = (
        loss.address()?,
        correct.address()?,
        totals.address(),
        weight.address()?,
        all,
        pieces as u32,
        problem.penalty as f32,
        offsets,
    );
    FINISH.launch(gpu, dtype.name(), Geometry::blocks(blocks, THREADS), arguments)?;
    Ok(Forward { loss, correct, logits })
}

/// Gradients of weight and bias.
pub(super) fn backward(
    gpu: &'static Gpu,
    problem: &Problem,
    saved: &super::ProbeRule,
    grad: &Tensor,
) -> Result<[Tensor; 2]> {
    let (dtype, blocks) = (grad.dtype(), problem.widths.len());
    let (all, offsets) = (problem.description(), problem.offsets());
    let differences = Tensor::empty_on(gpu, saved.logits.shape(), dtype)?;
    let geometry = Geometry::for_items(blocks * problem.rows * 32, THREADS);
    let arguments = (differences.address()?, saved.logits.address()?, saved.labels.address()?, grad.address()?, all);
    DIFFERENCES.launch(gpu, dtype.name(), geometry, arguments)?;
    let bias = differences.sum(&[1], false)?;

    let tiles = problem.classes.div_ceil(TILE) * problem.widest().div_ceil(TILE);
    let most_parts = problem.rows.div_ceil(ROWS_OF_PIECE).max(1);
    let wanted = (ENOUGH_BLOCKS / (tiles * blocks).max(1)).clamp(1, most_parts);
    // Parts are whole pieces, which are whole steps of the main loop.
    let depth = problem.rows.div_ceil(wanted).next_multiple_of(ROWS_OF_PIECE);
    let parts = problem.rows.div_ceil(depth.max(1));
    let partials = Tensor::empty_on(gpu, [parts, problem.classes, problem.features()], DType::F32)?;
    let geometry = Geometry::blocks(tiles, PRODUCT_THREADS);
    let geometry = Geometry { grid: [geometry.grid[0], parts as u32, blocks as u32], ..geometry };
    let arguments =
        (partials.address()?, differences.address()?, saved.features.address()?, all, depth as u32, offsets);
    let wide = problem.is_wide(dtype) && problem.classes.is_multiple_of(16 / dtype.size());
    let kernel = if wide { WEIGHT_WIDE } else { WEIGHT_NARROW };
    kernel.launch(gpu, dtype.name(), geometry, arguments)?;

    let weight = Tensor::empty_on(gpu, saved.weight.shape(), dtype)?;
    let arguments = (
        weight.address()?,
        partials.address()?,
        saved.weight.address()?,
        grad.address()?,
        all,
        parts as u32,
        problem.penalty as f32,
        offsets,
    );
    let geometry = Geometry::for_items(problem.classes * problem.widest(), THREADS);
    let geometry = Geometry { grid: [geometry.grid[0], blocks as u32, 1], ..geometry };
    WEIGHT_SUM.launch(gpu, dtype.name(), geometry, arguments)?;
    Ok([weight, bias])
}
