//! Convolutions by products of patches, one or several side by side: their results are neighbouring channels of one map,
//! as those of a cross-scale embedding are.
//!
//! A tile is some hundred positions of the result. Neighbouring taps of a line are neighbours in memory, so a patch is some
//! runs of elements, read where they lie and multiplied with the weight in the order (tap, channel, out); what would lie in
//! the padding is left out. Patches of short runs are copied into a panel first. The input gradient is computed the same
//! way: input positions with the same remainder of division by the stride read the same taps, so each such phase is a
//! convolution of stride 1 over the output's gradient. Nothing is scattered, every tap is used once, and no two tiles
//! write to the same place.

use std::sync::Arc;

use super::Geometry;
use super::patches::{
    Anchor, PANEL_COLUMNS, PaddedLines, Source, Taps, forward_anchors, forward_taps, input_source, tile_rows,
};
use crate::cpu::block_gemm::{PANEL, Writes};
use crate::cpu::gemm::Into;
use crate::cpu::packed::{
    Packed, Patches, Term, add_product, add_product_of_taps, ahead, copy_weights, has_whole_taps, patch_stride, start,
    sums_len,
};
use crate::cpu::{Factor, Float, parallel};
use crate::tensor::{Buffer, Weight};

/// A convolution whose result is the channels of a map from `first` on.
#[derive(Clone, Copy)]
pub(in crate::ops) struct Part {
    pub geometry: Geometry,
    pub first: usize,
}

/// The result (batch, height, width, `channels`) of all parts, which differ in kernel, padding and output channels alone;
/// `bias` has an element for each channel.
pub(in crate::ops) fn output<T: Float>(
    parts: &[Part],
    channels: usize,
    input: &[T],
    weights: &[Weight<'_, T>],
    bias: Option<&[T]>,
) -> Buffer<T> {
    let Some(Part { geometry, .. }) = parts.first() else { return Buffer::zeroed(0) };
    let rows = geometry.batch * geometry.output[0] * geometry.output[1];
    let packed: Vec<(Arc<Vec<Packed<T>>>, Taps)> = parts
        .iter()
        .zip(weights)
        .map(|(Part { geometry: g, .. }, weight)| {
            let key = ByGroups([g.taps(), g.group_inputs(), g.group_outputs()]);
            (weight.form(key, || packed_groups(g, weight.values)), forward_taps(g))
        })
        .collect();
    let mut output = Buffer::recycled(rows * channels);
    let (tile, writes) = (tile_rows(rows), Writes::of_large::<T>(rows * channels));
    let panels: usize =
        packed.iter().flat_map(|(weights, _)| weights.iter()).map(|weight| weight.panels().count()).sum();
    let in_place = || parts.iter().zip(&packed).all(|(part, (_, taps))| reads_in_place(part, input, taps));
    if rows <= FEW && panels > rows.div_ceil(tile) && !is_short(parts) && in_place() {
        output_by_panels(parts, input, &packed, bias, &mut output);
        return output;
    }
    parallel::pieces_mut(&mut output, tile * channels, |index, out| {
        let (first_row, rows) = (index * tile, out.len() / channels);
        if let ([Part { geometry: g, .. }], [(weights, taps)]) = (parts, packed.as_slice())
            && is_short(parts)
        {
            let positions = first_row..first_row + rows;
            if weights[0].takes_runs() && PaddedLines::<T>::pays(g) {
                let lines = PaddedLines::of(g, input, positions);
                let runs = (&lines.offsets[..], lines.run_len);
                return weights[0].rows_of_runs(&lines.data, &lines.starts, runs, bias, out, writes);
            }
            let panel = input_source(g, input, 0).panel(taps, &forward_anchors(g, positions));
            return weights[0].rows(&panel, bias, out, writes, &[]);
        }
        let into = start(out, bias);
        for (&Part { geometry: g, first }, (weights, taps)) in parts.iter().zip(&packed) {
            let anchors = forward_anchors(&g, first_row..first_row + rows);
            for (group, weight) in weights.iter().enumerate() {
                let destination = (&mut out[first + group * g.group_outputs()..], channels, into);
                input_source(&g, input, group).multiply(taps, &anchors, weight, destination);
            }
        }
    });
    output
}

/// Whether patches are copied, and their product is written once.
fn is_short(parts: &[Part]) -> bool {
    matches!(parts, [Part { geometry: g, .. }] if g.options.groups == 1 && g.taps() * g.in_channels <= SHORT)
}

/// Positions up to which threads share the columns: tiles of so few would keep few of them busy, and each would read the
/// whole weight.
pub(super) const FEW: usize = 256;

fn reads_in_place<T: Float>(Part { geometry: g, .. }: &Part, input: &[T], taps: &Taps) -> bool {
    g.options.groups == 1 && input_source(g, input, 0).has_long_runs(taps)
}

/// [`output`] by panels of columns, where every part [reads its patches in place](reads_in_place).
fn output_by_panels<T: Float>(
    parts: &[Part],
    input: &[T],
    weights: &[(Arc<Vec<Packed<T>>>, Taps)],
    bias: Option<&[T]>,
    output: &mut [T],
) {
    let terms: Vec<Vec<Term>> = parts
        .iter()
        .zip(weights)
        .map(|(Part { geometry: g, .. }, (_, taps))| {
            let rows = g.batch * g.output[0] * g.output[1];
            input_source(g, input, 0).terms(taps, &forward_anchors(g, 0..rows))
        })
        .collect();
    let panels: Vec<(usize, (usize, usize))> = weights
        .iter()
        .enumerate()
        .flat_map(|(part, (weight, _))| weight[0].panels().map(move |panel| (part, panel)))
        .collect();
    let widths: Vec<usize> = panels.iter().map(|&(_, (_, width))| width).collect();
    let mut strips = parallel::columns_mut(output, &widths);
    parallel::pieces_mut(&mut strips, 1, |index, strip| {
        let (part, (column, _)) = panels[index];
        let Part { geometry: g, first } = parts[part];
        let bias = bias.map(|bias| &bias[first..][..g.out_channels]);
        weights[part].0[0].panel_of_terms(input, &terms[part], (column, bias), &mut strip[0]);
    });
}

/// The weight of [`output`], by its own extents: taps, and inputs and outputs of a group.
#[derive(Clone, PartialEq)]
struct ByGroups([usize; 3]);

fn packed_groups<T: Float>(g: &Geometry, weight: &[T]) -> Vec<Packed<T>> {
    let (extents, strides) = ([g.group_inputs(), g.group_outputs()], [g.taps(), g.group_inputs() * g.taps()]);
    let order: Vec<usize> = (0..g.taps()).collect();
    let groups = weight.chunks(g.taps() * extents[0] * extents[1]);
    groups.map(|weight| Packed::gathered(weight, extents, strides, &order)).collect()
}

/// Elements of a patch whose product is written once, so that large results can go past the caches.
const SHORT: usize = 128;

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

/// A vertical and a horizontal phase, and the weight of its taps as a product reads it.
pub(super) struct PhasePair<W> {
    pub remainders: [usize; 2],
    pub taps: Taps,
    pub weight: W,
}

/// All pairs of phases; `pack` makes the weight of the taps of these numbers, in the order (tap, out, in).
pub(super) fn phase_pairs<W>(g: &Geometry, pack: impl Fn(&[usize]) -> W) -> Vec<PhasePair<W>> {
    let axis = |axis: usize| phases(g.kernel[axis], g.options.stride[axis], g.options.dilation[axis]);
    let mut pairs = Vec::new();
    let horizontal = axis(1);
    for y in axis(0) {
        for x in &horizontal {
            let order: Vec<usize> =
                y.taps.iter().flat_map(|i| x.taps.iter().map(move |j| i * g.kernel[1] + j)).collect();
            let taps = Taps { ys: y.offsets.clone(), xs: x.offsets.clone() };
            pairs.push(PhasePair { remainders: [y.remainder, x.remainder], taps, weight: pack(&order) });
        }
    }
    pairs
}

/// Each group's weight of some taps, in the order (tap, out, in).
fn groups_of_taps<T: Float>(g: &Geometry, weight: &[T], order: &[usize]) -> Vec<Packed<T>> {
    let (extents, strides) = ([g.group_outputs(), g.group_inputs()], [g.group_inputs() * g.taps(), g.taps()]);
    let groups = weight.chunks(g.taps() * extents[0] * extents[1]);
    groups.map(|weight| Packed::gathered(weight, extents, strides, order)).collect()
}

/// Lines of the input that are a piece of its gradient: whole ones, with about a tile's rows in every phase.
pub(super) fn lines_of_piece(g: &Geometry) -> usize {
    let total = g.batch * g.input[0] * g.input[1];
    let strides = g.options.stride[0].saturating_mul(g.options.stride[1]).min(total.max(1));
    (tile_rows(total / strides) * strides).div_ceil(g.input[1].max(1)).max(1)
}

/// The gradient of the input by `grad`, that of the result of [`output`].
pub(in crate::ops) fn input_gradient<T: Float>(
    parts: &[Part],
    channels: usize,
    grad: &[T],
    weights: &[&[T]],
    bias: Option<&[T]>,
) -> Buffer<T> {
    let Some(&Part { geometry: g, .. }) = parts.first() else { return Buffer::zeroed(0) };
    let pairs_of = |(part, weight): (&Part, &&[T])| {
        (*part, phase_pairs(&part.geometry, |order| groups_of_taps(&part.geometry, weight, order)))
    };
    let pairs: Vec<(Part, Vec<PhasePair<Vec<Packed<T>>>>)> = parts.iter().zip(weights).map(pairs_of).collect();
    let mut output = Buffer::recycled(g.input_shape().elements());
    let (lines, width) = (lines_of_piece(&g), g.input[1]);
    parallel::pieces_mut(&mut output, lines * width * g.in_channels, |index, out| {
        let mut into = start(out, bias);
        if into == Into::Overwrite && (g.options.stride != [1; 2] || parts.len() > 1) {
            out.fill(T::ZERO);
            into = Into::Add;
        }
        for (part, pairs) in &pairs {
            add_input_gradient(part, pairs, (grad, channels), index * lines, out, into);
        }
    });
    output
}

/// The gradient of whole lines of the input, counted over the batch from `first`, by a part's channels.
fn add_input_gradient<T: Float>(
    &Part { geometry: ref g, first: first_channel }: &Part,
    pairs: &[PhasePair<Vec<Packed<T>>>],
    (grad, grad_channels): (&[T], usize),
    first: usize,
    out: &mut [T],
    into: Into,
) {
    let (channels, group_inputs, group_outputs) = (g.in_channels, g.group_inputs(), g.group_outputs());
    for PhasePair { remainders, taps, weight: weights } in pairs {
        let (anchors, places) = phase_positions(g, *remainders, first, out.len() / (g.input[1] * channels));
        if anchors.is_empty() {
            continue;
        }
        // Without stride the only phase holds every position, in the order of the output.
        let direct = g.options.stride == [1; 2];
        let mut scratch = Buffer::recycled(if direct { 0 } else { anchors.len() * group_inputs });
        for (group, weight) in weights.iter().enumerate() {
            let source = Source {
                data: grad,
                extents: g.output,
                channels: grad_channels,
                read: group_outputs,
                first: first_channel + group * group_outputs,
            };
            let at = group * group_inputs;
            if direct {
                source.multiply(taps, &anchors, weight, (&mut out[at..], channels, into));
                continue;
            }
            source.multiply(taps, &anchors, weight, (&mut scratch, group_inputs, Into::Overwrite));
            for (row, place) in scratch.chunks(group_inputs).zip(&places) {
                let out = &mut out[place * channels + at..][..group_inputs];
                out.iter_mut().zip(row).for_each(|(out, &value)| *out += value);
            }
        }
    }
}

/// The positions of a phase in `lines` lines of the input from line `first` of the batch: what they read, and their
/// numbers within these lines.
pub(super) fn phase_positions(
    g: &Geometry,
    remainders: [usize; 2],
    first: usize,
    lines: usize,
) -> (Vec<Anchor>, Vec<usize>) {
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
struct Share<'a, S> {
    group: usize,
    ys: &'a [isize],
    rows: std::ops::Range<usize>,
    /// As [`add_product`] has them.
    sums: &'a mut [S],
}

/// The gradient of a part's weight by `grad`, a map of `channels`.
pub(in crate::ops) fn weight_gradient<E: Factor>(
    part: &Part,
    channels: usize,
    input: &[E],
    grad: &[E],
) -> Buffer<E::Sum> {
    let g = &part.geometry;
    let rows = g.batch * g.output[0] * g.output[1];
    let (group_inputs, group_outputs) = (g.group_inputs(), g.group_outputs());
    let taps = forward_taps(g);
    let line = taps.xs.len() * group_inputs;
    let lines = (PANEL_COLUMNS / line).max(1).min(g.kernel[0]);
    // Of a group, blocks of lines of taps; the last one may have fewer.
    let block_len = |ys: usize| sums_len(ys * line, group_outputs);
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
        parallel::pieces_mut(&mut shares, 1, |_, share| {
            add_share(part, input, (grad, channels), &taps.xs, &mut share[0])
        });
        parallel::pieces_mut(&mut total, parallel::PIECE, |index, total| {
            for part in partial.chunks(part_len).take(used) {
                let part = &part[index * parallel::PIECE..][..total.len()];
                total.iter_mut().zip(part).for_each(|(total, &sum)| *total += sum);
            }
        });
    }
    let mut output = Buffer::recycled(g.weight_shape().elements());
    let weight_len = g.taps() * group_inputs;
    for (group, output) in output.chunks_mut(group_outputs * weight_len).enumerate() {
        parallel::pieces_mut(output, PANEL * weight_len, |panel, weights| {
            let mut rest = &total[group * group_len..];
            for (index, ys) in taps.ys.chunks(lines).enumerate() {
                let (extents, features) = ([ys.len() * line, group_inputs], (panel * PANEL, group_outputs));
                copy_weights(rest, extents, features, weights, (index * lines * taps.xs.len(), g.taps()));
                rest = &rest[block_len(ys.len())..];
            }
        });
    }
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

fn add_share<E: Factor>(
    &Part { geometry: ref g, first: first_channel }: &Part,
    input: &[E],
    (grad, channels): (&[E], usize),
    xs: &[isize],
    share: &mut Share<'_, E::Sum>,
) {
    const TILE: usize = 128;
    let source = input_source(g, input, share.group);
    let group_outputs = g.group_outputs();
    let columns = share.ys.len() * source.line_columns(xs);
    let stride = patch_stride(columns);
    let whole_taps = has_whole_taps(source.read, group_outputs);
    // The rows of a map are patches, if they fill whole groups.
    let in_place = g.is_pointwise() && stride == columns;
    let copied = !whole_taps && !in_place;
    let mut panel = Buffer::<E::Sum>::recycled(if copied { TILE.min(share.rows.len()) * stride } else { 0 });
    let panel: &mut [E] = bytemuck::cast_slice_mut(&mut panel);
    share.sums.fill(E::Sum::ZERO);
    for first in share.rows.clone().step_by(TILE) {
        let rows = TILE.min(share.rows.end - first);
        let grad = &grad[first * channels + first_channel + share.group * group_outputs..];
        if in_place {
            let patches = Patches { data: &input[first * columns..], stride, columns };
            let coming = TILE.min(share.rows.end - first - rows);
            let next = [
                ahead(input, (first + rows) * columns, coming * columns),
                ahead(grad, rows * channels, coming * channels),
            ];
            add_product(patches, (grad, channels, group_outputs), rows, share.sums, next);
            continue;
        }
        let anchors = forward_anchors(g, first..first + rows);
        if whole_taps {
            let mut pairs = source.pairs(share.ys, xs, &anchors);
            let grad = (grad, channels, group_outputs);
            add_product_of_taps((input, source.read), grad, rows, &mut pairs, share.sums);
            continue;
        }
        source.fill_panel(&mut panel[..rows * stride], stride, &anchors, share.ys, xs);
        let patches = Patches::filled(&panel[..rows * stride], columns);
        add_product(patches, (grad, channels, group_outputs), rows, share.sums, [&[], &[]]);
    }
}
