//! Layers with parameters.

use super::{Context, Initializer, Parameter, Scope};
use crate::tensor::Shape;
use crate::{DType, Error, Result, Tensor, ops};

/// Weight and bias in the dtype of a layer's input.
fn affine(weight: &Parameter, bias: Option<&Parameter>, dtype: DType) -> Result<(Tensor, Option<Tensor>)> {
    Ok((weight.tensor_as(dtype)?, bias.map(|bias| bias.tensor_as(dtype)).transpose()?))
}

/// y = x Wᵀ + b on the last axis.
///
/// ```
/// use gridgrad::nn::{Linear, Scope};
/// use gridgrad::{DType, Tensor};
/// let fc = Linear::new(&Scope::new(0, DType::F32), 8, 3, true)?;
/// assert_eq!(fc.forward(&Tensor::zeros([2, 5, 8], DType::F32)?)?.shape().to_vec(), [2, 5, 3]);
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Linear {
    /// (out, in)
    pub weight: Parameter,
    /// (out)
    pub bias: Option<Parameter>,
}

impl Linear {
    /// A linear layer with PyTorch's default initialisation.
    ///
    /// # Errors
    /// Where a name is taken.
    pub fn new(scope: &Scope, in_features: usize, out_features: usize, bias: bool) -> Result<Self> {
        let default = Initializer::default_bias(&Shape::from([out_features, in_features]));
        Self::with_init(scope, [in_features, out_features], Initializer::DEFAULT, bias.then_some(default))
    }

    /// A linear layer with `weight` and, where given, `bias` drawn from these.
    ///
    /// # Errors
    /// Where a name is taken.
    pub fn with_init(
        scope: &Scope,
        [in_features, out_features]: [usize; 2],
        weight: Initializer,
        bias: Option<Initializer>,
    ) -> Result<Self> {
        Ok(Linear {
            weight: scope.parameter("weight", [out_features, in_features], weight)?,
            bias: bias.map(|bias| scope.parameter("bias", [out_features], bias)).transpose()?,
        })
    }

    /// (…, in) to (…, out).
    ///
    /// # Errors
    /// Where the last axis is not `in`.
    pub fn forward(&self, input: &Tensor) -> Result<Tensor> {
        let (weight, bias) = affine(&self.weight, self.bias.as_ref(), input.dtype())?;
        ops::linear(input, &weight, bias.as_ref())
    }

    /// [`Linear::forward`] and the exact GELU behind it, in one op.
    ///
    /// # Errors
    /// As [`Linear::forward`].
    pub fn forward_gelu(&self, input: &Tensor) -> Result<Tensor> {
        let (weight, bias) = affine(&self.weight, self.bias.as_ref(), input.dtype())?;
        ops::linear_gelu(input, &weight, bias.as_ref())
    }
}
/// Normalises the last axis to mean 0 and variance 1, then scales and shifts.
///
/// ```
/// use gridgrad::nn::{LayerNorm, Scope};
/// use gridgrad::{DType, Tensor, random::Philox};
/// let norm = LayerNorm::new(&Scope::new(0, DType::F64), 8, 1e-5)?;
/// let output = norm.forward(&Tensor::randn([4, 8], DType::F64, Philox::new(0))?)?;
/// assert!(output.mean(&[-1], false)?.to_vec::<f64>()?.iter().all(|mean| mean.abs() < 1e-12));
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct LayerNorm {
    /// (channels)
    pub weight: Parameter,
    /// (channels)
    pub bias: Parameter,
    eps: f64,
}

impl LayerNorm {
    /// Starts as scale 1 and shift 0.
    ///
    /// # Errors
    /// Where a name is taken.
    pub fn new(scope: &Scope, channels: usize, eps: f64) -> Result<Self> {
        Ok(LayerNorm {
            weight: scope.parameter("weight", [channels], Initializer::Constant(1.0))?,
            bias: scope.parameter("bias", [channels], Initializer::Constant(0.0))?,
            eps,
        })
    }

    /// (…, channels) to the same shape.
    ///
    /// # Errors
    /// Where the last axis is not `channels`.
    pub fn forward(&self, input: &Tensor) -> Result<Tensor> {
        let dtype = input.dtype();
        ops::layer_norm(input, &self.weight.tensor_as(dtype)?, &self.bias.tensor_as(dtype)?, self.eps)
    }
}

/// A convolution of a channels-last map, with PyTorch's default initialisation.
///
/// ```
/// use gridgrad::nn::{Conv2d, Scope};
/// use gridgrad::ops::Conv2dOptions;
/// use gridgrad::{DType, Tensor};
/// let options = Conv2dOptions { padding: [1, 1], ..Conv2dOptions::default() };
/// let conv = Conv2d::new(&Scope::new(0, DType::F32), [3, 16], 3, true, options)?;
/// assert_eq!(conv.forward(&Tensor::ones([1, 8, 8, 3], DType::F32)?)?.shape().to_vec(), [1, 8, 8, 16]);
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Conv2d {
    /// (out, in / groups, kernel height, kernel width)
    pub weight: Parameter,
    /// (out)
    pub bias: Option<Parameter>,
    options: ops::Conv2dOptions,
}

impl Conv2d {
    /// A convolution with square kernels and PyTorch's default initialisation.
    ///
    /// # Errors
    /// Where `groups` does not divide the channels, or a name is taken.
    pub fn new(
        scope: &Scope,
        channels: [usize; 2],
        kernel: usize,
        bias: bool,
        options: ops::Conv2dOptions,
    ) -> Result<Self> {
        let fan = [channels[1], channels[0] / options.groups.max(1), kernel, kernel];
        let default = Initializer::default_bias(&Shape::from(fan));
        Self::with_init(scope, channels, kernel, Initializer::DEFAULT, bias.then_some(default), options)
    }

    /// A convolution with square kernels, `weight` and, where given, `bias` drawn from these.
    ///
    /// # Errors
    /// Where `groups` does not divide the channels, or a name is taken.
    pub fn with_init(
        scope: &Scope,
        [in_channels, out_channels]: [usize; 2],
        kernel: usize,
        weight: Initializer,
        bias: Option<Initializer>,
        options: ops::Conv2dOptions,
    ) -> Result<Self> {
        if options.groups == 0 || !in_channels.is_multiple_of(options.groups) {
            let message = format!("{} groups do not divide {in_channels} channels", options.groups);
            return Err(Error::argument("Conv2d", message));
        }
        let shape = [out_channels, in_channels / options.groups, kernel, kernel];
        Ok(Conv2d {
            weight: scope.parameter("weight", shape, weight)?,
            bias: bias.map(|bias| scope.parameter("bias", [out_channels], bias)).transpose()?,
            options,
        })
    }

    /// How its kernels move.
    pub fn options(&self) -> ops::Conv2dOptions {
        self.options
    }

    /// (batch, height, width, in) to (batch, height, width, out).
    ///
    /// # Errors
    /// Where the channels are not `in`, or the kernel does not fit into the padded map.
    pub fn forward(&self, input: &Tensor) -> Result<Tensor> {
        let (weight, bias) = affine(&self.weight, self.bias.as_ref(), input.dtype())?;
        ops::conv2d(input, &weight, bias.as_ref(), self.options)
    }
}

/// A transposed convolution of a channels-last map: the gradient of a [`Conv2d`] with respect to its input, as a layer.
///
/// ```
/// use gridgrad::nn::{ConvTranspose2d, Scope};
/// use gridgrad::{DType, Tensor, ops::Conv2dOptions};
/// let double = Conv2dOptions { stride: [2, 2], ..Conv2dOptions::default() };
/// let up = ConvTranspose2d::new(&Scope::new(0, DType::F32), [8, 4], 2, true, double, [0, 0])?;
/// assert_eq!(up.forward(&Tensor::zeros([1, 5, 6, 8], DType::F32)?)?.shape().to_vec(), [1, 10, 12, 4]);
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ConvTranspose2d {
    /// (in, out / groups, kernel height, kernel width)
    pub weight: Parameter,
    /// (out)
    pub bias: Option<Parameter>,
    options: ops::Conv2dOptions,
    output_padding: [usize; 2],
}

impl ConvTranspose2d {
    /// A transposed convolution with square kernels and PyTorch's default initialisation.
    ///
    /// # Errors
    /// Where `groups` does not divide the channels, or a name is taken.
    pub fn new(
        scope: &Scope,
        [in_channels, out_channels]: [usize; 2],
        kernel: usize,
        bias: bool,
        options: ops::Conv2dOptions,
        output_padding: [usize; 2],
    ) -> Result<Self> {
        if options.groups == 0 || !out_channels.is_multiple_of(options.groups) {
            let message = format!("{} groups do not divide {out_channels} channels", options.groups);
            return Err(Error::argument("ConvTranspose2d", message));
        }
        let shape = Shape::from([in_channels, out_channels / options.groups, kernel, kernel]);
        let default = Initializer::default_bias(&shape);
        Ok(ConvTranspose2d {
            weight: scope.parameter("weight", shape, Initializer::DEFAULT)?,
            bias: bias.then(|| scope.parameter("bias", [out_channels], default)).transpose()?,
            options,
            output_padding,
        })
    }

    /// (batch, height, width, in) to a larger map with `out` channels.
    ///
    /// # Errors
    /// Where the channels are not `in`, or nothing is left of the map.
    pub fn forward(&self, input: &Tensor) -> Result<Tensor> {
        let (weight, bias) = affine(&self.weight, self.bias.as_ref(), input.dtype())?;
        ops::conv_transpose2d(input, &weight, bias.as_ref(), self.options, self.output_padding)
    }
}

/// A learned vector for each of a number of symbols.
///
/// ```
/// use gridgrad::nn::{Embedding, Scope};
/// use gridgrad::{DType, Tensor};
/// let embedding = Embedding::new(&Scope::new(0, DType::F32), 10, 4)?;
/// assert_eq!(embedding.forward(&Tensor::new(&[7i64, 0, 7], [3])?)?.shape().to_vec(), [3, 4]);
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Embedding {
    /// (symbols, width)
    pub weight: Parameter,
}

impl Embedding {
    /// Vectors that start from N(0, 1), as in PyTorch.
    ///
    /// # Errors
    /// Where the name is taken.
    pub fn new(scope: &Scope, symbols: usize, width: usize) -> Result<Self> {
        Ok(Embedding { weight: scope.parameter("weight", [symbols, width], Initializer::Normal { std: 1.0 })? })
    }

    /// `i64` indices of any shape to (…, width).
    ///
    /// # Errors
    /// Where an index is not below the number of symbols.
    pub fn forward(&self, indices: &Tensor) -> Result<Tensor> {
        ops::embedding(&self.weight.tensor(), indices)
    }
}

/// Zeroes elements at random in training; the others grow such that the mean stays.
///
/// ```
/// use gridgrad::nn::{Context, Dropout};
/// use gridgrad::random::Philox;
/// use gridgrad::{DType, Tensor};
/// let (dropout, x) = (Dropout::new(0.5)?, Tensor::ones([100], DType::F32)?);
/// assert_eq!(dropout.forward(&x, &Context::eval())?.to_vec::<f32>()?, [1.0; 100]);
/// let dropped = dropout.forward(&x, &Context::train(Philox::new(1)))?.to_vec::<f32>()?;
/// assert!(dropped.iter().all(|&value| value == 0.0 || value == 2.0));
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Dropout {
    p: f64,
}

impl Dropout {
    /// Drops each element with probability `p`.
    ///
    /// # Errors
    /// Where `p` is not in 0 to 1.
    pub fn new(p: f64) -> Result<Self> {
        if (0.0..=1.0).contains(&p) {
            Ok(Dropout { p })
        } else {
            Err(Error::argument("Dropout", format!("probability {p}; expected 0 to 1")))
        }
    }

    /// Any shape to the same shape.
    ///
    /// # Errors
    /// Where the dtype is not floating point.
    pub fn forward(&self, input: &Tensor, context: &Context) -> Result<Tensor> {
        match context.next_stream() {
            Some(stream) if self.p > 0.0 => ops::dropout(input, self.p, stream),
            _ => Ok(input.clone()),
        }
    }
}

/// Normalises each channel over the batch and the map in training, by running statistics in evaluation.
///
/// ```
/// use gridgrad::nn::{BatchNorm, Context, Scope};
/// use gridgrad::random::Philox;
/// use gridgrad::{DType, Tensor};
/// let norm = BatchNorm::new(&Scope::new(0, DType::F64), 1)?;
/// let x = Tensor::new(&[1.0, 3.0], [2, 1])?;
/// let y = norm.forward(&x, &Context::train(Philox::new(0)))?.to_vec::<f64>()?;
/// assert!((y[0] + 1.0).abs() < 1e-4 && (y[1] - 1.0).abs() < 1e-4);
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct BatchNorm {
    /// (channels)
    pub weight: Parameter,
    /// (channels)
    pub bias: Parameter,
    running_mean: Parameter,
    running_var: Parameter,
    momentum: f64,
    eps: f64,
}

impl BatchNorm {
    /// Starts as scale 1, shift 0, running mean 0 and running variance 1; PyTorch's momentum 0.1 and eps 1e-5.
    ///
    /// # Errors
    /// Where a name is taken.
    pub fn new(scope: &Scope, channels: usize) -> Result<Self> {
        let (zero, one) = (Initializer::Constant(0.0), Initializer::Constant(1.0));
        Ok(BatchNorm {
            weight: scope.parameter("weight", [channels], one)?,
            bias: scope.parameter("bias", [channels], zero)?,
            running_mean: scope.statistic("running_mean", [channels], zero)?,
            running_var: scope.statistic("running_var", [channels], one)?,
            momentum: 0.1,
            eps: 1e-5,
        })
    }

    /// (…, channels) to the same shape. In training, moves the running statistics towards the batch's.
    ///
    /// # Errors
    /// Where the last axis is not `channels`, or a training batch has fewer than two values per channel.
    pub fn forward(&self, input: &Tensor, context: &Context) -> Result<Tensor> {
        self.normalised(input, context, |weight, bias, mode| {
            ops::batch_norm(input, Some(weight), Some(bias), mode, self.eps)
        })
    }

    /// The ReLU of [`BatchNorm::forward`], in fewer passes over memory: `input` is (batch, …, channels).
    ///
    /// # Errors
    /// As [`BatchNorm::forward`].
    pub fn forward_relu(&self, input: &Tensor, context: &Context) -> Result<Tensor> {
        self.normalised(input, context, |weight, bias, mode| ops::batch_norm_relu(input, weight, bias, mode, self.eps))
    }

    fn normalised(
        &self,
        input: &Tensor,
        context: &Context,
        op: impl FnOnce(&Tensor, &Tensor, ops::BatchNormMode<'_>) -> Result<ops::BatchNorm>,
    ) -> Result<Tensor> {
        let running = ops::BatchStatistics { mean: self.running_mean.tensor(), variance: self.running_var.tensor() };
        let mode = if context.is_training() { ops::BatchNormMode::Train } else { ops::BatchNormMode::Eval(&running) };
        let (weight, bias) = (self.weight.tensor_as(input.dtype())?, self.bias.tensor_as(input.dtype())?);
        let result = op(&weight, &bias, mode)?;
        if let Some(batch) = &result.batch {
            let updated = running.updated(batch, self.momentum)?;
            // Not shared any more, the parameters are overwritten in place: a recorded step writes to their addresses.
            drop(running);
            self.running_mean.set(&updated.mean)?;
            self.running_var.set(&updated.variance)?;
        }
        Ok(result.output)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Philox;

    fn names(scope: &Scope) -> Vec<String> {
        scope.parameters().iter().map(|parameter| format!("{} {}", parameter.name(), parameter.shape())).collect()
    }

    #[test]
    fn layers_have_pytorchs_names_and_shapes() {
        let scope = Scope::new(0, DType::F32);
        let grouped = ops::Conv2dOptions { groups: 2, stride: [2, 2], ..Default::default() };
        let conv = Conv2d::new(&scope.child("conv"), [4, 6], 3, true, grouped).unwrap();
        let up = ConvTranspose2d::new(&scope.child("up"), [6, 4], 2, false, grouped, [0, 0]).unwrap();
        let norm = BatchNorm::new(&scope.child("bn"), 4).unwrap();
        let embedding = Embedding::new(&scope.child("embed"), 5, 3).unwrap();
        assert_eq!(
            names(&scope),
            [
                "conv.weight (6, 2, 3, 3)",
                "conv.bias (6)",
                "up.weight (6, 2, 2, 2)",
                "bn.weight (4)",
                "bn.bias (4)",
                "bn.running_mean (4)",
                "bn.running_var (4)",
                "embed.weight (5, 3)"
            ]
        );
        let x = Tensor::randn([2, 9, 9, 4], DType::F32, Philox::new(1)).unwrap();
        let y = up.forward(&conv.forward(&x).unwrap()).unwrap();
        assert_eq!(norm.forward(&y, &Context::eval()).unwrap().shape().to_vec(), [2, 8, 8, 4]);
        let indices = Tensor::new(&[4i64, 0], [2]).unwrap();
        assert_eq!(embedding.forward(&indices).unwrap().shape().to_vec(), [2, 3]);
        assert!(Conv2d::new(&scope.child("bad"), [3, 6], 3, true, grouped).is_err());
    }

    #[test]
    fn batch_norm_normalises_in_training_and_follows_the_batches() {
        let scope = Scope::new(0, DType::F64);
        let norm = BatchNorm::new(&scope, 2).unwrap();
        let x = Tensor::randn([64, 2], DType::F64, Philox::new(2)).unwrap().scale(3.0).unwrap().shift(5.0).unwrap();
        let y = norm.forward(&x, &Context::train(Philox::new(0))).unwrap();
        assert!(y.mean_all().unwrap().item().unwrap().abs() < 1e-9);
        for _ in 0..200 {
            norm.forward(&x, &Context::train(Philox::new(0))).unwrap();
        }
        let (trained, settled) = (y, norm.forward(&x, &Context::eval()).unwrap());
        // Running statistics have reached the batch's own; variances differ by n / (n − 1).
        let difference = trained.sub(&settled).unwrap().abs().unwrap().max(&[0, 1], false).unwrap().item().unwrap();
        assert!(difference < 0.05, "{difference}");
    }

    #[test]
    fn dropout_is_for_training_alone() {
        let x = Tensor::ones([1000], DType::F32).unwrap();
        let dropout = Dropout::new(0.25).unwrap();
        assert_eq!(dropout.forward(&x, &Context::eval()).unwrap().raw_bytes().unwrap(), x.raw_bytes().unwrap());
        let dropped = dropout.forward(&x, &Context::train(Philox::new(3))).unwrap().to_f64_vec().unwrap();
        let zeros = dropped.iter().filter(|&&v| v == 0.0).count();
        assert!((200..300).contains(&zeros) && dropped.iter().all(|&v| v == 0.0 || (v - 4.0 / 3.0).abs() < 1e-6));
        assert!(Dropout::new(1.5).is_err());
    }
}
