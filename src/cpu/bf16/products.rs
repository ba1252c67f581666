//! Whole products, with all threads.

use half::bf16;

use super::{GROUP, PANEL, Panels, To, narrow};
use crate::cpu::{parallel, simd};
use crate::tensor::{Buffer, Element};

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

/// Whether threads share the panels: blocks of so few rows would keep few of them busy, and each would read all panels.
pub(crate) fn shares_panels(right: &Panels, count: usize) -> bool {
    const FEW: usize = 256;
    let [depth, columns] = right.extents();
    count <= FEW && columns.div_ceil(PANEL) > count.div_ceil(block_rows(depth, columns))
}

/// `rows · right + bias` for the dense rows (count, depth), rounded.
///
/// # Panics
/// Where the rows are not of this depth.
pub(crate) fn multiply_rows(rows: &[bf16], right: &Panels, bias: Option<&[bf16]>, count: usize) -> Buffer<bf16> {
    let [depth, columns] = right.extents();
    assert_eq!(rows.len(), count * depth, "rows");
    if shares_panels(right, count) {
        return multiply_by_panels(rows, right, bias, count, |to| To::Narrow(to), |value| value);
    }
    let mut output = Buffer::recycled(count * columns);
    let (block, streamed) = (block_rows(depth, columns), is_streamed(output.len()));
    parallel::pieces_mut(&mut output, block * columns, |index, output| {
        let rows = &rows[index * block * depth..][..output.len() / columns * depth];
        right.rows(rows, bias, output, streamed);
    });
    output
}

/// `finish(rows · right + bias)`, panel by panel; `to` says whether `finish` takes the sums or rounded ones.
pub(crate) fn multiply_by_panels<S: Element>(
    rows: &[bf16],
    right: &Panels,
    bias: Option<&[bf16]>,
    count: usize,
    to: fn(&mut [S]) -> To<'_>,
    finish: impl Fn(S) -> bf16 + Copy + Sync + Send,
) -> Buffer<bf16> {
    let [depth, columns] = right.extents();
    let mut output = Buffer::recycled(count * columns);
    let starts: Vec<usize> = (0..count).map(|row| row * depth).collect();
    let widths: Vec<usize> = (0..columns).step_by(PANEL).map(|first| PANEL.min(columns - first)).collect();
    let mut strips = parallel::columns_mut(&mut output, &widths);
    parallel::pieces_mut(&mut strips, 1, |panel, strip| {
        let mut values = Buffer::recycled(count * PANEL);
        right.panel_at((rows, &starts), bias, panel, to(&mut values), PANEL, false);
        simd::dispatch(
            #[inline(always)]
            || {
                for (row, values) in strip[0].iter_mut().zip(values.chunks_exact(PANEL)) {
                    row.iter_mut().zip(values).for_each(|(to, &value)| *to = finish(value));
                }
            },
        );
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
