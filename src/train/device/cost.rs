//! What the kernels of a training step move and compute.

use crate::kernels::{Cost, Costs};

/// One entry for each kernel.
pub(crate) static COSTS: Costs = Costs {
    names: &[
        ("n", "elements of all tensors"),
        ("blocks", "blocks of the norm"),
        ("rows", "rows of logits"),
        ("classes", "classes"),
    ],
    kernels: &[
        Cost::new("gradient_squares", "4 n + 8 blocks", "2 n"),
        Cost::new("add_measures", "4 rows classes + 8 rows + 4", "rows"),
        Cost::new("finish_step", "8 blocks + 88", "blocks"),
        Cost::new("apply_step", "88", "8"),
        Cost::new("loss_gradient", "12", "0"),
        Cost::new("adamw", "28 n", "14 n"),
        Cost::new("sgd", "20 n", "5 n"),
        Cost::new("average", "12 n", "3 n"),
    ],
};
