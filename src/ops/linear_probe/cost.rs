//! What this room's kernels move and compute.

use crate::kernels::{Cost, Costs};

/// One entry for each kernel.
pub(crate) static COSTS: Costs = Costs {
    names: &[
        ("rows", "rows"),
        ("features", "features of all blocks"),
        ("classes", "classes"),
        ("blocks", "blocks of features, each with a classifier"),
        ("pieces", "pieces of the rows whose losses are added beforehand"),
        ("parts", "parts of the rows whose sums are partial"),
    ],
    kernels: &[
        LOGITS,
        Cost { kernel: "linear_probe_logits_narrow", ..LOGITS },
        Cost::new("linear_probe_losses", "4 blocks rows classes + 8 rows + 16 blocks pieces", "5 blocks rows classes"),
        Cost::new(
            "linear_probe_finish",
            "16 blocks pieces + classes features s + blocks (s + 8)",
            "2 classes features + 2 blocks pieces",
        ),
        Cost::new(
            "linear_probe_differences",
            "blocks rows classes (4 + s) + 8 rows + blocks s",
            "6 blocks rows classes",
        ),
        WEIGHT,
        Cost { kernel: "linear_probe_weight_narrow", ..WEIGHT },
        Cost::new(
            "linear_probe_weight_sum",
            "4 parts classes features + 2 classes features s + blocks s",
            "(parts + 2) classes features",
        ),
    ],
};

/// In either form of the tiles.
const LOGITS: Cost = Cost::of_products(
    "linear_probe_logits_wide",
    "(rows features + classes features) s + blocks classes s + 4 blocks rows classes",
    "2 rows classes features",
);
const WEIGHT: Cost = Cost::of_products(
    "linear_probe_weight_wide",
    "(rows features + blocks rows classes) s + 4 parts classes features",
    "2 rows classes features",
);
