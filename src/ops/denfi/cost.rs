//! What this room's kernels move and compute.

use crate::kernels::{Cost, Costs};

/// One entry for each kernel.
pub(crate) static COSTS: Costs = Costs {
    names: &[
        ("cells", "cells of all maps"),
        ("channels", "channels"),
        ("outputs", "values of the regression map for a cell: 4 and 2 for each bin"),
        ("blocks", "blocks whose sums of the weight's gradient are partial"),
        ("places", "upper left neighbours that taps may name, on all maps"),
        ("boxes", "boxes"),
        ("counted", "cells whose points are counted"),
    ],
    kernels: &[
        Cost::new("denfi_conv_forward", "(cells (2 channels + outputs) + 9 channels) s", "90 cells channels"),
        Cost::new("denfi_conv_keys", "cells outputs s + 108 cells", "9 * 39 cells"),
        Cost::new(
            "denfi_conv_input_gradient",
            "(2 cells channels + 9 channels) s + 108 cells + 4 places",
            "108 cells channels",
        ),
        Cost::new(
            "denfi_conv_weight_partials",
            "cells (2 channels + outputs) s + 36 blocks channels",
            "90 cells channels",
        ),
        Cost::new("denfi_conv_weight_sum", "36 blocks channels + 9 channels s", "9 blocks channels"),
        Cost::new(
            "denfi_conv_boundary_gradient",
            "(cells (2 channels + 2 outputs) + 9 channels) s",
            "145 cells channels",
        ),
        Cost::new("boundary_density_forward", "10 boxes s + 8 counted", "400 boxes"),
        Cost::new("boundary_density_backward", "17 boxes s + 8 counted", "800 boxes"),
    ],
};
