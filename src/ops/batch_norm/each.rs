//! Batch normalisation with a ReLU behind it, also over a leading model axis.

use rayon::prelude::*;

use super::{BatchNorm, BatchNormMode, BatchNormRule, BatchStatistics, Layer, cpu, gpu, normalise_on};
use crate::autograd::{Backward, Function, record};
use crate::cpu::Float;
use crate::ops::Counts;
use crate::ops::elementwise::{Unary, derivative};
use crate::tensor::{Buffer, Element, Place, dispatch_stored, place};
use crate::{Error, Result, Tensor};

const OP: &str = "batch_norm_relu_each";
const ALONE: &str = "batch_norm_relu";

/// The ReLU of [`batch_norm`](super::batch_norm): `input` is (batch, …, channels), `weight`, `bias` and statistics are
/// (channels).
///
/// Memory is read once for the statistics, and once more to normalise and rectify; the backward pass finds out from the
/// input again where the ReLU passes. Derivatives of every order: the first fused, further ones made of primitive ops.
///
/// ```
/// use gridgrad::ops::{BatchNormMode, batch_norm_relu};
/// use gridgrad::{DType, Tensor};
/// let x = Tensor::new(&[1.0, 3.0], [2, 1])?;
/// let (weight, bias) = (Tensor::ones([1], DType::F64)?, Tensor::zeros([1], DType::F64)?);
/// let y = batch_norm_relu(&x, &weight, &bias, BatchNormMode::Train, 1e-12)?.output.to_vec::<f64>()?;
/// assert!(y[0] == 0.0 && (y[1] - 1.0).abs() < 1e-9);
/// # Ok::<(), gridgrad::Error>(())
/// ```
///
/// # Errors
/// As [`batch_norm`](super::batch_norm).
pub fn batch_norm_relu(
    input: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    mode: BatchNormMode<'_>,
    eps: f64,
) -> Result<BatchNorm> {
    let &[batch, .., channels] = &input.shape()[..] else {
        return Err(Error::shape(ALONE, format!("input {}, expected (batch, …, channels)", input.shape())));
    };
    let of_model = |tensor: &Tensor| tensor.reshape([&[1], &tensor.shape()[..]].concat());
    let given = match mode {
        BatchNormMode::Train => None,
        BatchNormMode::Eval(BatchStatistics { mean, variance }) => {
            Some(BatchStatistics { mean: of_model(mean)?, variance: of_model(variance)? })
        }
    };
    let mode = given.as_ref().map_or(BatchNormMode::Train, BatchNormMode::Eval);
    let tensors = [of_model(input)?, of_model(weight)?, of_model(bias)?];
    let result = forward(ALONE, &tensors, mode, &Counts::full(1, batch), eps)?;
    let batch = result.batch.map(|BatchStatistics { mean, variance }| -> Result<_> {
        Ok(BatchStatistics { mean: mean.reshape([channels])?, variance: variance.reshape([channels])? })
    });
    Ok(BatchNorm { output: result.output.reshape(input.shape())?, batch: batch.transpose()? })
}

/// [`batch_norm_relu`] for every model: `input` is (models, batch, …, channels), `weight`,
/// `bias` and statistics are (models, channels). In training each model is normalised by the statistics of its own real
/// samples; outputs and gradients of the padding are zero. See [`Counts`].
///
/// First derivatives only.
///
/// # Errors
/// As [`batch_norm`](super::batch_norm), and where the models or counts do not fit.
pub fn batch_norm_relu_each(
    input: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    mode: BatchNormMode<'_>,
    counts: &Counts,
    eps: f64,
) -> Result<BatchNorm> {
    forward(OP, &[input.clone(), weight.clone(), bias.clone()], mode, counts, eps)
}

/// Both ops: `tensors` are input, weight and bias with the models' axis.
fn forward(
    op: &'static str,
    tensors: &[Tensor; 3],
    mode: BatchNormMode<'_>,
    counts: &Counts,
    eps: f64,
) -> Result<BatchNorm> {
    let [input, weight, bias] = tensors;
    let &[models, batch, ref positions @ .., channels] = &input.shape()[..] else {
        let message = format!("input {}, expected (models, batch, …, channels)", input.shape());
        return Err(Error::shape(op, message));
    };
    let positions: usize = positions.iter().product();
    if channels == 0 || eps.is_nan() || eps <= 0.0 {
        let message = format!("input {} and eps {eps}; expected channels and a positive eps", input.shape());
        return Err(Error::argument(op, message));
    }
    let given = match mode {
        BatchNormMode::Train if counts.list().iter().any(|count| count * positions < 2) => {
            let message = format!("input {}: training needs two values per channel or more", input.shape());
            return Err(Error::shape(op, message));
        }
        BatchNormMode::Train => None,
        BatchNormMode::Eval(statistics) => Some(statistics),
    };
    let vectors = [Some(weight), Some(bias), given.map(|given| &given.mean), given.map(|given| &given.variance)];
    if let Some(vector) = vectors.into_iter().flatten().find(|vector| **vector.shape() != [models, channels]) {
        return Err(Error::shape(op, format!("{} for input {}", vector.shape(), input.shape())));
    }
    input.expect_float(op)?;
    [weight, bias].into_iter().try_for_each(|vector| vector.expect_dtype(op, input.dtype()))?;
    let all: Vec<&Tensor> = std::iter::once(input).chain(vectors.into_iter().flatten()).collect();
    let place = place(op, &all)?;
    counts.check(op, [models, batch], place)?;
    let layer = Layer { weight: Some(weight), bias: Some(bias), relu: true, counts: Some(counts) };
    let normalised = match place {
        Place::Gpu(gpu) => normalise_on(gpu, input, layer, given, eps)?,
        Place::Host => on_host(input, [weight, bias], given, counts, eps)?,
    };
    let super::Normalised { output, batch, mean, scale } = normalised;
    let train = batch.is_some();
    let output = record(output, &[input, weight, bias], |_| EachRule {
        input: input.clone(),
        weight: weight.clone(),
        bias: bias.clone(),
        mean,
        scale,
        eps,
        train,
        counts: counts.clone(),
        op,
    });
    Ok(BatchNorm { output, batch })
}

/// The elements of one model's real samples, of a tensor (models, batch, …).
fn real<'a, T>(values: &'a [T], counts: &Counts, batch: usize, model: usize) -> &'a [T] {
    let model_len = values.len() / counts.models();
    &values[model * model_len..][..model_len / batch.max(1) * counts.list()[model]]
}

/// One model's part of a tensor (models, channels).
fn row<T>(values: &[T], channels: usize, model: usize) -> &[T] {
    &values[model * channels..][..channels]
}

/// Vectors of all models, one after the other.
fn stacked<T: Float>(rows: &[Buffer<T>]) -> Result<Tensor> {
    let channels = rows.first().map_or(0, |row| row.len());
    Tensor::from_buffer(
        Buffer::from_fn(rows.len() * channels, |at| rows[at / channels][at % channels]),
        [rows.len(), channels],
    )
}

fn on_host(
    input: &Tensor,
    [weight, bias]: [&Tensor; 2],
    given: Option<&BatchStatistics>,
    counts: &Counts,
    eps: f64,
) -> Result<super::Normalised> {
    let (dtype, batch_size) = (input.dtype(), input.shape()[1]);
    let channels = weight.shape()[1];
    dispatch_stored!(OP, dtype, (S, T) => {
        let (x, w, b) = (input.stored::<S>(OP)?, weight.floats::<T>(OP)?, bias.floats::<T>(OP)?);
        let (mean, variance, batch) = match given {
            Some(given) => (given.mean.cast_values(T::DTYPE)?, given.variance.cast_values(T::DTYPE)?, None),
            None => {
                let of_model = |model: usize| cpu::statistics::<S, T>(real(&x, counts, batch_size, model), channels);
                let statistics: Vec<[Buffer<T>; 3]> = (0..counts.models()).into_par_iter().map(of_model).collect();
                let [mut means, mut biased, mut unbiased] = [const { Vec::new() }; 3];
                for [mean, variance, corrected] in statistics {
                    means.push(mean);
                    biased.push(variance);
                    unbiased.push(corrected);
                }
                let (mean, variance) = (stacked(&means)?, stacked(&unbiased)?);
                (mean.clone(), stacked(&biased)?, Some(BatchStatistics { mean, variance }))
            }
        };
        let scale = cpu::inverse_deviation(variance.data::<T>()?, eps);
        let scale = Tensor::from_buffer(scale, mean.shape())?;
        let (means, scales) = (mean.data::<T>()?, scale.data::<T>()?);
        let model_len = input.elements() / counts.models();
        let output = counts.collect(model_len, |model, _| {
            let [mean, scale, w, b] = [means, scales, &w, &b].map(|values| row(values, channels, model));
            let affine = cpu::Affine::new(mean, scale, Some(w), Some(b));
            cpu::apply::<true, S, T>(real(&x, counts, batch_size, model), &affine)
        });
        let output = Tensor::from_stored(output, input.shape(), dtype)?;
        Ok(super::Normalised { output, batch, mean, scale })
    })
}

struct EachRule {
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    /// (models, channels)
    mean: Tensor,
    /// 1 / √(variance + eps), (models, channels)
    scale: Tensor,
    eps: f64,
    train: bool,
    counts: Counts,
    op: &'static str,
}

impl Function for EachRule {
    fn name(&self) -> &'static str {
        self.op
    }

    /// As [`batch_norm`](super::batch_norm)'s, of the gradient where the ReLU passes.
    fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        if backward.create_graph() && self.op == ALONE {
            return self.composed(backward);
        }
        backward.first_order_only(OP)?;
        let [input, weight, bias] = match place(OP, &[&self.input, backward.grad()])? {
            Place::Gpu(gpu) => {
                let (x, dy, statistics) = (&self.input, backward.grad(), [&self.mean, &self.scale]);
                let counts = Some(&self.counts);
                let layer = Layer { weight: Some(&self.weight), bias: Some(&self.bias), relu: true, counts };
                let [dw, db] = gpu::parameter_gradients(gpu, x, dy, statistics, layer)?;
                let sums = self.train.then_some([&dw, &db]);
                let dx = || gpu::input_gradient(gpu, x, dy, statistics, layer, sums);
                [backward.needs(0).then(dx).transpose()?, Some(dw), Some(db)]
            }
            Place::Host => self.on_host(backward)?,
        };
        let cast = |gradient: Option<Tensor>| gradient.map(|g| g.cast(self.weight.dtype())).transpose();
        Ok(vec![input, cast(weight)?, cast(bias)?])
    }
}

impl EachRule {
    /// Of one model without padding, made of primitive ops.
    fn composed(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let dtype = self.input.dtype();
        let alone = |tensor: &Tensor| tensor.reshape(&tensor.shape()[1..]);
        let (x, weight, mean, scale) =
            (alone(&self.input)?, alone(&self.weight)?, alone(&self.mean)?, alone(&self.scale)?);
        let normalised = x.detach().sub(&mean.cast(dtype)?)?.mul(&scale.cast(dtype)?)?;
        let output = normalised.mul(&weight.detach())?.add(&alone(&self.bias)?.detach())?;
        let passed = alone(backward.grad())?.mul(&derivative(Unary::Relu, &output)?)?;
        let (train, eps) = (self.train, self.eps);
        let rule = BatchNormRule { input: x, weight: Some(weight), bias: None, mean, scale, eps, train };
        let gradients = rule.composed(&passed)?;
        let like = |gradient: Option<Tensor>, tensor: &Tensor| {
            gradient.map(|gradient| gradient.cast(tensor.dtype())?.reshape(tensor.shape())).transpose()
        };
        Ok(vec![
            like(gradients.input, &self.input)?,
            like(Some(gradients.weight), &self.weight)?,
            like(Some(gradients.bias), &self.bias)?,
        ])
    }

    fn on_host(&self, backward: &Backward<'_>) -> Result<[Option<Tensor>; 3]> {
        let (dtype, shape, counts) = (self.input.dtype(), self.input.shape(), &self.counts);
        let (batch, channels) = (shape[1], self.mean.shape()[1]);
        dispatch_stored!(OP, dtype, (S, T) => {
            let (x, dy) = (self.input.stored::<S>(OP)?, backward.grad().stored::<S>(OP)?);
            let (weights, biases) = (self.weight.floats::<T>(OP)?, self.bias.floats::<T>(OP)?);
            let (means, scales) = (self.mean.data::<T>()?, self.scale.data::<T>()?);
            let of_model = |model: usize| {
                let [mean, scale, w, b] = [means, scales, &weights, &biases].map(|all| row(all, channels, model));
                (cpu::Affine::new(mean, scale, Some(w), Some(b)), scale)
            };
            let parameters = |model: usize| {
                let (affine, scale) = of_model(model);
                let [x, dy] = [&x, &dy].map(|values| real(values, counts, batch, model));
                cpu::parameter_gradients::<true, S, T>(x, dy, scale, &affine)
            };
            let (dw, db): (Vec<Buffer<T>>, Vec<Buffer<T>>) =
                (0..counts.models()).into_par_iter().map(|model| parameters(model).into()).unzip();
            let input = if backward.needs(0) {
                let dx = counts.collect(shape.elements() / counts.models(), |model, _| {
                    let (affine, scale) = of_model(model);
                    let [x, dy] = [&x, &dy].map(|values| real(values, counts, batch, model));
                    let sums = self.train.then_some((&dw[model][..], &db[model][..]));
                    cpu::input_gradient::<true, S, T>(x, dy, scale, &affine, sums)
                });
                Some(Tensor::from_stored(dx, shape, dtype)?)
            } else {
                None
            };
            Ok([input, Some(stacked(&dw)?), Some(stacked(&db)?)])
        })
    }
}
