//! The patches that a tile of positions reads: where their runs lie, and panels that they are copied into.

use std::ops::Range;

use bytemuck::Pod;

use super::{Conv2dOptions, Geometry};
use crate::cpu::gemm::Into;
use crate::cpu::packed::{Packed, Pairs, Term};
use crate::cpu::{Float, simd};
use crate::tensor::{Buffer, DType};

/// Columns of a panel, unless one line of taps alone has more.
pub(super) const PANEL_COLUMNS: usize = 1024;

/// Rows of a tile: enough to pay for reading the weight, few enough to share a small problem between threads, which several
/// numbers of them can share evenly.
pub(super) fn tile_rows(rows: usize) -> usize {
    const MOST: usize = 256;
    const FEWEST: usize = 64;
    let tiles = rows.div_ceil(MOST).max((rows / FEWEST).min(16));
    let tiles = match tiles {
        4.. if rows / tiles >= 2 * FEWEST => tiles.next_multiple_of(4),
        4.. => tiles / 4 * 4,
        _ => tiles / 2 * 2,
    };
    rows.div_ceil(tiles.max(1)).max(1)
}

/// A channels-last map and the channels of it that are read.
#[derive(Clone, Copy)]
pub(super) struct Source<'a, T> {
    pub data: &'a [T],
    /// Height and width.
    pub extents: [usize; 2],
    /// Of a position of the map.
    pub channels: usize,
    /// How many of them are read.
    pub read: usize,
    /// The first one that is read.
    pub first: usize,
}

/// Where the patch of one row of a tile begins.
#[derive(Clone, Copy)]
pub(super) struct Anchor {
    pub image: usize,
    pub y: isize,
    pub x: isize,
}

/// Distances of a kernel's taps from the anchor, rising.
pub(super) struct Taps {
    pub ys: Vec<isize>,
    pub xs: Vec<isize>,
}

impl<T: Pod> Source<'_, T> {
    /// Columns of a line of taps.
    pub fn line_columns(&self, xs: &[isize]) -> usize {
        xs.len() * self.read
    }

    /// Elements of a run: of taps that are neighbours in memory.
    pub fn run_len(&self, xs: &[isize]) -> usize {
        self.runs(xs)[0].1 * self.read
    }

    /// Writes the patches of `anchors`, one row each, `stride` apart, in the order (y, x, channel), with zeros outside of
    /// the map and behind a patch.
    pub fn fill_panel(&self, panel: &mut [T], stride: usize, anchors: &[Anchor], ys: &[isize], xs: &[isize]) {
        let [height, width] = self.extents.map(|extent| extent as isize);
        let runs = self.runs(xs);
        simd::dispatch(
            #[inline(always)]
            || {
                for (row, &anchor) in anchors.iter().enumerate() {
                    let mut at = row * stride;
                    for y in ys.iter().map(|y| anchor.y + y) {
                        for &(offset, taps) in &runs {
                            let (x, end) = (anchor.x + offset, at + taps * self.read);
                            let inside = (0..height).contains(&y);
                            let first = if inside { (-x).clamp(0, taps as isize) } else { taps as isize };
                            let last = (width - x).clamp(first, taps as isize);
                            let [first, copied] = [first, last - first].map(|taps| taps as usize * self.read);
                            panel[at..at + first].fill(T::zeroed());
                            if copied > 0 {
                                let line = (anchor.image * self.extents[0] + y as usize) * self.extents[1];
                                let position = line + x.max(0) as usize;
                                let from = position * self.channels + self.first;
                                copy_run(&self.data[from..], &mut panel[at + first..], copied);
                            }
                            panel[at + first + copied..end].fill(T::zeroed());
                            at = end;
                        }
                    }
                    panel[at..(row + 1) * stride].fill(T::zeroed());
                }
            },
        );
    }

    /// Of every tap, in the order (y, x), the anchors for which it meets the map, and where.
    pub fn pairs(&self, ys: &[isize], xs: &[isize], anchors: &[Anchor]) -> Vec<Pairs> {
        let [height, width] = self.extents.map(|extent| extent as isize);
        let pairs_of = |y: &isize, x: &isize| {
            let mut pairs = Pairs::default();
            for (row, anchor) in anchors.iter().enumerate() {
                let (y, x) = (anchor.y + y, anchor.x + x);
                if (0..height).contains(&y) && (0..width).contains(&x) {
                    let position = (anchor.image * self.extents[0] + y as usize) * self.extents[1] + x as usize;
                    pairs.patches.push(position * self.channels + self.first);
                    pairs.grads.push(row);
                }
            }
            pairs
        };
        ys.iter().flat_map(|y| xs.iter().map(move |x| (y, x))).map(|(y, x)| pairs_of(y, x)).collect()
    }

    /// The horizontal taps that are neighbours in memory: the offset of the first one and how many there are.
    fn runs(&self, xs: &[isize]) -> Vec<(isize, usize)> {
        let dense = self.read == self.channels && xs.windows(2).all(|pair| pair[1] - pair[0] == 1);
        if dense { vec![(xs[0], xs.len())] } else { xs.iter().map(|&x| (x, 1)).collect() }
    }

    /// Run by run, the parts of patches that lie in the map: rows of which the same taps do make a term.
    pub fn terms(&self, taps: &Taps, anchors: &[Anchor]) -> Vec<Term> {
        let [height, width] = self.extents.map(|extent| extent as isize);
        let mut terms = Vec::new();
        let mut first = 0;
        for y in &taps.ys {
            for &(offset, count) in &self.runs(&taps.xs) {
                let mut of_run: Vec<Term> = Vec::new();
                for (row, anchor) in anchors.iter().enumerate() {
                    let (y, x) = (anchor.y + y, anchor.x + offset);
                    let inside = (-x).clamp(0, count as isize)..(width - x).clamp(0, count as isize);
                    if !(0..height).contains(&y) || inside.is_empty() {
                        continue;
                    }
                    let position = (anchor.image * self.extents[0] + y as usize) * self.extents[1];
                    let start = (position + (x + inside.start) as usize) * self.channels + self.first;
                    let tap = |tap: isize| (first + tap as usize) * self.read;
                    let weight = tap(inside.start)..tap(inside.end);
                    let known = of_run.iter().position(|term| term.weight == weight);
                    let number = known.unwrap_or_else(|| {
                        let [rows, starts] = [(); 2].map(|()| Vec::with_capacity(anchors.len()));
                        of_run.push(Term { weight, rows, starts });
                        of_run.len() - 1
                    });
                    let term = &mut of_run[number];
                    term.rows.push(row);
                    term.starts.push(start);
                }
                terms.append(&mut of_run);
                first += count;
            }
        }
        terms
    }
}

impl<T: Float> Source<'_, T> {
    /// The patches of `anchors`, one after the other.
    pub fn panel(&self, taps: &Taps, anchors: &[Anchor]) -> Buffer<T> {
        let depth = taps.ys.len() * self.line_columns(&taps.xs);
        let mut panel = Buffer::recycled(anchors.len() * depth);
        self.fill_panel(&mut panel, depth, anchors, &taps.ys, &taps.xs);
        panel
    }

    /// The product of the patches of `anchors` with `weight` (tap, channel, column), into rows `row_stride` apart.
    ///
    /// Long runs of a patch are read where they are, and what lies outside of the map is left out; patches of short ones are
    /// copied into a panel first.
    pub fn multiply(
        &self,
        taps: &Taps,
        anchors: &[Anchor],
        weight: &Packed<T>,
        (destination, row_stride, mut into): (&mut [T], usize, Into),
    ) {
        if self.has_long_runs(taps) {
            let terms = self.terms(taps, anchors);
            return weight.add_terms(self.data, &terms, anchors.len(), (destination, row_stride, into));
        }
        let line = self.line_columns(&taps.xs);
        let lines = (PANEL_COLUMNS / line).max(1);
        let mut panel = Buffer::recycled(anchors.len() * line * lines.min(taps.ys.len()));
        for (index, ys) in taps.ys.chunks(lines).enumerate() {
            let depth = ys.len() * line;
            let panel = &mut panel[..anchors.len() * depth];
            self.fill_panel(panel, depth, anchors, ys, &taps.xs);
            let rows = (index * lines * line, depth);
            weight.multiply((panel, depth), rows, anchors.len(), (destination, row_stride, into));
            into = Into::Add;
        }
    }

    /// Whether patches are read where they are, as [`Source::terms`].
    pub fn has_long_runs(&self, taps: &Taps) -> bool {
        const LONG: usize = 64;
        T::DTYPE == DType::F32 && self.run_len(&taps.xs) >= LONG
    }
}

/// The lines of a map that some patches read, with the zeros around it: a patch has a run in each of its lines.
pub(super) struct PaddedLines<T: Pod> {
    pub data: Buffer<T>,
    /// Where each patch begins.
    pub starts: Vec<usize>,
    /// Where its runs begin, from there.
    pub offsets: Vec<usize>,
    /// Elements of a run.
    pub run_len: usize,
}

impl<T: Float> PaddedLines<T> {
    /// Whether copies of lines are not much more than the patches in them, however large strides and paddings are.
    pub fn pays(g: &Geometry) -> bool {
        let Conv2dOptions { stride, padding, dilation, .. } = g.options;
        dilation == [1; 2] && (0..2).all(|axis| stride[axis] <= g.kernel[axis] && padding[axis] < g.kernel[axis])
    }

    /// For some positions of the result, counted over the batch, where it [pays](PaddedLines::pays).
    pub fn of(g: &Geometry, input: &[T], positions: Range<usize>) -> Self {
        let ([height, width], [out_height, out_width], channels) = (g.input, g.output, g.in_channels);
        let ([stride, stride_x], [padding, padding_x]) = (g.options.stride, g.options.padding);
        let (line_len, pitch) = (width * channels, (width + 2 * padding_x) * channels);
        let mut lines = Vec::new();
        let mut starts = Vec::with_capacity(positions.len());
        for line in positions.start / out_width..positions.end.div_ceil(out_width) {
            let first = line / out_height * (height + 2 * padding) + line % out_height * stride;
            let end = first + g.kernel[0];
            // Lines that the one before has read are there.
            let next = lines.last().map_or(first, |last: &usize| last + 1).max(first);
            lines.extend(next..end);
            let start = (lines.len() - g.kernel[0]) * pitch;
            let columns = positions.start.max(line * out_width)..positions.end.min((line + 1) * out_width);
            starts.extend(columns.map(|position| start + position % out_width * stride_x * channels));
        }
        let mut data = Buffer::recycled(lines.len() * pitch);
        for (padded, line) in data.chunks_exact_mut(pitch).zip(&lines) {
            let (image, y) = (line / (height + 2 * padding), (line % (height + 2 * padding)).wrapping_sub(padding));
            if y >= height {
                padded.fill(T::ZERO);
                continue;
            }
            let (left, rest) = padded.split_at_mut(padding_x * channels);
            let (inner, right) = rest.split_at_mut(line_len);
            left.fill(T::ZERO);
            inner.copy_from_slice(&input[(image * height + y) * line_len..][..line_len]);
            right.fill(T::ZERO);
        }
        let offsets = (0..g.kernel[0]).map(|y| y * pitch).collect();
        PaddedLines { data, starts, offsets, run_len: g.kernel[1] * channels }
    }
}

/// Copies `len` elements. A short run is copied in whole vectors, which may write beyond its end: panels are filled
/// from front to back, so what comes next overwrites that.
#[inline(always)]
fn copy_run<T: Pod>(source: &[T], panel: &mut [T], len: usize) {
    const VECTOR: usize = 16;
    let whole = len.next_multiple_of(VECTOR);
    if len <= 8 * VECTOR && whole <= source.len() && whole <= panel.len() {
        for at in (0..whole).step_by(VECTOR) {
            panel[at..at + VECTOR].copy_from_slice(&source[at..at + VECTOR]);
        }
    } else {
        panel[..len].copy_from_slice(&source[..len]);
    }
}

pub(super) fn input_source<'a, T>(g: &Geometry, data: &'a [T], group: usize) -> Source<'a, T> {
    Source { data, extents: g.input, channels: g.in_channels, read: g.group_inputs(), first: group * g.group_inputs() }
}

pub(super) fn forward_taps(g: &Geometry) -> Taps {
    let offsets =
        |axis: usize| (0..g.kernel[axis]).map(|tap| (tap * g.options.dilation[axis]) as isize).collect::<Vec<_>>();
    Taps { ys: offsets(0), xs: offsets(1) }
}

/// The anchors of some positions of the result, counted over the batch.
pub(super) fn forward_anchors(g: &Geometry, rows: Range<usize>) -> Vec<Anchor> {
    let [height, width] = g.output;
    let start = |axis: usize, at: usize| (at * g.options.stride[axis]) as isize - g.options.padding[axis] as isize;
    let (mut image, mut y, mut x) = (rows.start / (height * width), rows.start / width % height, rows.start % width);
    let mut anchors = Vec::with_capacity(rows.len());
    for _ in rows {
        anchors.push(Anchor { image, y: start(0, y), x: start(1, x) });
        x += 1;
        if x == width {
            (x, y) = (0, y + 1);
        }
        if y == height {
            (y, image) = (0, image + 1);
        }
    }
    anchors
}
