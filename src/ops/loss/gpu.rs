//! A group of threads for each row of logits.

use super::{CrossEntropyOptions, Reduction};
use crate::driver::seam::Address;
use crate::gpu::{FLOATS, Geometry, Gpu, Kernel, Signature};
use crate::{DType, Result, Tensor};

/// losses or null, block totals or null, statistics, logits, labels or null, soft targets or null, rows, classes, lanes,
/// keep, spread, whether a label is ignored, that label
type ForwardArguments = (Address, Address, Address, Address, Address, Address, u64, u32, u32, f32, f32, u32, u64);
const FORWARD: Kernel<ForwardArguments> = Kernel::new("loss", "cross_entropy_forward", FLOATS);
/// loss, share, block totals, blocks, whether the mean is wanted
const FINISH: Kernel<(Address, Address, Address, u32, u32)> = Kernel::new("loss", "cross_entropy_finish", FLOATS);
/// gradient of the logits or null, of the soft targets or null, logits, labels or null, soft targets or null,
/// statistics, gradient of the loss, whether it has rows, share or null, rows, classes, lanes, keep, spread, whether a
/// label is ignored, that label
type BackwardArguments =
    (Address, Address, Address, Address, Address, Address, Address, u32, Address, u64, u32, u32, f32, f32, u32, u64);
const BACKWARD: Kernel<BackwardArguments> = Kernel::new("loss", "cross_entropy_backward", FLOATS);
/// output, labels, rows, classes, keep, spread, whether a label is ignored, that label
const WEIGHTS: Kernel<(Address, Address, u64, u32, f32, f32, u32, u64)> =
    Kernel::new("loss", "cross_entropy_weights", FLOATS);

pub(crate) static KERNELS: &[Signature] =
    &[FORWARD.signature(), FINISH.signature(), BACKWARD.signature(), WEIGHTS.signature()];

/// As in the kernel file.
const THREADS: usize = 256;
/// Bytes of a block's total: an f64 and a count of 64 bits.
const TOTAL_WORDS: usize = 2;
/// Values of a row's statistics.
const SAVED: usize = 2;
/// Blocks of the forward pass whose totals are added up. It does not depend on the device, so neither does the sum.
const MOST_BLOCKS: usize = 1024;
/// Classes from which on a row is worth a whole block.
const MANY_CLASSES: usize = 4096;

/// What the rows of logits are compared with, on the device.
#[derive(Clone, Copy)]
pub(super) enum Rows<'a> {
    Labels(&'a Tensor),
    Soft(&'a Tensor),
}

impl Rows<'_> {
    /// Addresses of labels and of soft targets; one of them is null.
    fn addresses(self) -> Result<(Address, Address)> {
        Ok(match self {
            Rows::Labels(labels) => (labels.address()?, Address::NULL),
            Rows::Soft(soft) => (Address::NULL, soft.address()?),
        })
    }
}

/// Rows of logits, and the options as kernels take them.
struct Logits {
    rows: usize,
    classes: usize,
    lanes: usize,
    keep: f32,
    spread: f32,
    has_ignored: u32,
    ignored: u64,
}

impl Logits {
    fn new(logits: &Tensor, options: CrossEntropyOptions) -> Self {
        let classes = logits.shape().last().copied().unwrap_or(1);
        let epsilon = options.label_smoothing;
        // About four classes for each thread.
        let lanes = if classes < MANY_CLASSES { classes.div_ceil(4).next_power_of_two().min(32) } else { THREADS };
        Logits {
            rows: logits.elements() / classes.max(1),
            classes,
            lanes,
            keep: (1.0 - epsilon) as f32,
            spread: (epsilon / classes as f64) as f32,
            has_ignored: options.ignore_index.is_some().into(),
            ignored: options.ignore_index.unwrap_or(0) as u64,
        }
    }

    fn geometry(&self, most: usize) -> Geometry {
        Geometry::blocks(self.rows.div_ceil(THREADS / self.lanes).min(most), THREADS as u32)
    }
}

/// What [`forward`] returns.
pub(super) struct Loss {
    /// In the dtype of the logits, reduced.
    pub loss: Tensor,
    /// The factor of each row's loss in it, a scalar in `f32`; without reduction there is none.
    pub share: Option<Tensor>,
    /// For [`backward`].
    pub statistics: Tensor,
}

pub(super) fn forward(
    gpu: &'static Gpu,
    logits: &Tensor,
    targets: Rows<'_>,
    options: CrossEntropyOptions,
) -> Result<Loss> {
    let (dtype, shape) = (logits.dtype(), Logits::new(logits, options));
    let statistics = Tensor::empty_on(gpu, [shape.rows * SAVED], DType::F32)?;
    let outer = &logits.shape()[..logits.rank().saturating_sub(1)];
    let reduced = options.reduction != Reduction::None;
    let geometry = shape.geometry(if reduced { MOST_BLOCKS } else { usize::MAX });
    let blocks = geometry.grid[0];
    let loss = Tensor::empty_on(gpu, if reduced { &[] } else { outer }, dtype)?;
    let totals = reduced.then(|| Tensor::empty_on(gpu, [blocks as usize * TOTAL_WORDS], DType::I64)).transpose()?;
    let to = totals.as_ref().map_or(Ok(Address::NULL), Tensor::address)?;
    let (labels, soft) = targets.addresses()?;
    let arguments = (
        if reduced { Address::NULL } else { loss.address()? },
        to,
        statistics.address()?,
        logits.address()?,
        labels,
        soft,
        shape.rows as u64,
        shape.classes as u32,
        shape.lanes as u32,
        shape.keep,
        shape.spread,
        shape.has_ignored,
        shape.ignored,
    );
    FORWARD.launch(gpu, dtype.name(), geometry, arguments)?;
    if !reduced {
        return Ok(Loss { loss, share: None, statistics });
    }
    let share = Tensor::empty_on(gpu, [], DType::F32)?;
    let mean = u32::from(options.reduction == Reduction::Mean);
    let one = Geometry::blocks(1, THREADS as u32);
    FINISH.launch(gpu, dtype.name(), one, (loss.address()?, share.address()?, to, blocks, mean))?;
    Ok(Loss { loss, share: Some(share), statistics })
}

/// What the backward pass reads of the forward pass.
pub(super) struct Saved<'a> {
    pub logits: &'a Tensor,
    pub targets: Rows<'a>,
    pub statistics: &'a Tensor,
    pub share: Option<&'a Tensor>,
    pub options: CrossEntropyOptions,
}

/// Gradients of the logits and of soft targets, where wanted.
pub(super) fn backward(
    gpu: &'static Gpu,
    saved: Saved<'_>,
    grad: &Tensor,
    wanted: [bool; 2],
) -> Result<[Option<Tensor>; 2]> {
    let Saved { logits, targets, statistics, share, options } = saved;
    let (dtype, shape) = (logits.dtype(), Logits::new(logits, options));
    let make = |wanted: bool| wanted.then(|| Tensor::empty_on(gpu, logits.shape(), dtype)).transpose();
    let gradients = [make(wanted[0])?, make(wanted[1])?];
    let address = |tensor: Option<&Tensor>| tensor.map_or(Ok(Address::NULL), Tensor::address);
    let (labels, soft) = targets.addresses()?;
    let arguments = (
        address(gradients[0].as_ref())?,
        address(gradients[1].as_ref())?,
        logits.address()?,
        labels,
        soft,
        statistics.address()?,
        grad.address()?,
        u32::from(options.reduction == Reduction::None),
        address(share)?,
        shape.rows as u64,
        shape.classes as u32,
        shape.lanes as u32,
        shape.keep,
        shape.spread,
        shape.has_ignored,
        shape.ignored,
    );
    BACKWARD.launch(gpu, dtype.name(), shape.geometry(usize::MAX), arguments)?;
    Ok(gradients)
}

/// The smoothed targets of labels in full, of the logits' shape.
pub(super) fn weights(
    gpu: &'static Gpu,
    labels: &Tensor,
    logits: &Tensor,
    options: CrossEntropyOptions,
) -> Result<Tensor> {
    let Logits { rows, classes, keep, spread, has_ignored, ignored, .. } = Logits::new(logits, options);
    let output = Tensor::empty_on(gpu, logits.shape(), logits.dtype())?;
    let geometry = Geometry::for_items(logits.elements(), THREADS as u32);
    let (to, labels) = (output.address()?, labels.address()?);
    let arguments = (to, labels, rows as u64, classes as u32, keep, spread, has_ignored, ignored);
    WEIGHTS.launch(gpu, logits.dtype().name(), geometry, arguments)?;
    Ok(output)
}
