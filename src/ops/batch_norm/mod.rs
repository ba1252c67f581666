//! Batch normalisation (Ioffe and Szegedy 2015).

pub(crate) mod cost;
mod cpu;
mod each;
pub(crate) mod gpu;

use crate::autograd::{Backward, Function, record};
use crate::gpu::Gpu;
use crate::ops::Counts;
use crate::tensor::{Element, Place, Shape, dispatch_stored, place};
use crate::{DType, Error, Result, Tensor};

pub use each::{batch_norm_relu, batch_norm_relu_each};

const OP: &str = "batch_norm";

/// Mean and variance of each channel, (channels) each.
#[derive(Clone, Debug)]
pub struct BatchStatistics {
    /// Means.
    pub mean: Tensor,
    /// Variances.
    pub variance: Tensor,
}

impl BatchStatistics {
    /// Running statistics after a step: (1 − momentum) of these and momentum of the batch's, off the tape.
    ///
    /// # Errors
    /// Where shapes, dtypes or devices differ.
    pub fn updated(&self, batch: &BatchStatistics, momentum: f64) -> Result<BatchStatistics> {
        let all = [&self.mean, &self.variance, &batch.mean, &batch.variance];
        if let Place::Gpu(gpu) = place("BatchStatistics::updated", &all)? {
            self.expect_alike(batch)?;
            return gpu::updated(gpu, self, batch, momentum);
        }
        let blend = |old: &Tensor, new: &Tensor| {
            old.detach().scale(1.0 - momentum)?.add(&new.detach().cast(old.dtype())?.scale(momentum)?)
        };
        Ok(BatchStatistics { mean: blend(&self.mean, &batch.mean)?, variance: blend(&self.variance, &batch.variance)? })
    }

    fn expect_alike(&self, batch: &BatchStatistics) -> Result<()> {
        let op = "BatchStatistics::updated";
        let shape = self.mean.shape();
        let others = [&self.variance, &batch.mean, &batch.variance];
        if let Some(other) = others.into_iter().find(|other| other.shape() != shape) {
            return Err(Error::shape(op, format!("got {}, expected {shape} as the running mean", other.shape())));
        }
        self.mean.expect_float(op)?;
        self.variance.expect_dtype(op, self.mean.dtype())
    }
}

/// Whose statistics normalise.
///
/// ```
/// use gridgrad::ops::{BatchNormMode, batch_norm};
/// use gridgrad::{DType, Tensor, random::Philox};
/// let x = Tensor::randn([4, 6, 6, 3], DType::F32, Philox::new(0))?;
/// let training = batch_norm(&x, None, None, BatchNormMode::Train, 1e-5)?;
/// let statistics = training.batch.unwrap();
/// let evaluation = batch_norm(&x, None, None, BatchNormMode::Eval(&statistics), 1e-5)?;
/// assert!(evaluation.batch.is_none());
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub enum BatchNormMode<'a> {
    /// The batch's own. The gradient flows through them.
    Train,
    /// Given ones, as constants.
    Eval(&'a BatchStatistics),
}

/// What [`batch_norm`] returns.
#[derive(Clone, Debug)]
pub struct BatchNorm {
    /// The normalised input.
    pub output: Tensor,
    /// When training, the batch's statistics for [`BatchStatistics::updated`], off the tape, with the unbiased
    /// variance (the sum of squares over the count less one), in the dtype in which they were computed.
    pub batch: Option<BatchStatistics>,
}

/// (x − mean) / √(variance + `eps`) · weight + bias for every channel of `input` (…, channels); `weight` and `bias` are
/// (channels), 1 and 0 where absent. The batch's variance is the biased one (the sum of squares over the count).
///
/// The gradient of the first order is fused; where gradients are differentiated again it is made of primitive ops.
///
/// # Errors
/// Where shapes or dtypes do not fit, `eps` is not positive, or there are fewer than two values per channel to train
/// on, which have no unbiased variance.
pub fn batch_norm(
    input: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    mode: BatchNormMode<'_>,
    eps: f64,
) -> Result<BatchNorm> {
    let Some((&channels, outer)) = input.shape().split_last().filter(|&(&channels, _)| channels > 0) else {
        return Err(Error::shape(OP, format!("input {} has no channels", input.shape())));
    };
    let count: usize = outer.iter().product();
    let given = match mode {
        BatchNormMode::Train if count < 2 => {
            let message = format!("input {}: training needs two values per channel or more", input.shape());
            return Err(Error::shape(OP, message));
        }
        BatchNormMode::Train => None,
        BatchNormMode::Eval(statistics) => Some(statistics),
    };
    if eps.is_nan() || eps <= 0.0 {
        return Err(Error::argument(OP, format!("eps must be positive, got {eps}")));
    }
    let vectors = [weight, bias, given.map(|given| &given.mean), given.map(|given| &given.variance)];
    if let Some(vector) = vectors.into_iter().flatten().find(|vector| **vector.shape() != [channels]) {
        return Err(Error::shape(OP, format!("{} for input {}", vector.shape(), input.shape())));
    }
    input.expect_float(OP)?;
    let all: Vec<&Tensor> = std::iter::once(input).chain(vectors.into_iter().flatten()).collect();
    let Normalised { output, batch, mean, scale } = match place(OP, &all)? {
        Place::Gpu(gpu) => normalise_on(gpu, input, Layer { weight, bias, ..Layer::default() }, given, eps)?,
        Place::Host => normalise(input, weight, bias, given, eps)?,
    };
    let inputs: Vec<&Tensor> = [Some(input), weight, bias].into_iter().flatten().collect();
    let output = record(output, &inputs, |_| BatchNormRule {
        input: input.clone(),
        weight: weight.cloned(),
        bias: bias.cloned(),
        mean,
        scale,
        eps,
        train: batch.is_some(),
    });
    Ok(BatchNorm { output, batch })
}

/// What is particular to a layer, beside its input and statistics.
#[derive(Clone, Copy, Default)]
struct Layer<'a> {
    weight: Option<&'a Tensor>,
    bias: Option<&'a Tensor>,
    /// Whether a ReLU follows.
    relu: bool,
    /// Where there is a model axis, in front of the batch and of all vectors.
    counts: Option<&'a Counts>,
}

/// The output and what the backward needs.
struct Normalised {
    output: Tensor,
    batch: Option<BatchStatistics>,
    mean: Tensor,
    scale: Tensor,
}

fn normalise(
    input: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    given: Option<&BatchStatistics>,
    eps: f64,
) -> Result<Normalised> {
    let (dtype, channels) = (input.dtype(), input.shape().last().copied().unwrap_or(1));
    dispatch_stored!(OP, dtype, (S, T) => {
        let x = input.stored::<S>(OP)?;
        let (mean, variance, batch) = match given {
            Some(given) => (given.mean.cast_values(T::DTYPE)?, given.variance.cast_values(T::DTYPE)?, None),
            None => {
                let [mean, biased, unbiased] = cpu::statistics::<S, T>(&x, channels).map(|s| Tensor::from_buffer(s, [channels]));
                let (mean, biased) = (mean?, biased?);
                (mean.clone(), biased, Some(BatchStatistics { mean, variance: unbiased? }))
            }
        };
        let scale = Tensor::from_buffer(cpu::inverse_deviation(variance.data::<T>()?, eps), [channels])?;
        let weight = weight.map(|weight| weight.floats::<T>(OP)).transpose()?;
        let bias = bias.map(|bias| bias.floats::<T>(OP)).transpose()?;
        let (mean_values, scale_values) = (mean.data()?, scale.data()?);
        let affine = cpu::Affine::new(mean_values, scale_values, weight.as_deref(), bias.as_deref());
        let y = cpu::apply::<false, S, T>(&x, &affine);
        Ok(Normalised { output: Tensor::from_stored(y, input.shape(), dtype)?, batch, mean, scale })
    })
}

fn normalise_on(
    gpu: &'static Gpu,
    input: &Tensor,
    layer: Layer<'_>,
    given: Option<&BatchStatistics>,
    eps: f64,
) -> Result<Normalised> {
    let (mean, scale, batch) = match given {
        Some(given) => {
            let variance = given.variance.cast_values(DType::F32)?;
            (given.mean.cast_values(DType::F32)?, gpu::inverse_deviation(gpu, &variance, eps)?, None)
        }
        None => {
            let [mean, scale, variance] = gpu::statistics(gpu, input, layer, eps)?;
            (mean.clone(), scale, Some(BatchStatistics { mean, variance }))
        }
    };
    let output = gpu::apply(gpu, input, [&mean, &scale], layer)?;
    Ok(Normalised { output, batch, mean, scale })
}

struct BatchNormRule {
    input: Tensor,
    weight: Option<Tensor>,
    bias: Option<Tensor>,
    mean: Tensor,
    /// 1 / √(variance + eps)
    scale: Tensor,
    eps: f64,
    train: bool,
}

/// Gradients of input, weight and bias.
struct InputGradients {
    input: Option<Tensor>,
    weight: Tensor,
    bias: Tensor,
}

impl Function for BatchNormRule {
    fn name(&self) -> &'static str {
        OP
    }

    /// With x̂ the normalised input and ⟨·⟩ the mean over the batch: db = Σ dy, dw = Σ dy x̂, and
    /// dx = w / √(variance + eps) · (dy − ⟨dy⟩ − x̂ ⟨dy x̂⟩), without the means where the statistics are constants.
    fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let gradients = if backward.create_graph() { self.composed(backward.grad())? } else { self.fused(backward)? };
        let mut all = vec![gradients.input];
        for (parameter, gradient) in [(&self.weight, gradients.weight), (&self.bias, gradients.bias)] {
            if let Some(parameter) = parameter {
                all.push(Some(gradient.cast(parameter.dtype())?));
            }
        }
        Ok(all)
    }
}

impl BatchNormRule {
    fn fused(&self, backward: &Backward<'_>) -> Result<InputGradients> {
        let (dtype, shape) = (self.input.dtype(), self.input.shape());
        let channels = self.mean.elements();
        if let Place::Gpu(gpu) = place(OP, &[&self.input, backward.grad()])? {
            return self.fused_on(gpu, backward);
        }
        dispatch_stored!(OP, dtype, (S, T) => {
            let (x, dy) = (self.input.stored::<S>(OP)?, backward.grad().stored::<S>(OP)?);
            let weight = self.weight.as_ref().map(|weight| weight.floats::<T>(OP)).transpose()?;
            let (mean, scale) = (self.mean.data::<T>()?, self.scale.data::<T>()?);
            let affine = cpu::Affine::new(mean, scale, weight.as_deref(), None);
            let [dw, db] = cpu::parameter_gradients::<false, S, T>(&x, &dy, scale, &affine);
            let input = if backward.needs(0) {
                let sums = self.train.then_some((&dw[..], &db[..]));
                let dx = cpu::input_gradient::<false, S, T>(&x, &dy, scale, &affine, sums);
                Some(Tensor::from_stored(dx, shape, dtype)?)
            } else {
                None
            };
            Ok(InputGradients {
                input,
                weight: Tensor::from_buffer(dw, [channels])?,
                bias: Tensor::from_buffer(db, [channels])?,
            })
        })
    }

    fn fused_on(&self, gpu: &'static Gpu, backward: &Backward<'_>) -> Result<InputGradients> {
        let (x, dy, statistics) = (&self.input, backward.grad(), [&self.mean, &self.scale]);
        let layer = Layer { weight: self.weight.as_ref(), bias: self.bias.as_ref(), ..Layer::default() };
        let [weight, bias] = gpu::parameter_gradients(gpu, x, dy, statistics, layer)?;
        let sums = self.train.then_some([&weight, &bias]);
        let gradient = || gpu::input_gradient(gpu, x, dy, statistics, layer, sums);
        let input = backward.needs(0).then(gradient).transpose()?;
        Ok(InputGradients { input, weight, bias })
    }

    fn composed(&self, dy: &Tensor) -> Result<InputGradients> {
        let (x, dtype) = (&self.input, self.input.dtype());
        let channels = self.mean.elements();
        let axes: Vec<isize> = (0..x.rank() as isize - 1).collect();
        let (centred, scale) = if self.train {
            let centred = x.sub(&x.mean(&axes, true)?)?;
            let scale = centred.square()?.mean(&axes, true)?.shift(self.eps)?.sqrt()?.recip()?;
            (centred, scale)
        } else {
            (x.sub(&self.mean.cast(dtype)?)?, self.scale.cast(dtype)?)
        };
        let normalised = centred.mul(&scale)?;
        let along = dy.mul(&normalised)?;
        let free = if self.train {
            let projected = normalised.mul(&along.mean(&axes, true)?)?;
            dy.sub(&dy.mean(&axes, true)?)?.sub(&projected)?
        } else {
            dy.clone()
        };
        let scale = match &self.weight {
            Some(weight) => scale.mul(&weight.cast(dtype)?)?,
            None => scale,
        };
        Ok(InputGradients {
            input: Some(free.mul(&scale)?),
            weight: along.sum_to(&Shape::from([channels]))?,
            bias: dy.sum_to(&Shape::from([channels]))?,
        })
    }
}
