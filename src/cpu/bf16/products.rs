//! Whole products, with all threads.

use half::bf16;

use super::{GROUP, PANEL, Panels, narrow};
use crate::cpu::{parallel, simd};
use crate::tensor::Buffer;

/// Rows which, with their sums, stay in a second-level cache.
pub(crate) fn block_rows(depth: usize, columns: usize) -> usize {
    const ELEMENTS: usize = 1 << 17;
    (ELEMENTS / (depth + columns).max(1)).clamp(32, 256) / GROUP * GROUP
}

/// Whether a result of so many elements goes past the caches.
pub(crate) fn is_streamed(elements: usize) -> bool {
    const CACHED_BYTES: usize = 16 << 20;
    elements * size_of::<bf16>() > CACHED_BYTES
}

/// `rows · right + bias` for the dense rows (count, depth), rounded.
///
/// # Panics
/// Where the rows are not of this depth.
pub(crate) fn multiply_rows(rows: &[bf16], right: &Panels, bias: Option<&[bf16]>, count: usize) -> Buffer<bf16> {
    let [depth, columns] = right.extents();
    assert_eq!(rows.len(), count * depth, "rows");
    let mut output = Buffer::recycled(count * columns);
    let (block, streamed) = (block_rows(depth, columns), is_streamed(output.len()));
    parallel::pieces_mut(&mut output, block * columns, |index, output| {
        let rows = &rows[index * block * depth..][..output.len() / columns * depth];
        right.rows(rows, bias, output, streamed);
    });
    output
}

/// `leftᵀ · right`, rounded, as (columns of the left, columns of the right).
///
/// # Panics
/// Where the depths differ.
pub(crate) fn multiply_transposed(left: &Panels, right: &Panels) -> Buffer<bf16> {
    let ([_, rows], [_, columns]) = (left.extents(), right.extents());
    let mut output = Buffer::recycled(rows * columns);
    let stride = right.view().sums_stride();
    parallel::pieces_mut(&mut output, PANEL * columns, |panel, output| {
        let mut sums = Buffer::<f32>::zeroed(PANEL * stride);
        left.view().add_transposed(panel, right.view(), &mut sums);
        narrow_rows(&sums, stride, output, columns);
    });
    output
}

/// Rounds rows of `columns` from sums that are `stride` apart.
pub(crate) fn narrow_rows(sums: &[f32], stride: usize, to: &mut [bf16], columns: usize) {
    simd::dispatch(
        #[inline(always)]
        || {
            for (to, sums) in to.chunks_exact_mut(columns.max(1)).zip(sums.chunks_exact(stride.max(1))) {
                for (to, &sum) in to.iter_mut().zip(sums) {
                    *to = narrow(sum);
                }
            }
        },
    );
}
