//! What this room's kernels move and compute.

use crate::kernels::{Cost, Costs};

/// One entry for each kernel.
pub(crate) static COSTS: Costs = Costs {
    names: &[
        ("crops", "crops of all models"),
        ("elements", "values of all crops"),
        ("parameters", "channels of all models"),
    ],
    kernels: &[Cost::new("crops", "elements (1 + s) + 32 crops + 8 parameters", "3 elements")],
};
