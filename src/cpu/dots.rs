//! Products of two `f32` matrices that both lie row by row, left · rightᵀ, from dot products: for so few rows on the left
//! that packing the right one would cost as much as the product.
//!
//! Vectors run along the depth. Some rows of the right operand stay in the nearest cache while all of the left pass by; a
//! block of both stays in registers over a chunk of the depth, and then every sum is that of its lanes. What it costs beside its
//! multiply-adds are those last sums, a quarter of a block's time at a depth of 256 and an eighth at 512.

use pulp::{Simd, WithSimd};

use super::ahead::Ahead;
use super::block_gemm::{Strided, load};
use super::simd;

/// `sums[i · stride + j] += Σ left[i, k] · right[j, k]` over as many rows as `rows` says, of `left` and of `right`; both have
/// as many columns. `ahead` is read soon after this product.
///
/// # Panics
/// Where extents do not match or a row leaves its data.
#[inline(never)]
pub fn add_dots(
    left: Strided<'_>,
    right: Strided<'_>,
    rows: [usize; 2],
    sums: &mut [f32],
    stride: usize,
    ahead: Strided<'_>,
) {
    assert_eq!(left.columns, right.columns, "columns");
    assert!(left.holds(rows[0]) && right.holds(rows[1]), "rows");
    assert!(rows[1] <= stride && (rows[0] == 0 || (rows[0] - 1) * stride + rows[1] <= sums.len()), "sums");
    simd::with_vectors(AddDots { left, right, rows, sums, stride, ahead });
}

struct AddDots<'a> {
    left: Strided<'a>,
    right: Strided<'a>,
    rows: [usize; 2],
    sums: &'a mut [f32],
    stride: usize,
    ahead: Strided<'a>,
}

impl WithSimd for AddDots<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        // Sums, a vector of each row on the left and one on the right are in registers.
        match S::F32_LANES {
            16.. => self.all_rows::<S, 3, 8>(simd),
            8.. => self.all_rows::<S, 2, 4>(simd),
            4.. => self.all_rows::<S, 3, 4>(simd),
            _ => self.all_rows::<S, 2, 2>(simd),
        }
    }
}

impl AddDots<'_> {
    #[inline(always)]
    fn all_rows<S: Simd, const R: usize, const C: usize>(&mut self, simd: S) {
        let [left, right] = self.rows;
        let blocks = left.div_ceil(R) * right.div_ceil(C);
        let mut ahead = Ahead::new(self.ahead, blocks);
        for column in (0..right).step_by(C) {
            for row in (0..left).step_by(R) {
                ahead.begin_block();
                match (row + R <= left, column + C <= right) {
                    (true, true) => self.block::<S, R, C>(simd, [row, column], &mut ahead),
                    (false, true) => (row..left).for_each(|row| self.block::<S, 1, C>(simd, [row, column], &mut ahead)),
                    (true, false) => {
                        (column..right).for_each(|column| self.block::<S, R, 1>(simd, [row, column], &mut ahead))
                    }
                    (false, false) => {
                        for row in row..left {
                            (column..right).for_each(|column| self.block::<S, 1, 1>(simd, [row, column], &mut ahead));
                        }
                    }
                }
                ahead.finish_block();
            }
        }
    }

    #[inline(always)]
    fn block<S: Simd, const R: usize, const C: usize>(
        &mut self,
        simd: S,
        [row, column]: [usize; 2],
        ahead: &mut Ahead<'_>,
    ) {
        let depth = self.left.columns;
        let left: [&[f32]; R] = std::array::from_fn(|r| &self.left.data[(row + r) * self.left.stride..][..depth]);
        let right: [&[f32]; C] = std::array::from_fn(|c| &self.right.data[(column + c) * self.right.stride..][..depth]);
        let mut sums = [[simd.splat_f32s(0.0); C]; R];
        let whole = depth / S::F32_LANES * S::F32_LANES;
        for at in (0..whole).step_by(S::F32_LANES) {
            ahead.ask();
            let mut factors = [simd.splat_f32s(0.0); R];
            for r in 0..R {
                factors[r] = load::<S>(left[r], at);
            }
            for c in 0..C {
                let values = load::<S>(right[c], at);
                for r in 0..R {
                    sums[r][c] = simd.mul_add_e_f32s(factors[r], values, sums[r][c]);
                }
            }
        }
        if whole < depth {
            for c in 0..C {
                let values = simd.partial_load_f32s(&right[c][whole..]);
                for r in 0..R {
                    sums[r][c] = simd.mul_add_e_f32s(simd.partial_load_f32s(&left[r][whole..]), values, sums[r][c]);
                }
            }
        }
        for (r, sums) in sums.into_iter().enumerate() {
            let to = &mut self.sums[(row + r) * self.stride + column..][..C];
            for (to, sum) in to.iter_mut().zip(sums) {
                *to += simd.reduce_sum_f32s(sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Philox;

    struct Dots<'a>(&'a [f32], &'a [f32], [usize; 3]);

    impl WithSimd for Dots<'_> {
        type Output = Vec<f32>;

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> Vec<f32> {
            let Dots(left, right, [rows, columns, depth]) = self;
            let stride = columns + 3;
            let mut sums = vec![0.25; rows * stride];
            let [left, right] = [left, right].map(|data| Strided { data, stride: depth + 1, columns: depth });
            AddDots { left, right, rows: [rows, columns], sums: &mut sums, stride, ahead: right }.with_simd(simd);
            sums
        }
    }

    #[test]
    fn every_instruction_set_matches_the_definition() {
        let random = |len, seed| (0..len).map(|i| Philox::new(seed).uniform(i) - 0.5).collect::<Vec<f32>>();
        for (rows, columns, depth) in [(1, 1, 1), (3, 8, 16), (7, 9, 33), (49, 20, 100), (2, 31, 15), (5, 1, 64)] {
            let [left, right] = [(rows, 1), (columns, 2)].map(|(rows, seed)| random((rows * (depth + 1)) as u64, seed));
            let results = simd::with_every_set(|| Dots(&left, &right, [rows, columns, depth]));
            for (index, got) in results.iter().flat_map(|sums| sums.iter().enumerate()) {
                let [i, j] = [index / (columns + 3), index % (columns + 3)];
                let term = |k| f64::from(left[i * (depth + 1) + k]) * f64::from(right[j * (depth + 1) + k]);
                let exact = 0.25 + if j < columns { (0..depth).map(term).sum::<f64>() } else { 0.0 };
                assert!((f64::from(*got) - exact).abs() < 1e-5, "{rows} × {columns} × {depth} at {index}");
            }
        }
    }
}
