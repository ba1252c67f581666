//! What this room's kernels move and compute.

use crate::kernels::{Cost, Costs};

/// One entry for each kernel.
pub(crate) static COSTS: Costs = Costs {
    names: &[
        ("rows", "rows"),
        ("columns", "columns"),
        ("parts", "blocks of rows whose sums are partial; 0 where there is one"),
    ],
    kernels: &[
        Cost::new("linear_column_sum", "rows columns s + columns s + 4 parts columns", "rows columns"),
        Cost::new("linear_gelu_backward", "3 rows columns s + columns s + 4 parts columns", "41 rows columns"),
    ],
};
