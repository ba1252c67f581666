//! What this room's kernels move and compute.

use crate::kernels::{Cost, Costs};

/// One entry for each kernel.
pub(crate) static COSTS: Costs = Costs {
    names: &[
        ("input", "elements of the input maps"),
        ("output", "elements of the output maps"),
        ("taps", "positions of a window"),
    ],
    kernels: &[
        Cost::new("max_pool", "(input + output) s + 4 output", "output taps"),
        Cost::new("max_pool_gather", "2 output s + 4 output", "0"),
        Cost::new("max_pool_scatter", "(input + output) s + 4 output", "output"),
    ],
};
