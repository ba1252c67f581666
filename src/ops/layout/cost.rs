//! What this room's kernels move and compute.

use crate::kernels::{Cost, Costs};

/// One entry for each kernel.
pub(crate) static COSTS: Costs = Costs {
    names: &[
        ("n", "units of the result that are copied"),
        ("unit", "bytes of a unit"),
        ("padded", "units of the result, zeros included"),
    ],
    kernels: &[
        Cost::new("copy", "2 n unit", "0"),
        Cost::new("transpose", "2 n unit", "0"),
        Cost::new("pad", "(n + padded) unit", "0"),
    ],
};
