//! Affine maps of the last axis, alone and with a GELU behind them.

pub(crate) mod bf16;
pub(crate) mod cost;
mod cpu;
mod flat;
pub(crate) mod gpu;

use crate::autograd::{Backward, Function, record, records};
use crate::ops::elementwise::{Unary, derivative};
use crate::ops::matmul::Transposed;
use crate::tensor::{Place, Shape, Weight, place};
use crate::{Error, Result, Tensor, dispatch_float};

/// y = x Wᵀ + b for `input` (…, in), `weight` (out, in), `bias` (out); the result is (…, out).
///
/// # Errors
/// Where the extents do not match or the dtypes differ.
pub fn linear(input: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let Call { extents, shape, inputs, place } = Call::new("linear", input, weight, bias)?;
    let output = match place {
        Place::Gpu(gpu) => gpu::linear(gpu, [input, weight], bias, extents)?.reshape(shape)?,
        Place::Host if crate::cpu::bf16::serves(input.dtype()) => {
            let (bias, weight) = (bias.map(Tensor::data).transpose()?, Weight::of(weight, weight.data()?));
            Tensor::from_buffer(bf16::forward(input.data()?, weight, bias, extents), shape)?
        }
        Place::Host => dispatch_float!("linear", input.dtype(), T => {
            let bias = bias.map(|bias| bias.floats::<T>("linear")).transpose()?;
            let (x, w) = (input.floats::<T>("linear")?, weight.floats::<T>("linear")?);
            Tensor::from_floats(cpu::forward(&x, &w, bias.as_deref(), extents), shape, input.dtype())
        })?,
    };
    Ok(record(output, &inputs, |_| LinearRule { input: input.clone(), weight: weight.clone() }))
}

/// The exact GELU of [`linear`] in one pass, which stores the sums before the GELU only where there will be a backward
/// pass. Derivatives of any order.
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
    let keeps_sums = records(&inputs);
    let (output, sums) = match place {
        Place::Gpu(gpu) => gpu::linear_gelu(gpu, [input, weight], bias, extents, keeps_sums)?,
        Place::Host if crate::cpu::bf16::serves(input.dtype()) => {
            let (bias, weight) = (bias.map(Tensor::data).transpose()?, Weight::of(weight, weight.data()?));
            let (output, sums) = bf16::forward_gelu(input.data()?, weight, bias, extents, keeps_sums);
            let of_rows = |values| Tensor::from_buffer(values, [extents[0], extents[2]]);
            (of_rows(output)?, sums.map(of_rows).transpose()?)
        }
        Place::Host => dispatch_float!("linear_gelu", input.dtype(), T => {
            let bias = bias.map(|bias| bias.floats::<T>("linear_gelu")).transpose()?;
            let (x, w) = (input.floats::<T>("linear_gelu")?, weight.floats::<T>("linear_gelu")?);
            let (output, sums) = cpu::forward_gelu(&x, &w, bias.as_deref(), extents, keeps_sums);
            let of_rows = |values| Tensor::from_floats(values, Shape::from([extents[0], extents[2]]), input.dtype());
            Ok::<_, Error>((of_rows(output)?, sums.map(of_rows).transpose()?))
        })?,
    };
    let output = output.reshape(shape)?;
    let Some(sums) = sums else { return Ok(output) };
    Ok(record(output, &inputs, |_| LinearGeluRule {
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

/// What a backward pass finds, of that which was wanted.
struct Gradients<G> {
    input: Option<G>,
    weight: Option<G>,
    bias: Option<G>,
}

/// All gradients on the processor by `grad` (rows, out), off the tape; `sums` are those before a GELU.
fn host_gradients(
    backward: &Backward<'_>,
    grad: &Tensor,
    sums: Option<&Tensor>,
    [input, weight]: [&Tensor; 2],
) -> Result<Vec<Option<Tensor>>> {
    const OP: &str = "linear";
    let [out_features, in_features] = weight.dims::<2>(OP, "weight (out, in)")?;
    let extents = [grad.shape()[0], in_features, out_features];
    let needs = [backward.needs(0), backward.needs(1), backward.needs(2)];
    if crate::cpu::bf16::serves(grad.dtype()) {
        let sums = sums.map(Tensor::data).transpose()?;
        let gradients = bf16::backward(grad.data()?, sums, input.data()?, weight.data()?, extents, needs);
        return Ok(vec![
            gradients.input.map(|values| Tensor::from_buffer(values, input.shape())).transpose()?,
            gradients.weight.map(|values| Tensor::from_buffer(values, weight.shape())).transpose()?,
            gradients.bias.map(|values| Tensor::from_buffer(values, [out_features])).transpose()?,
        ]);
    }
    dispatch_float!(OP, grad.dtype(), T => {
        let sums = sums.map(|sums| sums.floats::<T>(OP)).transpose()?;
        let (grad, x, w) = (grad.floats::<T>(OP)?, input.floats::<T>(OP)?, weight.floats::<T>(OP)?);
        let gradients = cpu::backward(&grad, sums.as_deref(), &x, &w, extents, needs);
        let tensor = |values, shape: &Shape| Tensor::from_floats(values, shape.clone(), input.dtype());
        Ok(vec![
            gradients.input.map(|values| tensor(values, input.shape())).transpose()?,
            gradients.weight.map(|values| tensor(values, weight.shape())).transpose()?,
            gradients.bias.map(|values| tensor(values, &Shape::from([out_features]))).transpose()?,
        ])
    })
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
        if grad.gpu().is_none() && !backward.create_graph() {
            return host_gradients(backward, &grad, None, [&self.input, &self.weight]);
        }
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
            let grad = rows_of(backward.grad())?;
            let Some(gpu) = grad.gpu() else {
                return host_gradients(backward, &grad, Some(&self.sums), [&self.input, &self.weight]);
            };
            let (dz, db) = gpu::gelu_backward(gpu, &self.sums, &grad)?;
            (dz, backward.needs(2).then_some(db))
        };
        let [dx, dw] = product_gradients(backward, &dz, &self.input, &self.weight)?;
        Ok(vec![dx, dw, db])
    }
}
