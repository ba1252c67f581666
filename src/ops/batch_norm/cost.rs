//! What this room's kernels move and compute.

use crate::kernels::{Cost, Costs};

/// One entry for each kernel.
pub(crate) static COSTS: Costs = Costs {
    names: &[
        ("rows", "values of a channel of one model"),
        ("channels", "channels of all models"),
        ("parts", "parts of the rows whose sums are partial"),
    ],
    kernels: &[
        Cost::new("batch_norm_partial_statistics", "rows channels s + 12 parts channels", "4 rows channels"),
        Cost::new("batch_norm_finish_statistics", "12 parts channels + 12 channels", "8 parts channels"),
        Cost::new("batch_norm_inverse_deviation", "8 channels", "3 channels"),
        Cost::new("batch_norm_apply", "2 rows channels s + 8 channels + 2 channels s", "2 rows channels"),
        Cost::new("batch_norm_partial_sums", "2 rows channels s + 4 channels + 8 parts channels", "4 rows channels"),
        Cost::new("batch_norm_finish_sums", "8 parts channels + 12 channels", "2 parts channels"),
        Cost::new("batch_norm_input_gradient", "3 rows channels s + 16 channels + channels s", "5 rows channels"),
        Cost::new("batch_norm_update", "6 channels s", "6 channels"),
    ],
};
