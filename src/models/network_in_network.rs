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

use crate::nn::{BatchNorm, Context, Conv2d, Linear, Parameters, Scope};
use crate::ops::{Conv2dOptions, Pool2dOptions, avg_pool2d, global_avg_pool2d, max_pool2d};
use crate::{DType, Error, Result, Tensor};

const OP: &str = "network in network";

/// (kernel, channels) of the convolutions of each block.
const BLOCKS: [[(usize, usize); 3]; 3] =
    [[(5, 192), (1, 160), (1, 96)], [(5, 192), (1, 192), (1, 192)], [(3, 192), (1, 192), (1, 192)]];

/// Channels before the head.
const FEATURES: usize = 192;

/// The windows between blocks.
const POOL: Pool2dOptions =
    Pool2dOptions { kernel: [3; 2], stride: [2; 2], padding: [1; 2], ceil_mode: false, count_include_pad: true };

/// A convolution with batch normalisation and ReLU behind it.
struct Layer {
    conv: Conv2d,
    norm: BatchNorm,
}

impl Layer {
    fn new(scope: &Scope, channels: [usize; 2], kernel: usize) -> Result<Self> {
        let options = Conv2dOptions { padding: [kernel / 2; 2], ..Conv2dOptions::default() };
        let conv = Conv2d::new(&scope.child("conv"), channels, kernel, false, options)?;
        Ok(Layer { conv, norm: BatchNorm::new(&scope.child("norm"), channels[1])? })
    }

    fn forward(&self, input: &Tensor, context: &Context) -> Result<Tensor> {
        self.norm.forward(&self.conv.forward(input)?, context)?.relu()
    }
}

/// The network. See the [module documentation](self).
pub struct NetworkInNetwork {
    channels: usize,
    blocks: Vec<Vec<Layer>>,
    fc: Linear,
    parameters: Parameters,
}

impl NetworkInNetwork {
    /// A network for images of `channels` channels, with PyTorch's default initialisation from `seed`.
    ///
    /// # Errors
    /// Where there are no channels or no classes.
    pub fn new(channels: usize, classes: usize, seed: u64, dtype: DType) -> Result<Self> {
        if channels == 0 || classes == 0 {
            return Err(Error::argument(
                OP,
                format!("{channels} channels and {classes} classes; both must be positive"),
            ));
        }
        let scope = Scope::new(seed, dtype);
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
        let fc = Linear::new(&scope.child("fc"), FEATURES, classes, true)?;
        Ok(NetworkInNetwork { channels, blocks, fc, parameters: scope.parameters().clone() })
    }

    /// All parameters and statistics.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// Multiply-adds of convolutions and the classifier for an image of these extents (height, width).
    pub fn products(&self, image: [usize; 2]) -> u64 {
        let (mut sum, mut extents) = (self.fc.weight.shape().elements(), image);
        for block in &self.blocks {
            let weights: usize = block.iter().map(|layer| layer.conv.weight.shape().elements()).sum();
            sum += extents[0] * extents[1] * weights;
            extents = extents.map(|extent| extent.div_ceil(POOL.stride[0]));
        }
        sum as u64
    }

    /// Class logits (batch, classes) of `images` (batch, height, width, channels), normalised, of any size from 5×5.
    ///
    /// # Errors
    /// Where the images do not have the network's channels, or are smaller.
    pub fn logits(&self, images: &Tensor, context: &Context) -> Result<Tensor> {
        let [_, height, width, channels] = images.dims::<4>(OP, "images (batch, height, width, channels)")?;
        if channels != self.channels || height.min(width) < 5 {
            let message = format!("images {}; expected {} channels and at least 5×5", images.shape(), self.channels);
            return Err(Error::shape(OP, message));
        }
        let mut x = images.clone();
        for (number, block) in self.blocks.iter().enumerate() {
            for layer in block {
                x = layer.forward(&x, context)?;
            }
            x = match number {
                0 => max_pool2d(&x, POOL)?,
                1 => avg_pool2d(&x, POOL)?,
                _ => global_avg_pool2d(&x)?,
            };
        }
        self.fc.forward(&x)
    }
}
