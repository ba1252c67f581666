//! Products with a packed weight, in `f32` by the blocks of [`block_gemm`](super::block_gemm) and in `f64` by the general
//! product; and sums of products over rows. One thread each: convolutions and linear layers share their rows among threads.

use std::ops::Range;

use super::ahead::contiguous;
use super::block_gemm::{GROUP, LANES, Onto, PANEL, Product, Strided, Writes};
use super::gemm::{Into, Matrix, Threads, gemm};
use super::{Factor, Float, parallel, simd};
use crate::tensor::{Buffer, DType};

/// Products that are summed at most before they join a longer sum, which keeps errors small.
const DEPTH: usize = 192;
/// The same for [`Packed::rows`], whose short sums are written once. A panel so deep stays in the nearest cache.
const ROW_DEPTH: usize = 256;

/// A weight, depth × columns, as products read it: for `f32` in panels, each row-major, its columns filled up with
/// zeros; else row-major.
pub(crate) struct Packed<T> {
    data: Buffer<T>,
    depth: usize,
    columns: usize,
}

fn is_f32<T: Float>() -> bool {
    T::DTYPE == DType::F32
}

/// Columns of the panel that begins at `first`, filled up.
fn panel_width(columns: usize, first: usize) -> usize {
    PANEL.min((columns - first).next_multiple_of(LANES))
}

/// The first column of each panel, and how many columns it has.
pub(crate) fn panels(columns: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..columns).step_by(PANEL).map(move |first| (first, PANEL.min(columns - first)))
}

impl<T: Float> Packed<T> {
    /// Packs a row-major weight, in parallel.
    pub fn new(weight: &[T], depth: usize, columns: usize) -> Self {
        Self::gathered(weight, [depth, columns], [columns, 1], &[0])
    }

    /// Packs the transpose of a row-major weight (columns, depth), in parallel.
    pub fn transposed(weight: &[T], depth: usize, columns: usize) -> Self {
        Self::gathered(weight, [depth, columns], [1, depth], &[0])
    }

    /// Packs, in parallel, the matrix of `taps.len() · rows` rows whose element (tap t, row r; column c) is
    /// `weight[taps[t] + r · strides[0] + c · strides[1]]`.
    pub fn gathered(weight: &[T], [rows, columns]: [usize; 2], strides: [usize; 2], taps: &[usize]) -> Self {
        let depth = taps.len() * rows;
        let (filled, panel) = if is_f32::<T>() { (columns.next_multiple_of(LANES), PANEL) } else { (columns, columns) };
        let mut data = Buffer::recycled(depth * filled);
        parallel::pieces_mut(&mut data, depth * panel, |index, data| {
            let (first, width) = (index * panel, data.len() / depth);
            let used = width.min(columns - first);
            let weight = &weight[first * strides[1]..];
            if used < width {
                data.chunks_exact_mut(width).for_each(|row| row[used..].fill(T::ZERO));
            }
            match (strides, taps) {
                ([1, stride], [0]) => pack_transposed(weight, stride, data, width, used),
                ([stride, 1], [0]) => {
                    for (row, packed) in data.chunks_exact_mut(width).enumerate() {
                        packed[..used].copy_from_slice(&weight[row * stride..][..used]);
                    }
                }
                _ => {
                    // By way of a short buffer: rows of a tap are so far apart that lines of them share few sets of a cache.
                    let mut near = Buffer::recycled(taps.len() * width);
                    near.fill(T::ZERO);
                    let all_in_order = taps.iter().enumerate().all(|(t, &tap)| t == tap);
                    for row in 0..rows {
                        let weight = &weight[row * strides[0]..];
                        if all_in_order {
                            pack_transposed(weight, strides[1], &mut near, width, used);
                        } else {
                            for column in 0..used {
                                let weight = &weight[column * strides[1]..];
                                for (&tap, near) in taps.iter().zip(near.chunks_exact_mut(width)) {
                                    near[column] = weight[tap];
                                }
                            }
                        }
                        for (t, near) in near.chunks_exact(width).enumerate() {
                            data[(t * rows + row) * width..][..width].copy_from_slice(near);
                        }
                    }
                }
            }
        });
        Packed { data, depth, columns }
    }

    /// `to = rows · weight + bias` for dense rows of the weight's depth, written as `writes` says where sums are short
    /// enough to be written once. `ahead` is read soon after.
    pub fn rows(&self, rows: &[T], bias: Option<&[T]>, to: &mut [T], writes: Writes, ahead: &[T]) {
        let count = to.len() / self.columns.max(1);
        let (depth, columns) = (self.depth, self.columns);
        if !is_f32::<T>() || !columns.is_multiple_of(LANES) {
            let into = start(to, bias);
            return self.multiply((rows, depth), (0, depth), count, (to, columns, into));
        }
        let (data, to): (&[f32], &mut [f32]) = (bytemuck::cast_slice(rows), bytemuck::cast_slice_mut(to));
        let bias: Option<&[f32]> = bias.map(bytemuck::cast_slice);
        let weight: &[f32] = bytemuck::cast_slice(&self.data);
        let ahead: &[f32] = bytemuck::cast_slice(ahead);
        let chunk = depth.div_ceil(depth.div_ceil(ROW_DEPTH));
        let chunks = depth.div_ceil(chunk);
        let writes = if chunks > 1 && writes == Writes::Streamed { Writes::Fetched } else { writes };
        let share = ahead.len().div_ceil(columns.div_ceil(PANEL) * chunks).max(1);
        let mut ahead = ahead.chunks(share);
        if count == 0 {
            return;
        }
        for column in (0..columns).step_by(PANEL) {
            let width = panel_width(columns, column);
            let panel = &weight[column * depth..][..depth * width];
            for (index, panel) in panel.chunks(chunk * width).enumerate() {
                let (onto, writes) = match bias {
                    _ if index > 0 => (Onto::Itself, Writes::Near),
                    Some(bias) => (Onto::Row(&bias[column..][..width]), writes),
                    None => (Onto::Nothing, writes),
                };
                let rows = Strided { data: &data[index * chunk..], stride: depth, columns: panel.len() / width };
                let (destination, ahead) = (&mut to[column..], contiguous(ahead.next().unwrap_or_default()));
                let (places, terms) = (columns, chunk);
                Product { rows, runs: [0], count, panel, width, destination, places, onto, writes, terms, ahead }.run();
            }
        }
    }

    /// Whether [`Packed::rows_of_runs`] serves.
    pub fn takes_runs(&self) -> bool {
        is_f32::<T>() && self.columns.is_multiple_of(LANES)
    }

    /// [`Packed::rows`] for few terms, where rows begin at `starts` and have their elements in runs of `len`, at the same
    /// `offsets`.
    ///
    /// # Panics
    /// Where it does not [serve](Packed::takes_runs).
    pub fn rows_of_runs(
        &self,
        data: &[T],
        starts: &[usize],
        (offsets, len): (&[usize], usize),
        bias: Option<&[T]>,
        to: &mut [T],
        writes: Writes,
    ) {
        assert!(self.takes_runs(), "runs of f32 by whole vectors");
        let (data, to): (&[f32], &mut [f32]) = (bytemuck::cast_slice(data), bytemuck::cast_slice_mut(to));
        let bias: Option<&[f32]> = bias.map(bytemuck::cast_slice);
        let weight: &[f32] = bytemuck::cast_slice(&self.data);
        if starts.is_empty() {
            return;
        }
        for column in (0..self.columns).step_by(PANEL) {
            let width = panel_width(self.columns, column);
            let product = Product {
                rows: Strided { data, stride: starts, columns: len },
                runs: offsets,
                count: starts.len(),
                panel: &weight[column * self.depth..][..self.depth * width],
                width,
                destination: &mut to[column..],
                places: self.columns,
                onto: bias.map_or(Onto::Nothing, |bias| Onto::Row(&bias[column..][..width])),
                writes,
                terms: self.depth,
                ahead: contiguous(&[]),
            };
            product.run();
        }
    }

    /// The product of rows of `depth` elements, from `data` and `stride` apart, with the weight's rows from `first` on,
    /// into rows `row_stride` apart.
    pub fn multiply(
        &self,
        (data, stride): (&[T], usize),
        (first, depth): (usize, usize),
        rows: usize,
        (to, row_stride, into): (&mut [T], usize, Into),
    ) {
        if is_f32::<T>() {
            let starts = (0..rows).map(|row| row * stride).collect();
            let term = Term { weight: first..first + depth, rows: (0..rows).collect(), starts };
            return self.add_terms(data, &[term], rows, (to, row_stride, into));
        }
        if rows > 0 {
            let left = Matrix::strided(data, rows, depth, stride, 1);
            let right =
                Matrix::row_major(&self.data[first * self.columns..][..depth * self.columns], depth, self.columns);
            gemm(to, row_stride, left, right, into, Threads::One);
        }
    }

    /// The sums of terms for each of `rows` rows, `row_stride` apart, in `f32`.
    ///
    /// # Panics
    /// For other types.
    pub fn add_terms(&self, data: &[T], terms: &[Term], rows: usize, (to, row_stride, into): (&mut [T], usize, Into)) {
        assert!(is_f32::<T>(), "terms are products of f32");
        let columns = self.columns;
        let (data, to) = (bytemuck::cast_slice(data), bytemuck::cast_slice_mut(to));
        let weight: &[f32] = bytemuck::cast_slice(&self.data);
        // Whole vectors are written: a panel that is not filled goes by way of a buffer.
        let mut scratch = Buffer::<f32>::recycled(if columns.is_multiple_of(LANES) { 0 } else { rows * PANEL });
        for column in (0..columns).step_by(PANEL) {
            let (width, used) = (panel_width(columns, column), PANEL.min(columns - column));
            let panel = &weight[column * self.depth..][..self.depth * width];
            if used == width {
                let to: &mut [f32] = if rows == 0 { &mut [] } else { &mut to[column..] };
                add_terms_to_panel(data, terms, (panel, width), rows, (to, row_stride, into));
                continue;
            }
            add_terms_to_panel(data, terms, (panel, width), rows, (&mut scratch, width, Into::Overwrite));
            for (row, values) in scratch.chunks_exact(width).take(rows).enumerate() {
                let out = &mut to[row * row_stride + column..][..used];
                match into {
                    Into::Overwrite => out.copy_from_slice(&values[..used]),
                    Into::Add => out.iter_mut().zip(values).for_each(|(out, value)| *out += value),
                }
            }
        }
    }

    /// [`panels`] of an `f32` weight.
    pub fn panels(&self) -> impl Iterator<Item = (usize, usize)> + use<T> {
        panels(self.columns)
    }

    /// Of [`Packed::add_terms`] the panel that begins at column `first`: its part of `bias` and the sums of all terms, for each
    /// row of `to`, which has the panel's columns.
    pub fn panel_of_terms(
        &self,
        data: &[T],
        terms: &[Term],
        (first, bias): (usize, Option<&[T]>),
        to: &mut [&mut [T]],
    ) {
        assert!(is_f32::<T>(), "terms are products of f32");
        let (width, used) = (panel_width(self.columns, first), PANEL.min(self.columns - first));
        let panel = &self.data[first * self.depth..][..self.depth * width];
        let bias = bias.map(|bias| &bias[first..][..used]);
        let mut sums = Buffer::<T>::zeroed(to.len() * width);
        // In the order of `add_terms`, so with the same bits: the bias joins the sums of a panel that is not filled at the end.
        let (before, behind) = if used == width { (bias, None) } else { (None, bias) };
        before.iter().for_each(|bias| sums.chunks_exact_mut(width).for_each(|row| row.copy_from_slice(bias)));
        let (data, panel) = (bytemuck::cast_slice(data), bytemuck::cast_slice(panel));
        let into = (bytemuck::cast_slice_mut(&mut sums), width, Into::Add);
        add_terms_to_panel(data, terms, (panel, width), to.len(), into);
        for (to, row) in to.iter_mut().zip(sums.chunks_exact(width)) {
            to.copy_from_slice(&row[..used]);
            behind.iter().for_each(|bias| to.iter_mut().zip(*bias).for_each(|(to, &bias)| *to += bias));
        }
    }
}

/// A share of a product's depth, for some of its rows.
pub(crate) struct Term {
    /// Rows of the weight.
    pub weight: Range<usize>,
    /// Rows of the result.
    pub rows: Vec<usize>,
    /// Where the elements of each of them lie, as many as the weight has rows.
    pub starts: Vec<usize>,
}

/// The sums of terms for one panel of columns, into `rows` rows `row_stride` apart.
fn add_terms_to_panel(
    data: &[f32],
    terms: &[Term],
    (panel, width): (&[f32], usize),
    rows: usize,
    (to, row_stride, into): (&mut [f32], usize, Into),
) {
    // What no term reaches at first begins with zero.
    let whole = terms.first().is_some_and(|term| term.rows.len() == rows);
    if into == Into::Overwrite && !whole {
        (0..rows).for_each(|row| to[row * row_stride..][..width].fill(0.0));
    }
    let mut places = Vec::with_capacity(rows);
    for (number, term) in terms.iter().enumerate() {
        let depth = term.weight.len();
        let chunk = depth.div_ceil(depth.div_ceil(DEPTH).max(1)).max(1);
        places.clear();
        places.extend(term.rows.iter().map(|row| row * row_stride));
        let behind = &panel[term.weight.end * width..];
        let product = Product {
            rows: Strided { data, stride: term.starts.as_slice(), columns: depth },
            runs: [0],
            count: term.rows.len(),
            panel: &panel[term.weight.start * width..term.weight.end * width],
            width,
            destination: &mut *to,
            places: places.as_slice(),
            onto: if number == 0 && whole && into == Into::Overwrite { Onto::Nothing } else { Onto::Itself },
            writes: Writes::Near,
            terms: chunk,
            ahead: contiguous(&behind[..behind.len().min(depth * width)]),
        };
        product.run();
    }
}

/// Writes rows of the transpose, `width` apart: element (row, column) is `weight[column * stride + row]`.
pub(crate) fn pack_transposed<T: Float>(weight: &[T], stride: usize, packed: &mut [T], width: usize, columns: usize) {
    // Rows whose lines stay in the nearest cache until all columns are there.
    const ROWS: usize = 64;
    const SIDE: usize = 4;
    simd::dispatch(
        #[inline(always)]
        || {
            for (block, packed) in packed.chunks_mut(ROWS * width).enumerate() {
                let rows = packed.len() / width;
                let column = |column: usize| &weight[column * stride + block * ROWS..][..rows];
                let (squares, tail) = (columns / SIDE * SIDE, rows / SIDE * SIDE);
                for first in (0..squares).step_by(SIDE) {
                    let sides = [0, 1, 2, 3].map(|number| column(first + number));
                    for (at, packed) in packed.chunks_exact_mut(SIDE * width).enumerate() {
                        let mut square = [[T::ZERO; SIDE]; SIDE];
                        for (values, side) in square.iter_mut().zip(sides) {
                            values.copy_from_slice(&side[at * SIDE..][..SIDE]);
                        }
                        let [a, b, c, d] = square;
                        for row in 0..SIDE {
                            packed[row * width + first..][..SIDE].copy_from_slice(&[a[row], b[row], c[row], d[row]]);
                        }
                    }
                }
                for row in 0..rows {
                    for number in if row < tail { squares } else { 0 }..columns {
                        packed[row * width + number] = column(number)[row];
                    }
                }
            }
        },
    );
}

/// Up to `len` elements from `at` on: what a product asks for ahead of the one that reads them.
pub(crate) fn ahead<T>(data: &[T], at: usize, len: usize) -> &[T] {
    let data = data.get(at..).unwrap_or_default();
    &data[..len.min(data.len())]
}

/// How a product enters a result that begins with `bias`.
pub(crate) fn after<T>(bias: Option<&[T]>) -> Into {
    if bias.is_some() { Into::Add } else { Into::Overwrite }
}

/// Begins rows with the bias, if there is one.
pub(crate) fn start<T: Float>(rows: &mut [T], bias: Option<&[T]>) -> Into {
    bias.iter().for_each(|bias| rows.chunks_mut(bias.len()).for_each(|row| row.copy_from_slice(bias)));
    after(bias)
}

/// Elements between the rows of a panel of patches of which [`add_product`] takes products.
pub(crate) fn patch_stride(columns: usize) -> usize {
    columns.next_multiple_of(GROUP)
}

/// Length of the sums of [`add_product`].
pub(crate) fn sums_len(columns: usize, features: usize) -> usize {
    patch_stride(columns) * features.next_multiple_of(LANES)
}

/// Where the sum of a patch's column and a feature is.
fn sum_place(columns: usize, features: usize, (column, feature): (usize, usize)) -> usize {
    let first = feature / PANEL * PANEL;
    first * patch_stride(columns) + column * panel_width(features, first) + feature - first
}

/// Writes the sums of column `column` of patches: a row with an element for each feature.
pub(crate) fn copy_sums<T: Float>(sums: &[T], columns: usize, column: usize, row: &mut [T]) {
    let features = row.len();
    for (panel, out) in row.chunks_mut(PANEL).enumerate() {
        out.copy_from_slice(&sums[sum_place(columns, features, (column, panel * PANEL))..][..out.len()]);
    }
}

/// The inverse of the order in which [`add_product`] sums columns (tap, channel): writes the sums of up to [`PANEL`] features
/// from `first` on to `weights`, each of them (channel, `all_taps`), at the taps from `first_tap` on.
pub(crate) fn copy_weights<T: Float>(
    sums: &[T],
    [columns, channels]: [usize; 2],
    (first, features): (usize, usize),
    weights: &mut [T],
    (first_tap, all_taps): (usize, usize),
) {
    let (taps, count) = (columns / channels, weights.len() / (channels * all_taps));
    let mut near = Buffer::recycled(taps * count);
    for channel in 0..channels {
        for (tap, near) in near.chunks_exact_mut(count).enumerate() {
            let column = tap * channels + channel;
            near.copy_from_slice(&sums[sum_place(columns, features, (column, first))..][..count]);
        }
        for (feature, weights) in weights.chunks_exact_mut(channels * all_taps).enumerate() {
            for (tap, out) in weights[channel * all_taps + first_tap..][..taps].iter_mut().enumerate() {
                *out = near[tap * count + feature];
            }
        }
    }
}

/// The left operand of [`add_product`]: rows of `columns` elements, `stride` apart.
#[derive(Clone, Copy)]
pub(crate) struct Patches<'a, E> {
    pub data: &'a [E],
    pub stride: usize,
    pub columns: usize,
}

impl<'a, E> Patches<'a, E> {
    /// Rows [`patch_stride`] apart, which are filled up with zeros.
    pub fn filled(data: &'a [E], columns: usize) -> Self {
        Patches { data, stride: patch_stride(columns), columns }
    }
}

/// Pairs of rows whose products are summed.
#[derive(Default)]
pub(crate) struct Pairs {
    /// Where those of patches begin.
    pub patches: Vec<usize>,
    /// Numbers of those of a gradient.
    pub grads: Vec<usize>,
}

/// As [`add_product`], of patches that are read where they are: of each of their taps, `channels` columns, the pairs of rows in
/// which it meets the map, as far as [`has_whole_taps`].
pub(crate) fn add_product_of_taps<E: Factor>(
    (data, channels): (&[E], usize),
    (grad, grad_stride, features): (&[E], usize, usize),
    rows: usize,
    taps: &mut [Pairs],
    sums: &mut [E::Sum],
) {
    let mut near = Buffer::<E::Sum>::recycled(rows * PANEL);
    let near: &mut [E] = bytemuck::cast_slice_mut(&mut near);
    taps.iter_mut().flat_map(|pairs| &mut pairs.grads).for_each(|row| *row *= PANEL);
    for (index, sums) in sums.chunks_mut(taps.len() * channels * PANEL).enumerate() {
        let first = index * PANEL;
        let width = panel_width(features, first);
        // Rows of a gradient are often a power of two apart and would share few sets of a cache.
        for (row, near) in near.chunks_exact_mut(PANEL).enumerate() {
            near[..width].copy_from_slice(&grad[row * grad_stride + first..][..width]);
        }
        for (pairs, sums) in taps.iter().zip(sums.chunks_mut(channels * width)) {
            let left = Strided { data, stride: pairs.patches.as_slice(), columns: channels };
            let right = Strided { data: &*near, stride: pairs.grads.as_slice(), columns: width };
            E::multiply_transposed(left, right, pairs.patches.len(), sums, &[]);
        }
    }
}

/// Whether [`add_product_of_taps`] serves: channels fill whole groups, features whole vectors, and the former are many.
pub(crate) fn has_whole_taps(channels: usize, features: usize) -> bool {
    const MANY: usize = 64;
    channels >= MANY && channels.is_multiple_of(GROUP) && features.is_multiple_of(LANES)
}

/// `sums += patchesᵀ · grad`: rows of the gradient are `grad_stride` apart; columns of patches fill whole groups or are
/// [`Patches::filled`]. Both of `ahead` are read soon after.
pub(crate) fn add_product<E: Factor>(
    patches: Patches<'_, E>,
    (grad, grad_stride, features): (&[E], usize, usize),
    rows: usize,
    sums: &mut [E::Sum],
    ahead: [&[E]; 2],
) {
    let filled_columns = patch_stride(patches.columns);
    let left = Strided { data: patches.data, stride: patches.stride, columns: filled_columns };
    let share = ahead.map(<[E]>::len).iter().sum::<usize>().div_ceil(features.div_ceil(PANEL)).max(1);
    let mut ahead = ahead.iter().flat_map(|data| data.chunks(share));
    let mut near = Buffer::<E::Sum>::recycled(rows * PANEL);
    let near: &mut [E] = bytemuck::cast_slice_mut(&mut near);
    for (index, sums) in sums.chunks_mut(filled_columns * PANEL).enumerate() {
        let first = index * PANEL;
        let (width, used) = (panel_width(features, first), PANEL.min(features - first));
        // Rows of a gradient are often a power of two apart and would share few sets of a cache.
        for (row, near) in near.chunks_exact_mut(width).take(rows).enumerate() {
            near[..used].copy_from_slice(&grad[row * grad_stride + first..][..used]);
            near[used..].fill(E::zeroed());
        }
        let right = Strided { data: &*near, stride: width, columns: width };
        E::multiply_transposed(left, right, rows, sums, ahead.next().unwrap_or_default());
    }
}
