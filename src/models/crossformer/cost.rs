//! Parameters and multiply-adds, by the conventions of the published tables.

use super::CrossFormer;
use super::config::{CrossFormerConfig, Kind, PositionBias, split_channels};
use crate::Result;

/// What a part of the network costs for one image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StageCost {
    /// Learned values.
    pub parameters: usize,
    /// Multiply-adds of convolutions and matrix products.
    pub products: u64,
    /// Multiply-adds by the authors' counter, which adds layer norms and the position bias network and leaves out the
    /// amplitude cooling layers. The published "FLOPs" are these.
    pub published: u64,
}

/// Costs of the whole network for one image of the configuration's size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cost {
    /// The patch embedding.
    pub embedding: StageCost,
    /// Each stage: its blocks, and the step to the next stage.
    pub stages: Vec<StageCost>,
    /// Final norm and classifier.
    pub head: StageCost,
}

impl Cost {
    /// The sum of all parts.
    pub fn total(&self) -> StageCost {
        let parts = self.stages.iter().chain([&self.embedding, &self.head]);
        parts.fold(StageCost::default(), |sum, part| StageCost {
            parameters: sum.parameters + part.parameters,
            products: sum.products + part.products,
            published: sum.published + part.published,
        })
    }
}

impl CrossFormer {
    /// Parameters and multiply-adds per stage.
    ///
    /// # Errors
    /// Never for a network that was built.
    pub fn cost(&self) -> Result<Cost> {
        let config = self.config();
        let maps = config.stage_maps(config.img_size[0], config.img_size[1])?;
        let count = |prefix: &str| -> usize {
            let named = self.parameters().weights().filter(|parameter| parameter.name().starts_with(prefix));
            named.map(|parameter| parameter.shape().elements()).sum()
        };
        let stages = (0..config.stages()).map(|stage| {
            let (products, published) = stage_products(config, stage, maps[stage]);
            StageCost { parameters: count(&format!("layers.{stage}.")), products, published }
        });
        let [rows, columns] = maps[0];
        let tokens = (rows * columns) as u64;
        let embedding = tokens * kernel_products(&config.patch_kernels, config.in_chans, config.embed_dim);
        let mut head = StageCost { parameters: count("norm.") + count("head."), ..StageCost::default() };
        if config.kind == Kind::Classifier {
            let channels = config.channels(config.stages() - 1) as u64;
            head.products = channels * config.num_classes as u64;
            // The counter takes the first map over 2 to the number of stages for the last map.
            head.published = head.products + channels * (tokens >> config.stages());
        }
        Ok(Cost {
            embedding: StageCost {
                parameters: count("patch_embed.") + count("absolute_pos_embed"),
                products: embedding,
                published: embedding + tokens * config.embed_dim as u64,
            },
            stages: stages.collect(),
            head,
        })
    }
}

fn kernel_products(kernels: &[usize], channels: usize, out: usize) -> u64 {
    let kernel = |(&side, out): (&usize, usize)| (side * side * channels * out) as u64;
    kernels.iter().zip(split_channels(out, kernels.len())).map(kernel).sum()
}

/// Multiply-adds of a stage without and with what the authors' counter adds.
fn stage_products(config: &CrossFormerConfig, stage: usize, [rows, columns]: [usize; 2]) -> (u64, u64) {
    let tokens = (rows * columns) as u64;
    let channels = config.channels(stage) as u64;
    let (mut products, mut cooling, mut extra) = (0, 0, 0);
    for block in 0..config.depths[stage] {
        let [gh, gw] = config.block_grouping(stage, block, [rows, columns]).grouping.group;
        let group = (gh * gw) as u64;
        let hidden = (channels as f64 * config.mlp_ratio[stage]) as u64;
        products += tokens * (4 * channels * channels + 2 * group * channels + 2 * channels * hidden);
        extra += 2 * tokens * channels;
        if matches!(config.position_bias, PositionBias::Dynamic | PositionBias::DynamicResidual) {
            let (width, heads) = (channels / 4 / 4, config.num_heads[stage] as u64);
            // The counter charges the network once per token of a group, in every group.
            extra += tokens * (2 * width + 2 * width * width + width * heads);
        }
        if config.has_cooling(stage, block) {
            cooling += tokens * 9 * channels;
        }
    }
    if let Some(kernels) = config.merge_kernels.get(stage) {
        let outputs = tokens / (config.merge_stride * config.merge_stride) as u64;
        products += outputs * kernel_products(kernels, channels as usize, config.channels(stage + 1));
        extra += tokens * channels;
    }
    (products + cooling, products + extra)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;

    #[test]
    fn counts_match_the_published_table() {
        for (name, parameters, published, products) in [
            ("tiny", 27_776_794, 2.858, 2.853),
            ("small", 30_657_394, 4.910, 4.902),
            ("base", 51_971_554, 9.165, 9.152),
            ("large", 91_971_184, 16.116, 16.095),
            ("++small", 23_325_340, 4.389, 4.383),
            ("++base", 51_994_594, 9.504, 9.494),
            ("++large", 92_001_904, 16.567, 16.551),
            ("++huge", 95_962_944, 21.586, 21.566),
        ] {
            let model = CrossFormer::new(CrossFormerConfig::named(name, 1000).unwrap(), 0, DType::Bf16).unwrap();
            let cost = model.cost().unwrap();
            let total = cost.total();
            let giga = |count: u64| (count as f64 / 1e6).round() / 1e3;
            assert_eq!((total.parameters, total.parameters), (parameters, model.parameters().count()), "{name}");
            // The table's second column is without the classifier.
            let products_before_head = total.products - cost.head.products;
            assert_eq!((giga(total.published), giga(products_before_head)), (published, products), "{name}");
        }
    }
}
