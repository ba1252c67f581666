//! The problems that kernels are measured on and predicted for: those of CrossFormer-T, -S, -B and -L at 224 × 224.

use std::fmt;

use gridgrad::models::CrossFormerConfig;
use gridgrad::{Error, Result};
use serde::Serialize;

/// The models by their names in `CrossFormerConfig::named`, and in tables.
pub const MODELS: [(&str, char); 4] = [("tiny", 'T'), ("small", 'S'), ("base", 'B'), ("large", 'L')];
/// Images of a batch.
pub const BATCHES: [usize; 3] = [1, 32, 256];

/// An op with its extents for one image; maps are height and width.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Op {
    /// Convolutions of one stride with windows of `sides` and `out` channels each. An image needs no gradient.
    CrossScaleEmbedding {
        map: [usize; 2],
        channels: usize,
        sides: Vec<usize>,
        out: Vec<usize>,
        stride: usize,
        image: bool,
    },
    /// Attention within groups, `interval` apart.
    Lsda { map: [usize; 2], heads: usize, head_width: usize, group: [usize; 2], interval: [usize; 2] },
    /// The bias networks of a stage, one for each block with its group, for all offsets; the same for any batch.
    PositionBias { groups: Vec<[usize; 2]>, width: usize, heads: usize },
    /// Rows of tokens.
    LayerNorm { rows: usize, width: usize },
    /// A linear layer with a GELU behind it.
    LinearGelu { rows: usize, input: usize, output: usize },
    /// The scores of attention groups, or logits.
    Softmax { rows: usize, width: usize },
    /// The largest of windows of 3 × 3, 2 apart, with a padding of 1.
    MaxPool { map: [usize; 2], channels: usize },
    /// By the batch's own statistics.
    BatchNorm { map: [usize; 2], channels: usize },
}

/// An op on a batch, and in which models it occurs.
#[derive(Clone, Debug, Serialize)]
pub struct Case {
    #[serde(flatten)]
    pub op: Op,
    pub batch: usize,
    /// Initials of the models.
    pub models: String,
}

impl Op {
    pub fn room(&self) -> &'static str {
        match self {
            Op::CrossScaleEmbedding { .. } => "cross_scale_embedding",
            Op::Lsda { .. } => "lsda",
            Op::PositionBias { .. } => "position_bias",
            Op::LayerNorm { .. } => "layer_norm",
            Op::LinearGelu { .. } => "linear_gelu",
            Op::Softmax { .. } => "softmax",
            Op::MaxPool { .. } => "max_pool",
            Op::BatchNorm { .. } => "batch_norm",
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Op::CrossScaleEmbedding { map: [h, w], channels, sides, out, stride, .. } => {
                write!(f, "{h}×{w}×{channels} by {sides:?} / {stride} to {}", out.iter().sum::<usize>())
            }
            Op::Lsda { map: [h, w], heads, head_width, group, interval } => {
                write!(f, "{h}×{w}, {heads} heads of {head_width}, G {}, I {}", group[0], interval[0])
            }
            Op::PositionBias { groups, width, heads } => {
                let mut sides: Vec<String> = groups.iter().map(|group| group[0].to_string()).collect();
                sides.dedup();
                write!(f, "{} of G {}, width {width}, {heads} heads", groups.len(), sides.join(", "))
            }
            Op::LayerNorm { rows, width } | Op::Softmax { rows, width } => write!(f, "{rows} × {width}"),
            Op::LinearGelu { rows, input, output } => write!(f, "{rows} × {input} to {output}"),
            Op::MaxPool { map: [h, w], channels } | Op::BatchNorm { map: [h, w], channels } => {
                write!(f, "{h}×{w}×{channels}")
            }
        }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}, batch {}", self.op.room(), self.op, self.batch)
    }
}

/// All problems of all models at every batch, each once.
pub fn published() -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    for batch in BATCHES {
        for (name, initial) in MODELS {
            collect(&CrossFormerConfig::named(name, 1000)?, initial, batch, &mut cases)?;
        }
    }
    Ok(cases)
}

/// A network of small extents with every op in it, for seconds instead of hours.
pub fn short() -> Result<Vec<Case>> {
    let config = r#"{"img_size": [32, 32], "num_classes": 10, "embed_dim": 32, "depths": [2, 1], "num_heads": [1, 2],
                     "group_size": [4, 4], "interval": [2, 1], "mlp_ratio": [2.0, 2.0]}"#;
    let config = serde_json::from_str(config).map_err(|error| Error::Config(error.to_string()))?;
    let mut cases = Vec::new();
    collect(&config, 'x', 1, &mut cases)?;
    Ok(cases)
}

fn collect(config: &CrossFormerConfig, initial: char, batch: usize, cases: &mut Vec<Case>) -> Result<()> {
    let mut push = |op: Op| match cases.iter_mut().find(|case| case.op == op && case.batch == batch) {
        Some(case) if case.models.contains(initial) => {}
        Some(case) => case.models.push(initial),
        None => cases.push(Case { op, batch, models: initial.to_string() }),
    };
    let maps = config.stage_maps(config.img_size[0], config.img_size[1])?;
    push(embedding(
        config.img_size,
        config.in_chans,
        &config.patch_kernels,
        config.embed_dim,
        config.patch_stride,
        true,
    ));
    for (stage, &map) in maps.iter().enumerate() {
        let (channels, heads) = (config.channels(stage), config.num_heads[stage]);
        let rows = map[0] * map[1];
        let mut groups = Vec::new();
        for block in 0..config.depths[stage] {
            let grouping = config.block_grouping(stage, block, map).grouping;
            let (group, interval) = (grouping.group, grouping.interval);
            push(Op::Lsda { map, heads, head_width: channels / heads, group, interval });
            groups.push(group);
            // The scores of all groups, which unfused attention keeps in memory.
            push(Op::Softmax { rows: rows * heads, width: group[0] * group[1] });
        }
        push(Op::PositionBias { groups, width: channels / 16, heads });
        push(Op::LayerNorm { rows, width: channels });
        let hidden = (channels as f64 * config.mlp_ratio[stage]) as usize;
        push(Op::LinearGelu { rows, input: channels, output: hidden });
        if let Some(kernels) = config.merge_kernels.get(stage) {
            push(embedding(map, channels, kernels, 2 * channels, config.merge_stride, false));
        }
        if stage == 0 {
            // CrossFormer has neither; its largest map serves.
            push(Op::MaxPool { map, channels });
            push(Op::BatchNorm { map, channels });
        }
    }
    Ok(())
}

/// Half of the channels for the smallest window, and so on; the rest for the largest.
fn embedding(map: [usize; 2], channels: usize, sides: &[usize], total: usize, stride: usize, image: bool) -> Op {
    let mut out: Vec<usize> = (1..sides.len()).map(|halvings| total >> halvings).collect();
    out.push(total - out.iter().sum::<usize>());
    Op::CrossScaleEmbedding { map, channels, sides: sides.to_vec(), out, stride, image }
}
