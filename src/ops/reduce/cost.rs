//! What this room's kernels move and compute.

use crate::kernels::{Cost, Costs};

/// One entry for each kernel.
pub(crate) static COSTS: Costs = Costs {
    names: &[
        ("outer", "reductions before the axis"),
        ("count", "elements of the axis"),
        ("inner", "reductions behind the axis"),
        ("splits", "chunks that the axis is cut into"),
        ("t", "bytes of an element of the result"),
    ],
    kernels: &[
        Cost::new("sum_rows", "outer count inner s + outer splits inner t", "outer count inner"),
        Cost::new("max_rows", "outer count inner s + outer splits inner t", "outer count inner"),
        Cost::new("sum_columns", "outer count inner s + outer splits inner t", "outer count inner"),
        Cost::new("max_columns", "outer count inner s + outer splits inner t", "outer count inner"),
        Cost::new("argmax", "outer count s + 8 outer", "outer count"),
    ],
};
