//! What this room's kernels move and compute.

use crate::kernels::{Cost, Costs};

/// One entry for each kernel.
pub(crate) static COSTS: Costs = Costs {
    names: &[("elements", "values of all maps"), ("features", "features of all images: cells by channels")],
    kernels: &[
        Cost::new("pooled_features_forward", "elements s + 4 features", "elements"),
        Cost::new("pooled_features_backward", "elements s + 4 features", "elements"),
        Cost::new("add_relu_gap_forward", "3 elements s + 4 features", "3 elements"),
        Cost::new("add_relu_gap_backward", "3 elements s + 4 features", "3 elements"),
    ],
};
