//! What a CrossFormer is made of.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// What the network returns, and how its long-distance attention meets maps of any size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Logits of classes. A map no larger than a group attends in groups of its shorter side.
    #[default]
    #[serde(rename = "cls")]
    Classifier,
    /// The map of every stage. A map no larger than a group attends as a whole.
    Backbone,
    /// The map of every stage, with the grouping of the original dense code: the interval is fixed, and a long-distance
    /// group spans the whole map.
    LegacyBackbone,
}

/// Which blocks attend to adjacent tokens and which to distant ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttentionPattern {
    /// Even blocks of a stage short, odd ones long: the paper's.
    #[default]
    Alternate,
    /// Short distance in every block.
    Short,
    /// Long distance in every block.
    Long,
}

/// How attention knows where tokens are (the paper's comparison of position representations).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PositionBias {
    /// A network from the offset to the bias: the paper's DPB.
    #[default]
    Dynamic,
    /// The same with skip connections.
    DynamicResidual,
    /// A learned table per block (Swin's relative position bias). Fixes the largest group.
    Relative,
    /// A learned vector per token after the patch embedding. Fixes the image size.
    Absolute,
    /// Nothing.
    None,
}

/// How the group size grows with depth (CrossFormer++, progressive group size).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupSchedule {
    /// One size per stage, from the list.
    #[default]
    Constant,
    /// Linear from 4 to the whole map over all blocks.
    Linear,
    /// Linear, then the whole map, or half of it in the third stage.
    LinearDiv,
    /// Linear, then half the map and the whole map by turns in the third stage.
    Alter,
    /// In the third stage half the listed size in the first four blocks.
    #[serde(rename = "7_14")]
    SevenFourteen,
}

/// A CrossFormer's architecture. Lists have one entry per stage, of which there may be any number.
///
/// As JSON or TOML, keys left out take the published default (CrossFormer-S at 224 × 224), and an unknown key is an error.
///
/// ```
/// use gridgrad::models::CrossFormerConfig;
/// let small = CrossFormerConfig::named("small", 10)?;
/// assert_eq!((small.depths.clone(), small.embed_dim), (vec![2, 2, 6, 2], 96));
/// let same: CrossFormerConfig = serde_json::from_str(r#"{"num_classes": 10, "drop_path_rate": 0.2}"#).unwrap();
/// assert_eq!(same, small);
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Partial")]
pub struct CrossFormerConfig {
    /// What the network returns.
    pub kind: Kind,
    /// Channels of the image.
    pub in_chans: usize,
    /// Height and width of the images that the group schedule and costs are computed for. Others work as well.
    pub img_size: [usize; 2],
    /// Classes of the head.
    pub num_classes: usize,
    /// Channels of the first stage; each further stage has twice as many.
    pub embed_dim: usize,
    /// Blocks.
    pub depths: Vec<usize>,
    /// Attention heads.
    pub num_heads: Vec<usize>,
    /// Tokens along a side of a group, G.
    pub group_size: Vec<usize>,
    /// Distance between the tokens of a long-distance group, I.
    pub interval: Vec<usize>,
    /// Width of the MLP's hidden layer in channels of the stage.
    pub mlp_ratio: Vec<f64>,
    /// Sides of the patch embedding's kernels.
    pub patch_kernels: Vec<usize>,
    /// Stride of the patch embedding.
    pub patch_stride: usize,
    /// Sides of the kernels between stages, one list per transition.
    pub merge_kernels: Vec<Vec<usize>>,
    /// Stride between stages.
    pub merge_stride: usize,
    /// Whether the projections to Q, K and V have a bias.
    pub qkv_bias: bool,
    /// Added to variances in layer norms.
    pub layer_norm_eps: f64,
    /// Amplitude cooling layers (CrossFormer++).
    pub use_acl: bool,
    /// Chooses the interval such that one long-distance region covers the map.
    pub adaptive_interval: bool,
    /// 0 pads maps behind, 1 on both sides.
    pub pad_type: usize,
    /// Lets padded tokens take part in attention, as keys without content.
    pub no_mask: bool,
    /// Largest stochastic depth rate, reached in the last block.
    pub drop_path_rate: f64,
    /// Rate of dropout on the attention probabilities; 0 in all published models.
    pub attn_drop_rate: f64,
    /// How the group size grows.
    pub group_type: GroupSchedule,
    /// Which distances attend.
    pub attention: AttentionPattern,
    /// Position representation.
    pub position_bias: PositionBias,
}

/// The configuration as written, before defaults.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Partial {
    model: Option<String>,
    kind: Kind,
    in_chans: Option<usize>,
    img_size: Option<[usize; 2]>,
    num_classes: Option<usize>,
    embed_dim: Option<usize>,
    depths: Option<Vec<usize>>,
    num_heads: Option<Vec<usize>>,
    group_size: Option<Vec<usize>>,
    interval: Option<Vec<usize>>,
    mlp_ratio: Option<Vec<f64>>,
    patch_kernels: Option<Vec<usize>>,
    patch_stride: Option<usize>,
    merge_kernels: Option<Vec<Vec<usize>>>,
    merge_stride: Option<usize>,
    qkv_bias: Option<bool>,
    layer_norm_eps: Option<f64>,
    use_acl: bool,
    adaptive_interval: bool,
    pad_type: usize,
    no_mask: bool,
    drop_path_rate: f64,
    attn_drop_rate: f64,
    group_type: GroupSchedule,
    attention: AttentionPattern,
    position_bias: PositionBias,
}

impl TryFrom<Partial> for CrossFormerConfig {
    type Error = Error;

    fn try_from(partial: Partial) -> Result<Self> {
        if let Some(model) = partial.model.filter(|model| model != "crossformer") {
            return Err(Error::Config(format!("model '{model}' is not 'crossformer'")));
        }
        const MOST_STAGES: usize = 16;
        let depths = partial.depths.unwrap_or_else(|| vec![2, 2, 6, 2]);
        let stages = depths.len();
        if stages == 0 || stages > MOST_STAGES {
            return Err(Error::Config(format!("depths has {stages} stages; expected 1 to {MOST_STAGES}")));
        }
        let embed_dim = partial.embed_dim.unwrap_or(96);
        let doubled = |value: usize, stage: usize| value.saturating_mul(1 << stage);
        let patch_kernels = partial.patch_kernels.unwrap_or_else(|| vec![4, 8, 16, 32]);
        let config = CrossFormerConfig {
            kind: partial.kind,
            in_chans: partial.in_chans.unwrap_or(3),
            img_size: partial.img_size.unwrap_or([224, 224]),
            num_classes: partial.num_classes.unwrap_or(1000),
            num_heads: partial
                .num_heads
                .unwrap_or_else(|| (0..stages).map(|stage| doubled((embed_dim / 32).max(1), stage)).collect()),
            group_size: partial.group_size.unwrap_or_else(|| vec![7; stages]),
            interval: partial.interval.unwrap_or_else(|| (0..stages).rev().map(|halvings| 1 << halvings).collect()),
            mlp_ratio: partial.mlp_ratio.unwrap_or_else(|| vec![4.0; stages]),
            patch_stride: partial.patch_stride.unwrap_or_else(|| patch_kernels.first().copied().unwrap_or(4)),
            patch_kernels,
            merge_kernels: partial.merge_kernels.unwrap_or_else(|| vec![vec![2, 4]; stages - 1]),
            merge_stride: partial.merge_stride.unwrap_or(2),
            qkv_bias: partial.qkv_bias.unwrap_or(true),
            layer_norm_eps: partial.layer_norm_eps.unwrap_or(1e-5),
            use_acl: partial.use_acl,
            adaptive_interval: partial.adaptive_interval,
            pad_type: partial.pad_type,
            no_mask: partial.no_mask,
            drop_path_rate: partial.drop_path_rate,
            attn_drop_rate: partial.attn_drop_rate,
            group_type: partial.group_type,
            attention: partial.attention,
            position_bias: partial.position_bias,
            embed_dim,
            depths,
        };
        config.validate()?;
        Ok(config)
    }
}

/// Names that [`CrossFormerConfig::named`] knows.
pub const NAMES: [&str; 9] = ["micro", "tiny", "small", "base", "large", "++small", "++base", "++large", "++huge"];

impl CrossFormerConfig {
    /// A published size, for `num_classes` classes at 224 × 224, or `micro`, a two-stage network of ours for 32 × 32.
    ///
    /// # Errors
    /// Where the name is not one of [`NAMES`].
    pub fn named(name: &str, num_classes: usize) -> Result<Self> {
        let (embed_dim, depths, drop_path_rate) = match name {
            "micro" => return Self::micro(num_classes),
            "tiny" => (64, [1, 1, 8, 6], 0.1),
            "small" => (96, [2, 2, 6, 2], 0.2),
            "base" => (96, [2, 2, 18, 2], 0.3),
            "large" => (128, [2, 2, 18, 2], 0.5),
            "++small" => (64, [2, 2, 18, 2], 0.2),
            "++base" => (96, [2, 2, 18, 2], 0.3),
            "++large" => (128, [2, 2, 18, 2], 0.5),
            "++huge" => (128, [6, 6, 18, 2], 0.5),
            _ => return Err(Error::Config(format!("model '{name}' is not one of {}", NAMES.join(", ")))),
        };
        let mut partial = Partial {
            num_classes: Some(num_classes),
            embed_dim: Some(embed_dim),
            depths: Some(depths.to_vec()),
            drop_path_rate,
            ..Partial::default()
        };
        if name.starts_with("++") {
            partial.group_size = Some(vec![4, 4, 14, 7]);
            partial.interval = Some(vec![4, 2, 1, 1]);
            partial.use_acl = true;
        }
        partial.try_into()
    }

    /// Two stages for 32 × 32 images: maps of 8 × 8 and 4 × 4, so that both kinds of attention have work.
    fn micro(num_classes: usize) -> Result<Self> {
        Partial {
            img_size: Some([32, 32]),
            num_classes: Some(num_classes),
            embed_dim: Some(48),
            depths: Some(vec![2, 2]),
            num_heads: Some(vec![3, 6]),
            group_size: Some(vec![4, 4]),
            interval: Some(vec![2, 1]),
            mlp_ratio: Some(vec![2.0, 2.0]),
            drop_path_rate: 0.05,
            ..Partial::default()
        }
        .try_into()
    }

    /// The number of stages.
    pub fn stages(&self) -> usize {
        self.depths.len()
    }

    /// Channels of a stage.
    pub fn channels(&self, stage: usize) -> usize {
        self.embed_dim << stage
    }

    /// Height and width of every stage's map for an image of `height` × `width`.
    ///
    /// # Errors
    /// Where nothing is left of the image in some stage; says the smallest image that works.
    pub fn stage_maps(&self, height: usize, width: usize) -> Result<Vec<[usize; 2]>> {
        let mut maps = vec![[height / self.patch_stride, width / self.patch_stride]];
        for _ in 1..self.stages() {
            let [h, w] = maps[maps.len() - 1];
            maps.push([h / self.merge_stride, w / self.merge_stride]);
        }
        if maps.iter().any(|map| map.contains(&0)) {
            let smallest = self.patch_stride.saturating_mul(self.merge_stride.saturating_pow(self.stages() as u32 - 1));
            let message = format!("an image of {height}×{width} is too small; the smallest is {smallest}×{smallest}");
            return Err(Error::Config(message));
        }
        Ok(maps)
    }

    /// Compares all parameters with each other.
    ///
    /// # Errors
    /// Names the first that cannot be built.
    pub fn validate(&self) -> Result<()> {
        let check = |holds: bool, message: &dyn Fn() -> String| {
            if holds { Ok(()) } else { Err(Error::Config(message())) }
        };
        let stages = self.stages();
        for (key, len) in [
            ("num_heads", self.num_heads.len()),
            ("group_size", self.group_size.len()),
            ("interval", self.interval.len()),
            ("mlp_ratio", self.mlp_ratio.len()),
            ("merge_kernels", self.merge_kernels.len() + 1),
        ] {
            check(len == stages, &|| format!("{key} has entries for {len} stages, depths for {stages}"))?;
        }
        check((1..=1 << 16).contains(&self.embed_dim), &|| {
            format!("embed_dim {} is not in 1 to 65536", self.embed_dim)
        })?;
        check((1..=1 << 12).contains(&self.in_chans), &|| format!("in_chans {} is not in 1 to 4096", self.in_chans))?;
        check(self.img_size.iter().all(|side| (1..=1 << 16).contains(side)), &|| {
            format!("img_size {:?} is not in 1 to 65536", self.img_size)
        })?;
        check((1..=1 << 24).contains(&self.num_classes), &|| {
            format!("num_classes {} is not in 1 to 16777216", self.num_classes)
        })?;
        for stage in 0..stages {
            let (channels, heads) = (self.channels(stage), self.num_heads[stage]);
            check((1..=4096).contains(&self.depths[stage]), &|| {
                format!("stage {stage}: depth {} is not in 1 to 4096", self.depths[stage])
            })?;
            check(heads > 0 && channels.is_multiple_of(heads), &|| {
                format!("stage {stage}: {heads} heads do not divide {channels} channels")
            })?;
            check((1..=1 << 12).contains(&self.group_size[stage]), &|| {
                format!("stage {stage}: group_size {} is not in 1 to 4096", self.group_size[stage])
            })?;
            check((1..=1 << 12).contains(&self.interval[stage]), &|| {
                format!("stage {stage}: interval {} is not in 1 to 4096", self.interval[stage])
            })?;
            let hidden = channels as f64 * self.mlp_ratio[stage];
            check((1.0..1e9).contains(&hidden), &|| {
                format!("stage {stage}: mlp_ratio {} gives no usable hidden width", self.mlp_ratio[stage])
            })?;
        }
        let needs_bias_width = matches!(self.position_bias, PositionBias::Dynamic | PositionBias::DynamicResidual);
        check(!needs_bias_width || self.embed_dim / 4 / 4 > 0, &|| {
            format!("embed_dim {} leaves no width for the position bias network; at least 16", self.embed_dim)
        })?;
        check_kernels("patch_kernels", &self.patch_kernels, self.patch_stride, self.embed_dim)?;
        for (stage, kernels) in self.merge_kernels.iter().enumerate() {
            check_kernels("merge_kernels", kernels, self.merge_stride, self.channels(stage + 1))?;
        }
        check(self.layer_norm_eps > 0.0 && self.layer_norm_eps < 1.0, &|| {
            format!("layer_norm_eps {} is not between 0 and 1", self.layer_norm_eps)
        })?;
        check(self.pad_type <= 1, &|| format!("pad_type {} is not 0 or 1", self.pad_type))?;
        for (key, rate) in [("drop_path_rate", self.drop_path_rate), ("attn_drop_rate", self.attn_drop_rate)] {
            check((0.0..1.0).contains(&rate), &|| format!("{key} {rate} is not in 0 to 1"))?;
        }
        const MOST_PARAMETERS: f64 = 1e11;
        let parameters = self.approximate_parameters();
        check(parameters <= MOST_PARAMETERS, &|| {
            format!("{parameters:.1e} parameters; at most {MOST_PARAMETERS:.0e}")
        })?;
        self.stage_maps(self.img_size[0], self.img_size[1]).map(|_| ())
    }

    /// Weights of blocks, embeddings and head, to see before memory is asked for whether there can be enough.
    fn approximate_parameters(&self) -> f64 {
        let kernels = |kernels: &[usize]| kernels.iter().map(|&side| (side * side) as f64).sum::<f64>();
        let stage = |stage: usize| {
            let channels = self.channels(stage) as f64;
            let merging = self.merge_kernels.get(stage).map_or(0.0, |sides| kernels(sides) * 2.0 * channels * channels);
            self.depths[stage] as f64 * channels * channels * (4.0 + 2.0 * self.mlp_ratio[stage]) + merging
        };
        let head = self.channels(self.stages() - 1) as f64 * self.num_classes as f64;
        let embedding = kernels(&self.patch_kernels) * (self.in_chans * self.embed_dim) as f64;
        embedding + head + (0..self.stages()).map(stage).sum::<f64>()
    }
}

fn check_kernels(key: &str, kernels: &[usize], stride: usize, channels: usize) -> Result<()> {
    let fail = |message: String| Err(Error::Config(format!("{key}: {message}")));
    if kernels.is_empty() || kernels.len() > 16 || stride == 0 {
        return fail(format!("{} kernels of stride {stride}; expected 1 to 16 of at least 1", kernels.len()));
    }
    if let Some(kernel) = kernels.iter().find(|&&k| k < stride || k > 1024 || !(k - stride).is_multiple_of(2)) {
        return fail(format!("kernel {kernel} for stride {stride}; expected the stride plus an even number"));
    }
    if channels >> (kernels.len() - 1) == 0 {
        return fail(format!("{} kernels share {channels} channels; the last would get none", kernels.len()));
    }
    Ok(())
}

/// Channels of each of `kernels` kernels that together make `total`: half for the first, a quarter for the second, and
/// so on; the last two share alike. What halving leaves over goes to the last.
pub(super) fn split_channels(total: usize, kernels: usize) -> Vec<usize> {
    let mut split: Vec<usize> = (1..kernels).map(|halvings| total >> halvings).collect();
    split.push(total - split.iter().sum::<usize>());
    split
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> std::result::Result<CrossFormerConfig, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    #[test]
    fn keys_left_out_take_the_published_default() {
        assert_eq!(
            parse("{}").unwrap(),
            CrossFormerConfig { drop_path_rate: 0.0, ..CrossFormerConfig::named("small", 1000).unwrap() }
        );
        let two = parse(r#"{"model": "crossformer", "depths": [1, 1]}"#).unwrap();
        assert_eq!((two.interval, two.num_heads, two.merge_kernels), (vec![2, 1], vec![3, 6], vec![vec![2, 4]]));
    }

    #[test]
    fn impossible_configurations_are_named() {
        for (json, message) in [
            (r#"{"embed_dimension": 96}"#, "unknown field `embed_dimension`"),
            (r#"{"model": "swin"}"#, "model 'swin'"),
            (r#"{"num_heads": [5, 6, 12, 24]}"#, "stage 0: 5 heads do not divide 96 channels"),
            (r#"{"group_size": [7, 0, 7, 7]}"#, "stage 1: group_size 0"),
            (r#"{"interval": [8, 4, 2, 0]}"#, "stage 3: interval 0"),
            (r#"{"img_size": [31, 224]}"#, "the smallest is 32×32"),
            (r#"{"depths": []}"#, "0 stages"),
            (r#"{"depths": [2, 2, 0, 2]}"#, "stage 2: depth 0"),
            (r#"{"group_size": [7]}"#, "group_size has entries for 1 stages"),
            (r#"{"patch_kernels": [4, 7]}"#, "kernel 7 for stride 4"),
            (r#"{"merge_kernels": [[2], [], [2]]}"#, "0 kernels"),
            (r#"{"patch_stride": 0}"#, "stride 0"),
            (r#"{"embed_dim": 8, "num_heads": [1, 1, 1, 1]}"#, "at least 16"),
            (r#"{"mlp_ratio": [4, 4, -1, 4]}"#, "mlp_ratio -1"),
            (r#"{"pad_type": 2}"#, "pad_type 2"),
            (r#"{"embed_dim": 65536}"#, "parameters; at most 1e11"),
            (r#"{"layer_norm_eps": 0}"#, "layer_norm_eps 0"),
            (r#"{"drop_path_rate": 1.5}"#, "drop_path_rate 1.5"),
            (r#"{"attn_drop_rate": 1.0}"#, "attn_drop_rate 1"),
        ] {
            let error = parse(json).unwrap_err();
            assert!(error.contains(message), "{json}: {error}");
        }
        assert!(CrossFormerConfig::named("gigantic", 10).unwrap_err().to_string().contains("++huge"));
    }

    #[test]
    fn channels_split_by_halves() {
        assert_eq!(split_channels(96, 4), [48, 24, 12, 12]);
        assert_eq!(split_channels(96, 1), [96]);
        assert_eq!(split_channels(97, 2), [48, 49]);
    }
}
