//! Convolutions as matrix products of patches, a tile of rows at a time.
//!
//! A tile is some hundred positions of the result. The patches that they read are copied into a panel (position, tap,
//! channel) that fits the second-level cache, and multiplied with the weight in the order (tap, channel, out). The input
//! gradient is computed the same way: input positions with the same remainder of division by the stride read the same
//! taps, so each such phase is a convolution of stride 1 over the output's gradient. Nothing is scattered, every tap is
//! used once, and no two tiles write to the same place. Depthwise convolutions and gradients of images have ways of
//! their own.

use super::{Geometry, depthwise, scatter, winograd};
use crate::cpu::gemm::{Into, Matrix, Threads, gemm};
use crate::cpu::{Float, parallel, simd};
use crate::tensor::Buffer;

/// Columns of a panel, unless one line of taps alone has more.
pub(super) const PANEL_COLUMNS: usize = 1024;

/// Rows of a tile: enough to pay for reading the weight, few enough to share a small problem between threads.
fn tile_rows(rows: usize) -> usize {
    (rows / 16).clamp(64, 256)
}

/// A channels-last map and the channels of it that one group reads.
#[derive(Clone, Copy)]
struct Source<'a, T> {
    data: &'a [T],
    extents: [usize; 2],
    channels: usize,
    group_channels: usize,
    group: usize,
}

/// Where the patch of one row of a tile begins.
#[derive(Clone, Copy)]
struct Anchor {
    image: usize,
    y: isize,
    x: isize,
}

/// Distances of a kernel's taps from the anchor, rising.
struct Taps {
    ys: Vec<isize>,
    xs: Vec<isize>,
}

impl<T: Float> Source<'_, T> {
    fn line_columns(&self, xs: &[isize]) -> usize {
        xs.len() * self.group_channels
    }

    /// Writes the patches of `anchors`, one row each, in the order (y, x, channel), with zeros outside of the map.
    fn fill_panel(&self, panel: &mut [T], anchors: &[Anchor], ys: &[isize], xs: &[isize]) {
        let [height, width] = self.extents.map(|extent| extent as isize);
        let dense = self.group_channels == self.channels && xs.windows(2).all(|pair| pair[1] - pair[0] == 1);
        // Neighbouring taps are neighbours in memory: one run per line, else one run per tap.
        let runs: Vec<(isize, usize)> =
            if dense { vec![(xs[0], xs.len())] } else { xs.iter().map(|&x| (x, 1)).collect() };
        let lines = anchors.iter().flat_map(|&anchor| ys.iter().map(move |&y| (anchor, anchor.y + y)));
        let mut at = 0;
        simd::dispatch(
            #[inline(always)]
            || {
                for (anchor, y) in lines {
                    for &(offset, taps) in &runs {
                        let (x, end) = (anchor.x + offset, at + taps * self.group_channels);
                        let inside = (0..height).contains(&y);
                        let first = if inside { (-x).clamp(0, taps as isize) } else { taps as isize };
                        let last = (width - x).clamp(first, taps as isize);
                        let [first, copied] = [first, last - first].map(|taps| taps as usize * self.group_channels);
                        panel[at..at + first].fill(T::ZERO);
                        if copied > 0 {
                            let line = (anchor.image * self.extents[0] + y as usize) * self.extents[1];
                            let position = line + x.max(0) as usize;
                            let from = position * self.channels + self.group * self.group_channels;
                            copy_run(&self.data[from..], &mut panel[at + first..], copied);
                        }
                        panel[at + first + copied..end].fill(T::ZERO);
                        at = end;
                    }
                }
            },
        );
    }

    /// The product of the patches of `anchors` with `weight` (tap, channel, column), into rows `row_stride` apart.
    fn multiply(
        &self,
        taps: &Taps,
        anchors: &[Anchor],
        weight: &[T],
        columns: usize,
        (destination, row_stride, mut into): (&mut [T], usize, Into),
    ) {
        let line = self.line_columns(&taps.xs);
        let lines = (PANEL_COLUMNS / line).max(1);
        let mut panel = Buffer::recycled(anchors.len() * line * lines.min(taps.ys.len()));
        for (ys, weight) in taps.ys.chunks(lines).zip(weight.chunks(lines * line * columns)) {
            let depth = ys.len() * line;
            let panel = &mut panel[..anchors.len() * depth];
            self.fill_panel(panel, anchors, ys, &taps.xs);
            let (left, right) =
                (Matrix::row_major(panel, anchors.len(), depth), Matrix::row_major(weight, depth, columns));
            gemm(destination, row_stride, left, right, into, Threads::One);
            into = Into::Add;
        }
    }
}

/// Copies `len` elements. A short run is copied in whole vectors, which may write beyond its end: panels are filled
/// from front to back, so what comes next overwrites that.
#[inline(always)]
fn copy_run<T: Float>(source: &[T], panel: &mut [T], len: usize) {
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

/// One group's weight in the order (tap, row, column), with the taps of `order`; rows and columns are the weight's in
/// and out channels, one way or the other, whose strides are given.
fn repack<T: Float>(weight: &[T], extents: [usize; 2], strides: [usize; 2], order: &[usize], packed: &mut [T]) {
    const BLOCK: usize = 8;
    let [rows, columns] = extents;
    let mut blocks: Vec<Vec<&mut [T]>> = (0..rows.div_ceil(BLOCK)).map(|_| Vec::with_capacity(order.len())).collect();
    for plane in packed.chunks_mut(rows * columns) {
        blocks.iter_mut().zip(plane.chunks_mut(BLOCK * columns)).for_each(|(block, part)| block.push(part));
    }
    parallel::pieces_mut(&mut blocks, 1, |index, block| {
        let planes = &mut block[0];
        for column in 0..columns {
            for row in 0..BLOCK.min(rows - index * BLOCK) {
                let taps = &weight[(index * BLOCK + row) * strides[0] + column * strides[1]..];
                planes.iter_mut().zip(order).for_each(|(plane, &tap)| plane[row * columns + column] = taps[tap]);
            }
        }
    });
}

/// How a product enters a result that begins with `bias`.
fn after<T>(bias: Option<&[T]>) -> Into {
    if bias.is_some() { Into::Add } else { Into::Overwrite }
}

/// Begins rows with the bias, if there is one.
pub(super) fn start<T: Float>(rows: &mut [T], bias: Option<&[T]>) -> Into {
    bias.iter().for_each(|bias| rows.chunks_mut(bias.len()).for_each(|row| row.copy_from_slice(bias)));
    after(bias)
}

pub(super) fn output<T: Float>(g: &Geometry, input: &[T], weight: &[T], bias: Option<&[T]>) -> Buffer<T> {
    let features = g.out_channels;
    let rows = g.batch * g.output[0] * g.output[1];
    if g.is_depthwise() {
        return depthwise::output(g, input, weight, bias);
    }
    if winograd::applies::<T>(g) {
        return winograd::output(g, input, weight, bias);
    }
    let mut output = Buffer::recycled(rows * features);
    let tile = tile_rows(rows);
    if g.is_pointwise() {
        parallel::pieces_mut(&mut output, tile * features, |_, piece| _ = start(piece, bias));
        let (into, weight) = (after(bias), Matrix::row_major(weight, features, g.in_channels).transposed());
        gemm(&mut output, features, Matrix::row_major(input, rows, g.in_channels), weight, into, Threads::All);
        return output;
    }
    let (group_inputs, group_outputs, taps) = (g.group_inputs(), g.group_outputs(), g.taps());
    let order: Vec<usize> = (0..taps).collect();
    let group_weights = taps * group_inputs * group_outputs;
    let mut packed = Buffer::recycled(weight.len());
    for (weight, packed) in weight.chunks(group_weights).zip(packed.chunks_mut(group_weights)) {
        repack(weight, [group_inputs, group_outputs], [taps, group_inputs * taps], &order, packed);
    }
    let taps = forward_taps(g);
    parallel::pieces_mut(&mut output, tile * features, |index, out| {
        let into = start(out, bias);
        let anchors: Vec<Anchor> =
            (index * tile..index * tile + out.len() / features).map(|row| forward_anchor(g, row)).collect();
        for (group, packed) in packed.chunks(group_weights).enumerate() {
            let destination = (&mut out[group * group_outputs..], features, into);
            input_source(g, input, group).multiply(&taps, &anchors, packed, group_outputs, destination);
        }
    });
    output
}

fn input_source<'a, T>(g: &Geometry, data: &'a [T], group: usize) -> Source<'a, T> {
    Source { data, extents: g.input, channels: g.in_channels, group_channels: g.group_inputs(), group }
}

fn forward_taps(g: &Geometry) -> Taps {
    let offsets =
        |axis: usize| (0..g.kernel[axis]).map(|tap| (tap * g.options.dilation[axis]) as isize).collect::<Vec<_>>();
    Taps { ys: offsets(0), xs: offsets(1) }
}

fn forward_anchor(g: &Geometry, row: usize) -> Anchor {
    let [height, width] = g.output;
    let start = |axis: usize, at: usize| (at * g.options.stride[axis]) as isize - g.options.padding[axis] as isize;
    Anchor { image: row / (height * width), y: start(0, row / width % height), x: start(1, row % width) }
}

/// The taps that meet input positions h with (h + padding) mod stride = `remainder`: tap i meets such a position in
/// the output position ⌊(h + padding) / stride⌋ + offset.
struct Phase {
    remainder: usize,
    taps: Vec<usize>,
    offsets: Vec<isize>,
}

/// The phases of one axis that have taps.
fn phases(kernel: usize, stride: usize, dilation: usize) -> Vec<Phase> {
    let mut phases: Vec<Phase> = Vec::new();
    // Backwards, so that the offsets rise.
    for tap in (0..kernel).rev() {
        let (remainder, offset) = (tap * dilation % stride, -((tap * dilation / stride) as isize));
        match phases.iter_mut().find(|phase| phase.remainder == remainder) {
            Some(phase) => {
                phase.taps.push(tap);
                phase.offsets.push(offset);
            }
            None => phases.push(Phase { remainder, taps: vec![tap], offsets: vec![offset] }),
        }
    }
    phases
}

/// A vertical and a horizontal phase, with their weight in the order (group, tap, out, in).
struct PhasePair<T> {
    remainders: [usize; 2],
    taps: Taps,
    weight: Buffer<T>,
}

fn phase_pairs<T: Float>(g: &Geometry, weight: &[T]) -> Vec<PhasePair<T>> {
    let axis = |axis: usize| phases(g.kernel[axis], g.options.stride[axis], g.options.dilation[axis]);
    let (group_inputs, group_outputs, taps) = (g.group_inputs(), g.group_outputs(), g.taps());
    let mut pairs = Vec::new();
    let horizontal = axis(1);
    for y in axis(0) {
        for x in &horizontal {
            let order: Vec<usize> =
                y.taps.iter().flat_map(|i| x.taps.iter().map(move |j| i * g.kernel[1] + j)).collect();
            let mut packed = Buffer::recycled(order.len() * group_inputs * g.out_channels);
            let groups = weight.chunks(taps * group_inputs * group_outputs);
            for (weight, packed) in groups.zip(packed.chunks_mut(order.len() * group_inputs * group_outputs)) {
                repack(weight, [group_outputs, group_inputs], [group_inputs * taps, taps], &order, packed);
            }
            let taps = Taps { ys: y.offsets.clone(), xs: x.offsets.clone() };
            pairs.push(PhasePair { remainders: [y.remainder, x.remainder], taps, weight: packed });
        }
    }
    pairs
}

pub(super) fn input_gradient<T: Float>(g: &Geometry, grad: &[T], weight: &[T], bias: Option<&[T]>) -> Buffer<T> {
    let channels = g.in_channels;
    if g.is_depthwise() {
        return depthwise::input_gradient(g, grad, weight, bias);
    }
    if winograd::applies::<T>(g) {
        return winograd::input_gradient(g, grad, weight, bias);
    }
    let mut output = Buffer::recycled(g.input_shape().elements());
    if g.is_pointwise() {
        let rows = g.batch * g.input[0] * g.input[1];
        parallel::pieces_mut(&mut output, tile_rows(rows) * channels, |_, piece| _ = start(piece, bias));
        let (grad, weight) =
            (Matrix::row_major(grad, rows, g.out_channels), Matrix::row_major(weight, g.out_channels, channels));
        gemm(&mut output, channels, grad, weight, after(bias), Threads::All);
        return output;
    }
    if scatter::pays(g) {
        return scatter::input_gradient(g, grad, weight, bias);
    }
    let pairs = phase_pairs(g, weight);
    let [height, width] = g.input;
    let total = g.batch * height * width;
    // A piece is some whole lines, with about a tile's rows in every phase.
    let strides = g.options.stride[0].saturating_mul(g.options.stride[1]).min(total.max(1));
    let lines = (tile_rows(total / strides) * strides).div_ceil(width.max(1)).max(1);
    parallel::pieces_mut(&mut output, lines * width * channels, |index, out| {
        input_gradient_lines(g, &pairs, (grad, bias), index * lines, out);
    });
    output
}

/// The gradient of whole lines of the input, counted over the batch from `first`.
fn input_gradient_lines<T: Float>(
    g: &Geometry,
    pairs: &[PhasePair<T>],
    (grad, bias): (&[T], Option<&[T]>),
    first: usize,
    out: &mut [T],
) {
    let (channels, group_inputs, group_outputs) = (g.in_channels, g.group_inputs(), g.group_outputs());
    let source = |group: usize| Source {
        data: grad,
        extents: g.output,
        channels: g.out_channels,
        group_channels: group_outputs,
        group,
    };
    // Without stride the only phase holds every position, in the order of the output.
    let direct = g.options.stride == [1; 2];
    let into = start(out, bias);
    if !direct && bias.is_none() {
        out.fill(T::ZERO);
    }
    for PhasePair { remainders, taps, weight } in pairs {
        let (anchors, places) = phase_positions(g, *remainders, first, out.len() / (g.input[1] * channels));
        if anchors.is_empty() {
            continue;
        }
        let mut scratch = Buffer::recycled(if direct { 0 } else { anchors.len() * group_inputs });
        let group_weights = taps.ys.len() * taps.xs.len() * group_outputs * group_inputs;
        for (group, weight) in weight.chunks(group_weights).enumerate() {
            let (source, at) = (source(group), group * group_inputs);
            if direct {
                source.multiply(taps, &anchors, weight, group_inputs, (&mut out[at..], channels, into));
                continue;
            }
            let into = start(&mut scratch, bias.map(|bias| &bias[at..at + group_inputs]));
            source.multiply(taps, &anchors, weight, group_inputs, (&mut scratch, group_inputs, into));
            for (row, place) in scratch.chunks(group_inputs).zip(&places) {
                out[place * channels + at..][..group_inputs].copy_from_slice(row);
            }
        }
    }
}

/// The positions of a phase in `lines` lines of the input from line `first` of the batch: what they read, and their
/// numbers within these lines.
fn phase_positions(g: &Geometry, remainders: [usize; 2], first: usize, lines: usize) -> (Vec<Anchor>, Vec<usize>) {
    let ([height, width], stride, padding) = (g.input, g.options.stride, g.options.padding);
    let (mut anchors, mut places) = (Vec::new(), Vec::new());
    for line in 0..lines {
        let (image, y) = ((first + line) / height, (first + line) % height + padding[0]);
        if y % stride[0] != remainders[0] {
            continue;
        }
        let start = padding[1] % stride[1];
        let skip = if remainders[1] >= start { remainders[1] - start } else { remainders[1] + (stride[1] - start) };
        for x in (skip..width).step_by(stride[1]) {
            anchors.push(Anchor { image, y: (y / stride[0]) as isize, x: ((x + padding[1]) / stride[1]) as isize });
            places.push(line * width + x);
        }
    }
    (anchors, places)
}

/// A share of the weight gradient: of one group and some lines of its taps, summed over some of the output positions.
struct Share<'a, T> {
    group: usize,
    ys: &'a [isize],
    rows: std::ops::Range<usize>,
    /// (out, tap, in)
    sums: &'a mut [T],
}

pub(super) fn weight_gradient<T: Float>(g: &Geometry, input: &[T], grad: &[T]) -> Buffer<T> {
    if g.is_depthwise() {
        return depthwise::weight_gradient(g, input, grad);
    }
    if winograd::applies::<T>(g) {
        return winograd::weight_gradient(g, input, grad);
    }
    let rows = g.batch * g.output[0] * g.output[1];
    let (group_inputs, group_outputs) = (g.group_inputs(), g.group_outputs());
    let taps = forward_taps(g);
    let line = taps.xs.len() * group_inputs;
    let lines = (PANEL_COLUMNS / line).max(1).min(g.kernel[0]);
    let weights = g.weight_shape().elements();
    let rows_per_part = rows.div_ceil(parts(rows, weights, g.options.groups * g.kernel[0].div_ceil(lines))).max(1);
    let parts = rows.div_ceil(rows_per_part).max(1);
    let mut partial = Buffer::zeroed(parts * weights);
    let mut shares = Vec::new();
    for (part, sums) in partial.chunks_mut(weights).enumerate() {
        let rows = part * rows_per_part..rows.min((part + 1) * rows_per_part);
        for (group, sums) in sums.chunks_mut(group_outputs * g.taps() * group_inputs).enumerate() {
            let blocks = taps.ys.chunks(lines).zip(sums.chunks_mut(lines * line * group_outputs));
            shares.extend(blocks.map(|(ys, sums)| Share { group, ys, rows: rows.clone(), sums }));
        }
    }
    parallel::pieces_mut(&mut shares, 1, |_, share| add_share(g, input, grad, &taps.xs, &mut share[0]));
    // Sums over parts, from (group, block of lines, out, tap, in) to (out, in, tap).
    let mut output = Buffer::recycled(weights);
    parallel::pieces_mut(&mut output, g.taps() * group_inputs, |feature, out| {
        let (group, feature) = (feature / group_outputs, feature % group_outputs);
        for first in (0..g.kernel[0]).step_by(lines) {
            let columns = lines.min(g.kernel[0] - first) * line;
            let start = (group * g.kernel[0] + first) * line * group_outputs + feature * columns;
            for column in 0..columns {
                let sum = (0..parts).map(|part| partial[part * weights + start + column]).sum();
                out[column % group_inputs * g.taps() + first * taps.xs.len() + column / group_inputs] = sum;
            }
        }
    });
    output
}

/// Into how many parts the rows are cut: enough to keep threads busy, while partial sums stay small and are worth it.
fn parts(rows: usize, weights: usize, shares_per_part: usize) -> usize {
    const SHARES: usize = 32;
    const PARTIAL_SUMS: usize = 1 << 23;
    const ROWS: usize = 256;
    (SHARES / shares_per_part).min(PARTIAL_SUMS / weights).min(rows / ROWS).max(1)
}

fn add_share<T: Float>(g: &Geometry, input: &[T], grad: &[T], xs: &[isize], share: &mut Share<'_, T>) {
    let source = input_source(g, input, share.group);
    let (features, group_outputs) = (g.out_channels, g.group_outputs());
    let columns = share.ys.len() * source.line_columns(xs);
    let tile = 256;
    let mut panel = Buffer::recycled(if g.is_pointwise() { 0 } else { tile.min(share.rows.len()) * columns });
    for first in share.rows.clone().step_by(tile) {
        let rows = tile.min(share.rows.end - first);
        let grad = &grad[first * features + share.group * group_outputs..];
        let grad = Matrix::strided(grad, rows, group_outputs, features, 1).transposed();
        let patches = if g.is_pointwise() {
            &input[first * columns..][..rows * columns]
        } else {
            let anchors: Vec<Anchor> = (first..first + rows).map(|row| forward_anchor(g, row)).collect();
            source.fill_panel(&mut panel[..rows * columns], &anchors, share.ys, xs);
            &panel[..rows * columns]
        };
        gemm(share.sums, columns, grad, Matrix::row_major(patches, rows, columns), Into::Add, Threads::One);
    }
}
