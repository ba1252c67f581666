//! What this room's kernels move and compute.

use crate::kernels::{Cost, Costs};

/// One entry for each kernel.
pub(crate) static COSTS: Costs = Costs {
    names: &[("rows", "rows"), ("width", "elements of a row")],
    kernels: &[
        Cost::new("softmax_forward", "2 rows width s", "5 rows width"),
        Cost::new("softmax_backward", "3 rows width s", "4 rows width"),
    ],
};
