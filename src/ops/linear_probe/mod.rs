//! Linear classifiers of the features of a network's blocks, all trained at once (Alain and Bengio 2016,
//! "Understanding intermediate layers using linear classifier probes").

pub(crate) mod cost;
mod cpu;
pub(crate) mod gpu;

use crate::autograd::{Backward, Function, record};
use crate::tensor::{Place, place};
use crate::{DType, Error, Result, Tensor, dispatch_float};

const OP: &str = "linear_probe";

/// The most blocks of a call.
const MOST_BLOCKS: usize = 512;

/// Extents and penalty of one call.
#[derive(Clone)]
struct Problem {
    rows: usize,
    classes: usize,
    /// Features of each block.
    widths: Vec<usize>,
    penalty: f64,
}

impl Problem {
    fn features(&self) -> usize {
        self.widths.iter().sum()
    }

    /// The first feature of a block.
    fn first(&self, block: usize) -> usize {
        self.widths[..block].iter().sum()
    }
}

/// What an implementation returns.
struct Forward {
    loss: Tensor,
    correct: Tensor,
    /// (blocks, rows, classes), in `f32` or `f64`.
    logits: Tensor,
}

/// The results of [`linear_probe`].
#[derive(Clone, Debug)]
pub struct ProbeLoss {
    /// The loss of each block's probe, (blocks), in the dtype of the features.
    pub loss: Tensor,
    /// Rows whose label has the largest logit, and the lowest class where several have it: (blocks), `i64`.
    pub correct: Tensor,
}

/// The loss of a linear classifier for each block of `features` (rows, features), whose block l is the next `widths[l]`
/// of each row, as [`pooled_features`](super::pooled_features) lays them out: with the block's features z, its columns W
/// of `weight` (classes, features) and its row b of `bias` (blocks, classes), the mean over rows of the cross entropy of
/// z Wᵀ + b and `labels` (rows), `i64`, plus `penalty` / 2 · |W|².
///
/// First derivatives only, with respect to `weight` and `bias`: features are frozen, so no gradient flows to them. On a
/// GPU each step is one launch for all blocks.
///
/// # Errors
/// Where shapes, dtypes or devices do not fit, there are no classes or blocks or more than 512, `penalty` is negative,
/// or a label on the processor is not a class. On a GPU such a label makes all losses and gradients NaN.
///
/// ```
/// use gridgrad::{DType, Tensor, ops};
/// // Two blocks, of one and of two features.
/// let features = Tensor::new(&[1.0f32, 0.0, 2.0, -1.0, 3.0, 0.0], [2, 3])?;
/// let (weight, bias) = (Tensor::zeros([2, 3], DType::F32)?.variable()?, Tensor::zeros([2, 2], DType::F32)?.variable()?);
/// let labels = Tensor::new(&[0i64, 1], [2])?;
/// let probes = ops::linear_probe(&features, &weight, &bias, &labels, &[1, 2], 0.0)?;
/// assert_eq!(probes.loss.to_vec::<f32>()?, [2f32.ln(); 2]);
/// assert_eq!(probes.correct.to_vec::<i64>()?, [1, 1]); // ties go to the lowest class
/// assert!(probes.loss.sum_all()?.backward()?.get(&weight).is_some());
/// # Ok::<(), gridgrad::Error>(())
/// ```
pub fn linear_probe(
    features: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    labels: &Tensor,
    widths: &[usize],
    penalty: f64,
) -> Result<ProbeLoss> {
    let problem = check(features, weight, bias, labels, widths, penalty)?;
    let dtype = features.dtype();
    let Forward { loss, correct, logits } = match place(OP, &[features, weight, bias, labels])? {
        Place::Gpu(gpu) => gpu::forward(gpu, &problem, features, weight, bias, labels)?,
        Place::Host => dispatch_float!(OP, dtype, T => {
            let classes = host_labels(labels, problem.classes)?;
            let (z, w, b) = (features.floats::<T>(OP)?, weight.floats::<T>(OP)?, bias.floats::<T>(OP)?);
            let (loss, correct, logits) = cpu::forward(&problem, &z, &w, &b, &classes);
            let blocks = widths.len();
            Ok(Forward {
                loss: Tensor::from_floats(loss, [blocks], dtype)?,
                correct: Tensor::from_buffer(correct, [blocks])?,
                logits: Tensor::from_buffer(logits, [blocks, problem.rows, problem.classes])?,
            })
        })?,
    };
    let rule =
        |_| ProbeRule { features: features.detach(), weight: weight.clone(), labels: labels.clone(), logits, problem };
    Ok(ProbeLoss { loss: record(loss, &[weight, bias], rule), correct })
}

fn check(
    features: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    labels: &Tensor,
    widths: &[usize],
    penalty: f64,
) -> Result<Problem> {
    let [rows, width] = features.dims(OP, "features (rows, features)")?;
    let [classes, _] = weight.dims(OP, "weight (classes, features)")?;
    features.expect_float(OP)?;
    weight.expect_dtype(OP, features.dtype())?;
    bias.expect_dtype(OP, features.dtype())?;
    labels.expect_dtype(OP, DType::I64)?;
    if widths.is_empty() || widths.len() > MOST_BLOCKS || classes == 0 || !(penalty >= 0.0 && penalty.is_finite()) {
        let message = format!("{} blocks, {classes} classes, penalty {penalty}", widths.len());
        let expected = format!("expected 1 to {MOST_BLOCKS} blocks, a class, and a penalty from 0 on");
        return Err(Error::argument(OP, format!("{message}; {expected}")));
    }
    let total = widths.iter().try_fold(0usize, |sum, &width| sum.checked_add(width));
    let shapes = **weight.shape() == [classes, width] && **bias.shape() == [widths.len(), classes];
    if total != Some(width) || !shapes || **labels.shape() != [rows] {
        let got = [features, weight, bias, labels].map(|tensor| tensor.shape().to_string()).join(", ");
        let expected = "(rows, features), (classes, features), (blocks, classes), (rows)";
        let message = format!("got {got} for blocks of {total:?} features, expected {expected}");
        return Err(Error::shape(OP, message));
    }
    if rows.max(width).max(classes) > i32::MAX as usize {
        return Err(Error::shape(OP, "more than 2^31 rows, features or classes"));
    }
    Ok(Problem { rows, classes, widths: widths.to_vec(), penalty })
}

fn host_labels(labels: &Tensor, classes: usize) -> Result<Vec<usize>> {
    let class = |(row, &label): (usize, &i64)| {
        let class = usize::try_from(label).ok().filter(|&class| class < classes);
        let message = || format!("label {label} of row {row}, expected 0 to {}", classes - 1);
        class.ok_or_else(|| Error::argument(OP, message()))
    };
    labels.data::<i64>()?.iter().enumerate().map(class).collect()
}

struct ProbeRule {
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    logits: Tensor,
    problem: Problem,
}

impl Function for ProbeRule {
    fn name(&self) -> &'static str {
        OP
    }

    fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        backward.first_order_only(OP)?;
        let Self { features, weight, labels, logits, problem } = self;
        let (grad, dtype) = (backward.grad(), backward.grad().dtype());
        let [by_weight, by_bias] = match place(OP, &[features, grad])? {
            Place::Gpu(gpu) => gpu::backward(gpu, problem, self, grad)?,
            Place::Host => dispatch_float!(OP, dtype, T => {
                let classes = host_labels(labels, problem.classes)?;
                let (z, w, x) = (features.floats::<T>(OP)?, weight.floats::<T>(OP)?, logits.floats::<T>(OP)?);
                let [w, b] = cpu::backward(problem, &z, &w, &x, &classes, &grad.floats::<T>(OP)?);
                let by_bias = Tensor::from_floats(b, [problem.widths.len(), problem.classes], dtype)?;
                Ok([Tensor::from_floats(w, weight.shape(), dtype)?, by_bias])
            })?,
        };
        Ok(vec![Some(by_weight), Some(by_bias)])
    }
}
