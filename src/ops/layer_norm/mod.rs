//! Normalisation of the last axis.

mod bf16;
pub(crate) mod cost;
mod cpu;
pub(crate) mod gpu;

use crate::autograd::{Backward, Function, record};
use crate::tensor::{Buffer, Place, Shape, place};
use crate::{DType, Error, Result, Tensor, dispatch_float};

/// Layer normalisation (Ba, Kiros and Hinton 2016): y = (x − E\[x\]) / √(Var\[x\] + `eps`) · w + b, with mean and biased
/// variance over the last axis of `input` (…, channels); `weight` and `bias` (channels).
///
/// A mean much larger than the deviation costs no accuracy. Derivatives of any order.
///
/// # Errors
/// Where the extents do not match, the dtypes differ, or `eps` is negative or not finite.
pub fn layer_norm(input: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let dtype = input.dtype();
    check(input.shape(), dtype, weight, bias, eps)?;
    let (output, statistics) = match place("layer_norm", &[input, weight, bias])? {
        Place::Gpu(gpu) => gpu::forward(gpu, input, weight, bias, eps)?,
        Place::Host if dtype == DType::Bf16 => {
            let (w, b) = (weight.floats("layer_norm")?, bias.floats("layer_norm")?);
            let (output, statistics) = bf16::forward(input.data()?, &w, &b, eps);
            let rows = statistics.len();
            (Tensor::from_buffer(output, input.shape())?, Tensor::from_buffer(statistics, [rows])?)
        }
        Place::Host => dispatch_float!("layer_norm", dtype, T => {
            let (x, w, b) = (input.floats("layer_norm")?, weight.floats("layer_norm")?, bias.floats("layer_norm")?);
            let (output, statistics) = cpu::forward::<T>(&x, &w, &b, eps);
            let rows = statistics.len();
            Ok((Tensor::from_floats(output, input.shape(), dtype)?, Tensor::from_buffer(statistics, [rows])?))
        })?,
    };
    Ok(on_tape(output, input, weight, bias, statistics, eps))
}

/// Whether an input of `shape` and `dtype` can be normalised so.
pub(crate) fn check(shape: &Shape, dtype: DType, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<()> {
    let [channels] = weight.dims::<1>("layer_norm", "weight (channels)")?;
    if shape.last() != Some(&channels) || bias.shape() != weight.shape() {
        let message = format!(
            "input {shape}, weight {}, bias {}; expected (…, channels), (channels), (channels)",
            weight.shape(),
            bias.shape()
        );
        return Err(Error::shape("layer_norm", message));
    }
    for parameter in [weight, bias] {
        parameter.expect_dtype("layer_norm", dtype)?;
    }
    if !(eps.is_finite() && eps >= 0.0) {
        return Err(Error::argument("layer_norm", format!("eps {eps}, expected a finite number of at least 0")));
    }
    weight.expect_float("layer_norm")
}

/// Puts the output of a kernel that normalises what it computes on the tape; `statistics` as [`gpu::forward`] gives
/// them.
pub(crate) fn on_tape(
    output: Tensor,
    input: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    statistics: Tensor,
    eps: f64,
) -> Tensor {
    let rule = |_| LayerNormRule { input: input.clone(), weight: weight.clone(), statistics, eps };
    record(output, &[input, weight, bias], rule)
}

struct LayerNormRule {
    input: Tensor,
    weight: Tensor,
    /// In the compute type: as [`cpu::forward`] gives them.
    statistics: Tensor,
    eps: f64,
}

impl Function for LayerNormRule {
    fn name(&self) -> &'static str {
        "layer_norm"
    }

    fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let gradients = if backward.create_graph() { self.composed(backward) } else { self.fused(backward) }?;
        Ok(gradients.into_iter().enumerate().map(|(i, gradient)| gradient.filter(|_| backward.needs(i))).collect())
    }
}

impl LayerNormRule {
    fn fused(&self, backward: &Backward<'_>) -> Result<[Option<Tensor>; 3]> {
        let (op, grad, dtype) = ("layer_norm", backward.grad(), self.input.dtype());
        if let Place::Gpu(gpu) = place(op, &[&self.input, grad])? {
            let wanted = (backward.needs(0), backward.needs(1) || backward.needs(2));
            return gpu::backward(gpu, &self.input, &self.weight, &self.statistics, grad, wanted);
        }
        if dtype == DType::Bf16 {
            let w = self.weight.floats(op)?;
            let (x, dy) = (self.input.data()?, grad.data()?);
            let (dx, sums) = bf16::backward(x, &w, self.statistics.data()?, dy, backward.needs(0));
            let (dw, db) = sums.split_at(w.len());
            let parameter = |sum| Tensor::from_floats(Buffer::copy_of(sum), self.weight.shape(), dtype).map(Some);
            let dx = dx.map(|dx| Tensor::from_buffer(dx, self.input.shape())).transpose()?;
            return Ok([dx, parameter(dw)?, parameter(db)?]);
        }
        dispatch_float!(op, dtype, T => {
            let (x, w, dy) = (self.input.floats(op)?, self.weight.floats(op)?, grad.floats(op)?);
            let (dx, sums) = cpu::backward::<T>(&x, &w, self.statistics.data()?, &dy, backward.needs(0));
            let dx = dx.map(|dx| Tensor::from_floats(dx, self.input.shape(), dtype)).transpose()?;
            let (dw, db) = sums.split_at(w.len());
            let parameter = |sum| Tensor::from_floats(Buffer::copy_of(sum), self.weight.shape(), dtype).map(Some);
            Ok([dx, parameter(dw)?, parameter(db)?])
        })
    }

    /// The same gradients, made of recorded ops.
    fn composed(&self, backward: &Backward<'_>) -> Result<[Option<Tensor>; 3]> {
        let grad = backward.grad();
        let mean = |tensor: &Tensor| tensor.mean(&[-1], true);
        let centered = self.input.sub(&mean(&self.input)?)?;
        let rstd = mean(&centered.square()?)?.shift(self.eps)?.sqrt()?.recip()?;
        let normalised = centered.mul(&rstd)?;
        let gamma = grad.mul(&self.weight)?;
        let projected = normalised.mul(&mean(&gamma.mul(&normalised)?)?)?;
        let dx = gamma.sub(&mean(&gamma)?)?.sub(&projected)?.mul(&rstd)?;
        let dw = grad.mul(&normalised)?.sum_to(self.weight.shape())?;
        let db = grad.sum_to(self.weight.shape())?;
        Ok([Some(dx), Some(dw), Some(db)])
    }
}
