//! What this room's kernels move and compute.

use crate::kernels::{Cost, Costs};

/// One entry for each kernel.
pub(crate) static COSTS: Costs = Costs {
    names: &[
        ("source", "elements of the map that is read: the input, or for its gradient the output's"),
        ("target", "elements of the map at the other end"),
        ("weight", "elements of the weight"),
        ("depth", "terms of each sum: taps and channels of a group"),
        ("taps", "positions of the window"),
        ("parts", "parts of the positions whose sums are partial"),
        ("rows", "rows of a tile: 132 with their gaps in f32, else 128"),
        ("columns", "columns of a tile: 68 with their gaps in f32, else 128 or 64"),
        ("terms", "terms of a tile: 16 in f32, else 32"),
    ],
    kernels: &[
        Cost::of_products("conv2d_gather", "(source + target + weight) s", "2 target depth")
            .with_shared("2048 + 3 (rows + columns) terms s"),
        Cost::of_products("conv2d_weight", "(source + target) s + 4 parts weight", "2 target depth"),
        Cost::new("conv2d_pack", "2 weight s", "0"),
        Cost::new("conv2d_sum", "4 parts weight + weight s", "parts weight"),
        Cost::new("conv2d_pad", "2 source s", "0"),
        Cost::new("conv2d_depthwise", "(source + target + weight) s", "2 target taps"),
        Cost::new("conv2d_depthwise_weight", "(source + target) s + 4 parts weight", "2 target taps"),
    ],
};
