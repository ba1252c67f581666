//! Losses: cross entropy, fused, and two that are short compositions of other ops.

pub(crate) mod cost;
mod cpu;
mod cross_entropy;
pub(crate) mod gpu;

use crate::{DType, Result, Tensor};

pub use cross_entropy::{CrossEntropyOptions, Targets, cross_entropy};

/// What becomes of the losses of the single elements or rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reduction {
    /// Their mean; NaN where there are none.
    #[default]
    Mean,
    /// Their sum.
    Sum,
    /// They are the result.
    None,
}

impl Reduction {
    fn apply(self, losses: &Tensor) -> Result<Tensor> {
        match self {
            Reduction::Mean => losses.mean_all(),
            Reduction::Sum => losses.sum_all(),
            Reduction::None => Ok(losses.clone()),
        }
    }
}

/// (input − target)², after broadcasting.
///
/// # Errors
/// Where the shapes do not broadcast or the dtypes differ.
pub fn mse_loss(input: &Tensor, target: &Tensor, reduction: Reduction) -> Result<Tensor> {
    in_compute_type("mse_loss", input, target, |input, target| reduction.apply(&input.sub(target)?.square()?))
}

/// −t ln σ(x) − (1 − t) ln(1 − σ(x)) for logits x and target probabilities t, after broadcasting.
///
/// Stable: each logarithm is a softplus, so neither overflows nor cancels.
///
/// # Errors
/// Where the shapes do not broadcast or the dtypes differ.
pub fn binary_cross_entropy_with_logits(logits: &Tensor, target: &Tensor, reduction: Reduction) -> Result<Tensor> {
    in_compute_type("binary_cross_entropy_with_logits", logits, target, |logits, target| {
        let present = target.mul(&logits.neg()?.softplus()?)?;
        let absent = target.neg()?.shift(1.0)?.mul(&logits.softplus()?)?;
        reduction.apply(&present.add(&absent)?)
    })
}

/// Half-precision inputs are widened, so that a composition rounds its result alone.
fn in_compute_type(
    op: &'static str,
    input: &Tensor,
    target: &Tensor,
    loss: impl FnOnce(&Tensor, &Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let dtype = input.dtype();
    input.expect_float(op)?;
    target.expect_dtype(op, dtype)?;
    let compute = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    loss(&input.cast(compute)?, &target.cast(compute)?)?.cast(dtype)
}
