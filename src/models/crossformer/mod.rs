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

mod bias;
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
use bias::StageBias;
use layers::{Block, CrossScaleEmbedding, Groups};

/// A block's place in the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockPosition {
    /// Stage, from 0.
    pub stage: usize,
    /// Block within the stage, from 0.
    pub block: usize,
}

/// What one token attends to in one block.
#[derive(Clone, Debug)]
pub struct AttentionMap {
    /// The block.
    pub position: BlockPosition,
    /// Its groups.
    pub grouping: BlockGrouping,
    /// Height and width of the block's map, in tokens.
    pub map: [usize; 2],
    /// The token (y, x).
    pub query: [usize; 2],
    /// For each head, weights of all tokens, row-major; 0 outside the group.
    pub heads: Vec<Vec<f32>>,
}

struct Stage {
    blocks: Vec<Block>,
    bias: StageBias,
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
        let mut features = Vec::with_capacity(self.stages.len());
        self.run(images, |position, block, x, groups| {
            let x = block.forward(x, groups, context)?;
            if position.block + 1 == self.config.depths[position.stage] {
                features.push(x.clone());
            }
            Ok(x)
        })?;
        Ok(features)
    }

    /// What tokens attend to: for every block, every head and every query (y, x) of the first image, weights over the
    /// block's map. `queries` are given as shares of the map's height and width, 0 to 1.
    ///
    /// # Errors
    /// As [`CrossFormer::features`].
    pub fn attention_maps(&self, images: &Tensor, queries: &[[f64; 2]]) -> Result<Vec<AttentionMap>> {
        let mut maps = Vec::new();
        self.run(images, |position, block, x, groups| {
            let map = [x.shape()[1], x.shape()[2]];
            for share in queries {
                let token = |axis: usize| ((share[axis] * map[axis] as f64) as usize).min(map[axis] - 1);
                let query = [token(0), token(1)];
                let heads = block.attention_weights(x, groups, query)?;
                maps.push(AttentionMap {
                    position,
                    grouping: self.config.block_grouping(position.stage, position.block, map),
                    map,
                    query,
                    heads,
                });
            }
            block.forward(x, groups, &Context::eval())
        })?;
        Ok(maps)
    }

    /// Embeds `images` and takes them through the blocks; `visit` applies each.
    fn run(
        &self,
        images: &Tensor,
        mut visit: impl FnMut(BlockPosition, &Block, &Tensor, Groups<'_>) -> Result<Tensor>,
    ) -> Result<()> {
        let [_, height, width, channels] =
            images.dims::<4>("crossformer", "images (batch, height, width, channels)")?;
        if channels != self.config.in_chans {
            let message =
                format!("images {} with {channels} channels; expected {}", images.shape(), self.config.in_chans);
            return Err(Error::shape("crossformer", message));
        }
        let maps = self.config.stage_maps(height, width)?;
        let eps = self.config.layer_norm_eps;
        let x = self.embedding.forward_normalised(images, &self.embedding_norm, eps)?;
        let mut x = self.add_absolute_position(x, maps[0])?;
        for (number, (stage, map)) in self.stages.iter().zip(maps).enumerate() {
            let grouping = |block: usize| self.config.block_grouping(number, block, map).grouping;
            let groups: Vec<[usize; 2]> = (0..stage.blocks.len()).map(|block| grouping(block).group).collect();
            let sources: Vec<_> = stage.blocks.iter().map(Block::bias).collect();
            let tables = stage.bias.tables(&sources, &groups, x.dtype())?;
            for (block, (layer, table)) in stage.blocks.iter().zip(&tables).enumerate() {
                let groups = Groups { grouping: grouping(block), table: table.as_ref() };
                x = visit(BlockPosition { stage: number, block }, layer, &x, groups)?;
            }
            if let Some((norm, embedding)) = &stage.merging {
                x = embedding.forward(&norm.forward(&x)?)?;
            }
        }
        Ok(())
    }

    fn add_absolute_position(&self, x: Tensor, [rows, columns]: [usize; 2]) -> Result<Tensor> {
        let Some(position) = &self.absolute_position else { return Ok(x) };
        let position = position.tensor_as(x.dtype())?;
        if position.shape()[1] != rows * columns {
            let message =
                format!("absolute positions for {} tokens, the image has {rows}×{columns}", position.shape()[1]);
            return Err(Error::shape("crossformer", message));
        }
        x.add(&position.reshape([1, rows, columns, self.config.embed_dim])?)
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
        bias: StageBias::default(),
        merging: config.merge_kernels.get(number).map(merging).transpose()?,
    })
}
