//! Matrices as products read them.

use half::bf16;

use super::{GROUP, PANEL, Places, Product, To, widen};
use crate::cpu::block_gemm::Strided;
use crate::cpu::{parallel, simd};
use crate::tensor::Buffer;

/// Pairs of neighbouring elements that so many elements make; the last may be half empty.
pub(crate) fn pairs(depth: usize) -> usize {
    depth.div_ceil(2)
}

/// Elements of a panel.
fn panel_len(depth: usize) -> usize {
    pairs(depth) * 2 * PANEL
}

/// A matrix, depth × columns, in panels of [`PANEL`] columns. A panel holds, for each pair of rows and then for each
/// column, the two elements side by side. What is missing of the last pair and the last panel is zero.
pub(crate) struct Panels {
    pub(super) data: Buffer<bf16>,
    depth: usize,
    columns: usize,
}

/// Panels in borrowed memory.
#[derive(Clone, Copy)]
pub(crate) struct PanelsView<'a> {
    pub(super) data: &'a [bf16],
    depth: usize,
    columns: usize,
}

impl Panels {
    /// Memory that panels of this size take.
    pub fn len(depth: usize, columns: usize) -> usize {
        panel_len(depth) * columns.div_ceil(PANEL)
    }

    /// Packs a row-major matrix (depth, columns), in parallel.
    pub fn of_rows(matrix: &[bf16], depth: usize, columns: usize) -> Self {
        Self::of_strided((matrix, columns), depth, columns)
    }

    /// [`Panels::of_rows`] for rows that are `stride` apart.
    pub fn of_strided((matrix, stride): (&[bf16], usize), depth: usize, columns: usize) -> Self {
        Self::of_placed((matrix, |row| row * stride), depth, columns)
    }

    /// [`Panels::of_rows`] for rows that begin anywhere.
    pub fn of_placed(
        (matrix, start): (&[bf16], impl Fn(usize) -> usize + Sync + Send),
        depth: usize,
        columns: usize,
    ) -> Self {
        let mut data = Buffer::recycled(Self::len(depth, columns));
        parallel::pieces_mut(&mut data, panel_len(depth), |index, panel| {
            pack((matrix, &start), [depth, columns], index * PANEL, panel);
        });
        Panels { data, depth, columns }
    }

    /// Packs the transpose of a row-major matrix (columns, depth), in parallel.
    pub fn of_columns(matrix: &[bf16], depth: usize, columns: usize) -> Self {
        assert_eq!(matrix.len(), depth * columns, "matrix");
        let mut data = Buffer::recycled(Self::len(depth, columns));
        parallel::pieces_mut(&mut data, panel_len(depth), |index, panel| {
            let (panel, _) = panel.as_chunks_mut::<2>();
            for column in 0..PANEL {
                let panel = panel[column..].iter_mut().step_by(PANEL);
                let first = (index * PANEL + column) * depth;
                let Some(column) = matrix.get(first..first + depth) else {
                    panel.for_each(|packed| *packed = [bf16::ZERO; 2]);
                    continue;
                };
                let (column, last) = column.as_chunks::<2>();
                let last = last.first().map(|&last| [last, bf16::ZERO]);
                for (packed, pair) in panel.zip(column.iter().copied().chain(last)) {
                    *packed = pair;
                }
            }
        });
        Panels { data, depth, columns }
    }

    /// Rows and columns.
    pub fn extents(&self) -> [usize; 2] {
        [self.depth, self.columns]
    }

    /// For reading.
    pub fn view(&self) -> PanelsView<'_> {
        PanelsView { data: &self.data, depth: self.depth, columns: self.columns }
    }

    /// `to = rows · self + bias`, rounded, for dense rows; one thread.
    pub fn rows(&self, rows: &[bf16], bias: Option<&[bf16]>, to: &mut [bf16], streamed: bool) {
        let starts: Vec<usize> = (0..to.len() / self.columns.max(1)).map(|row| row * self.depth).collect();
        self.rows_at((rows, &starts), bias, To::Narrow(to), self.columns, streamed);
    }

    /// The sums of [`Panels::rows`], not rounded.
    pub fn sums(&self, rows: &[bf16], bias: Option<&[bf16]>, to: &mut [f32]) {
        let starts: Vec<usize> = (0..to.len() / self.columns.max(1)).map(|row| row * self.depth).collect();
        self.rows_at((rows, &starts), bias, To::Wide(to), self.columns, false);
    }

    /// `to = rows · self + bias` for rows that begin anywhere, into rows that are `stride` apart; one thread.
    pub fn rows_at(
        &self,
        (data, starts): (&[bf16], &[usize]),
        bias: Option<&[bf16]>,
        mut to: To<'_>,
        stride: usize,
        streamed: bool,
    ) {
        if starts.is_empty() {
            return;
        }
        for index in 0..self.columns.div_ceil(PANEL) {
            let first = index * PANEL;
            let to = match &mut to {
                To::Narrow(to) => To::Narrow(&mut to[first..]),
                To::Wide(to) => To::Wide(&mut to[first..]),
                To::Added(to) => To::Added(&mut to[first..]),
            };
            self.panel_at((data, starts), bias, index, to, stride, streamed);
        }
        if streamed {
            simd::finish_streaming();
        }
    }

    /// The columns of the panel of this number of [`Panels::rows_at`], into rows that begin with them.
    pub fn panel_at(
        &self,
        (data, starts): (&[bf16], &[usize]),
        bias: Option<&[bf16]>,
        index: usize,
        to: To<'_>,
        stride: usize,
        streamed: bool,
    ) {
        let (first, used) = (index * PANEL, PANEL.min(self.columns - index * PANEL));
        let mut start = [0.0; PANEL];
        if let Some(bias) = bias {
            start.iter_mut().zip(&bias[first..][..used]).for_each(|(start, &bias)| *start = widen(bias));
        }
        let (start, panel, places) = (&start, self.view().panel(index), Places::Apart(stride));
        Product { data, starts, depth: self.depth, panel, start, used, places, streamed }.run(to);
    }
}

impl<'a> PanelsView<'a> {
    /// Packs a row-major matrix (depth, columns) into memory of [`Panels::len`] elements; one thread.
    pub fn pack(matrix: &[bf16], depth: usize, columns: usize, into: &'a mut [bf16]) -> Self {
        assert_eq!(matrix.len(), depth * columns, "matrix");
        let into = &mut into[..Panels::len(depth, columns)];
        for (index, panel) in into.chunks_mut(panel_len(depth).max(1)).enumerate() {
            pack((matrix, |row| row * columns), [depth, columns], index * PANEL, panel);
        }
        PanelsView { data: into, depth, columns }
    }

    /// The panel of a number.
    pub fn panel(&self, index: usize) -> &'a [bf16] {
        &self.data[index * panel_len(self.depth)..][..panel_len(self.depth)]
    }

    /// Elements between the rows of the sums of [`PanelsView::add_transposed`].
    pub fn sums_stride(&self) -> usize {
        self.columns.next_multiple_of(PANEL)
    }

    /// `sums += panelᵀ · right`, where the panel is `self`'s of this number: rows of the sums, one for each of the panel's
    /// columns, are [`PanelsView::sums_stride`] of `right` apart; one thread.
    pub fn add_transposed(&self, index: usize, right: PanelsView<'_>, sums: &mut [f32]) {
        /// Of two panels that the first-level cache holds.
        const PAIRS: usize = 96;
        assert_eq!(self.depth, right.depth, "depth");
        let columns = PANEL.min(self.columns - index * PANEL).next_multiple_of(GROUP);
        let (left, stride) = (self.panel(index).as_chunks().0, right.sums_stride());
        for (chunk, data) in left.chunks(PAIRS * PANEL).enumerate() {
            let left = Strided { data, stride: PANEL, columns };
            for column in 0..right.columns.div_ceil(PANEL) {
                let right = &right.panel(column).as_chunks().0[chunk * PAIRS * PANEL..];
                let right = Strided { data: right, stride: PANEL, columns: PANEL };
                super::add_transposed(left, right, data.len() / PANEL, (&mut sums[column * PANEL..], stride));
            }
        }
    }
}

/// Packs the panel that begins at column `first` of a matrix (depth, columns), whose rows begin at these places.
fn pack(
    (matrix, start): (&[bf16], impl Fn(usize) -> usize),
    [depth, columns]: [usize; 2],
    first: usize,
    panel: &mut [bf16],
) {
    let used = PANEL.min(columns - first);
    let part = |row: usize| &matrix[start(row) + first..][..used];
    simd::dispatch(
        #[inline(always)]
        || {
            let (panel, _) = panel.as_chunks_mut::<{ 2 * PANEL }>();
            for (pair, panel) in panel.iter_mut().enumerate() {
                let (even, odd) = (part(2 * pair), 2 * pair + 1);
                if used == PANEL && odd < depth {
                    interleave(even, part(odd), panel.as_chunks_mut().0);
                } else {
                    let mut rows = [[bf16::ZERO; PANEL]; 2];
                    rows[0][..used].copy_from_slice(even);
                    if odd < depth {
                        rows[1][..used].copy_from_slice(part(odd));
                    }
                    interleave(&rows[0], &rows[1], panel.as_chunks_mut().0);
                }
            }
        },
    );
}

/// Pairs of the elements of two rows.
#[inline(always)]
pub(crate) fn interleave(even: &[bf16], odd: &[bf16], pairs: &mut [[bf16; 2]]) {
    for (pair, (&even, &odd)) in pairs.iter_mut().zip(even.iter().zip(odd)) {
        *pair = [even, odd];
    }
}
