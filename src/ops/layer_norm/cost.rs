//! What this room's kernels move and compute.

use crate::kernels::{Cost, Costs};

/// One entry for each kernel.
pub(crate) static COSTS: Costs = Costs {
    names: &[("rows", "rows"), ("width", "elements of a row"), ("parts", "parts of the rows whose sums are partial")],
    kernels: &[
        Cost::new("layer_norm_forward", "2 rows width s + 12 rows + 2 width s", "8 rows width"),
        Cost::new("layer_norm_forward_streamed", "2 rows width s + 12 rows + 2 width s", "8 rows width"),
        Cost::new("layer_norm_backward", "3 rows width s + 12 rows + width s + 8 parts width", "15 rows width"),
        Cost::new("layer_norm_backward_streamed", "3 rows width s + 12 rows + width s", "11 rows width"),
        Cost::new("layer_norm_parameter_gradients", "2 rows width s + 12 rows + 8 parts width", "4 rows width"),
        Cost::new("layer_norm_finish", "8 parts width + 2 width s", "2 parts width"),
    ],
};
