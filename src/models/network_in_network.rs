//! The small convolutional network of the certified ensembles: a Network-in-Network (Lin, Chen and Yan, ICLR 2014) of
//! three blocks, each a wide convolution and two of 1×1, as base classifier of Deep Partition Aggregation (Levine and
//! Feizi, ICLR 2021) and Finite Aggregation (Wang, Levine and Feizi, ICML 2022).
//!
//! Every convolution is without bias, and batch normalisation and ReLU follow it:
//!
//! | block | convolutions | then |
//! | --- | --- | --- |
//! | 1 | 5×5 to 192, 1×1 to 160, 1×1 to 96 | largest of 3×3, stride 2, padding 1 |
//! | 2 | 5×5 to 192, 1×1 to 192, 1×1 to 192 | mean of 3×3, stride 2, padding 1, always over 9 |
//! | 3 | 3×3 to 192, 1×1 to 192, 1×1 to 192 | mean over the map, linear map to the classes |
//!
//! Parameters are named `block1.0.conv.weight`, `block1.0.norm.{weight,bias,running_mean,running_var}` and so on to
//! `block3.2`, then `fc.weight` and `fc.bias`: the names of PyTorch modules `block1`, `block2`, `block3` that are
//! sequences of modules with a `conv` and a `norm`, and of a module `fc`.
//!
//! ```
//! use gridgrad::models::NetworkInNetwork;
//! use gridgrad::nn::Context;
//! use gridgrad::{DType, Tensor};
//! let model = NetworkInNetwork::new(1, 10, 0, DType::F32)?;
//! assert_eq!(model.parameters().count(), 996_042);
//! let logits = model.logits(&Tensor::zeros([2, 8, 8, 1], DType::F32)?, &Context::eval())?;
//! assert_eq!(logits.shape().to_vec(), [2, 10]);
//! # Ok::<(), gridgrad::Error>(())
//! ```

use crate::nn::{Context, Initializer, Parameter, Parameters, Scope};
use crate::ops::{
    BatchNormMode, BatchStatistics, Conv2dOptions, Counts, Pool2dOptions, avg_pool2d, batch_norm_relu_each,
    conv2d_each, linear_each, max_pool2d,
};
use crate::tensor::Shape;
use crate::{DType, Error, Result, Tensor};

const OP: &str = "network in network";

/// (kernel, channels) of the convolutions of each block.
const BLOCKS: [[(usize, usize); 3]; 3] =
    [[(5, 192), (1, 160), (1, 96)], [(5, 192), (1, 192), (1, 192)], [(3, 192), (1, 192), (1, 192)]];

/// Channels before the head.
const FEATURES: usize = 192;

/// Height and width of the smallest images.
const SMALLEST: usize = 5;

/// The windows between blocks.
const POOL: Pool2dOptions =
    Pool2dOptions { kernel: [3; 2], stride: [2; 2], padding: [1; 2], ceil_mode: false, count_include_pad: true };

/// A convolution with batch normalisation and ReLU behind it.
struct Layer {
    kernel: usize,
    conv: Parameter,
    weight: Parameter,
    bias: Parameter,
    running_mean: Parameter,
    running_var: Parameter,
}

impl Layer {
    /// How far a training batch moves the running statistics.
    const MOMENTUM: f64 = 0.1;
    const EPS: f64 = 1e-5;

    fn new(scope: &Scope, [inputs, outputs]: [usize; 2], kernel: usize) -> Result<Self> {
        let (zero, one) = (Initializer::Constant(0.0), Initializer::Constant(1.0));
        let norm = scope.child("norm");
        Ok(Layer {
            kernel,
            conv: scope.child("conv").parameter("weight", [outputs, inputs, kernel, kernel], Initializer::DEFAULT)?,
            weight: norm.parameter("weight", [outputs], one)?,
            bias: norm.parameter("bias", [outputs], zero)?,
            running_mean: norm.statistic("running_mean", [outputs], zero)?,
            running_var: norm.statistic("running_var", [outputs], one)?,
        })
    }

    /// (models, batch, height, width, in) to (models, batch, height, width, out).
    fn forward(&self, input: &Tensor, counts: &Counts, context: &Context) -> Result<Tensor> {
        let (dtype, models) = (input.dtype(), counts.models());
        let options = Conv2dOptions { padding: [self.kernel / 2; 2], ..Conv2dOptions::default() };
        let x = conv2d_each(input, &each(&self.conv, models, 4, dtype)?, None, counts, options)?;
        let vector = |parameter: &Parameter| each(parameter, models, 1, dtype);
        let statistic = |parameter: &Parameter| each(parameter, models, 1, parameter.tensor().dtype());
        let running = BatchStatistics { mean: statistic(&self.running_mean)?, variance: statistic(&self.running_var)? };
        let mode = if context.is_training() { BatchNormMode::Train } else { BatchNormMode::Eval(&running) };
        let result = batch_norm_relu_each(&x, &vector(&self.weight)?, &vector(&self.bias)?, mode, counts, Self::EPS)?;
        if let Some(batch) = &result.batch {
            let updated = running.updated(batch, Self::MOMENTUM)?;
            // Not shared any more, the parameters are overwritten in place.
            drop(running);
            self.running_mean.set(&updated.mean.reshape(self.running_mean.shape())?)?;
            self.running_var.set(&updated.variance.reshape(self.running_var.shape())?)?;
        }
        Ok(result.output)
    }
}

/// A parameter as (models, …) with `rank` axes behind, whether it has the axis of the models or not.
fn each(parameter: &Parameter, models: usize, rank: usize, dtype: DType) -> Result<Tensor> {
    let value = parameter.tensor_as(dtype)?;
    let own = value.shape().len().saturating_sub(rank);
    value.reshape([&[models], &value.shape()[own..]].concat())
}

/// The network, or several of them. See the [module documentation](self).
pub struct NetworkInNetwork {
    channels: usize,
    models: usize,
    blocks: Vec<Vec<Layer>>,
    fc: [Parameter; 2],
    parameters: Parameters,
}

impl NetworkInNetwork {
    /// A network for images of `channels` channels, with PyTorch's default initialisation from `seed`.
    ///
    /// # Errors
    /// Where there are no channels or no classes.
    pub fn new(channels: usize, classes: usize, seed: u64, dtype: DType) -> Result<Self> {
        Self::build(&Scope::new(seed, dtype), 1, channels, classes)
    }

    /// A network for each seed, computed together: every parameter has a leading axis (models, …), and along it the bits
    /// that [`NetworkInNetwork::new`] gives the seed.
    ///
    /// # Errors
    /// Where there are no seeds, channels or classes.
    pub fn each(channels: usize, classes: usize, seeds: &[u64], dtype: DType) -> Result<Self> {
        Self::build(&Scope::each(seeds, dtype), seeds.len(), channels, classes)
    }

    fn build(scope: &Scope, models: usize, channels: usize, classes: usize) -> Result<Self> {
        if [models, channels, classes].contains(&0) {
            let message = format!("{models} models, {channels} channels and {classes} classes; all must be positive");
            return Err(Error::argument(OP, message));
        }
        let (mut blocks, mut inputs) = (Vec::new(), channels);
        for (number, layers) in BLOCKS.iter().enumerate() {
            let block = scope.child(format!("block{}", number + 1));
            let mut built = Vec::new();
            for (position, &(kernel, outputs)) in layers.iter().enumerate() {
                built.push(Layer::new(&block.child(position), [inputs, outputs], kernel)?);
                inputs = outputs;
            }
            blocks.push(built);
        }
        let (head, shape) = (scope.child("fc"), Shape::from([classes, FEATURES]));
        let bias = Initializer::default_bias(&shape);
        let fc = [head.parameter("weight", shape, Initializer::DEFAULT)?, head.parameter("bias", [classes], bias)?];
        Ok(NetworkInNetwork { channels, models, blocks, fc, parameters: scope.parameters().clone() })
    }

    /// All parameters and statistics.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// Multiply-adds of convolutions and the classifier of one model for an image of these extents (height, width).
    pub fn products(&self, image: [usize; 2]) -> u64 {
        let (mut sum, mut extents) = (self.fc[0].shape().elements(), image);
        for block in &self.blocks {
            let weights: usize = block.iter().map(|layer| layer.conv.shape().elements()).sum();
            sum += extents[0] * extents[1] * weights;
            extents = extents.map(|extent| extent.div_ceil(POOL.stride[0]));
        }
        (sum / self.models) as u64
    }

    /// The present values of model number `model` under the names and with the shapes of a single network.
    ///
    /// # Errors
    /// Where there is no such model, or a device refuses.
    pub fn state_of(&self, model: usize) -> Result<crate::nn::StateDict> {
        if model >= self.models {
            return Err(Error::argument(OP, format!("model {model} of {}", self.models)));
        }
        let own = |parameter: Parameter| -> Result<_> {
            let value = parameter.tensor().detach();
            let rank = if parameter.name().ends_with("conv.weight") {
                4
            } else {
                1 + usize::from(parameter.name() == "fc.weight")
            };
            let value = each(&parameter, self.models, rank, value.dtype())?.detach().narrow(0, model, 1)?;
            let shape = value.shape()[1..].to_vec();
            Ok((parameter.name().to_owned(), value.reshape(shape)?))
        };
        self.parameters.iter().map(own).collect()
    }

    /// Class logits (batch, classes) of `images` (batch, height, width, channels), normalised, of any size from 5×5.
    ///
    /// # Errors
    /// Where the images do not have the network's channels, or are smaller, or these are several networks.
    pub fn logits(&self, images: &Tensor, context: &Context) -> Result<Tensor> {
        let shape = images.dims::<4>(OP, "images (batch, height, width, channels)")?;
        let counts = Counts::full(1, shape[0]);
        let logits = self.logits_each(&images.reshape([&[1], &shape[..]].concat())?, &counts, context)?;
        let classes = logits.shape()[2];
        logits.reshape([shape[0], classes])
    }

    /// Class logits (models, batch, classes) of `images` (models, batch, height, width, channels), as
    /// [`NetworkInNetwork::logits`]. The numbers of a model depend on its own real samples alone.
    ///
    /// # Errors
    /// Where the images do not have the network's channels, or are smaller, or models or counts do not fit.
    pub fn logits_each(&self, images: &Tensor, counts: &Counts, context: &Context) -> Result<Tensor> {
        let [models, batch, height, width, channels] =
            images.dims::<5>(OP, "images (models, batch, height, width, channels)")?;
        if channels != self.channels || height.min(width) < SMALLEST || models != self.models {
            let message = format!(
                "images {}; expected {} channels and at least {SMALLEST}×{SMALLEST}, for {} models",
                images.shape(),
                self.channels,
                self.models
            );
            return Err(Error::shape(OP, message));
        }
        let mut x = images.clone();
        for (number, block) in self.blocks.iter().enumerate() {
            for layer in block {
                x = layer.forward(&x, counts, context)?;
            }
            x = between(number, &x)?;
        }
        let dtype = x.dtype();
        let [weight, bias] = &self.fc;
        let (weight, bias) = (each(weight, models, 2, dtype)?, each(bias, models, 1, dtype)?);
        linear_each(&x.reshape([models, batch, FEATURES])?, &weight, Some(&bias), counts)
    }
}

/// What follows block `number`. Images are pooled one by one, so models and samples are one axis.
fn between(number: usize, x: &Tensor) -> Result<Tensor> {
    let [models, batch, map @ .., channels] = x.dims::<5>(OP, "a map")?;
    let images = x.reshape([models * batch, map[0], map[1], channels])?;
    let pooled = match number {
        0 => max_pool2d(&images, POOL)?,
        1 => avg_pool2d(&images, POOL)?,
        _ => avg_pool2d(&images, Pool2dOptions::tiling(map))?,
    };
    pooled.reshape([&[models, batch], &pooled.shape()[1..]].concat())
}
