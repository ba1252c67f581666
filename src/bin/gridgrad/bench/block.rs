//! A transformer block by itself: what CrossFormers are made of, and small enough to set beside other frameworks.

use gridgrad::nn::{Context, LayerNorm, Linear, Parameters, Scope};
use gridgrad::ops::global_avg_pool2d;
use gridgrad::ops::lsda::{Grouping, lsda};
use gridgrad::ops::position_bias::{Affine, BiasLayer, PositionBiasNetwork, dynamic_position_bias};
use gridgrad::train::Classifier;
use gridgrad::{DType, Error, Result, Tensor};

/// Channels of the maps, in heads of 32: a first block of CrossFormer-S.
pub const CHANNELS: usize = 96;
/// Classes of the head behind the block, which is there for the loss.
pub const CLASSES: usize = 10;
const HEADS: usize = 3;
/// Side of a group of tokens.
const GROUP: usize = 7;
/// Width of the network that makes the position bias.
const BIAS_WIDTH: usize = CHANNELS / 4 / 4;
const EPS: f64 = 1e-5;

/// Attention within groups of neighbouring tokens and an MLP, each behind a layer norm and around a skip; then the mean of
/// the tokens and a linear map to the classes.
pub struct Block {
    norm1: LayerNorm,
    qkv: Linear,
    projection: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    bias_projection: Linear,
    bias_layers: [(LayerNorm, Linear); 3],
    head: Linear,
    parameters: Parameters,
}

impl Block {
    pub fn new() -> Result<Self> {
        let scope = Scope::new(0, DType::F32);
        let norm = |name: &str, width| LayerNorm::new(&scope.child(name), width, EPS);
        let linear = |name: &str, inputs, outputs| Linear::new(&scope.child(name), inputs, outputs, true);
        let layer = |name: &str, outputs| -> Result<(LayerNorm, Linear)> {
            Ok((norm(&format!("{name}.norm"), BIAS_WIDTH)?, linear(&format!("{name}.linear"), BIAS_WIDTH, outputs)?))
        };
        Ok(Block {
            norm1: norm("norm1", CHANNELS)?,
            qkv: linear("qkv", CHANNELS, 3 * CHANNELS)?,
            projection: linear("projection", CHANNELS, CHANNELS)?,
            norm2: norm("norm2", CHANNELS)?,
            fc1: linear("fc1", CHANNELS, 4 * CHANNELS)?,
            fc2: linear("fc2", 4 * CHANNELS, CHANNELS)?,
            bias_projection: linear("bias", 2, BIAS_WIDTH)?,
            bias_layers: [layer("bias1", BIAS_WIDTH)?, layer("bias2", BIAS_WIDTH)?, layer("bias3", HEADS)?],
            head: linear("head", CHANNELS, CLASSES)?,
            parameters: scope.parameters().clone(),
        })
    }

    /// Multiply-adds of linear maps and attention for a map of these extents (height, width).
    pub fn products([height, width]: [usize; 2]) -> u64 {
        (height * width * (12 * CHANNELS * CHANNELS + 2 * GROUP * GROUP * CHANNELS) + CHANNELS * CLASSES) as u64
    }

    /// The table of position biases.
    fn bias(&self) -> Result<Tensor> {
        let linear = |linear: &Linear| -> Result<Affine> {
            let missing = || Error::Config(format!("{} has no bias", linear.weight.name()));
            Ok(Affine { weight: linear.weight.tensor(), bias: linear.bias.as_ref().ok_or_else(missing)?.tensor() })
        };
        let layer = |(norm, map): &(LayerNorm, Linear)| -> Result<BiasLayer> {
            let norm = Affine { weight: norm.weight.tensor(), bias: norm.bias.tensor() };
            Ok(BiasLayer { norm, linear: linear(map)? })
        };
        let [first, second, third] = &self.bias_layers;
        let layers = [layer(first)?, layer(second)?, layer(third)?];
        let network =
            PositionBiasNetwork { projection: linear(&self.bias_projection)?, layers, residual: false, eps: EPS };
        dynamic_position_bias(&network, [GROUP; 2])
    }
}

impl Classifier for Block {
    /// Logits for maps (batch, height, width, [`CHANNELS`]).
    fn forward(&self, x: &Tensor, _: &Context) -> Result<Tensor> {
        let bias = self.bias()?.cast(x.dtype())?;
        let mixed = lsda(&self.qkv.forward(&self.norm1.forward(x)?)?, Some(&bias), HEADS, Grouping::short(GROUP))?;
        let x = x.add(&self.projection.forward(&mixed)?)?;
        let hidden = self.fc1.forward_gelu(&self.norm2.forward(&x)?)?;
        self.head.forward(&global_avg_pool2d(&x.add(&self.fc2.forward(&hidden)?)?)?)
    }

    fn parameters(&self) -> &Parameters {
        &self.parameters
    }
}
