//! The parts of the network, under the official names.

use super::bias::BiasSource;
use super::config::{CrossFormerConfig, split_channels};
use crate::nn::{Context, Conv2d, Initializer, LayerNorm, Linear, Parameter, Scope};
use crate::ops::lsda::{Grouping, attention_weights, lsda, lsda_dropout};
use crate::ops::{EmbeddingNorm, EmbeddingOptions};
use crate::tensor::Shape;
use crate::{Result, Tensor, ops};

/// Every linear layer starts from N(0, 0.02), cut at ±2, with bias 0.
pub(super) const LINEAR: Initializer = Initializer::TruncatedNormal { std: 0.02, limit: 2.0 };
const ZERO: Initializer = Initializer::Constant(0.0);

pub(super) fn linear(scope: &Scope, in_features: usize, out_features: usize, bias: bool) -> Result<Linear> {
    Linear::with_init(scope, [in_features, out_features], LINEAR, bias.then_some(ZERO))
}

/// A cross-scale embedding layer: the patch embedding, or the step between stages.
pub(super) struct CrossScaleEmbedding {
    weights: Vec<Parameter>,
    biases: Vec<Parameter>,
    stride: usize,
}

impl CrossScaleEmbedding {
    /// Kernels named `name`.0, `name`.1, … with `out` channels together.
    pub fn new(
        scope: &Scope,
        name: &str,
        kernels: &[usize],
        [channels, out]: [usize; 2],
        stride: usize,
    ) -> Result<Self> {
        let (mut weights, mut biases) = (Vec::new(), Vec::new());
        for (number, (&kernel, out)) in kernels.iter().zip(split_channels(out, kernels.len())).enumerate() {
            let scope = scope.child(format!("{name}.{number}"));
            let shape = Shape::from([out, channels, kernel, kernel]);
            biases.push((scope.clone(), Initializer::default_bias(&shape), out));
            weights.push(scope.parameter("weight", shape, Initializer::DEFAULT)?);
        }
        let bias = |(scope, initializer, out): (Scope, _, usize)| scope.parameter("bias", [out], initializer);
        let biases = biases.into_iter().map(bias).collect::<Result<_>>()?;
        Ok(CrossScaleEmbedding { weights, biases, stride })
    }

    /// (batch, height, width, channels) to (batch, ⌊height / stride⌋, ⌊width / stride⌋, out).
    pub fn forward(&self, input: &Tensor) -> Result<Tensor> {
        self.with_options(input, &EmbeddingOptions::new(self.stride))
    }

    /// The same with a layer norm after it.
    pub fn forward_normalised(&self, input: &Tensor, norm: &LayerNorm, eps: f64) -> Result<Tensor> {
        let [weight, bias] = [&norm.weight, &norm.bias].map(|parameter| parameter.tensor_as(input.dtype()));
        let layer_norm = Some(EmbeddingNorm { weight: weight?, bias: bias?, eps });
        self.with_options(input, &EmbeddingOptions { layer_norm, ..EmbeddingOptions::new(self.stride) })
    }

    fn with_options(&self, input: &Tensor, options: &EmbeddingOptions) -> Result<Tensor> {
        let values = |parameters: &[Parameter]| -> Result<Vec<Tensor>> {
            parameters.iter().map(|parameter| parameter.tensor_as(input.dtype())).collect()
        };
        ops::cross_scale_embedding_with(input, &values(&self.weights)?, &values(&self.biases)?, options)
    }
}

/// The groups that a block's attention sees, and the bias table for them.
#[derive(Clone, Copy)]
pub(super) struct Groups<'a> {
    pub grouping: Grouping,
    /// In the dtype of the block's input.
    pub table: Option<&'a Tensor>,
}

/// Attention within groups, with its projections.
struct Attention {
    bias: BiasSource,
    qkv: Linear,
    proj: Linear,
    heads: usize,
    no_mask: bool,
    drop_rate: f64,
}

impl Attention {
    fn new(scope: &Scope, config: &CrossFormerConfig, stage: usize, block: usize) -> Result<Self> {
        let channels = config.channels(stage);
        Ok(Attention {
            bias: BiasSource::new(scope, config, stage, block)?,
            qkv: linear(&scope.child("qkv"), channels, 3 * channels, config.qkv_bias)?,
            proj: linear(&scope.child("proj"), channels, channels, true)?,
            heads: config.num_heads[stage],
            no_mask: config.no_mask,
            drop_rate: config.attn_drop_rate,
        })
    }

    /// What the query of image 0 attends to, per head. `no_mask` padding is left out of the picture.
    fn weights(&self, input: &Tensor, groups: Groups<'_>, query: [usize; 2]) -> Result<Vec<Vec<f32>>> {
        attention_weights(&self.qkv.forward(input)?, groups.table, self.heads, groups.grouping, 0, query)
    }

    fn forward(&self, input: &Tensor, groups: Groups<'_>, context: &Context) -> Result<Tensor> {
        if self.no_mask { self.forward_padded(input, groups, context) } else { self.attend(input, groups, context) }
    }

    fn attend(&self, input: &Tensor, Groups { grouping, table }: Groups<'_>, context: &Context) -> Result<Tensor> {
        let qkv = self.qkv.forward(input)?;
        // Asked for only where it is used: the streams of other layers do not depend on a rate of 0.
        let stream = if self.drop_rate > 0.0 { context.next_stream() } else { None };
        let mixed = match stream {
            Some(stream) => lsda_dropout(&qkv, table, self.heads, grouping, self.drop_rate, stream),
            None => lsda(&qkv, table, self.heads, grouping),
        };
        self.proj.forward(&mixed?)
    }

    /// Pads the map in memory, so that padded tokens take part in attention with the biases of K and V as content.
    fn forward_padded(&self, input: &Tensor, groups: Groups<'_>, context: &Context) -> Result<Tensor> {
        let grouping = groups.grouping;
        let mut padded = input.clone();
        for axis in 0..2 {
            let (extent, before) = (input.shape()[axis + 1], grouping.origin[axis]);
            let full = (extent + before).next_multiple_of(grouping.group[axis] * grouping.interval[axis]);
            padded = padded.pad(axis as isize + 1, before, full - extent - before)?;
        }
        let whole = Groups { grouping: Grouping { origin: [0; 2], ..grouping }, ..groups };
        let output = self.attend(&padded, whole, context)?;
        let rows = output.narrow(1, grouping.origin[0], input.shape()[1])?;
        rows.narrow(2, grouping.origin[1], input.shape()[2])
    }
}

/// A transformer block: attention and MLP, each behind a layer norm and around a skip.
pub(super) struct Block {
    norm1: LayerNorm,
    attention: Attention,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    cooling: Option<(Conv2d, LayerNorm)>,
    drop_path_rate: f64,
}

impl Block {
    pub fn new(scope: &Scope, config: &CrossFormerConfig, stage: usize, block: usize) -> Result<Self> {
        let channels = config.channels(stage);
        let hidden = (channels as f64 * config.mlp_ratio[stage]) as usize;
        let eps = config.layer_norm_eps;
        let number = config.depths[..stage].iter().sum::<usize>() + block;
        let last = config.depths.iter().sum::<usize>() - 1;
        let cooling = || -> Result<(Conv2d, LayerNorm)> {
            let options = ops::Conv2dOptions { padding: [1; 2], groups: channels, ..Default::default() };
            let conv = Conv2d::new(&scope.child("ex_conv"), [channels; 2], 3, true, options)?;
            Ok((conv, LayerNorm::new(&scope.child("ex_ln"), channels, eps)?))
        };
        Ok(Block {
            norm1: LayerNorm::new(&scope.child("norm1"), channels, eps)?,
            attention: Attention::new(&scope.child("attn"), config, stage, block)?,
            norm2: LayerNorm::new(&scope.child("norm2"), channels, eps)?,
            fc1: linear(&scope.child("mlp.fc1"), channels, hidden, true)?,
            fc2: linear(&scope.child("mlp.fc2"), hidden, channels, true)?,
            cooling: config.has_cooling(stage, block).then(cooling).transpose()?,
            drop_path_rate: config.drop_path_rate * number as f64 / last.max(1) as f64,
        })
    }

    /// (batch, height, width, channels) to the same shape.
    pub fn forward(&self, input: &Tensor, groups: Groups<'_>, context: &Context) -> Result<Tensor> {
        let attended = self.attention.forward(&self.norm1.forward(input)?, groups, context)?;
        let x = input.add(&self.drop_path(attended, context)?)?;
        let hidden = self.fc1.forward_gelu(&self.norm2.forward(&x)?)?;
        let x = x.add(&self.drop_path(self.fc2.forward(&hidden)?, context)?)?;
        match &self.cooling {
            None => Ok(x),
            Some((conv, norm)) => norm.forward(&conv.forward(&x)?),
        }
    }

    /// What a query of the first image attends to, per head: weights over the map.
    pub fn attention_weights(&self, input: &Tensor, groups: Groups<'_>, query: [usize; 2]) -> Result<Vec<Vec<f32>>> {
        self.attention.weights(&self.norm1.forward(input)?, groups, query)
    }

    /// Where the bias of its attention comes from.
    pub fn bias(&self) -> &BiasSource {
        &self.attention.bias
    }

    fn drop_path(&self, branch: Tensor, context: &Context) -> Result<Tensor> {
        match context.next_stream() {
            Some(stream) if self.drop_path_rate > 0.0 => ops::drop_path(&branch, self.drop_path_rate, stream),
            _ => Ok(branch),
        }
    }
}

impl CrossFormerConfig {
    /// Whether an amplitude cooling layer follows a block: after every third one, but not after a stage's last.
    pub(super) fn has_cooling(&self, stage: usize, block: usize) -> bool {
        self.use_acl && (block + 1).is_multiple_of(3) && block + 1 < self.depths[stage]
    }
}
