//! What this room's kernels move and compute.

use crate::kernels::{Cost, Costs};

/// One entry for each kernel.
pub(crate) static COSTS: Costs = Costs {
    names: &[("n", "elements")],
    kernels: &[Cost::new("dropout", "2 n s", "n"), Cost::new("drop_path", "2 n s", "n")],
};
