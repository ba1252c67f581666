//! Reductions of (outer, count, inner) over the middle axis.

use crate::cpu::{Float, parallel, simd};
use crate::tensor::Buffer;

/// Partial sums of a row: independent, so that they fill vector registers.
const LANES: usize = 16;

pub(super) fn sum<T: Float>(values: &[T], outer: usize, count: usize, inner: usize) -> Buffer<T> {
    if inner == 1 {
        return sum_rows(values, outer, count);
    }
    if outer == 1 {
        return parallel::accumulate(count, (1 << 14) / inner.max(1), inner, |range, sums| {
            simd::dispatch(
                #[inline(always)]
                || add_rows(&values[range.start * inner..range.end * inner], sums),
            );
        });
    }
    let mut output = Buffer::zeroed(outer * inner);
    parallel::pieces_mut(&mut output, inner, |index, sums| {
        let rows = &values[index * count * inner..][..count * inner];
        simd::dispatch(
            #[inline(always)]
            || add_rows(rows, sums),
        );
    });
    output
}

#[inline(always)]
fn add_rows<T: Float>(rows: &[T], sums: &mut [T]) {
    for row in rows.chunks_exact(sums.len().max(1)) {
        sums.iter_mut().zip(row).for_each(|(sum, &value)| *sum += value);
    }
}

fn sum_rows<T: Float>(values: &[T], outer: usize, count: usize) -> Buffer<T> {
    if outer == 1 {
        return parallel::accumulate(count, 1 << 14, 1, |range, sum| sum[0] = sum_row(&values[range]));
    }
    let mut output = Buffer::recycled(outer);
    let rows_per_piece = (parallel::PIECE / count.max(1)).max(1);
    parallel::pieces_mut(&mut output, rows_per_piece, |index, sums| {
        for (row, sum) in sums.iter_mut().enumerate() {
            *sum = sum_row(&values[(index * rows_per_piece + row) * count..][..count]);
        }
    });
    output
}

fn sum_row<T: Float>(row: &[T]) -> T {
    simd::dispatch(
        #[inline(always)]
        || {
            let mut lanes = [T::ZERO; LANES];
            let chunks = row.chunks_exact(LANES);
            let tail: T = chunks.remainder().iter().copied().sum();
            for chunk in chunks {
                lanes.iter_mut().zip(chunk).for_each(|(lane, &value)| *lane += value);
            }
            let mut width = LANES / 2;
            while width > 0 {
                for lane in 0..width {
                    let upper = lanes[lane + width];
                    lanes[lane] += upper;
                }
                width /= 2;
            }
            lanes[0] + tail
        },
    )
}

pub(super) fn max<T: Float>(values: &[T], outer: usize, count: usize, inner: usize) -> Buffer<T> {
    let mut output = Buffer::recycled(outer * inner);
    parallel::pieces_mut(&mut output, inner, |index, largest| {
        let rows = &values[index * count * inner..][..count * inner];
        largest.fill(T::NEG_INFINITY);
        simd::dispatch(
            #[inline(always)]
            || {
                for row in rows.chunks_exact(largest.len().max(1)) {
                    // A NaN on either side stays: the value comes first, and a best that is NaN is never exceeded.
                    largest.iter_mut().zip(row).for_each(|(best, &value)| {
                        *best = if value <= *best { *best } else { value.nan_max(*best) };
                    });
                }
            },
        );
    });
    output
}

pub(super) fn argmax<T: Float>(values: &[T], last: usize) -> Buffer<i64> {
    Buffer::from_fn(values.len() / last, |row| {
        let row = &values[row * last..][..last];
        let mut best = 0;
        for (index, &value) in row.iter().enumerate() {
            if value > row[best] {
                best = index;
            }
        }
        best as i64
    })
}
