//! Affine maps of the last axis.

mod cpu;

use crate::autograd::{Backward, Function, record};
use crate::ops::matmul::Transposed;
use crate::{Error, Result, Tensor, dispatch_float};

/// y = x Wᵀ + b for `input` (…, in), `weight` (out, in), `bias` (out); the result is (…, out).
///
/// # Errors
/// Where the extents do not match or the dtypes differ.
pub fn linear(input: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let dtype = input.dtype();
    let [out_features, in_features] = weight.dims::<2>("linear", "weight (out, in)")?;
    let Some((&last, outer)) = input.shape().split_last().filter(|&(&last, _)| last == in_features) else {
        let message =
            format!("input {} for weight {}; the last axis must be {in_features}", input.shape(), weight.shape());
        return Err(Error::shape("linear", message));
    };
    for parameter in [Some(weight), bias].into_iter().flatten() {
        parameter.expect_dtype("linear", dtype)?;
    }
    if let Some(bias) = bias.filter(|bias| **bias.shape() != [out_features]) {
        return Err(Error::shape("linear", format!("bias {} for weight {}", bias.shape(), weight.shape())));
    }
    let rows: usize = outer.iter().product();
    let output = dispatch_float!("linear", dtype, T => {
        let bias = bias.map(|bias| bias.floats::<T>("linear")).transpose()?;
        let (x, w) = (input.floats::<T>("linear")?, weight.floats::<T>("linear")?);
        let y = cpu::forward(&x, &w, bias.as_deref(), [rows, last, out_features]);
        Tensor::from_floats(y, [outer, &[out_features]].concat(), dtype)
    })?;
    let inputs: Vec<&Tensor> = [Some(input), Some(weight), bias].into_iter().flatten().collect();
    Ok(record(output, &inputs, |_| LinearRule { input: input.clone(), weight: weight.clone() }))
}

struct LinearRule {
    input: Tensor,
    weight: Tensor,
}

impl Function for LinearRule {
    fn name(&self) -> &'static str {
        "linear"
    }

    /// dx = dy W, dW = dyᵀ x, db = Σ dy.
    fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let out_features = self.weight.shape()[0];
        let in_features = self.weight.shape()[1];
        let rows = self.input.elements() / in_features.max(1);
        let rows = if in_features == 0 { backward.grad().elements() / out_features.max(1) } else { rows };
        let grad = backward.grad().reshape([rows, out_features])?;
        let dx = if backward.needs(0) { Some(grad.matmul(&self.weight)?.reshape(self.input.shape())?) } else { None };
        let dw = if backward.needs(1) {
            let input = self.input.reshape([rows, in_features])?;
            Some(grad.matmul_transposed(&input, Transposed { left: true, right: false })?)
        } else {
            None
        };
        let db = if backward.needs(2) { Some(grad.sum(&[0], false)?) } else { None };
        Ok(vec![dx, dw, db])
    }
}
