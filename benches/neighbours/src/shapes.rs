//! The sizes of the networks, as gridgrad and benches/pytorch have them.

use crate::Result;

/// (kernel, channels) of Network-in-Network's convolutions, block by block; a pool follows each of the first two.
pub const NETWORK_IN_NETWORK: [[(usize, usize); 3]; 3] =
    [[(5, 192), (1, 160), (1, 96)], [(5, 192), (1, 192), (1, 192)], [(3, 192), (1, 192), (1, 192)]];

/// (inputs, outputs, stride) of ResNet-18's basic blocks.
pub const RESNET18: [(usize, usize, usize); 8] =
    [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2), (512, 512, 1)];

/// Kernels of a cross-scale embedding with their output channels.
pub type Kernels = Vec<(usize, usize)>;

pub const PATCH_STRIDE: usize = 4;
pub const MERGE_STRIDE: usize = 2;

/// A CrossFormer block on square maps (batch, side, side, channels).
#[derive(Clone, Copy, Debug)]
pub struct Block {
    pub side: usize,
    pub channels: usize,
    pub heads: usize,
    /// Side of a group of tokens.
    pub group: usize,
    /// Distance of a group's tokens along an axis.
    pub interval: usize,
    /// Probability that an image goes past a branch.
    pub drop_path: f64,
}

impl Block {
    /// A first block of CrossFormer-S: 96 channels in 3 heads, and neighbouring tokens make a group.
    pub fn alone(side: usize) -> Result<Self> {
        Block::new(side, 96, 1, 0.0)
    }

    /// Groups of 7 × 7 tokens and heads of 32 channels.
    fn new(side: usize, channels: usize, interval: usize, drop_path: f64) -> Result<Self> {
        let (group, heads) = (7, channels / 32);
        if side == 0 || side % (group * interval) != 0 {
            let message =
                format!("a map of {side} × {side} does not divide into groups of {group} at distance {interval}");
            return Err(message.into());
        }
        Ok(Block { side, channels, heads, group, interval, drop_path })
    }

    /// Tokens of a group.
    pub fn tokens(self) -> usize {
        self.group * self.group
    }

    /// A map cut into groups, axis by axis, and the order that brings a group's tokens together.
    pub fn cut(self, batch: usize) -> ([usize; 8], [usize; 8]) {
        let (group, interval, count) = (self.group, self.interval, self.side / (self.group * self.interval));
        ([batch, count, group, interval, count, group, interval, self.channels], [0, 1, 4, 3, 6, 2, 5, 7])
    }

    /// The way back from groups.
    pub fn joined(self, batch: usize) -> ([usize; 8], [usize; 8]) {
        let (group, interval, count) = (self.group, self.interval, self.side / (self.group * self.interval));
        ([batch, count, count, interval, interval, group, group, self.channels], [0, 1, 5, 3, 2, 6, 4, 7])
    }

    /// All offsets (dy, dx) of two tokens of a group, a row each, and for each pair of tokens the number of its row.
    pub fn offsets(self) -> (Vec<f32>, Vec<u32>) {
        let (group, span) = (self.group as i64, 2 * self.group as i64 - 1);
        let offsets = (0..span * span).flat_map(|row| [row / span, row % span]).map(|at| (at - group + 1) as f32);
        let places = || (0..group * group).map(|token| (token / group, token % group));
        let row = |(y, x): (i64, i64), (other_y, other_x): (i64, i64)| {
            ((y - other_y + group - 1) * span + x - other_x + group - 1) as u32
        };
        let rows = places().flat_map(|token| places().map(move |other| row(token, other)));
        (offsets.collect(), rows.collect())
    }

    /// Width of the network that makes the position bias.
    pub fn bias_width(self) -> usize {
        self.channels / 4 / 4
    }
}

/// A CrossFormer: for each stage the blocks, and the kernels of the embedding in front.
pub fn crossformer(name: &str, image: usize) -> Result<Vec<(Kernels, Vec<Block>)>> {
    let (width, depths, last_drop_path): (usize, [usize; 4], f64) = match name {
        "tiny" => (64, [1, 1, 8, 6], 0.1),
        "small" => (96, [2, 2, 6, 2], 0.2),
        _ => return Err(format!("model '{name}' is not one of nin, resnet18, block, tiny, small").into()),
    };
    let count: usize = depths.iter().sum();
    let (mut stages, mut number) = (Vec::new(), 0);
    for (stage, depth) in depths.into_iter().enumerate() {
        let (side, channels) = (image / (PATCH_STRIDE << stage), width << stage);
        let kernels: &[usize] = if stage == 0 { &[4, 8, 16, 32] } else { &[2, 4] };
        let last = kernels.len() - 1;
        let kernels = kernels.iter().enumerate().map(|(scale, &kernel)| (kernel, channels >> (scale + 1).min(last)));
        let mut blocks = Vec::new();
        for block in 0..depth {
            let interval = if block % 2 == 1 { [8, 4, 2, 1][stage] } else { 1 };
            blocks.push(Block::new(side, channels, interval, last_drop_path * number as f64 / (count - 1) as f64)?);
            number += 1;
        }
        stages.push((kernels.collect(), blocks));
    }
    Ok(stages)
}
