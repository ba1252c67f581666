//! Cross entropy of a softmax.

use super::Reduction;
use super::cpu::{self, Rows, Smoothing};
use super::gpu;
use crate::autograd::{Backward, Function, record};
use crate::gpu::Gpu;
use crate::tensor::{Buffer, Shape, place};
use crate::{DType, Error, Result, Tensor, dispatch_float};

const OP: &str = "cross_entropy";

/// What [`cross_entropy`] compares with.
#[derive(Clone, Copy, Debug)]
pub enum Targets<'a> {
    /// The class of each row, `i64`, shape (…).
    ///
    /// Labels on the host may go with logits on a GPU: they are checked and uploaded, which a recorded step cannot
    /// repeat. Labels on a GPU are not looked at by the host: the loss and the gradient of a row whose label is not a
    /// class are NaN.
    Labels(&'a Tensor),
    /// The probability of each class, shape (…, classes). Rows need not sum to 1. Gradients flow to it.
    Soft(&'a Tensor),
}

/// How [`cross_entropy`] weighs and combines rows.
///
/// ```
/// use gridgrad::ops::{CrossEntropyOptions, Targets, cross_entropy};
/// use gridgrad::{DType, Tensor};
/// let (logits, labels) = (Tensor::zeros([2, 4], DType::F64)?, Tensor::new(&[0i64, 3], [2])?);
/// let options = CrossEntropyOptions { label_smoothing: 0.1, ..CrossEntropyOptions::default() };
/// let loss = cross_entropy(&logits, Targets::Labels(&labels), options)?;
/// assert!((loss.item()? - 4f64.ln()).abs() < 1e-12);
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CrossEntropyOptions {
    /// ε in \[0, 1\]: targets t become (1 − ε) t + ε / classes (Szegedy et al. 2016).
    pub label_smoothing: f64,
    /// What becomes of the rows' losses. The mean is over rows that are not ignored.
    pub reduction: Reduction,
    /// A label, usually outside the classes, whose rows have loss 0 and do not count.
    pub ignore_index: Option<i64>,
}

/// −Σ t ln softmax(logits) over the classes, for `logits` (…, classes); a scalar, or (…) without reduction.
///
/// Stable for logits of any size. A class of target 0 does not count, so its logit may be −∞. Derivatives of any order.
///
/// # Errors
/// Where shapes, dtypes or devices do not fit, there are no classes, a label on the host is not a class, or ε is outside
/// \[0, 1\].
pub fn cross_entropy(logits: &Tensor, target: Targets<'_>, options: CrossEntropyOptions) -> Result<Tensor> {
    let dtype = logits.dtype();
    let Some((&classes, outer)) = logits.shape().split_last().filter(|&(&classes, _)| classes > 0) else {
        return Err(Error::shape(OP, format!("got logits {}, expected (…, classes)", logits.shape())));
    };
    if !(0.0..=1.0).contains(&options.label_smoothing) {
        let message = format!("label smoothing {}, expected a number from 0 to 1", options.label_smoothing);
        return Err(Error::argument(OP, message));
    }
    let target = SavedTargets::new(target, logits, outer, options.ignore_index)?;
    let (losses, statistics, share) = match target.on_device() {
        Some((gpu, targets)) => {
            let gpu::Loss { loss, share, statistics } = gpu::forward(gpu, logits, targets, options)?;
            (loss, statistics, share.map_or(Share::Known(1.0), Share::OnDevice))
        }
        None => {
            let counted = target.counted(outer.iter().product());
            let (losses, statistics) = dispatch_float!(OP, dtype, T => {
                let (soft, x) = (target.floats::<T>()?, logits.floats::<T>(OP)?);
                let targets = target.rows(soft.as_deref());
                let (losses, statistics) = cpu::forward(&x, classes, targets, smoothing(options, classes));
                let saved = statistics.len();
                let losses = reduce(losses, outer, options.reduction, counted, dtype)?;
                Ok((losses, Tensor::from_buffer(statistics, [saved])?))
            })?;
            let mean = options.reduction == Reduction::Mean;
            (losses, statistics, Share::Known(if mean { 1.0 / counted as f64 } else { 1.0 }))
        }
    };
    let soft = target.soft().cloned();
    let inputs: Vec<&Tensor> = [Some(logits), soft.as_ref()].into_iter().flatten().collect();
    let rule = |_| CrossEntropyRule { logits: logits.clone(), target, statistics, share, options };
    Ok(record(losses, &inputs, rule))
}

/// The factor of each row's loss in the result.
enum Share {
    Known(f64),
    /// A scalar in `f32`: only the device knows how many rows count.
    OnDevice(Tensor),
}

fn smoothing<T: crate::cpu::Float>(options: CrossEntropyOptions, classes: usize) -> Smoothing<T> {
    let epsilon = options.label_smoothing;
    Smoothing { keep: T::from_f64(1.0 - epsilon), spread: T::from_f64(epsilon / classes as f64) }
}

fn reduce<T: crate::cpu::Float>(
    losses: Buffer<T>,
    outer: &[usize],
    reduction: Reduction,
    counted: usize,
    dtype: DType,
) -> Result<Tensor> {
    let losses = Tensor::from_buffer(losses, outer)?;
    let reduced = match reduction {
        Reduction::Mean => losses.sum_all()?.scale(1.0 / counted as f64),
        Reduction::Sum => losses.sum_all(),
        Reduction::None => Ok(losses),
    }?;
    reduced.cast(dtype)
}

/// The class of each row, `None` where ignored.
fn checked(labels: &Tensor, classes: usize, ignored: Option<i64>) -> Result<Vec<Option<usize>>> {
    let class = |(row, &label): (usize, &i64)| match usize::try_from(label) {
        _ if Some(label) == ignored => Ok(None),
        Ok(class) if class < classes => Ok(Some(class)),
        _ => Err(Error::argument(OP, format!("label {label} of row {row}, expected 0 to {}", classes - 1))),
    };
    labels.data::<i64>()?.iter().enumerate().map(class).collect()
}

/// Targets in the form that the backward keeps.
enum SavedTargets {
    /// The class of each row, `None` where ignored.
    Labels(Vec<Option<usize>>),
    /// As they came, on the logits' GPU.
    DeviceLabels(&'static Gpu, Tensor),
    Soft(Tensor),
}

impl SavedTargets {
    fn new(target: Targets<'_>, logits: &Tensor, outer: &[usize], ignored: Option<i64>) -> Result<Self> {
        let refuse = |got: &Tensor, expected: &Shape| {
            let message = format!("got targets {} for logits {}, expected {expected}", got.shape(), logits.shape());
            Err(Error::shape(OP, message))
        };
        match target {
            Targets::Labels(labels) if **labels.shape() != *outer => refuse(labels, &outer.into()),
            Targets::Soft(soft) if soft.shape() != logits.shape() => refuse(soft, logits.shape()),
            Targets::Soft(soft) => {
                soft.expect_dtype(OP, logits.dtype())?;
                logits.expect_float(OP)?;
                place(OP, &[logits, soft])?;
                Ok(SavedTargets::Soft(soft.clone()))
            }
            Targets::Labels(labels) => {
                labels.expect_dtype(OP, DType::I64)?;
                logits.expect_float(OP)?;
                if labels.gpu().is_some() {
                    place(OP, &[logits, labels])?;
                }
                let classes = logits.shape().last().copied().unwrap_or(0);
                match (logits.gpu(), labels.gpu()) {
                    (Some(gpu), Some(_)) => Ok(SavedTargets::DeviceLabels(gpu, labels.clone())),
                    (Some(gpu), None) => {
                        checked(labels, classes, ignored)?;
                        Ok(SavedTargets::DeviceLabels(gpu, labels.to_device(gpu.device())?))
                    }
                    (None, _) => Ok(SavedTargets::Labels(checked(labels, classes, ignored)?)),
                }
            }
        }
    }

    fn soft(&self) -> Option<&Tensor> {
        match self {
            SavedTargets::Labels(_) | SavedTargets::DeviceLabels(..) => None,
            SavedTargets::Soft(soft) => Some(soft),
        }
    }

    /// Where a GPU computes: itself and the targets.
    fn on_device(&self) -> Option<(&'static Gpu, gpu::Rows<'_>)> {
        match self {
            SavedTargets::Labels(_) => None,
            SavedTargets::DeviceLabels(gpu, labels) => Some((gpu, gpu::Rows::Labels(labels))),
            SavedTargets::Soft(soft) => soft.gpu().map(|gpu| (gpu, gpu::Rows::Soft(soft))),
        }
    }

    fn floats<T: crate::cpu::Float>(&self) -> Result<Option<crate::tensor::Floats<'_, T>>> {
        self.soft().map(|soft| soft.floats(OP)).transpose()
    }

    fn rows<'a, T>(&'a self, soft: Option<&'a [T]>) -> Rows<'a, T> {
        match self {
            SavedTargets::Labels(labels) => Rows::Labels(labels),
            SavedTargets::DeviceLabels(..) | SavedTargets::Soft(_) => Rows::Soft(soft.unwrap_or_default()),
        }
    }

    fn counted(&self, rows: usize) -> usize {
        match self {
            SavedTargets::Labels(labels) => labels.iter().flatten().count(),
            SavedTargets::DeviceLabels(..) | SavedTargets::Soft(_) => rows,
        }
    }

    /// (1 − ε) t + ε / classes in full, and 0 in ignored rows; on the tape where the targets are.
    fn weights(&self, logits: &Tensor, options: CrossEntropyOptions) -> Result<Tensor> {
        let classes = logits.shape().last().copied().unwrap_or(1);
        let epsilon = options.label_smoothing;
        let (keep, spread) = (1.0 - epsilon, epsilon / classes as f64);
        match self {
            SavedTargets::Soft(soft) => soft.scale(keep)?.shift(spread),
            SavedTargets::DeviceLabels(gpu, labels) => gpu::weights(gpu, labels, logits, options),
            SavedTargets::Labels(labels) => {
                Tensor::from_index(logits.shape(), logits.dtype(), |at| match labels[at / classes] {
                    None => 0.0,
                    Some(label) if label == at % classes => keep + spread,
                    Some(_) => spread,
                })
            }
        }
    }
}

struct CrossEntropyRule {
    logits: Tensor,
    target: SavedTargets,
    /// In the compute type: as [`cpu::forward`] gives them.
    statistics: Tensor,
    share: Share,
    options: CrossEntropyOptions,
}

impl Function for CrossEntropyRule {
    fn name(&self) -> &'static str {
        OP
    }

    fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        if let (Some((gpu, targets)), false) = (self.target.on_device(), backward.create_graph()) {
            return self.fused_on(gpu, targets, backward);
        }
        let scales = self.row_scales(backward.grad())?;
        let logits = match (backward.needs(0), backward.create_graph()) {
            (false, _) => None,
            (true, false) => Some(self.fused(&scales)?),
            (true, true) => Some(self.composed(&scales)?),
        };
        let soft = if backward.needs(1) {
            let surprise = crate::ops::log_softmax(&self.logits, -1)?.scale(self.options.label_smoothing - 1.0)?;
            Some(surprise.mul(&scales)?)
        } else {
            None
        };
        Ok(vec![logits, soft])
    }
}

impl CrossEntropyRule {
    /// What each row's loss contributes to the final gradient, shape (…, 1).
    fn row_scales(&self, grad: &Tensor) -> Result<Tensor> {
        let mut shape = self.logits.shape().to_vec();
        shape.pop();
        let per_row = match &self.share {
            Share::OnDevice(share) => grad.mul(&share.cast(grad.dtype())?)?.broadcast_to(&shape[..])?,
            Share::Known(1.0) => grad.broadcast_to(&shape[..])?,
            Share::Known(share) => grad.scale(*share)?.broadcast_to(&shape[..])?,
        };
        shape.push(1);
        per_row.reshape(shape)
    }

    fn fused_on(
        &self,
        gpu: &'static Gpu,
        targets: gpu::Rows<'_>,
        backward: &Backward<'_>,
    ) -> Result<Vec<Option<Tensor>>> {
        let share = match &self.share {
            Share::Known(_) => None,
            Share::OnDevice(share) => Some(share),
        };
        let (logits, statistics, options) = (&self.logits, &self.statistics, self.options);
        let saved = gpu::Saved { logits, targets, statistics, share, options };
        let wanted = [backward.needs(0), self.target.soft().is_some() && backward.needs(1)];
        Ok(gpu::backward(gpu, saved, backward.grad(), wanted)?.into())
    }

    fn fused(&self, scales: &Tensor) -> Result<Tensor> {
        let dtype = self.logits.dtype();
        let classes = self.logits.shape().last().copied().unwrap_or(1);
        dispatch_float!(OP, dtype, T => {
            let (logits, soft, scales) = (self.logits.floats::<T>(OP)?, self.target.floats::<T>()?, scales.floats(OP)?);
            let targets = self.target.rows(soft.as_deref());
            let smoothing = smoothing(self.options, classes);
            let gradient = cpu::backward(&logits, classes, targets, smoothing, self.statistics.data()?, &scales);
            Tensor::from_floats(gradient, self.logits.shape(), dtype)
        })
    }

    /// The same gradient, made of recorded ops.
    fn composed(&self, scales: &Tensor) -> Result<Tensor> {
        let weights = self.target.weights(&self.logits, self.options)?;
        let probabilities = crate::ops::softmax(&self.logits, -1)?;
        probabilities.mul(&weights.sum(&[-1], true)?)?.sub(&weights)?.mul(scales)
    }
}
