//! What this room's kernels move and compute.

use crate::kernels::{Cost, Costs};

/// One entry for each kernel.
pub(crate) static COSTS: Costs = Costs {
    names: &[
        ("rows", "offsets of a group: rows of the table"),
        ("p", "width of the network"),
        ("heads", "heads"),
        ("parameters", "elements of all parameters"),
        ("blocks", "blocks, each with sums of its own"),
        ("warps", "warps of a block"),
        ("pitch", "p rounded up to odd"),
    ],
    kernels: &[
        Cost::new("position_bias_forward", "(parameters + rows heads) s", "2 rows (2 p p + 2 p + p heads)")
            .with_shared("4 (2 p + heads) pitch + 16 warps p"),
        Cost::new(
            "position_bias_backward",
            "(parameters + rows heads) s + 4 blocks parameters",
            "6 rows (2 p p + 2 p + p heads)",
        )
        .with_shared("4 (2 p + heads) pitch + 4 warps (13 p + heads)"),
        Cost::new("position_bias_add_partials", "4 blocks parameters + parameters s", "blocks parameters"),
    ],
};
