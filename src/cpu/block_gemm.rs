//! Products of `f32` matrices in packed or scattered form, block by block: what convolutions are made of.
//!
//! The right operand is packed once, in panels of [`PANEL`] columns. A block of some rows by one panel stays in registers
//! over the whole depth. Sums run in the order of the depth, whatever the number of rows and threads. What is needed next
//! can be asked for meanwhile: a few cache lines before each block, where a copy beforehand would wait for memory.

use pulp::{Simd, WithSimd};

use super::ahead::{Ahead, contiguous};
use super::simd;

/// Columns of a panel are a multiple of this.
pub const LANES: usize = 16;
/// Columns of a whole panel.
pub const PANEL: usize = 2 * LANES;
/// Columns of a packed left operand of [`multiply_transposed`] in one group.
pub const GROUP: usize = 8;

/// What a product is added to.
#[derive(Clone, Copy, PartialEq)]
pub enum Onto<'a> {
    /// destination = product
    Nothing,
    /// destination += product
    Itself,
    /// Every row of the destination = this row + product: sums begin with a bias.
    Row(&'a [f32]),
}

/// How a product that does not read its destination writes it. The bits are the same.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Writes {
    /// The destination is in a cache near the core.
    Near,
    /// The destination is anywhere: its lines are asked for before the product begins.
    Fetched,
    /// The destination is large and read much later: vectors that begin on a line go past the caches.
    Streamed,
}

impl Writes {
    /// For a result of so many elements, written once: what no cache holds until it is read goes past them.
    pub fn of_large<T>(elements: usize) -> Self {
        const CACHED_BYTES: usize = 16 << 20;
        if elements * size_of::<T>() > CACHED_BYTES { Writes::Streamed } else { Writes::Fetched }
    }
}

/// `destination = rows · panel` or `destination += rows · panel`.
pub struct Product<'a, R, P, O> {
    /// Rows, or the first runs of rows, each run with so many elements.
    pub rows: Strided<'a, R>,
    /// Where the runs of a row begin, from the row's beginning: `[0]`, or several of sums that are not split into shorter ones.
    pub runs: O,
    /// How many rows.
    pub count: usize,
    /// The right operand, row-major.
    pub panel: &'a [f32],
    /// Its columns, [`LANES`] or [`PANEL`].
    pub width: usize,
    /// Where all rows of the result lie.
    pub destination: &'a mut [f32],
    /// Distance of the result's rows, or where each of them begins.
    pub places: P,
    /// What the product is added to.
    pub onto: Onto<'a>,
    /// How the result is written. Sums of more than `terms` are read again, so none goes past the caches.
    pub writes: Writes,
    /// Terms that are summed at most before they join a longer sum, which keeps errors small.
    pub terms: usize,
    /// What is read soon after this product.
    pub ahead: Strided<'a>,
}

impl<R: Starts, P: Starts, O: AsRef<[usize]>> Product<'_, R, P, O> {
    /// Computes it.
    ///
    /// # Panics
    /// Where extents do not match or a row leaves its slice.
    #[inline(never)]
    pub fn run(self) {
        let streamed = self.writes == Writes::Streamed;
        simd::with_vectors(self);
        if streamed {
            simd::finish_streaming();
        }
    }

    /// Terms of each sum.
    #[inline(always)]
    fn depth(&self) -> usize {
        self.runs.as_ref().len() * self.rows.columns
    }

    fn check(&self) {
        let Product { rows, count, panel, width, .. } = self;
        assert!((*width == LANES || *width == PANEL) && panel.len() == self.depth() * width, "panel");
        assert!(self.runs.as_ref().len() == 1 || self.terms >= self.depth(), "runs");
        assert!(rows.holds(*count) && self.places.hold(*count, *width, self.destination.len()), "rows");
        assert!(self.terms > 0 || panel.is_empty(), "terms");
        if let Onto::Row(row) = self.onto {
            assert_eq!(row.len(), *width, "row to begin with");
        }
    }
}

/// Where rows begin: `usize` apart, or at the places of a list.
pub trait Starts: Copy {
    /// The place of a row.
    fn at(&self, row: usize) -> usize;
    /// Whether so many rows of `columns` elements lie in data of length `len`. Of a list that shows when a row is read.
    fn hold(&self, rows: usize, columns: usize, len: usize) -> bool;
}

impl Starts for usize {
    #[inline(always)]
    fn at(&self, row: usize) -> usize {
        row * self
    }

    fn hold(&self, rows: usize, columns: usize, len: usize) -> bool {
        rows == 0 || (rows - 1) * self + columns <= len
    }
}

impl Starts for &[usize] {
    #[inline(always)]
    fn at(&self, row: usize) -> usize {
        self[row]
    }

    fn hold(&self, rows: usize, _: usize, _: usize) -> bool {
        rows <= self.len()
    }
}

/// Rows of `columns` contiguous elements.
#[derive(Clone, Copy)]
pub struct Strided<'a, P = usize, E = f32> {
    /// Where all rows lie.
    pub data: &'a [E],
    /// Distance of rows, or where each of them begins.
    pub stride: P,
    /// Elements of a row that count.
    pub columns: usize,
}

impl<P: Starts, E> Strided<'_, P, E> {
    pub(super) fn holds(&self, rows: usize) -> bool {
        self.stride.hold(rows, self.columns, self.data.len())
    }
}

/// Runs a [`TransposedProduct`].
///
/// # Panics
/// Where extents do not match or a row leaves its data.
#[inline(never)]
pub fn multiply_transposed<L: Starts, R: Starts>(
    left: Strided<'_, L>,
    right: Strided<'_, R>,
    depth: usize,
    sums: &mut [f32],
    ahead: &[f32],
) {
    simd::with_vectors(TransposedProduct { left, right, depth, sums, ahead });
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

impl<R: Starts, P: Starts, O: AsRef<[usize]>> WithSimd for Product<'_, R, P, O> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        self.check();
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

impl<R: Starts, P: Starts, O: AsRef<[usize]>> Product<'_, R, P, O> {
    #[inline(always)]
    fn all_rows<S: Simd, const N: usize, const V: usize>(&mut self, simd: S) {
        let mut ahead = Ahead::new(self.ahead, self.count.div_ceil(N));
        let mut first = 0;
        while first < self.count {
            ahead.begin_block();
            let left = self.count - first;
            first += match left {
                _ if left >= N => self.block::<S, N, V>(simd, first, &mut ahead),
                4.. => self.block::<S, 4, V>(simd, first, &mut ahead),
                2.. => self.block::<S, 2, V>(simd, first, &mut ahead),
                _ => self.block::<S, 1, V>(simd, first, &mut ahead),
            };
            ahead.finish_block();
        }
    }

    #[inline(always)]
    fn block<S: Simd, const N: usize, const V: usize>(
        &mut self,
        simd: S,
        first: usize,
        ahead: &mut Ahead<'_>,
    ) -> usize {
        for column in (0..self.width).step_by(V * S::F32_LANES) {
            if self.writes == Writes::Fetched {
                for r in first..first + N {
                    simd::prefetch_to_write(&self.destination[self.places.at(r) + column..][..V * S::F32_LANES]);
                }
            }
            let mut done = 0;
            // At least once, so that a product of no terms is written.
            loop {
                let terms = self.terms.min(self.depth() - done);
                let sums = self.sums::<S, N, V>(simd, (first, column), (done, terms), ahead);
                let onto = if done == 0 { self.onto } else { Onto::Itself };
                done += terms;
                let streamed = self.writes == Writes::Streamed && self.terms >= self.depth();
                for (r, sums) in sums.into_iter().enumerate() {
                    let to = &mut self.destination[self.places.at(first + r) + column..][..V * S::F32_LANES];
                    for (v, sum) in sums.into_iter().enumerate() {
                        let at = v * S::F32_LANES;
                        let sum = match onto {
                            Onto::Nothing | Onto::Row(_) => sum,
                            Onto::Itself => simd.add_f32s(load::<S>(to, at), sum),
                        };
                        if streamed {
                            simd::stream::<S>(&mut to[at..at + S::F32_LANES], sum);
                        } else {
                            store::<S>(to, at, sum);
                        }
                    }
                }
                if done == self.depth() {
                    break;
                }
            }
        }
        N
    }

    /// Of rows from `first` on and columns from `column` on the sums of some terms; the first ones begin with a row, if there
    /// is one to begin with.
    #[inline(always)]
    fn sums<S: Simd, const N: usize, const V: usize>(
        &self,
        simd: S,
        (first, column): (usize, usize),
        (from, terms): (usize, usize),
        ahead: &mut Ahead<'_>,
    ) -> [[S::f32s; V]; N] {
        let mut sums = [[simd.splat_f32s(0.0); V]; N];
        if let (Onto::Row(row), 0) = (self.onto, from) {
            let mut start = [simd.splat_f32s(0.0); V];
            for (v, start) in start.iter_mut().enumerate() {
                *start = load::<S>(row, column + v * S::F32_LANES);
            }
            sums = [start; N];
        }
        // Of one run some terms, of several all.
        let len = if self.runs.as_ref().len() == 1 { terms } else { self.rows.columns };
        let mut panel = &self.panel[from * self.width..][..terms * self.width];
        for run in self.runs.as_ref() {
            let mut rows: [&[f32]; N] = [&[]; N];
            for (r, row) in rows.iter_mut().enumerate() {
                *row = &self.rows.data[self.rows.stride.at(first + r) + run + from..][..len];
            }
            let (of_run, behind) = panel.split_at(len * self.width);
            panel = behind;
            for (at, right) in of_run.chunks_exact(self.width).enumerate() {
                ahead.ask();
                let right = &S::as_simd_f32s(&right[column..]).0[..V];
                for r in 0..N {
                    let factor = simd.splat_f32s(rows[r][at]);
                    for v in 0..V {
                        sums[r][v] = simd.mul_add_e_f32s(factor, right[v], sums[r][v]);
                    }
                }
            }
        }
        sums
    }
}

/// `sums += leftᵀ · right`, row-major without gaps.
pub struct TransposedProduct<'a, A, B> {
    /// Rows of a multiple of four columns, best of [`GROUP`].
    pub left: Strided<'a, A>,
    /// Rows of [`LANES`] or [`PANEL`] columns.
    pub right: Strided<'a, B>,
    /// Rows of both.
    pub depth: usize,
    /// (column of the left operand, column of the right one)
    pub sums: &'a mut [f32],
    /// What is read soon after this product.
    pub ahead: &'a [f32],
}

impl<A: Starts, B: Starts> WithSimd for TransposedProduct<'_, A, B> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let TransposedProduct { left, right, depth, .. } = self;
        assert!(left.columns.is_multiple_of(4) && left.holds(depth), "left");
        assert!((right.columns == LANES || right.columns == PANEL) && right.holds(depth), "right");
        assert_eq!(self.sums.len(), left.columns * right.columns, "sums");
        if depth == 0 {
            return;
        }
        match (S::F32_LANES, right.columns) {
            // Twelve columns, as of a stem's large kernels: in one block, not in one of eight and one of four.
            (16.., PANEL) if self.left.columns == 12 => self.all_blocks::<S, 12, 2>(simd),
            (16.., PANEL) => self.all_blocks::<S, 8, 2>(simd),
            (16.., _) => self.all_blocks::<S, 8, 1>(simd),
            (8.., _) => self.all_blocks::<S, 4, 2>(simd),
            (4.., _) => self.all_blocks::<S, 4, 4>(simd),
            _ => self.all_blocks::<S, 2, 4>(simd),
        }
    }
}

impl<A: Starts, B: Starts> TransposedProduct<'_, A, B> {
    #[inline(always)]
    fn all_blocks<S: Simd, const R: usize, const V: usize>(&mut self, simd: S) {
        let blocks = self.left.columns.div_ceil(R);
        let mut ahead = Ahead::new(contiguous(self.ahead), blocks);
        for block in 0..blocks {
            ahead.begin_block();
            for column in (0..self.right.columns).step_by(V * S::F32_LANES) {
                if (block + 1) * R <= self.left.columns {
                    self.block::<S, R, V>(simd, [block * R, column], &mut ahead);
                } else {
                    self.block::<S, 4, V>(simd, [block * R, column], &mut ahead);
                }
            }
            ahead.finish_block();
        }
    }

    #[inline(always)]
    fn block<S: Simd, const R: usize, const V: usize>(
        &mut self,
        simd: S,
        [first, column]: [usize; 2],
        ahead: &mut Ahead<'_>,
    ) {
        let mut sums = [[simd.splat_f32s(0.0); V]; R];
        let (left, right) = (&self.left.data[first..], &self.right.data[column..]);
        for t in 0..self.depth {
            ahead.ask();
            let left = &left[self.left.stride.at(t)..][..R];
            let right = S::as_simd_f32s(&right[self.right.stride.at(t)..][..V * S::F32_LANES]).0;
            let right = &right[..V];
            for r in 0..R {
                let factor = simd.splat_f32s(left[r]);
                for v in 0..V {
                    sums[r][v] = simd.mul_add_e_f32s(factor, right[v], sums[r][v]);
                }
            }
        }
        for (r, sums) in sums.into_iter().enumerate() {
            for (v, sum) in sums.into_iter().enumerate() {
                let at = (first + r) * self.right.columns + column + v * S::F32_LANES;
                store::<S>(self.sums, at, simd.add_f32s(load::<S>(self.sums, at), sum));
            }
        }
    }
}

#[cfg(test)]
mod tests;
