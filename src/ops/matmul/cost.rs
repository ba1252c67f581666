//! What this room's kernels move and compute.

use crate::kernels::{Cost, Costs};

/// One entry for each kernel.
pub(crate) static COSTS: Costs = Costs {
    names: &[
        ("batch", "products"),
        ("m", "rows of the result"),
        ("n", "columns of the result"),
        ("k", "terms of each sum"),
        ("parts", "parts of the terms whose sums are partial"),
    ],
    kernels: &[
        Cost::of_products("matmul_large", "batch (m k + k n + m n) s", "2 batch m n k"),
        Cost::of_products("matmul_small", "batch (m k + k n + m n) s", "2 batch m n k"),
        Cost::of_products("matmul_scalar", "batch (m k + k n + m n) s", "2 batch m n k"),
        Cost::new("matmul_split_sum", "4 parts batch m n + batch m n s", "parts batch m n"),
    ],
};
