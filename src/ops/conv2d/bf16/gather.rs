//! Results and input gradients by products of patches, a tile of positions and a panel of columns at a time: sums in `f32`
//! that stay in the nearest cache, rounded once.

use std::ops::Range;

use super::super::Geometry;
use super::super::direct::{FEW, PhasePair, lines_of_piece, phase_pairs, phase_positions};
use super::super::patches::{Anchor, Source, Taps, forward_anchors, forward_taps, input_source, tile_rows};
use crate::cpu::bf16::{PANEL, Panels, Places, Product, To, bf16, narrow, pairs, widen};
use crate::cpu::packed::{self, panels};
use crate::cpu::{parallel, simd};
use crate::tensor::{Buffer, Weight};

/// Elements of a run from which on patches are read where they are.
const LONG: usize = 32;
/// Elements of a term that are multiplied at once: so many rows of a panel stay in the nearest cache.
const DEPTH: usize = 512;

/// Patches of some positions, the left operand of a product.
enum Operand<'a> {
    /// Read where they are; what lies outside of the map is left out.
    InPlace { data: &'a [bf16], terms: Vec<Term> },
    /// Copied, one after the other, with zeros outside of the map.
    Copied { patches: Buffer<bf16>, starts: Vec<usize>, depth: usize },
}

/// A share of the depth of a product, for some of its rows.
struct Term {
    /// Rows of the weight.
    weight: Range<usize>,
    /// Where the elements of each row lie.
    starts: Vec<usize>,
    /// Where its sums are.
    places: Vec<usize>,
}

impl<'a> Operand<'a> {
    fn new(source: &Source<'a, bf16>, taps: &Taps, anchors: &[Anchor]) -> Self {
        // The two elements of a product have to come from one tap.
        let is_long = source.run_len(&taps.xs) >= LONG;
        if source.read.is_multiple_of(2) && is_long {
            let terms = source.terms(taps, anchors).into_iter().flat_map(short_terms).collect();
            return Operand::InPlace { data: source.data, terms };
        }
        let depth = taps.ys.len() * source.line_columns(&taps.xs);
        let mut patches = Buffer::recycled(anchors.len() * depth);
        source.fill_panel(&mut patches, depth, anchors, &taps.ys, &taps.xs);
        Operand::Copied { patches, starts: (0..anchors.len()).map(|row| row * depth).collect(), depth }
    }

    /// The product with a panel and the row that it begins with, into rows of sums [`PANEL`] apart.
    fn multiply(&self, panel: &[bf16], start: &[f32; PANEL], sums: &mut [f32]) {
        let (used, streamed) = (PANEL, false);
        match self {
            Operand::Copied { patches, starts, depth } => {
                let (depth, places) = (*depth, Places::Apart(PANEL));
                Product { data: patches, starts, depth, panel, start, used, places, streamed }.run(To::Wide(sums));
            }
            Operand::InPlace { data, terms } => {
                sums.as_chunks_mut().0.iter_mut().for_each(|row| *row = *start);
                for Term { weight, starts, places } in terms {
                    let (depth, start, places) = (weight.len(), &[0.0; PANEL], Places::Listed(places));
                    let panel = &panel[weight.start * PANEL..][..pairs(depth) * 2 * PANEL];
                    Product { data, starts, depth, panel, start, used, places, streamed }.run(To::Added(sums));
                }
            }
        }
    }
}

/// A term in parts of no more than [`DEPTH`].
fn short_terms(term: packed::Term) -> impl Iterator<Item = Term> {
    let places: Vec<usize> = term.rows.iter().map(|row| row * PANEL).collect();
    term.weight.clone().step_by(DEPTH).map(move |first| Term {
        weight: first..term.weight.end.min(first + DEPTH),
        starts: term.starts.iter().map(|start| start + first - term.weight.start).collect(),
        places: places.clone(),
    })
}

/// What sums of a panel's columns begin with.
fn beginning(bias: Option<&[bf16]>, columns: Range<usize>) -> [f32; PANEL] {
    let mut start = [0.0; PANEL];
    if let Some(bias) = bias {
        start.iter_mut().zip(&bias[columns]).for_each(|(start, &bias)| *start = widen(bias));
    }
    start
}

/// Rounds rows of sums, [`PANEL`] apart, into rows of `width` elements that begin at these places.
fn round(sums: &[f32], to: &mut [bf16], width: usize, place: impl Fn(usize) -> usize) {
    simd::dispatch(
        #[inline(always)]
        || {
            for (row, sums) in sums.as_chunks::<PANEL>().0.iter().enumerate() {
                let to = &mut to[place(row)..][..width];
                to.iter_mut().zip(sums).for_each(|(to, &sum)| *to = narrow(sum));
            }
        },
    );
}

/// The weight of [`output`], by its own extents.
#[derive(Clone, PartialEq)]
struct ByTaps([usize; 3]);

/// From (out, in, tap) to (out, tap, in).
fn by_taps(g: &Geometry, weight: &[bf16]) -> Buffer<bf16> {
    let (taps, channels) = (g.taps(), g.in_channels);
    let mut packed = Buffer::recycled(weight.len());
    parallel::pieces_mut(&mut packed, taps * channels, |out, packed| {
        let weight = &weight[out * taps * channels..][..taps * channels];
        for (tap, packed) in packed.chunks_exact_mut(channels).enumerate() {
            packed.iter_mut().zip(weight[tap..].iter().step_by(taps)).for_each(|(packed, &value)| *packed = value);
        }
    });
    packed
}

/// The result (batch, height, width, out).
pub(super) fn output(g: &Geometry, input: &[bf16], weight: Weight<'_, bf16>, bias: Option<&[bf16]>) -> Buffer<bf16> {
    let (columns, rows, taps) = (g.out_channels, super::positions(g), forward_taps(g));
    let depth = g.taps() * g.in_channels;
    let key = ByTaps([g.taps(), g.in_channels, columns]);
    let weight = weight.form(key, || Panels::of_columns(&by_taps(g, weight.values), depth, columns));
    let source = input_source(g, input, 0);
    let mut output = Buffer::recycled(rows * columns);
    let tile = tile_rows(rows);
    if rows <= FEW && columns.div_ceil(PANEL) > rows.div_ceil(tile) {
        let operand = Operand::new(&source, &taps, &forward_anchors(g, 0..rows));
        let widths: Vec<usize> = panels(columns).map(|(_, width)| width).collect();
        let mut strips = parallel::columns_mut(&mut output, &widths);
        parallel::pieces_mut(&mut strips, 1, |panel, strip| {
            let start = beginning(bias, panel * PANEL..panel * PANEL + widths[panel]);
            let mut sums = Buffer::recycled(rows * PANEL);
            operand.multiply(weight.view().panel(panel), &start, &mut sums);
            for (row, sums) in strip[0].iter_mut().zip(sums.chunks_exact(PANEL)) {
                round(sums, row, widths[panel], |_| 0);
            }
        });
        return output;
    }
    parallel::pieces_mut(&mut output, tile * columns, |index, out| {
        let (first, count) = (index * tile, out.len() / columns);
        let operand = Operand::new(&source, &taps, &forward_anchors(g, first..first + count));
        let mut sums = Buffer::recycled(count * PANEL);
        for (panel, (first, width)) in panels(columns).enumerate() {
            operand.multiply(weight.view().panel(panel), &beginning(bias, first..first + width), &mut sums);
            round(&sums, out, width, |row| row * columns + first);
        }
    });
    output
}

/// The gradient of the input (batch, height, width, in) by `grad`, that of the result of [`output`]: phase by phase, as in `f32`.
pub(super) fn input_gradient(g: &Geometry, grad: &[bf16], weight: &[bf16], bias: Option<&[bf16]>) -> Buffer<bf16> {
    let (lines, width, columns) = (lines_of_piece(g), g.input[1], g.in_channels);
    let weight = by_taps(g, weight);
    let pairs = phase_pairs(g, |order| {
        let row = |row: usize| (row % g.out_channels * g.taps() + order[row / g.out_channels]) * g.in_channels;
        Panels::of_placed((&weight, row), order.len() * g.out_channels, g.in_channels)
    });
    let source = Source { data: grad, extents: g.output, channels: g.out_channels, read: g.out_channels, first: 0 };
    let mut output = Buffer::recycled(g.input_shape().elements());
    // Where strides exceed the kernel, some positions meet no tap.
    let has_gaps = pairs.len() < g.options.stride[0].saturating_mul(g.options.stride[1]);
    parallel::pieces_mut(&mut output, lines * width * columns, |index, out| {
        if has_gaps {
            match bias {
                Some(bias) => out.chunks_exact_mut(columns).for_each(|row| row.copy_from_slice(bias)),
                None => out.fill(bf16::ZERO),
            }
        }
        for PhasePair { remainders, taps, weight } in &pairs {
            let (anchors, places) = phase_positions(g, *remainders, index * lines, out.len() / (width * columns));
            let operand = Operand::new(&source, taps, &anchors);
            let mut sums = Buffer::recycled(anchors.len() * PANEL);
            for (panel, (first, width)) in panels(columns).enumerate() {
                operand.multiply(weight.view().panel(panel), &beginning(bias, first..first + width), &mut sums);
                round(&sums, out, width, |row| places[row] * columns + first);
            }
        }
    });
    output
}
