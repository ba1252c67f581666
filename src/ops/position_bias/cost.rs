//! What this room's kernels move and compute.

use crate::kernels::{Cost, Costs};

/// One entry for each kernel.
pub(crate) static COSTS: Costs = Costs {
    names: &[
        ("networks", "networks of a launch: the blocks of a stage"),
        ("rows", "offsets of a group: rows of the table"),
        ("p", "width of the network"),
        ("heads", "heads"),
        ("parameters", "elements of all parameters of a network"),
        ("stored", "bytes of a parameter"),
        ("blocks", "blocks of a network, each with sums of its own"),
        ("warps", "warps of a block"),
        ("pitch", "p rounded up to odd"),
    ],
    kernels: &[
        Cost::new(
            "position_bias_forward",
            "networks (parameters stored + rows heads s)",
            "2 networks rows (2 p p + 2 p + p heads)",
        )
        .with_shared("4 (2 p + heads) pitch + 16 warps p"),
        Cost::new(
            "position_bias_backward",
            "networks (2 parameters stored + rows heads s + 8 blocks parameters)",
            "networks (4 rows (3 p p + 2 p + p heads) + blocks parameters)",
        )
        .with_shared("4 (2 p + heads) pitch + 4 warps (13 p + heads)"),
    ],
};
