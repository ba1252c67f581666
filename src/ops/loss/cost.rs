//! What this room's kernels move and compute.

use crate::kernels::{Cost, Costs};

/// One entry for each kernel.
pub(crate) static COSTS: Costs = Costs {
    names: &[("rows", "rows of logits"), ("classes", "classes"), ("blocks", "blocks whose losses are added up")],
    kernels: &[
        Cost::new("cross_entropy_forward", "rows classes s + 20 rows + 16 blocks", "5 rows classes"),
        Cost::new("cross_entropy_finish", "16 blocks + s + 4", "2 blocks"),
        Cost::new("cross_entropy_backward", "2 rows classes s + 16 rows", "5 rows classes"),
        Cost::new("cross_entropy_weights", "rows classes s + 8 rows", "rows classes"),
    ],
};
