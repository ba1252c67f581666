//! Affine maps of the last axis, alone and with a GELU behind them.

pub(crate) mod cost;
mod cpu;
pub(crate) mod gpu;

use crate::autograd::{Backward, Function, record, records};
use crate::gpu::Gpu;
use crate::ops::elementwise::{Unary, derivative};
use crate::ops::matmul::Transposed;
use crate::tensor::{Place, Shape, place};
use crate::{Error, Result, Tensor, dispatch_float};

/// y = x Wᵀ + b for `input` (…, in), `weight` (out, in), `bias` (out); the result is (…, out).
///
/// # Errors
/// Where the extents do not match or the dtypes differ.
pub fn linear(input: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let Call { extents, shape, inputs, place } = Call::new("linear", input, weight, bias)?;
    let output = match place {
        Place::Gpu(gpu) => gpu::linear(gpu, [input, weight], bias, extents)?.reshape(shape)?,
        Place::Host => dispatch_float!("linear", input.dtype(), T => {
            let bias = bias.map(|bias| bias.floats::<T>("linear")).transpose()?;
            let (x, w) = (input.floats::<T>("linear")?, weight.floats::<T>("linear")?);
            Tensor::from_floats(cpu::forward(&x, &w, bias.as_deref(), extents), shape, input.dtype())
        })?,
    };
    Ok(record(output, &inputs, |_| LinearRule { input: input.clone(), weight: weight.clone() }))
}

/// The exact GELU of [`linear`]: one kernel on a GPU, which stores the sums before the GELU for the backward pass only
/// where there will be one. Derivatives of any order.
///
/// ```
/// use gridgrad::{DType, Tensor, ops, random::Philox};
/// let x = Tensor::randn([2, 5, 8], DType::F32, Philox::new(0))?;
/// let (weight, bias) = (Tensor::randn([32, 8], DType::F32, Philox::new(1))?, Tensor::zeros([32], DType::F32)?);
/// let hidden = ops::linear_gelu(&x, &weight, Some(&bias))?;
/// assert_eq!(hidden.to_vec::<f32>()?, ops::linear(&x, &weight, Some(&bias))?.gelu()?.to_vec::<f32>()?);
/// # Ok::<(), gridgrad::Error>(())
/// ```
///
/// # Errors
/// As [`linear`].
pub fn linear_gelu(input: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let Call { extents, shape, inputs, place } = Call::new("linear_gelu", input, weight, bias)?;
    let Place::Gpu(gpu) = place else { return linear(input, weight, bias)?.gelu() };
    let (output, sums) = gpu::linear_gelu(gpu, [input, weight], bias, extents, records(&inputs))?;
    let output = output.reshape(shape)?;
    let Some(sums) = sums else { return Ok(output) };
    Ok(record(output, &inputs, |_| LinearGeluRule {
        gpu,
        input: input.clone(),
        weight: weight.clone(),
        bias: bias.cloned(),
        sums,
    }))
}

/// The operands of a call, checked.
struct Call<'a> {
    /// rows, in, out
    extents: [usize; 3],
    /// Of the result.
    shape: Shape,
    inputs: Vec<&'a Tensor>,
    place: Place,
}

impl<'a> Call<'a> {
    fn new(op: &'static str, input: &'a Tensor, weight: &'a Tensor, bias: Option<&'a Tensor>) -> Result<Self> {
        let dtype = input.dtype();
        input.expect_float(op)?;
        let [out_features, in_features] = weight.dims::<2>(op, "weight (out, in)")?;
        let Some((_, outer)) = input.shape().split_last().filter(|&(&last, _)| last == in_features) else {
            let message =
                format!("input {} for weight {}; the last axis must be {in_features}", input.shape(), weight.shape());
            return Err(Error::shape(op, message));
        };
        for parameter in [Some(weight), bias].into_iter().flatten() {
            parameter.expect_dtype(op, dtype)?;
        }
        if let Some(bias) = bias.filter(|bias| **bias.shape() != [out_features]) {
            return Err(Error::shape(op, format!("bias {} for weight {}", bias.shape(), weight.shape())));
        }
        let inputs: Vec<&Tensor> = [Some(input), Some(weight), bias].into_iter().flatten().collect();
        Ok(Call {
            extents: [outer.iter().product(), in_features, out_features],
            shape: [outer, &[out_features]].concat().into(),
            place: place(op, &inputs)?,
            inputs,
        })
    }
}

/// dx = dy W, dW = dyᵀ x, of those that are wanted; `grad` is dy as (rows, out).
fn product_gradients(
    backward: &Backward<'_>,
    grad: &Tensor,
    input: &Tensor,
    weight: &Tensor,
) -> Result<[Option<Tensor>; 2]> {
    let dx = if backward.needs(0) { Some(grad.matmul(weight)?.reshape(input.shape())?) } else { None };
    let dw = if backward.needs(1) {
        let input = input.reshape([grad.shape()[0], weight.shape()[1]])?;
        Some(grad.matmul_transposed(&input, Transposed { left: true, right: false })?)
    } else {
        None
    };
    Ok([dx, dw])
}

/// The gradient (…, out) as (rows, out).
fn rows_of(grad: &Tensor) -> Result<Tensor> {
    let (last, outer) = grad.shape().split_last().ok_or_else(|| Error::shape("linear", "a gradient without axes"))?;
    grad.reshape([outer.iter().product(), *last])
}

struct LinearRule {
    input: Tensor,
    weight: Tensor,
}

impl Function for LinearRule {
    fn name(&self) -> &'static str {
        "linear"
    }

    /// db = Σ dy; the others as [`product_gradients`].
    fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let grad = rows_of(backward.grad())?;
        let [dx, dw] = product_gradients(backward, &grad, &self.input, &self.weight)?;
        let db = match grad.gpu() {
            _ if !backward.needs(2) => None,
            Some(gpu) if !backward.create_graph() => Some(gpu::column_sum(gpu, &grad)?),
            _ => Some(grad.sum(&[0], false)?),
        };
        Ok(vec![dx, dw, db])
    }
}

struct LinearGeluRule {
    gpu: &'static Gpu,
    input: Tensor,
    weight: Tensor,
    bias: Option<Tensor>,
    /// (rows, out), off the tape.
    sums: Tensor,
}

impl Function for LinearGeluRule {
    fn name(&self) -> &'static str {
        "linear_gelu"
    }

    /// dz = dy · GELU′(z) and db = Σ dz; the others as [`product_gradients`] of dz.
    fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let (dz, db) = if backward.create_graph() {
            // The sums again, as a recorded function of the inputs.
            let sums = linear(&self.input, &self.weight, self.bias.as_ref())?;
            let dz = rows_of(&backward.grad().mul(&derivative(Unary::Gelu, &sums)?)?)?;
            let db = if backward.needs(2) { Some(dz.sum(&[0], false)?) } else { None };
            (dz, db)
        } else {
            let (dz, db) = gpu::gelu_backward(self.gpu, &self.sums, &rows_of(backward.grad())?)?;
            (dz, backward.needs(2).then_some(db))
        };
        let [dx, dw] = product_gradients(backward, &dz, &self.input, &self.weight)?;
        Ok(vec![dx, dw, db])
    }
}
