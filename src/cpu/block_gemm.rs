//! Products of `f32` matrices in packed or scattered form, block by block: what convolutions are made of.
//!
//! The right operand is packed once, in panels of [`PANEL`] columns. A block of some rows by one panel stays in registers
//! over the whole depth. Sums run in the order of the depth, whatever the number of rows and threads. What is needed next
//! can be asked for meanwhile: a few cache lines before each block, where a copy beforehand would wait for memory.

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

/// `destination = rows · panel` or `destination += rows · panel`: `panel` is row-major, of `width` columns, which is
/// [`LANES`] or [`PANEL`]; the destination's rows begin at `places`. `ahead` is read soon after this product.
///
/// # Panics
/// Where extents do not match or a row leaves its slice.
pub fn multiply(
    rows: Rows<'_>,
    panel: &[f32],
    width: usize,
    to: (&mut [f32], &[usize]),
    onto: Onto<'_>,
    writes: Writes,
    ahead: &[f32],
) {
    multiply_ahead(rows, panel, width, to, onto, writes, lines(ahead));
}

/// Contiguous elements, a cache line in each row.
fn lines(data: &[f32]) -> Strided<'_> {
    const LINE: usize = 16;
    Strided { data, stride: LINE, columns: LINE }
}

/// [`multiply`], where what is read soon is rows of a matrix, as many as begin in its data.
///
/// # Panics
/// As [`multiply`].
#[inline(never)]
pub fn multiply_ahead(
    rows: Rows<'_>,
    panel: &[f32],
    width: usize,
    to: (&mut [f32], &[usize]),
    onto: Onto<'_>,
    writes: Writes,
    ahead: Strided<'_>,
) {
    assert!((width == LANES || width == PANEL) && panel.len().is_multiple_of(width), "panel");
    assert_eq!(rows.starts.len(), to.1.len(), "rows");
    if let Onto::Row(row) = onto {
        assert_eq!(row.len(), width, "row to begin with");
    }
    simd::with_vectors(Multiply { rows, panel, width, data: to.0, places: to.1, onto, writes, ahead });
    if writes == Writes::Streamed {
        simd::finish_streaming();
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

/// `sums += leftᵀ · right`, over `depth` rows: `left` has a multiple of four columns, best of [`GROUP`], `right` [`LANES`] or
/// [`PANEL`]; `sums` is row-major without gaps. `ahead` is read soon after this product.
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
    assert!(left.columns.is_multiple_of(4) && left.holds(depth), "left");
    assert!((right.columns == LANES || right.columns == PANEL) && right.holds(depth), "right");
    assert_eq!(sums.len(), left.columns * right.columns, "sums");
    if depth > 0 {
        simd::with_vectors(MultiplyTransposed { left, right, depth, sums, ahead });
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
    onto: Onto<'a>,
    writes: Writes,
    ahead: Strided<'a>,
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
            prefetch_share(self.ahead, first / R, self.places.len().div_ceil(R));
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
            if self.writes == Writes::Fetched {
                for place in &self.places[first..first + R] {
                    simd::prefetch_to_write(&self.data[place + column..][..V * S::F32_LANES]);
                }
            }
            let mut sums = [[simd.splat_f32s(0.0); V]; R];
            if let Onto::Row(row) = self.onto {
                let mut start = [simd.splat_f32s(0.0); V];
                for (v, start) in start.iter_mut().enumerate() {
                    *start = load::<S>(row, column + v * S::F32_LANES);
                }
                sums = [start; R];
            }
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
                        Onto::Nothing | Onto::Row(_) => sum,
                        Onto::Itself => simd.add_f32s(load::<S>(self.data, at), sum),
                    };
                    if self.writes == Writes::Streamed {
                        simd::stream::<S>(&mut self.data[at..at + S::F32_LANES], sum);
                    } else {
                        store::<S>(self.data, at, sum);
                    }
                }
            }
        }
        R
    }
}

struct MultiplyTransposed<'a, A, B> {
    left: Strided<'a, A>,
    right: Strided<'a, B>,
    depth: usize,
    sums: &'a mut [f32],
    ahead: &'a [f32],
}

/// Asks for the rows of `ahead` that fall to block `index` of `blocks`.
#[inline(always)]
pub(super) fn prefetch_share(ahead: Strided<'_>, index: usize, blocks: usize) {
    if !ahead.data.is_empty() {
        let share = ahead.data.len().div_ceil(ahead.stride).div_ceil(blocks);
        for row in ahead.data.chunks(ahead.stride).skip(index * share).take(share) {
            simd::prefetch(&row[..ahead.columns.min(row.len())]);
        }
    }
}

impl<A: Starts, B: Starts> WithSimd for MultiplyTransposed<'_, A, B> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        match (S::F32_LANES, self.right.columns) {
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

impl<A: Starts, B: Starts> MultiplyTransposed<'_, A, B> {
    #[inline(always)]
    fn all_blocks<S: Simd, const R: usize, const V: usize>(&mut self, simd: S) {
        let blocks = self.left.columns.div_ceil(R);
        for block in 0..blocks {
            prefetch_share(lines(self.ahead), block, blocks);
            for column in (0..self.right.columns).step_by(V * S::F32_LANES) {
                if (block + 1) * R <= self.left.columns {
                    self.block::<S, R, V>(simd, block * R, column);
                } else {
                    self.block::<S, 4, V>(simd, block * R, column);
                }
            }
        }
    }

    #[inline(always)]
    fn block<S: Simd, const R: usize, const V: usize>(&mut self, simd: S, first: usize, column: usize) {
        let mut sums = [[simd.splat_f32s(0.0); V]; R];
        let (left, right) = (&self.left.data[first..], &self.right.data[column..]);
        for t in 0..self.depth {
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
mod tests {
    use super::*;
    use crate::random::Philox;

    fn random(len: usize, seed: u64) -> Vec<f32> {
        (0..len).map(|i| Philox::new(seed).uniform(i as u64) - 0.5).collect()
    }

    /// Runs what `work` makes with every instruction set that this machine has.
    fn on_every_set<W: WithSimd<Output = Vec<f32>>>(work: impl Fn() -> W) -> Vec<Vec<f32>> {
        let mut results = vec![simd::with_vectors(work())];
        results.push(pulp::Simd::vectorize(pulp::Scalar128b, work()));
        results.push(pulp::Simd::vectorize(pulp::Scalar, work()));
        #[cfg(target_arch = "x86_64")]
        results.extend(pulp::x86::V3::try_new().map(|avx2| pulp::Simd::vectorize(avx2, work())));
        results
    }

    struct Rowwise<'a>(&'a [f32], &'a [f32], [usize; 3]);

    impl WithSimd for Rowwise<'_> {
        type Output = Vec<f32>;

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> Vec<f32> {
            let Rowwise(left, panel, [rows, depth, width]) = self;
            let starts: Vec<usize> = (0..rows).map(|row| row * depth).collect();
            let places: Vec<usize> = (0..rows).map(|row| row * width).collect();
            let mut data = vec![1.0; rows * width];
            let start = vec![0.25; width];
            for (onto, writes) in [
                (Onto::Nothing, Writes::Fetched),
                (Onto::Row(&start), Writes::Streamed),
                (Onto::Row(&start), Writes::Near),
                (Onto::Itself, Writes::Near),
            ] {
                let rows = Rows { data: left, starts: &starts };
                let (data, places, ahead) = (&mut data[..], &places[..], lines(left));
                Multiply { rows, panel, width, data, places, onto, writes, ahead }.with_simd(simd);
            }
            data
        }
    }

    struct Transposed<'a>(&'a [f32], &'a [f32], [usize; 3]);

    impl WithSimd for Transposed<'_> {
        type Output = Vec<f32>;

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> Vec<f32> {
            let Transposed(left, ahead, [columns, depth, width]) = self;
            let right = ahead;
            let mut sums = vec![0.0; columns * width];
            let left = Strided { data: left, stride: columns, columns };
            let right = Strided { data: right, stride: width, columns: width };
            MultiplyTransposed { left, right, depth, sums: &mut sums, ahead }.with_simd(simd);
            sums
        }
    }

    #[test]
    fn every_instruction_set_matches_the_definition() {
        for width in [LANES, PANEL] {
            for (rows, depth) in [(1, 1), (7, 5), (8, 33), (16, 9), (23, 40)] {
                let (left, right) = (random(rows * depth, 1), random(depth * width, 2));
                for got in on_every_set(|| Rowwise(&left, &right, [rows, depth, width])) {
                    for (index, got) in got.iter().enumerate() {
                        let term = |i| {
                            f64::from(left[index / width * depth + i]) * f64::from(right[i * width + index % width])
                        };
                        let exact: f64 = (0..depth).map(term).sum();
                        assert!(
                            (f64::from(*got) - 2.0 * exact - 0.25).abs() < 1e-5,
                            "{rows} × {depth} × {width} at {index}"
                        );
                    }
                }
                let columns = rows.next_multiple_of(4);
                let left = random(depth * columns, 3);
                for got in on_every_set(|| Transposed(&left, &right, [columns, depth, width])) {
                    for (index, got) in got.iter().enumerate() {
                        let term = |t| {
                            f64::from(left[t * columns + index / width]) * f64::from(right[t * width + index % width])
                        };
                        let exact: f64 = (0..depth).map(term).sum();
                        assert!((f64::from(*got) - exact).abs() < 1e-5, "{columns} × {depth} × {width} at {index}");
                    }
                }
            }
        }
    }

    #[test]
    fn rows_of_a_list_give_the_bits_of_rows_so_far_apart() {
        let (columns, depth, width) = (12, 21, PANEL);
        let (left, right) = (random(depth * columns, 1), random(depth * width, 2));
        let [left_starts, right_starts] =
            [columns, width].map(|stride| (0..depth).map(|t| t * stride).collect::<Vec<_>>());
        let (mut sums, mut of_lists) = (vec![0.5; columns * width], vec![0.5; columns * width]);
        let left_rows = Strided { data: &left, stride: columns, columns };
        multiply_transposed(left_rows, Strided { data: &right, stride: width, columns: width }, depth, &mut sums, &[]);
        let left_rows = Strided { data: &left, stride: left_starts.as_slice(), columns };
        let right_rows = Strided { data: &right, stride: right_starts.as_slice(), columns: width };
        multiply_transposed(left_rows, right_rows, depth, &mut of_lists, &[]);
        assert_eq!(sums, of_lists);
    }
}
