//! CrossFormer (ICLR 2022, arXiv 2108.00154) and CrossFormer++ (TPAMI 2024, arXiv 2303.06908): a pyramid vision
//! transformer with cross-scale embeddings, long/short-distance attention and dynamic position bias.
//!
//! The network takes images of any size that leaves a token in its last stage. Parameters have the official names; see
//! [`CrossFormer::load_official`].
//!
//! ```
//! use gridgrad::models::{CrossFormer, CrossFormerConfig};
//! use gridgrad::nn::Context;
//! use gridgrad::{DType, Tensor};
//! let model = CrossFormer::new(CrossFormerConfig::named("micro", 10)?, 0, DType::F32)?;
//! let logits = model.logits(&Tensor::zeros([2, 32, 32, 3], DType::F32)?, &Context::eval())?;
//! assert_eq!(logits.shape().to_vec(), [2, 10]);
//! # Ok::<(), gridgrad::Error>(())
//! ```

mod config;
mod cost;
mod groups;
mod layers;
mod official;

pub use config::{AttentionPattern, CrossFormerConfig, GroupSchedule, Kind, NAMES, PositionBias};
pub use cost::{Cost, StageCost};
pub use groups::BlockGrouping;

use crate::nn::{Context, Initializer, LayerNorm, Linear, Parameter, Parameters, Scope};
use crate::{DType, Error, Result, Tensor};
use layers::{Block, CrossScaleEmbedding};

struct Stage {
    blocks: Vec<Block>,
    /// Layer norm and cross-scale embedding to the next stage.
    merging: Option<(LayerNorm, CrossScaleEmbedding)>,
}

/// The network. See the [module documentation](self).
pub struct CrossFormer {
    config: CrossFormerConfig,
    embedding: CrossScaleEmbedding,
    embedding_norm: LayerNorm,
    absolute_position: Option<Parameter>,
    stages: Vec<Stage>,
    head: Option<(LayerNorm, Linear)>,
    parameters: Parameters,
}

impl CrossFormer {
    /// A network with the published initialisation from `seed`.
    ///
    /// # Errors
    /// Where the configuration cannot be built.
    pub fn new(config: CrossFormerConfig, seed: u64, dtype: DType) -> Result<Self> {
        config.validate()?;
        let scope = Scope::new(seed, dtype);
        let absolute_position = (config.position_bias == PositionBias::Absolute).then(|| {
            let [height, width] = config.img_size.map(|extent| extent / config.patch_stride);
            let initializer = Initializer::TruncatedNormal { std: 0.02, limit: 2.0 };
            scope.parameter("absolute_pos_embed", [1, height * width, config.embed_dim], initializer)
        });
        let embed = scope.child("patch_embed");
        let channels = [config.in_chans, config.embed_dim];
        let embedding =
            CrossScaleEmbedding::new(&embed, "projs", &config.patch_kernels, channels, config.patch_stride)?;
        let embedding_norm = LayerNorm::new(&embed.child("norm"), config.embed_dim, config.layer_norm_eps)?;
        let stages = (0..config.stages()).map(|number| stage(&scope, &config, number)).collect::<Result<_>>()?;
        let head = (config.kind == Kind::Classifier).then(|| -> Result<_> {
            let channels = config.channels(config.stages() - 1);
            let norm = LayerNorm::new(&scope.child("norm"), channels, config.layer_norm_eps)?;
            let weight = Initializer::TruncatedNormal { std: 0.02, limit: 2.0 };
            let sizes = [channels, config.num_classes];
            Ok((norm, Linear::with_init(&scope.child("head"), sizes, weight, Some(Initializer::Constant(0.0)))?))
        });
        Ok(CrossFormer {
            embedding,
            embedding_norm,
            absolute_position: absolute_position.transpose()?,
            stages,
            head: head.transpose()?,
            parameters: scope.parameters().clone(),
            config,
        })
    }

    /// The architecture.
    pub fn config(&self) -> &CrossFormerConfig {
        &self.config
    }

    /// All parameters, under the official names.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// The map of every stage after its last block, (batch, height, width, channels) each. `images` is (batch, height,
    /// width, channels), normalised.
    ///
    /// # Errors
    /// Where the images' channels are not the configuration's, or an image is too small.
    pub fn features(&self, images: &Tensor, context: &Context) -> Result<Vec<Tensor>> {
        let [_, height, width, channels] =
            images.dims::<4>("crossformer", "images (batch, height, width, channels)")?;
        if channels != self.config.in_chans {
            let message =
                format!("images {} with {channels} channels; expected {}", images.shape(), self.config.in_chans);
            return Err(Error::shape("crossformer", message));
        }
        let maps = self.config.stage_maps(height, width)?;
        let mut x = self.embedding_norm.forward(&self.embedding.forward(images)?)?;
        if let Some(position) = &self.absolute_position {
            let position = position.tensor();
            let [rows, columns] = maps[0];
            if position.shape()[1] != rows * columns {
                let message =
                    format!("absolute positions for {} tokens, the image has {rows}×{columns}", position.shape()[1]);
                return Err(Error::shape("crossformer", message));
            }
            x = x.add(&position.reshape([1, rows, columns, self.config.embed_dim])?)?;
        }
        let mut features = Vec::with_capacity(maps.len());
        for (number, (stage, map)) in self.stages.iter().zip(maps).enumerate() {
            for (block, layer) in stage.blocks.iter().enumerate() {
                x = layer.forward(&x, self.config.block_grouping(number, block, map).grouping, context)?;
            }
            features.push(x.clone());
            if let Some((norm, embedding)) = &stage.merging {
                x = embedding.forward(&norm.forward(&x)?)?;
            }
        }
        Ok(features)
    }

    /// Class logits, (batch, classes).
    ///
    /// # Errors
    /// As [`CrossFormer::features`], and where this is a backbone without a head.
    pub fn logits(&self, images: &Tensor, context: &Context) -> Result<Tensor> {
        let Some((norm, head)) = &self.head else {
            return Err(Error::Config("a backbone has no classes; use `features`".into()));
        };
        let mut features = self.features(images, context)?;
        let last = features.pop().ok_or_else(|| Error::Config("a network without stages".into()))?;
        drop(features);
        head.forward(&norm.forward(&last)?.mean(&[1, 2], false)?)
    }
}

fn stage(scope: &Scope, config: &CrossFormerConfig, number: usize) -> Result<Stage> {
    let scope = scope.child(format!("layers.{number}"));
    let block = |block: usize| Block::new(&scope.child(format!("blocks.{block}")), config, number, block);
    let merging = |kernels: &Vec<usize>| -> Result<_> {
        let (scope, channels) = (scope.child("downsample"), config.channels(number));
        let sizes = [channels, config.channels(number + 1)];
        let embedding = CrossScaleEmbedding::new(&scope, "reductions", kernels, sizes, config.merge_stride)?;
        Ok((LayerNorm::new(&scope.child("norm"), channels, config.layer_norm_eps)?, embedding))
    };
    Ok(Stage {
        blocks: (0..config.depths[number]).map(block).collect::<Result<_>>()?,
        merging: config.merge_kernels.get(number).map(merging).transpose()?,
    })
}
