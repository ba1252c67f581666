//! Softmax and its logarithm.

pub(crate) mod cost;
pub(crate) mod cpu;
pub(crate) mod gpu;

use crate::autograd::{Backward, Function, SavedOutput, record};
use crate::tensor::{Place, place};
use crate::{Result, Tensor, dispatch_float};

/// exp(xᵢ) / Σⱼ exp(xⱼ) over `axis`, counted from the front or, if negative, from the back.
///
/// Stable for logits of any size. A logit of −∞ has probability 0; where all are −∞ the result is NaN, and so it is
/// where one is +∞ or NaN. Derivatives of any order. The last axis is fast; any other is copied there and back.
///
/// # Errors
/// Where the axis does not exist or the dtype is not floating point.
pub fn softmax(input: &Tensor, axis: isize) -> Result<Tensor> {
    over_axis(input, axis, Form::Probabilities)
}

/// xᵢ − ln Σⱼ exp(xⱼ) over `axis`: the logarithm of [`softmax`], without its underflow.
///
/// # Errors
/// As [`softmax`].
pub fn log_softmax(input: &Tensor, axis: isize) -> Result<Tensor> {
    over_axis(input, axis, Form::Logarithms)
}

#[derive(Clone, Copy)]
enum Form {
    Probabilities,
    Logarithms,
}

impl Form {
    fn name(self) -> &'static str {
        match self {
            Form::Probabilities => "softmax",
            Form::Logarithms => "log_softmax",
        }
    }
}

fn over_axis(input: &Tensor, axis: isize, form: Form) -> Result<Tensor> {
    let op = form.name();
    input.expect_float(op)?;
    let axis = input.shape().axis(op, axis)? as isize;
    if axis + 1 == input.rank() as isize {
        over_last_axis(input, form)
    } else {
        over_last_axis(&input.transpose(axis, -1)?, form)?.transpose(axis, -1)
    }
}

fn over_last_axis(input: &Tensor, form: Form) -> Result<Tensor> {
    let dtype = input.dtype();
    let width = last_extent(input);
    input.expect_float(form.name())?;
    let output = match place(form.name(), &[input])? {
        Place::Gpu(gpu) => gpu::forward(gpu, form, input, width)?,
        Place::Host => dispatch_float!(form.name(), dtype, T => {
            Tensor::from_floats(cpu::forward::<T>(form, &input.floats(form.name())?, width), input.shape(), dtype)
        })?,
    };
    Ok(record(output, &[input], |output| SoftmaxRule { form, output }))
}

fn last_extent(tensor: &Tensor) -> usize {
    tensor.shape().last().copied().unwrap_or(1)
}

struct SoftmaxRule {
    form: Form,
    output: SavedOutput,
}

impl Function for SoftmaxRule {
    fn name(&self) -> &'static str {
        self.form.name()
    }

    fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let (op, grad, output) = (self.name(), backward.grad(), backward.output(&self.output));
        if backward.create_graph() {
            return Ok(vec![Some(composed(self.form, &output, grad)?)]);
        }
        let (dtype, width) = (grad.dtype(), last_extent(grad));
        let gradient = match place(op, &[&output, grad])? {
            Place::Gpu(gpu) => gpu::backward(gpu, self.form, &output, grad, width)?,
            Place::Host => dispatch_float!(op, dtype, T => {
                let gradient = cpu::backward::<T>(self.form, &output.floats(op)?, &grad.floats(op)?, width);
                Tensor::from_floats(gradient, grad.shape(), dtype)
            })?,
        };
        Ok(vec![Some(gradient)])
    }
}

/// The formula of [`cpu::backward`], made of recorded ops.
fn composed(form: Form, output: &Tensor, grad: &Tensor) -> Result<Tensor> {
    match form {
        Form::Probabilities => output.mul(&grad.sub(&output.mul(grad)?.sum(&[-1], true)?)?),
        Form::Logarithms => grad.sub(&output.exp()?.mul(&grad.sum(&[-1], true)?)?),
    }
}
