//! What this room's kernels move and compute.

use crate::kernels::{Cost, Costs};

/// One entry for each kernel.
pub(crate) static COSTS: Costs = Costs {
    names: &[("n", "elements"), ("c", "channels")],
    kernels: &[Cost::new("look_up_bytes", "n (1 + s) + 256 c s", "0").with_shared("256 c s")],
};
