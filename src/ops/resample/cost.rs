//! What this room's kernels move and compute.

use crate::kernels::{Cost, Costs};

/// One entry for each kernel.
pub(crate) static COSTS: Costs = Costs {
    names: &[
        ("input", "elements of the input maps"),
        ("output", "elements of the output maps"),
        ("entries", "inputs that an output reads"),
    ],
    kernels: &[Cost::new("resample", "(input + output) s", "2 output entries")],
};
