//! What this room's kernels move and compute.

use crate::kernels::{Cost, Costs};

/// One entry for each kernel.
pub(crate) static COSTS: Costs = Costs {
    names: &[
        ("rows", "rows"),
        ("features", "features of all blocks"),
        ("classes", "classes"),
        ("entries", "entries of all blocks' matrices"),
    ],
    kernels: &[
        Cost::new(
            "class_moments_sums",
            "4 rows features + 8 rows + 4 features + 4 classes features + 8 classes",
            "2 rows features",
        ),
        Cost::new("class_moments_squares_diagonal", "4 rows features + 8 rows + 8 features", "3 rows features"),
        Cost::new("class_moments_squares_full", "4 rows features + 8 rows + 4 features + 4 entries", "rows entries"),
    ],
};
