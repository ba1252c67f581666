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
        ("stored", "bytes of a value of the images as they are stored"),
        ("maps", "maps that are written: 2 where a layer norm follows and the embedding is kept, else 1"),
        ("staged", "bytes of pixels that a block stages, at most 76 KiB"),
        ("exchanged", "bytes of sums that warps exchange: 16 KiB where they share pieces, else 0"),
        ("parts", "parts of the positions whose sums are partial"),
        ("sums", "sums of a part: elements of the packed weights, then of the biases"),
        ("tile", "bytes of pixels and gradients that a block stages at a time, at most 47 KiB"),
    ],
    kernels: &[
        Cost::new("cross_scale_embedding_pack", "2 weights s", "0"),
        Cost::of_products(
            "cross_scale_embedding_forward",
            "pixels channels stored + (weights + out + maps positions out) s",
            "2 positions weights",
        )
        .with_shared("staged + exchanged"),
        Cost::new("cross_scale_embedding_turn_weights", "2 weights s", "0"),
        Cost::new("cross_scale_embedding_normalise", "pixels channels (stored + s)", "2 pixels channels"),
        Cost::of_products(
            "cross_scale_embedding_input_gradient",
            "(positions out + weights + pixels channels) s",
            "2 positions weights",
        ),
        Cost::of_products(
            "cross_scale_embedding_weight_gradient",
            "(pixels channels + positions out) s + 4 parts sums",
            "2 positions weights + positions out",
        )
        .with_shared("2 tile"),
        Cost::new("cross_scale_embedding_add_parts", "4 parts sums + (weights + out) s", "parts sums"),
    ],
};
