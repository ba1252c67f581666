//! Convolutions as matrix products of patches, a tile of rows at a time; those of stride 1 by [`winograd`].
//!
//! A tile is some hundred positions of the result. The patches that they read are copied into a panel (position, tap,
//! channel) that fits the second-level cache, and multiplied with the weight in the order (tap, channel, out). The input
//! gradient is computed the same way: input positions with the same remainder of division by the stride read the same
//! taps, so each such phase is a convolution of stride 1 over the output's gradient. Nothing is scattered, every tap is
//! used once, and no two tiles write to the same place. Depthwise convolutions and gradients of images have ways of
//! their own.

use super::{Geometry, depthwise, scatter, winograd};
use crate::cpu::block_gemm::Writes;
use crate::cpu::gemm::Into;
use crate::cpu::packed::{Packed, add_product, patch_stride, start, sum_place, sums_len};
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

    /// Writes the patches of `anchors`, one row each, `stride` apart, in the order (y, x, channel), with zeros outside of
    /// the map and behind a patch.
    fn fill_panel(&self, panel: &mut [T], stride: usize, anchors: &[Anchor], ys: &[isize], xs: &[isize]) {
        let [height, width] = self.extents.map(|extent| extent as isize);
        let dense = self.group_channels == self.channels && xs.windows(2).all(|pair| pair[1] - pair[0] == 1);
        // Neighbouring taps are neighbours in memory: one run per line, else one run per tap.
        let runs: Vec<(isize, usize)> =
            if dense { vec![(xs[0], xs.len())] } else { xs.iter().map(|&x| (x, 1)).collect() };
        simd::dispatch(
            #[inline(always)]
            || {
                for (row, &anchor) in anchors.iter().enumerate() {
                    let mut at = row * stride;
                    for y in ys.iter().map(|y| anchor.y + y) {
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
                    panel[at..(row + 1) * stride].fill(T::ZERO);
                }
            },
        );
    }

    /// The product of the patches of `anchors` with `weight` (tap, channel, column), into rows `row_stride` apart.
    fn multiply(
        &self,
        taps: &Taps,
        anchors: &[Anchor],
        weight: &Packed<T>,
        (destination, row_stride, mut into): (&mut [T], usize, Into),
    ) {
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

pub(super) fn output<T: Float>(g: &Geometry, input: &[T], weight: &[T], bias: Option<&[T]>) -> Buffer<T> {
    let features = g.out_channels;
    let rows = g.batch * g.output[0] * g.output[1];
    if g.is_depthwise() {
        return depthwise::output(g, input, weight, bias);
    }
    if winograd::applies_both_ways::<T>(g) {
        return winograd::output(g, input, weight, bias);
    }
    let mut output = Buffer::recycled(rows * features);
    let tile = tile_rows(rows);
    let (group_inputs, group_outputs, taps) = (g.group_inputs(), g.group_outputs(), g.taps());
    let order: Vec<usize> = (0..taps).collect();
    let group = taps * group_inputs * group_outputs;
    let extents = [group_inputs, group_outputs];
    let weights: Vec<Packed<T>> =
        weight.chunks(group).map(|weight| packed(weight, extents, [taps, group_inputs * taps], &order)).collect();
    let taps = forward_taps(g);
    let writes = Writes::of_large::<T>(output.len());
    parallel::pieces_mut(&mut output, tile * features, |index, out| {
        let (first, rows) = (index * tile, out.len() / features);
        if g.is_pointwise() {
            let input = &input[first * g.in_channels..][..rows * g.in_channels];
            return weights[0].rows(input, bias, out, writes);
        }
        let into = start(out, bias);
        let anchors: Vec<Anchor> = (first..first + rows).map(|row| forward_anchor(g, row)).collect();
        for (group, weight) in weights.iter().enumerate() {
            let destination = (&mut out[group * group_outputs..], features, into);
            input_source(g, input, group).multiply(&taps, &anchors, weight, destination);
        }
    });
    output
}

/// One group's weight: see [`repack`].
fn packed<T: Float>(weight: &[T], extents: [usize; 2], strides: [usize; 2], order: &[usize]) -> Packed<T> {
    let mut repacked = Buffer::recycled(order.len() * extents[0] * extents[1]);
    repack(weight, extents, strides, order, &mut repacked);
    Packed::new(repacked, order.len() * extents[0], extents[1])
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

/// A vertical and a horizontal phase, with each group's weight in the order (tap, out, in).
struct PhasePair<T> {
    remainders: [usize; 2],
    taps: Taps,
    weights: Vec<Packed<T>>,
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
            let groups = weight.chunks(taps * group_inputs * group_outputs);
            let (extents, strides) = ([group_outputs, group_inputs], [group_inputs * taps, taps]);
            let weights = groups.map(|weight| packed(weight, extents, strides, &order)).collect();
            let taps = Taps { ys: y.offsets.clone(), xs: x.offsets.clone() };
            pairs.push(PhasePair { remainders: [y.remainder, x.remainder], taps, weights });
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
        let (rows, depth) = (g.batch * g.input[0] * g.input[1], g.out_channels);
        let tile = tile_rows(rows);
        let weight = Packed::new(Buffer::copy_of(weight), depth, channels);
        let writes = Writes::of_large::<T>(output.len());
        parallel::pieces_mut(&mut output, tile * channels, |index, out| {
            let grad = &grad[index * tile * depth..][..out.len() / channels * depth];
            weight.rows(grad, bias, out, writes);
        });
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
    for PhasePair { remainders, taps, weights } in pairs {
        let (anchors, places) = phase_positions(g, *remainders, first, out.len() / (g.input[1] * channels));
        if anchors.is_empty() {
            continue;
        }
        let mut scratch = Buffer::recycled(if direct { 0 } else { anchors.len() * group_inputs });
        for (group, weight) in weights.iter().enumerate() {
            let (source, at) = (source(group), group * group_inputs);
            if direct {
                source.multiply(taps, &anchors, weight, (&mut out[at..], channels, into));
                continue;
            }
            let into = start(&mut scratch, bias.map(|bias| &bias[at..at + group_inputs]));
            source.multiply(taps, &anchors, weight, (&mut scratch, group_inputs, into));
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
    /// As [`add_product`] has them.
    sums: &'a mut [T],
}

pub(super) fn weight_gradient<T: Float>(g: &Geometry, input: &[T], grad: &[T]) -> Buffer<T> {
    if g.is_depthwise() {
        return depthwise::weight_gradient(g, input, grad);
    }
    if winograd::applies_both_ways::<T>(g) {
        return winograd::weight_gradient(g, input, grad);
    }
    let rows = g.batch * g.output[0] * g.output[1];
    let (group_inputs, group_outputs) = (g.group_inputs(), g.group_outputs());
    let taps = forward_taps(g);
    let line = taps.xs.len() * group_inputs;
    let lines = (PANEL_COLUMNS / line).max(1).min(g.kernel[0]);
    // Of a group, blocks of lines of taps; the last one may have fewer.
    let block_len = |ys: usize| sums_len::<T>(ys * line, group_outputs);
    let group_len: usize = taps.ys.chunks(lines).map(|ys| block_len(ys.len())).sum();
    let part_len = group_len * g.options.groups;
    let parts = concurrent_parts(part_len).min(rows.div_ceil(PART_ROWS)).max(1);
    let mut partial = Buffer::recycled(parts * part_len);
    let mut total = Buffer::zeroed(part_len);
    for first in (0..rows).step_by(parts * PART_ROWS) {
        let used = (rows - first).div_ceil(PART_ROWS).min(parts);
        let mut shares = Vec::new();
        for (part, sums) in partial.chunks_mut(part_len).take(used).enumerate() {
            let start = first + part * PART_ROWS;
            let mut rest = sums;
            for group in 0..g.options.groups {
                for ys in taps.ys.chunks(lines) {
                    let (sums, behind) = rest.split_at_mut(block_len(ys.len()));
                    shares.push(Share { group, ys, rows: start..rows.min(start + PART_ROWS), sums });
                    rest = behind;
                }
            }
        }
        parallel::pieces_mut(&mut shares, 1, |_, share| add_share(g, input, grad, &taps.xs, &mut share[0]));
        parallel::pieces_mut(&mut total, parallel::PIECE, |index, total| {
            for part in partial.chunks(part_len).take(used) {
                let part = &part[index * parallel::PIECE..][..total.len()];
                total.iter_mut().zip(part).for_each(|(total, &sum)| *total += sum);
            }
        });
    }
    let mut output = Buffer::recycled(g.weight_shape().elements());
    parallel::pieces_mut(&mut output, g.taps() * group_inputs, |feature, out| {
        let (group, feature) = (feature / group_outputs, feature % group_outputs);
        let mut start = group * group_len;
        for (index, ys) in taps.ys.chunks(lines).enumerate() {
            let columns = ys.len() * line;
            for column in 0..columns {
                let place = start + sum_place::<T>(columns, group_outputs, (column, feature));
                let tap = index * lines * taps.xs.len() + column / group_inputs;
                out[column % group_inputs * g.taps() + tap] = total[place];
            }
            start += block_len(ys.len());
        }
    });
    output
}

/// Output positions of a part of the weight gradient. Parts are counted from the first image and added in order, so
/// images whose gradient is zero, behind the others, add zeros and change no bit.
const PART_ROWS: usize = 1024;

/// How many parts are summed at a time: enough to keep threads busy, while their sums stay small.
fn concurrent_parts(part_len: usize) -> usize {
    const PARTIAL_SUMS: usize = 1 << 22;
    (PARTIAL_SUMS / part_len.max(1)).clamp(4, 32)
}

fn add_share<T: Float>(g: &Geometry, input: &[T], grad: &[T], xs: &[isize], share: &mut Share<'_, T>) {
    const TILE: usize = 128;
    let source = input_source(g, input, share.group);
    let (features, group_outputs) = (g.out_channels, g.group_outputs());
    let columns = share.ys.len() * source.line_columns(xs);
    let stride = patch_stride::<T>(columns);
    // The rows of a map are patches, if they fill whole groups.
    let in_place = g.is_pointwise() && stride == columns;
    let mut panel = Buffer::recycled(if in_place { 0 } else { TILE.min(share.rows.len()) * stride });
    share.sums.fill(T::ZERO);
    for first in share.rows.clone().step_by(TILE) {
        let rows = TILE.min(share.rows.end - first);
        let grad = (&grad[first * features + share.group * group_outputs..], features, group_outputs);
        if in_place {
            add_product((&input[first * columns..], columns), grad, rows, share.sums);
        } else {
            let anchors: Vec<Anchor> = (first..first + rows).map(|row| forward_anchor(g, row)).collect();
            source.fill_panel(&mut panel[..rows * stride], stride, &anchors, share.ys, xs);
            add_product((&panel[..rows * stride], columns), grad, rows, share.sums);
        }
    }
}
