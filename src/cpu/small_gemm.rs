//! Products of matrices that fit in the L1 or L2 cache: attention scores and their gradients.
//!
//! A general product packs its operands, which costs more than it saves at 49×32. Here the right operand is read in
//! place, [`LANES`] columns at a time, and a block of the result stays in registers over the whole depth.

use super::{Float, simd};

/// Widths of right operands and results are multiples of this.
pub const LANES: usize = 16;

/// The left operand: element (row, i) is at `row * row_stride + i * depth_stride`; one of the strides is 1.
#[derive(Clone, Copy)]
pub struct Left<'a, T> {
    data: &'a [T],
    row_stride: usize,
    depth_stride: usize,
}

impl<'a, T> Left<'a, T> {
    /// Row-major, rows `stride` apart.
    pub fn rows(data: &'a [T], stride: usize) -> Self {
        Left { data, row_stride: stride, depth_stride: 1 }
    }

    /// The transpose of a row-major matrix whose rows are `stride` apart.
    pub fn transposed(data: &'a [T], stride: usize) -> Self {
        Left { data, row_stride: 1, depth_stride: stride }
    }
}

/// `result = left · right`, or `result += left · right` with `ADD`: `rows` × `depth` by `depth` × `width`, both right
/// operand and result row-major without gaps.
///
/// # Panics
/// Where an operand is too short or `width` is not a multiple of [`LANES`].
#[inline(never)]
pub fn multiply<T: Float, const ADD: bool>(
    left: Left<'_, T>,
    [rows, depth, width]: [usize; 3],
    right: &[T],
    result: &mut [T],
) {
    assert!(width.is_multiple_of(LANES), "width");
    let (right, result) = (&right[..depth * width], &mut result[..rows * width]);
    simd::dispatch(
        #[inline(always)]
        || {
            let mut first = 0;
            while first < rows {
                let result = &mut result[first * width..];
                // AVX-512 has 32 registers of 16 floats; AVX2 has 16 of 8, which hold a quarter of that.
                first += match rows - first {
                    6.. if simd::has_wide_registers() => {
                        row_block::<T, 6, ADD>(left, first, depth, width, right, result)
                    }
                    2.. => row_block::<T, 2, ADD>(left, first, depth, width, right, result),
                    _ => row_block::<T, 1, ADD>(left, first, depth, width, right, result),
                };
            }
        },
    );
}

#[inline(always)]
fn row_block<T: Float, const R: usize, const ADD: bool>(
    left: Left<'_, T>,
    first: usize,
    depth: usize,
    width: usize,
    right: &[T],
    result: &mut [T],
) -> usize {
    let mut column = 0;
    while column + 2 * LANES <= width {
        tile::<T, R, 2, ADD>(left, first, depth, width, column, right, result);
        column += 2 * LANES;
    }
    if column < width {
        tile::<T, R, 1, ADD>(left, first, depth, width, column, right, result);
    }
    R
}

#[inline(always)]
fn tile<T: Float, const R: usize, const V: usize, const ADD: bool>(
    left: Left<'_, T>,
    first: usize,
    depth: usize,
    width: usize,
    column: usize,
    right: &[T],
    result: &mut [T],
) {
    // Loops and no closures: a closure may stay a function of its own, compiled without the vector instructions.
    let mut sums = [[[T::ZERO; LANES]; V]; R];
    if left.depth_stride == 1 {
        let mut rows: [&[T]; R] = [&[]; R];
        for (row, slice) in rows.iter_mut().enumerate() {
            *slice = &left.data[(first + row) * left.row_stride..][..depth];
        }
        for (at, right) in right.chunks_exact(width).enumerate() {
            let mut factors = [T::ZERO; R];
            for (factor, row) in factors.iter_mut().zip(rows) {
                *factor = row[at];
            }
            accumulate(&mut sums, factors, &right[column..][..V * LANES]);
        }
    } else {
        for (at, right) in right.chunks_exact(width).enumerate() {
            let mut factors = [T::ZERO; R];
            factors.copy_from_slice(&left.data[at * left.depth_stride + first..][..R]);
            accumulate(&mut sums, factors, &right[column..][..V * LANES]);
        }
    }
    for (row, sums) in sums.iter().enumerate() {
        let out = &mut result[row * width + column..][..V * LANES];
        for (out, &sum) in out.iter_mut().zip(sums.as_flattened()) {
            *out = if ADD { *out + sum } else { sum };
        }
    }
}

/// Adds the outer product of `factors` and `row` to the block.
#[inline(always)]
#[allow(clippy::needless_range_loop, reason = "one index for both arrays")]
fn accumulate<T: Float, const R: usize, const V: usize>(sums: &mut [[[T; LANES]; V]; R], factors: [T; R], row: &[T]) {
    for r in 0..R {
        for v in 0..V {
            for lane in 0..LANES {
                sums[r][v][lane] = factors[r].mul_add(row[v * LANES + lane], sums[r][v][lane]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Philox;

    #[test]
    fn every_block_size_matches_the_definition() {
        let random = |n: usize, seed| -> Vec<f64> { (0..n).map(|i| Philox::new(seed).normal(i as u64)).collect() };
        for rows in 1..14 {
            for (depth, width) in [(1, 16), (5, 32), (33, 48), (0, 16)] {
                let (a, b) = (random(rows * depth, 1), random(depth * width, 2));
                let mut transposed = vec![0.0; rows * depth];
                (0..rows * depth).for_each(|i| transposed[i % depth.max(1) * rows + i / depth.max(1)] = a[i]);
                for left in [Left::rows(&a, depth), Left::transposed(&transposed, rows)] {
                    let mut c = vec![1.0; rows * width];
                    multiply::<f64, true>(left, [rows, depth, width], &b, &mut c);
                    for (index, &got) in c.iter().enumerate() {
                        let (row, column) = (index / width, index % width);
                        let sum: f64 = (0..depth).map(|i| a[row * depth + i] * b[i * width + column]).sum();
                        assert!((got - 1.0 - sum).abs() < 1e-12, "{rows}×{depth}×{width} at {index}");
                    }
                }
            }
        }
    }
}
