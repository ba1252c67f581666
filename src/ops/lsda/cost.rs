//! What this room's kernels move and compute.

use crate::kernels::{Cost, Costs};

/// One entry for each kernel.
pub(crate) static COSTS: Costs = Costs {
    names: &[
        ("tokens", "tokens of all images"),
        ("heads", "heads"),
        ("d", "channels of a head"),
        ("group", "tokens of a group"),
        ("table", "rows of the bias table; 0 without one"),
        ("blocks", "blocks for each head, each with a table's gradient of its own"),
        ("slots", "groups that a block works on at once"),
        ("lines", "lines of a slot's tiles: the group's tokens rounded up to 16, at most `tile`"),
        ("tile", "tokens of a tile: 64, or 32 for heads of 256 bytes"),
        ("width", "d rounded up to 16, 32, 64 or 128"),
        ("parked", "sums that a block of the backward pass parks in shared memory"),
        ("capacity", "the group's tokens rounded up to whole tiles"),
    ],
    kernels: &[
        Cost::of_products("lsda_forward", "4 tokens heads d s + table heads s", "4 tokens heads group d")
            .with_shared("slots (3 lines width s + 8 capacity) + 16 + 4 table"),
        Cost::of_products(
            "lsda_backward",
            "7 tokens heads d s + table heads s + 4 blocks heads table",
            "10 tokens heads group d",
        )
        .with_shared(
            "slots ((4 lines width + 2 lines tile) s + 20 capacity) + 16 + 4 table (1 + tile / 16) + 4 parked",
        ),
        Cost::new("lsda_table_gradient", "4 blocks heads table + heads table s", "blocks heads table"),
    ],
};
