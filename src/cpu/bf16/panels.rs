//! Matrices as products read them.

use half::bf16;

use super::{PANEL, Product, To, widen};
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
        assert!(depth == 0 || (depth - 1) * stride + columns <= matrix.len(), "matrix");
        let matrix = &matrix[..depth.saturating_sub(1) * stride + columns.min(matrix.len())];
        let mut data = Buffer::recycled(Self::len(depth, columns));
        parallel::pieces_mut(&mut data, panel_len(depth), |index, panel| {
            pack((matrix, stride), columns, index * PANEL, panel);
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
            let used = PANEL.min(self.columns - first);
            let mut start = [0.0; PANEL];
            if let Some(bias) = bias {
                start.iter_mut().zip(&bias[first..][..used]).for_each(|(start, &bias)| *start = widen(bias));
            }
            let panel = self.view().panel(index);
            let product = Product { data, starts, depth: self.depth, panel, start: &start, used, stride, streamed };
            product.run(match &mut to {
                To::Narrow(to) => To::Narrow(&mut to[first..]),
                To::Wide(to) => To::Wide(&mut to[first..]),
                To::Added(to) => To::Added(&mut to[first..]),
            });
        }
        if streamed {
            simd::finish_streaming();
        }
    }
}

impl<'a> PanelsView<'a> {
    /// Packs a row-major matrix (depth, columns) into memory of [`Panels::len`] elements; one thread.
    pub fn pack(matrix: &[bf16], depth: usize, columns: usize, into: &'a mut [bf16]) -> Self {
        assert_eq!(matrix.len(), depth * columns, "matrix");
        let into = &mut into[..Panels::len(depth, columns)];
        for (index, panel) in into.chunks_mut(panel_len(depth).max(1)).enumerate() {
            pack((matrix, columns), columns, index * PANEL, panel);
        }
        PanelsView { data: into, depth, columns }
    }

    pub(super) fn panel(&self, index: usize) -> &'a [bf16] {
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
        let used = PANEL.min(self.columns - index * PANEL);
        let (left, stride) = (self.panel(index), right.sums_stride());
        for (chunk, left) in left.chunks(PAIRS * 2 * PANEL).enumerate() {
            for column in 0..right.columns.div_ceil(PANEL) {
                let right = &right.panel(column)[chunk * PAIRS * 2 * PANEL..][..left.len()];
                super::add_transposed(left, right, &mut sums[column * PANEL..], stride, used);
            }
        }
    }
}

/// Packs the panel that begins at column `first` of rows of `columns` elements, `stride` apart.
fn pack((matrix, stride): (&[bf16], usize), columns: usize, first: usize, panel: &mut [bf16]) {
    let used = PANEL.min(columns - first);
    simd::dispatch(
        #[inline(always)]
        || {
            let (panel, _) = panel.as_chunks_mut::<{ 2 * PANEL }>();
            for (pair, panel) in panel.iter_mut().enumerate() {
                let (even, odd) = (2 * pair * stride + first, (2 * pair + 1) * stride + first);
                let odd = matrix.get(odd..odd + used);
                if let (PANEL, Some(odd)) = (used, odd) {
                    interleave(&matrix[even..][..PANEL], odd, panel);
                } else {
                    let mut rows = [[bf16::ZERO; PANEL]; 2];
                    rows[0][..used].copy_from_slice(&matrix[even..][..used]);
                    if let Some(odd) = odd {
                        rows[1][..used].copy_from_slice(odd);
                    }
                    interleave(&rows[0], &rows[1], panel);
                }
            }
        },
    );
}

#[inline(always)]
fn interleave(even: &[bf16], odd: &[bf16], panel: &mut [bf16; 2 * PANEL]) {
    let (panel, _) = panel.as_chunks_mut::<2>();
    for (packed, (&even, &odd)) in panel.iter_mut().zip(even.iter().zip(odd)) {
        *packed = [even, odd];
    }
}
