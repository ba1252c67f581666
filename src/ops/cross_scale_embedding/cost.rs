//! What this room's kernels move and compute.

use crate::kernels::{Cost, Costs};

/// One entry for each kernel.
pub(crate) static COSTS: Costs = Costs {
    names: &[
        ("pixels", "positions of the input maps, of all images"),
        ("channels", "channels of the input"),
        ("positions", "positions of the output maps, of all images"),
        ("out", "channels of the output"),
        ("weights", "elements of all kernels' weights: sum of side² channels out"),
        ("parts", "parts of the positions whose sums are partial"),
    ],
    kernels: &[
        Cost::new("cross_scale_embedding_pack", "2 weights s", "0"),
        Cost::of_products(
            "cross_scale_embedding_forward",
            "(pixels channels + weights + out + positions out) s",
            "2 positions weights",
        ),
        Cost::of_products(
            "cross_scale_embedding_input_gradient",
            "(positions out + weights + pixels channels) s",
            "2 positions weights",
        ),
        Cost::of_products(
            "cross_scale_embedding_weight_gradient",
            "(pixels channels + positions out) s + 4 parts (weights + out)",
            "2 positions weights + positions out",
        ),
        Cost::new(
            "cross_scale_embedding_add_parts",
            "4 parts (weights + out) + (weights + out) s",
            "parts (weights + out)",
        ),
    ],
};
