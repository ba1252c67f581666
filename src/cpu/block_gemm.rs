//! Products of `f32` matrices in packed or scattered form, block by block: what convolutions are made of.
//!
//! The right operand is packed once, in panels of [`PANEL`] columns. A block of some rows by one panel stays in registers
//! over the whole depth. Sums run in the order of the depth, whatever the number of rows and threads.

use pulp::{Simd, WithSimd};

use super::simd;

/// Columns of a panel are a multiple of this.
pub const LANES: usize = 16;
/// Columns of a whole panel.
pub const PANEL: usize = 2 * LANES;
/// Columns of a packed left operand of [`multiply_transposed`] in one group.
pub const GROUP: usize = 8;

/// Rows whose elements are contiguous and which begin anywhere in `data`.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// Where all rows lie.
    pub data: &'a [f32],
    /// The beginning of each row.
    pub starts: &'a [usize],
}

/// What a product does with its destination.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Onto {
    /// destination = product
    Nothing,
    /// destination += product
    Itself,
}

/// `destination = rows · panel` or `destination += rows · panel`: `panel` is row-major, of `width` columns, which is
/// [`LANES`] or [`PANEL`]; the destination's rows begin at `places`.
///
/// # Panics
/// Where extents do not match or a row leaves its slice.
#[inline(never)]
pub fn multiply(rows: Rows<'_>, panel: &[f32], width: usize, to: (&mut [f32], &[usize]), onto: Onto) {
    assert!((width == LANES || width == PANEL) && panel.len().is_multiple_of(width), "panel");
    assert_eq!(rows.starts.len(), to.1.len(), "rows");
    simd::with_vectors(Multiply { rows, panel, width, data: to.0, places: to.1, onto });
}

/// `sums += leftᵀ · right`: `left` holds groups of [`GROUP`] columns one behind the other, each row-major, and `right` is
/// row-major with `width` columns, which is [`LANES`] or [`PANEL`]; so is `sums`.
///
/// # Panics
/// Where extents do not match.
#[inline(never)]
pub fn multiply_transposed(left: &[f32], right: &[f32], width: usize, sums: &mut [f32]) {
    let depth = right.len() / width;
    assert!((width == LANES || width == PANEL) && right.len() == depth * width, "right");
    assert!(sums.len().is_multiple_of(GROUP * width) && left.len() == depth * (sums.len() / width), "left");
    if depth > 0 {
        simd::with_vectors(MultiplyTransposed { left, right, width, sums });
    }
}

/// The vector at `at`.
#[inline(always)]
pub(crate) fn load<S: Simd>(data: &[f32], at: usize) -> S::f32s {
    S::as_simd_f32s(&data[at..at + S::F32_LANES]).0[0]
}

/// Writes a vector at `at`.
#[inline(always)]
pub(crate) fn store<S: Simd>(data: &mut [f32], at: usize, value: S::f32s) {
    S::as_mut_simd_f32s(&mut data[at..at + S::F32_LANES]).0[0] = value;
}

struct Multiply<'a> {
    rows: Rows<'a>,
    panel: &'a [f32],
    width: usize,
    data: &'a mut [f32],
    places: &'a [usize],
    onto: Onto,
}

impl WithSimd for Multiply<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        // As many sums as there are registers: 32 of AVX-512, 16 of AVX2, 32 of NEON.
        match (S::F32_LANES, self.width) {
            (16.., PANEL) => self.all_rows::<S, 8, 2>(simd),
            (16.., _) => self.all_rows::<S, 8, 1>(simd),
            (8.., _) => self.all_rows::<S, 6, 2>(simd),
            (4.., _) => self.all_rows::<S, 4, 4>(simd),
            _ => self.all_rows::<S, 2, 4>(simd),
        }
    }
}

impl Multiply<'_> {
    #[inline(always)]
    fn all_rows<S: Simd, const R: usize, const V: usize>(&mut self, simd: S) {
        let mut first = 0;
        while first < self.places.len() {
            let left = self.places.len() - first;
            first += match left {
                _ if left >= R => self.block::<S, R, V>(simd, first),
                4.. => self.block::<S, 4, V>(simd, first),
                2.. => self.block::<S, 2, V>(simd, first),
                _ => self.block::<S, 1, V>(simd, first),
            };
        }
    }

    #[inline(always)]
    fn block<S: Simd, const R: usize, const V: usize>(&mut self, simd: S, first: usize) -> usize {
        let depth = self.panel.len() / self.width;
        let mut rows: [&[f32]; R] = [&[]; R];
        for (r, row) in rows.iter_mut().enumerate() {
            *row = &self.rows.data[self.rows.starts[first + r]..][..depth];
        }
        for column in (0..self.width).step_by(V * S::F32_LANES) {
            let mut sums = [[simd.splat_f32s(0.0); V]; R];
            for (at, right) in self.panel.chunks_exact(self.width).enumerate() {
                let right = &S::as_simd_f32s(&right[column..]).0[..V];
                for r in 0..R {
                    let factor = simd.splat_f32s(rows[r][at]);
                    for v in 0..V {
                        sums[r][v] = simd.mul_add_e_f32s(factor, right[v], sums[r][v]);
                    }
                }
            }
            for (r, sums) in sums.into_iter().enumerate() {
                for (v, sum) in sums.into_iter().enumerate() {
                    let at = self.places[first + r] + column + v * S::F32_LANES;
                    let sum = match self.onto {
                        Onto::Nothing => sum,
                        Onto::Itself => simd.add_f32s(load::<S>(self.data, at), sum),
                    };
                    store::<S>(self.data, at, sum);
                }
            }
        }
        R
    }
}

struct MultiplyTransposed<'a> {
    left: &'a [f32],
    right: &'a [f32],
    width: usize,
    sums: &'a mut [f32],
}

impl WithSimd for MultiplyTransposed<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        match (S::F32_LANES, self.width) {
            (16.., PANEL) => self.all_groups::<S, 8, 2>(simd),
            (16.., _) => self.all_groups::<S, 8, 1>(simd),
            (8.., _) => self.all_groups::<S, 4, 2>(simd),
            (4.., _) => self.all_groups::<S, 4, 4>(simd),
            _ => self.all_groups::<S, 2, 4>(simd),
        }
    }
}

impl MultiplyTransposed<'_> {
    #[inline(always)]
    fn all_groups<S: Simd, const R: usize, const V: usize>(&mut self, simd: S) {
        let depth = self.right.len() / self.width;
        let groups = self.left.chunks_exact(depth * GROUP).zip(self.sums.chunks_exact_mut(GROUP * self.width));
        for (left, sums) in groups {
            for first in (0..GROUP).step_by(R) {
                for column in (0..self.width).step_by(V * S::F32_LANES) {
                    transposed_block::<S, R, V>(simd, left, self.right, self.width, [first, column], sums);
                }
            }
        }
    }
}

#[inline(always)]
fn transposed_block<S: Simd, const R: usize, const V: usize>(
    simd: S,
    left: &[f32],
    right: &[f32],
    width: usize,
    [first, column]: [usize; 2],
    out: &mut [f32],
) {
    let mut sums = [[simd.splat_f32s(0.0); V]; R];
    for (left, right) in left.chunks_exact(GROUP).zip(right.chunks_exact(width)) {
        let (left, right) = (&left[first..first + R], &S::as_simd_f32s(&right[column..]).0[..V]);
        for r in 0..R {
            let factor = simd.splat_f32s(left[r]);
            for v in 0..V {
                sums[r][v] = simd.mul_add_e_f32s(factor, right[v], sums[r][v]);
            }
        }
    }
    for (r, sums) in sums.into_iter().enumerate() {
        for (v, sum) in sums.into_iter().enumerate() {
            let at = (first + r) * width + column + v * S::F32_LANES;
            store::<S>(out, at, simd.add_f32s(load::<S>(out, at), sum));
        }
    }
}
