//! What this room's kernels move and compute.

use crate::kernels::{Cost, Costs};

/// One entry for each kernel.
pub(crate) static COSTS: Costs = Costs {
    names: &[
        ("readers", "indices"),
        ("rows", "rows of the source, or of the sums"),
        ("inner", "elements of a row"),
        ("outer", "how often all of it is repeated"),
        ("tiles", "tiles that the readers are cut into"),
        ("n", "indices that are sorted"),
        ("crossing", "segments' parts that are summed beforehand"),
    ],
    kernels: &[
        Cost::new("gather_rows", "2 outer readers inner s + 8 readers", "0"),
        Cost::new("gather_elements", "outer readers inner (2 s + 8)", "0"),
        Cost::new("gather_keys", "12 n", "0"),
        Cost::new("gather_sort_count", "4 n + 1024 tiles", "0"),
        Cost::new("gather_sort_scan", "2048 tiles + 1024", "0"),
        Cost::new("gather_sort_place", "16 n + 1024 tiles", "0"),
        Cost::new("gather_starts", "4 n + 4 rows", "0"),
        Cost::new(
            "gather_segment_partials",
            "outer readers inner s + 8 readers + 4 outer crossing inner",
            "outer readers inner",
        ),
        Cost::new(
            "gather_segment_sums",
            "outer (readers + rows) inner s + 4 readers + 4 rows + 4 outer crossing inner",
            "outer readers inner",
        ),
    ],
};
