//! Products of matrices that fit in the L1 or L2 cache: attention scores and their gradients, rows of windows.
//!
//! A general product packs its operands, which costs more than it saves at 49×32. Here the right operand is read in
//! place, and a block of the result stays in registers over the whole depth. `f32` in explicit vectors; other types, which
//! are references, in plain loops.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::block_gemm::{load, store};
use super::{Float, simd};
use crate::tensor::DType;

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

/// What a product is added to.
#[derive(Clone, Copy)]
pub enum Onto<'a, T> {
    /// result = product
    Nothing,
    /// result += product
    Itself,
    /// result = these values + product, in the same order.
    Values(&'a [T]),
}

/// Runs of `data` that are read soon after a product: it asks for some of them with every block of rows, so that they come
/// while it computes.
#[derive(Clone, Copy, Default)]
pub struct Ahead<'a> {
    /// Where the runs lie.
    pub data: &'a [u8],
    /// Bytes of `data`.
    pub runs: &'a [Range<usize>],
}

/// `left · right`, `rows` × `depth` by `depth` × `width`; right operand and result are row-major without gaps.
///
/// # Panics
/// Where an operand is too short, `width` is not a multiple of [`LANES`], or a run leaves its data.
#[inline(never)]
pub fn multiply<T: Float>(
    left: Left<'_, T>,
    [rows, depth, width]: [usize; 3],
    right: &[T],
    onto: Onto<'_, T>,
    result: &mut [T],
    ahead: Ahead<'_>,
) {
    assert!(width.is_multiple_of(LANES), "width");
    let (right, result) = (&right[..depth * width], &mut result[..rows * width]);
    if T::DTYPE != DType::F32 {
        return multiply_in_loops(left, [rows, depth, width], right, onto, result);
    }
    let left =
        Left { data: bytemuck::cast_slice(left.data), row_stride: left.row_stride, depth_stride: left.depth_stride };
    let onto = match onto {
        Onto::Nothing => Onto::Nothing,
        Onto::Itself => Onto::Itself,
        Onto::Values(values) => Onto::Values(bytemuck::cast_slice(values)),
    };
    let (right, result) = (bytemuck::cast_slice(right), bytemuck::cast_slice_mut(result));
    simd::with_vectors(Product { left, rows, depth, width, right, onto, result, ahead });
}

fn multiply_in_loops<T: Float>(
    left: Left<'_, T>,
    [rows, depth, width]: [usize; 3],
    right: &[T],
    onto: Onto<'_, T>,
    result: &mut [T],
) {
    simd::dispatch(
        #[inline(always)]
        || {
            for row in 0..rows {
                for column in (0..width).step_by(LANES) {
                    let mut sums = [T::ZERO; LANES];
                    for at in 0..depth {
                        let factor = left.data[row * left.row_stride + at * left.depth_stride];
                        for (sum, &right) in sums.iter_mut().zip(&right[at * width + column..][..LANES]) {
                            *sum = factor.mul_add(right, *sum);
                        }
                    }
                    let place = row * width + column;
                    for (lane, sum) in sums.into_iter().enumerate() {
                        result[place + lane] = match onto {
                            Onto::Nothing => sum,
                            Onto::Itself => result[place + lane] + sum,
                            Onto::Values(values) => values[place + lane] + sum,
                        };
                    }
                }
            }
        },
    );
}

struct Product<'a> {
    left: Left<'a, f32>,
    rows: usize,
    depth: usize,
    width: usize,
    right: &'a [f32],
    onto: Onto<'a, f32>,
    result: &'a mut [f32],
    ahead: Ahead<'a>,
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        // Rows of a block by the number of registers: 32 of AVX-512, 16 of AVX2, 32 of NEON for a quarter of the lanes.
        let most = match S::F32_LANES {
            16.. => 8,
            8.. => 6,
            4.. => 4,
            _ => 2,
        };
        let blocks = self.rows.div_ceil(most);
        let share = self.ahead.runs.len().div_ceil(blocks.max(1));
        let mut first = 0;
        for block in 0..blocks {
            for run in self.ahead.runs.iter().skip(block * share).take(share) {
                simd::prefetch(&self.ahead.data[run.clone()]);
            }
            // Blocks differ by one row at most: a short one at the end would wait for its own sums.
            let rows = (self.rows - first).div_ceil(blocks - block);
            match rows {
                8 if most >= 8 => self.row_block::<S, 8>(simd, first),
                7 if most >= 8 => self.row_block::<S, 7>(simd, first),
                6 if most >= 6 => self.row_block::<S, 6>(simd, first),
                5 if most >= 6 => self.row_block::<S, 5>(simd, first),
                4 if most >= 4 => self.row_block::<S, 4>(simd, first),
                3 if most >= 4 => self.row_block::<S, 3>(simd, first),
                2 => self.row_block::<S, 2>(simd, first),
                _ => self.row_block::<S, 1>(simd, first),
            }
            first += rows;
        }
    }
}

impl Product<'_> {
    #[inline(always)]
    fn row_block<S: Simd, const R: usize>(&mut self, simd: S, first: usize) {
        let mut column = 0;
        while column < self.width {
            let vectors = (self.width - column) / S::F32_LANES;
            column += match vectors {
                3 if S::F32_LANES >= 16 => self.tile::<S, R, 3>(simd, first, column),
                2.. => self.tile::<S, R, 2>(simd, first, column),
                _ => self.tile::<S, R, 1>(simd, first, column),
            };
        }
    }

    /// A block of `R` rows and `V` vectors; returns its columns.
    #[inline(always)]
    fn tile<S: Simd, const R: usize, const V: usize>(&mut self, simd: S, first: usize, column: usize) -> usize {
        let mut sums = [[simd.splat_f32s(0.0); V]; R];
        if self.left.depth_stride == 1 {
            let mut rows: [&[f32]; R] = [&[]; R];
            for (r, row) in rows.iter_mut().enumerate() {
                *row = &self.left.data[(first + r) * self.left.row_stride..][..self.depth];
            }
            for (at, right) in self.right.chunks_exact(self.width).enumerate() {
                let right = &S::as_simd_f32s(&right[column..]).0[..V];
                for r in 0..R {
                    let factor = simd.splat_f32s(rows[r][at]);
                    for v in 0..V {
                        sums[r][v] = simd.mul_add_e_f32s(factor, right[v], sums[r][v]);
                    }
                }
            }
        } else {
            for (at, right) in self.right.chunks_exact(self.width).enumerate() {
                let right = &S::as_simd_f32s(&right[column..]).0[..V];
                let left = &self.left.data[at * self.left.depth_stride + first..][..R];
                for r in 0..R {
                    let factor = simd.splat_f32s(left[r]);
                    for v in 0..V {
                        sums[r][v] = simd.mul_add_e_f32s(factor, right[v], sums[r][v]);
                    }
                }
            }
        }
        for (r, sums) in sums.into_iter().enumerate() {
            for (v, sum) in sums.into_iter().enumerate() {
                let at = (first + r) * self.width + column + v * S::F32_LANES;
                let sum = match self.onto {
                    Onto::Nothing => sum,
                    Onto::Itself => simd.add_f32s(load::<S>(self.result, at), sum),
                    Onto::Values(values) => simd.add_f32s(load::<S>(values, at), sum),
                };
                store::<S>(self.result, at, sum);
            }
        }
        V * S::F32_LANES
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Philox;

    fn every_block_size_matches_the_definition<T: Float>(tolerance: f64) {
        let random =
            |n: usize, seed| -> Vec<T> { (0..n).map(|i| T::from_f64(Philox::new(seed).normal(i as u64))).collect() };
        for rows in 1..18 {
            for (depth, width) in [(1, 16), (5, 32), (33, 48), (0, 16), (7, 64), (3, 80)] {
                let (a, b, values) = (random(rows * depth, 1), random(depth * width, 2), random(rows * width, 3));
                let mut transposed = vec![T::ZERO; rows * depth];
                (0..rows * depth).for_each(|i| transposed[i % depth.max(1) * rows + i / depth.max(1)] = a[i]);
                for left in [Left::rows(&a, depth), Left::transposed(&transposed, rows)] {
                    for (onto, start) in [
                        (Onto::Nothing, &vec![T::ZERO; rows * width]),
                        (Onto::Itself, &vec![T::ONE; rows * width]),
                        (Onto::Values(&values), &values),
                    ] {
                        let mut c = vec![T::ONE; rows * width];
                        multiply(
                            left,
                            [rows, depth, width],
                            &b,
                            onto,
                            &mut c,
                            Ahead { data: &[0; 9], runs: &[0..9, 3..4, 5..5] },
                        );
                        for (index, &got) in c.iter().enumerate() {
                            let (row, column) = (index / width, index % width);
                            let term = |i: usize| a[row * depth + i].to_f64() * b[i * width + column].to_f64();
                            let exact = start[index].to_f64() + (0..depth).map(term).sum::<f64>();
                            assert!(
                                (got.to_f64() - exact).abs() < tolerance,
                                "{rows}×{depth}×{width} at {index}: {got:?}, {exact}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn every_block_size_matches_the_definition_in_f64() {
        every_block_size_matches_the_definition::<f64>(1e-12);
    }

    #[test]
    fn every_block_size_matches_the_definition_in_f32() {
        every_block_size_matches_the_definition::<f32>(2e-5);
    }
}
