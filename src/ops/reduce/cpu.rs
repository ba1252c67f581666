//! Reductions of (outer, count, inner) over the middle axis.

use crate::cpu::{Float, lanes, parallel, simd};
use crate::tensor::Buffer;

pub(super) fn sum<T: Float>(values: &[T], [outer, count, inner]: [usize; 3], factor: f64) -> Buffer<T> {
    let mut sums = match (outer, inner) {
        (1, 1) => parallel::accumulate(count, 1 << 14, 1, |range, sum| {
            sum[0] = simd::dispatch(
                #[inline(always)]
                || sum_row(&values[range]),
            );
        }),
        (_, 1) => by_rows(values, [outer, count], sum_row),
        (1, _) => parallel::accumulate(count, (1 << 14) / inner.max(1), inner, |range, sums| {
            simd::dispatch(
                #[inline(always)]
                || combine_rows(&values[range.start * inner..range.end * inner], sums, |sum, value| sum + value),
            );
        }),
        _ => by_columns(values, [outer, count, inner], T::ZERO, |sum, value| sum + value),
    };
    if factor != 1.0 {
        let factor = T::from_f64(factor);
        sums.iter_mut().for_each(|sum| *sum *= factor);
    }
    sums
}

pub(super) fn max<T: Float>(values: &[T], [outer, count, inner]: [usize; 3]) -> Buffer<T> {
    match (outer, inner) {
        (1, 1) => {
            // The largest of the pieces' largest: the order does not matter to a maximum.
            let pieces = count.div_ceil(parallel::PIECE);
            let mut partial = Buffer::recycled(pieces);
            parallel::pieces_mut(&mut partial, 1, |index, largest| {
                let at = index * parallel::PIECE;
                largest[0] = simd::dispatch(
                    #[inline(always)]
                    || max_row(&values[at..count.min(at + parallel::PIECE)]),
                );
            });
            by_rows(&partial, [1, pieces], max_row)
        }
        (_, 1) => by_rows(values, [outer, count], max_row),
        _ => by_columns(values, [outer, count, inner], T::NEG_INFINITY, T::nan_max),
    }
}

#[inline(always)]
fn sum_row<T: Float>(row: &[T]) -> T {
    // In blocks: the error of a long running sum grows with its number of terms.
    const BLOCK: usize = 1024;
    let mut total = T::ZERO;
    for block in row.chunks(BLOCK) {
        let [sum] = lanes::sum(
            block,
            #[inline(always)]
            |value| [value],
        );
        total += sum;
    }
    total
}

#[inline(always)]
fn max_row<T: Float>(row: &[T]) -> T {
    lanes::fold(row, T::NEG_INFINITY, T::nan_max)
}

/// Reduces each of `outer` contiguous rows.
#[inline(always)]
fn by_rows<T: Float>(values: &[T], [outer, count]: [usize; 2], reduce: impl Fn(&[T]) -> T + Sync + Send) -> Buffer<T> {
    let mut output = Buffer::recycled(outer);
    let rows_per_piece = (parallel::PIECE / count.max(1)).max(1);
    parallel::pieces_mut(&mut output, rows_per_piece, |index, piece| {
        simd::dispatch(
            #[inline(always)]
            || {
                for (row, out) in piece.iter_mut().enumerate() {
                    *out = reduce(&values[(index * rows_per_piece + row) * count..][..count]);
                }
            },
        );
    });
    output
}

/// Reduces each of `outer` blocks of `count` rows to one row of `inner`.
#[inline(always)]
fn by_columns<T: Float>(
    values: &[T],
    [outer, count, inner]: [usize; 3],
    start: T,
    combine: impl Fn(T, T) -> T + Sync + Send,
) -> Buffer<T> {
    let mut output = Buffer::recycled(outer * inner);
    let block = count * inner;
    let blocks_per_piece = (parallel::PIECE / block.max(1)).max(1);
    parallel::pieces_mut(&mut output, blocks_per_piece * inner, |index, piece| {
        piece.fill(start);
        simd::dispatch(
            #[inline(always)]
            || {
                for (at, out) in piece.chunks_exact_mut(inner).enumerate() {
                    combine_rows(&values[(index * blocks_per_piece + at) * block..][..block], out, &combine);
                }
            },
        );
    });
    output
}

#[inline(always)]
fn combine_rows<T: Float>(rows: &[T], results: &mut [T], combine: impl Fn(T, T) -> T) {
    for row in rows.chunks_exact(results.len()) {
        results.iter_mut().zip(row).for_each(|(result, &value)| *result = combine(*result, value));
    }
}

/// The first NaN of each row, or else the first of its largest values.
pub(super) fn argmax<T: Float>(values: &[T], count: usize) -> Buffer<i64> {
    let mut output = Buffer::recycled(values.len() / count);
    let rows_per_piece = (parallel::PIECE / count).max(1);
    parallel::pieces_mut(&mut output, rows_per_piece, |index, piece| {
        for (row, out) in piece.iter_mut().enumerate() {
            let row = &values[(index * rows_per_piece + row) * count..][..count];
            let better = |value: T, best: T| value > best || (value.is_nan() && !best.is_nan());
            let best = (1..count).fold(0, |best, at| if better(row[at], row[best]) { at } else { best });
            *out = best as i64;
        }
    });
    output
}
