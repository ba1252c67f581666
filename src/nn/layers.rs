//! Layers with parameters.

use super::{Context, Initializer, Parameter, Scope};
use crate::tensor::Shape;
use crate::{Error, Result, Tensor, ops};

/// y = x Wᵀ + b on the last axis.
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
        let bias = self.bias.as_ref().map(Parameter::tensor);
        ops::linear(input, &self.weight.tensor(), bias.as_ref())
    }
}
/// Normalises the last axis to mean 0 and variance 1, then scales and shifts.
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
        ops::layer_norm(input, &self.weight.tensor(), &self.bias.tensor(), self.eps)
    }
}

/// A convolution of a channels-last map, with PyTorch's default initialisation.
#[derive(Clone, Debug)]
pub struct Conv2d {
    /// (out, in / groups, kernel height, kernel width)
    pub weight: Parameter,
    /// (out)
    pub bias: Option<Parameter>,
    options: ops::Conv2dOptions,
}

impl Conv2d {
    /// A convolution with square kernels.
    ///
    /// # Errors
    /// Where `groups` does not divide the channels, or a name is taken.
    pub fn new(
        scope: &Scope,
        [in_channels, out_channels]: [usize; 2],
        kernel: usize,
        bias: bool,
        options: ops::Conv2dOptions,
    ) -> Result<Self> {
        if options.groups == 0 || !in_channels.is_multiple_of(options.groups) {
            let message = format!("{} groups do not divide {in_channels} channels", options.groups);
            return Err(Error::argument("Conv2d", message));
        }
        let shape = Shape::from([out_channels, in_channels / options.groups, kernel, kernel]);
        let bias = bias.then(|| scope.parameter("bias", [out_channels], Initializer::default_bias(&shape)));
        Ok(Conv2d { weight: scope.parameter("weight", shape, Initializer::DEFAULT)?, bias: bias.transpose()?, options })
    }

    /// (batch, height, width, in) to (batch, height, width, out).
    ///
    /// # Errors
    /// Where the channels are not `in`, or the kernel does not fit into the padded map.
    pub fn forward(&self, input: &Tensor) -> Result<Tensor> {
        let bias = self.bias.as_ref().map(Parameter::tensor);
        ops::conv2d(input, &self.weight.tensor(), bias.as_ref(), self.options)
    }
}

/// Normalises each channel over the batch and the map in training, by running statistics in evaluation.
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
        let running = ops::BatchStatistics { mean: self.running_mean.tensor(), variance: self.running_var.tensor() };
        let mode = if context.is_training() { ops::BatchNormMode::Train } else { ops::BatchNormMode::Eval(&running) };
        let (weight, bias) = (self.weight.tensor(), self.bias.tensor());
        let result = ops::batch_norm(input, Some(&weight), Some(&bias), mode, self.eps)?;
        if let Some(batch) = &result.batch {
            let updated = running.updated(batch, self.momentum)?;
            self.running_mean.set(&updated.mean)?;
            self.running_var.set(&updated.variance)?;
        }
        Ok(result.output)
    }
}
