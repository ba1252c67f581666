//! What this room's kernels move and compute.

use crate::kernels::{Cost, Costs};

/// One entry for each kernel.
pub(crate) static COSTS: Costs = Costs {
    names: &[
        ("n", "elements of the result"),
        ("t", "bytes of an element of the result, for casts"),
        ("f", "FLOPs of the function, 1 to about 40"),
        ("left", "elements of the left operand"),
        ("right", "elements of the right operand"),
    ],
    kernels: &[
        Cost::new("cast", "n (s + t)", "0"),
        Cost::new("fill", "n s", "0"),
        Cost::new("unary_forward", "2 n s", "n f"),
        Cost::new("unary_backward", "3 n s", "n f"),
        Cost::new("binary", "(n + left + right) s", "n"),
        Cost::new("select", "4 n s", "0"),
    ],
};
