//! Affine maps in `bf16`, where the processor multiplies it: a block of rows at a time, with bias and GELU on the `f32` sums
//! while these are in a core's second-level cache. No operand is converted as a whole.

use std::sync::Arc;

use super::Gradients;
use crate::cpu::bf16::{
    PANEL, Panels, PanelsView, To, add_rows, bf16, block_rows, is_streamed, multiply_by_panels, multiply_rows,
    multiply_transposed, narrow, narrow_rows, narrowed, shares_panels, widen,
};
use crate::cpu::{parallel, simd};
use crate::ops::elementwise::scalar;
use crate::tensor::{Buffer, Weight};

/// rows, in, out
type Extents = [usize; 3];

/// The weight of [`forward`] in panels, by its own extents.
#[derive(Clone, PartialEq)]
struct Columns([usize; 2]);

fn packed(weight: Weight<'_, bf16>, [_, in_features, out_features]: Extents) -> Arc<Panels> {
    let key = Columns([in_features, out_features]);
    weight.form(key, || Panels::of_columns(weight.values, in_features, out_features))
}

pub(super) fn forward(
    input: &[bf16],
    weight: Weight<'_, bf16>,
    bias: Option<&[bf16]>,
    extents: Extents,
) -> Buffer<bf16> {
    multiply_rows(input, &packed(weight, extents), bias, extents[0])
}

/// GELU of [`forward`], and where `keeps_sums` the sums before it.
pub(super) fn forward_gelu(
    input: &[bf16],
    weight: Weight<'_, bf16>,
    bias: Option<&[bf16]>,
    extents: Extents,
    keeps_sums: bool,
) -> (Buffer<bf16>, Option<Buffer<bf16>>) {
    let [rows, in_features, out_features] = extents;
    let weight = packed(weight, extents);
    if !keeps_sums && shares_panels(&weight, rows) {
        let gelu = |sum: f32| narrow(scalar::gelu(sum));
        return (multiply_by_panels(input, &weight, bias, rows, |to| To::Wide(to), gelu), None);
    }
    let block = block_rows(in_features, out_features);
    let product = |index: usize, output: &mut [bf16], kept: &mut [bf16]| {
        let input = &input[index * block * in_features..][..output.len() / out_features * in_features];
        let mut sums = Buffer::recycled(output.len());
        weight.sums(input, bias, &mut sums);
        simd::dispatch(
            #[inline(always)]
            || {
                for (kept, &sum) in kept.iter_mut().zip(&*sums) {
                    *kept = narrow(sum);
                }
                for (out, &sum) in output.iter_mut().zip(&*sums) {
                    *out = narrow(scalar::gelu(sum));
                }
            },
        );
    };
    let (mut output, len) = (Buffer::recycled(rows * out_features), block * out_features);
    if !keeps_sums {
        parallel::pieces_mut(&mut output, len, |index, output| product(index, output, &mut []));
        return (output, None);
    }
    let mut sums = Buffer::recycled(rows * out_features);
    parallel::pieces_mut2((&mut output, len), (&mut sums, len), product);
    (output, Some(sums))
}

/// Gradients of [`forward`], and where `sums` are given of [`forward_gelu`], by `grad` (rows, out): of those in `needs`
/// (input, weight, bias).
pub(super) fn backward(
    grad: &[bf16],
    sums: Option<&[bf16]>,
    input: &[bf16],
    weight: &[bf16],
    extents: Extents,
    needs: [bool; 3],
) -> Gradients<Buffer<bf16>> {
    let [rows, in_features, out_features] = extents;
    if needs[1] && rows >= 1024 && in_features * out_features <= OnePass::WEIGHT {
        return OnePass { grad, sums, input, weight, extents, needs }.run();
    }
    let inner = sums.map(|sums| whole_gelu_gradient(grad, sums, out_features));
    let (grad, bias_sums) = match &inner {
        Some((inner, bias_sums)) => (&inner[..], Some(narrowed(bias_sums))),
        None => (grad, None),
    };
    let input_gradient = || {
        let weight = Panels::of_rows(weight, out_features, in_features);
        multiply_rows(grad, &weight, None, rows)
    };
    Gradients {
        input: needs[0].then(input_gradient),
        weight: needs[1].then(|| {
            let (left, right) = (Panels::of_rows(grad, rows, out_features), Panels::of_rows(input, rows, in_features));
            multiply_transposed(&left, &right)
        }),
        bias: needs[2].then(|| bias_sums.unwrap_or_else(|| column_sums(grad, out_features))),
    }
}

/// `inner = grad · GELU′(sums)`, rounded, whose rows are added to `total` before that.
fn gelu_gradient(grad: &[bf16], sums: &[bf16], inner: &mut [bf16], total: &mut [f32]) {
    let columns = total.len().max(1);
    simd::dispatch(
        #[inline(always)]
        || {
            let rows = grad.chunks_exact(columns).zip(sums.chunks_exact(columns));
            for (inner, (grad, sums)) in inner.chunks_exact_mut(columns).zip(rows) {
                for ((inner, total), (&grad, &sum)) in inner.iter_mut().zip(&mut *total).zip(grad.iter().zip(sums)) {
                    let value = scalar::gelu_derivative(widen(sum)) * widen(grad);
                    *total += value;
                    *inner = narrow(value);
                }
            }
        },
    );
}

/// [`gelu_gradient`] of all rows, with all threads.
fn whole_gelu_gradient(grad: &[bf16], sums: &[bf16], columns: usize) -> (Buffer<bf16>, Buffer<f32>) {
    let per_piece = (4 * parallel::PIECE / columns.max(1)).max(1) * columns;
    let mut inner = Buffer::recycled(grad.len());
    let mut totals = Buffer::zeroed(grad.len().div_ceil(per_piece.max(1)) * columns);
    parallel::pieces_mut2((&mut inner, per_piece), (&mut totals, columns), |index, inner, total| {
        let at = index * per_piece..index * per_piece + inner.len();
        gelu_gradient(&grad[at.clone()], &sums[at], inner, total);
    });
    (inner, total(&totals, columns))
}

fn column_sums(values: &[bf16], columns: usize) -> Buffer<bf16> {
    let rows = values.len() / columns.max(1);
    narrowed(&parallel::accumulate(rows, 64, columns, |range, total| {
        add_rows(&values[range.start * columns..range.end * columns], total);
    }))
}

/// All gradients in one pass over the rows: of each block the gradient of the sums stays in the second-level cache for the
/// bias, the input and the weight, whose `f32` sums are there as well.
struct OnePass<'a> {
    grad: &'a [bf16],
    sums: Option<&'a [bf16]>,
    input: &'a [bf16],
    weight: &'a [bf16],
    extents: Extents,
    needs: [bool; 3],
}

/// A run of rows with its share of the sums.
struct Part<'a> {
    first: usize,
    rows: usize,
    input_grad: &'a mut [bf16],
    weight_sums: &'a mut [f32],
    bias_sums: &'a mut [f32],
}

impl OnePass<'_> {
    /// Sums of the weight that the second-level cache of a core holds beside a block.
    const WEIGHT: usize = 160 << 10;
    /// Sums of all parts.
    const PARTIAL: usize = 1 << 20;

    fn run(&self) -> Gradients<Buffer<bf16>> {
        let [rows, in_features, out_features] = self.extents;
        let stride = in_features.next_multiple_of(PANEL);
        let sums_len = out_features.next_multiple_of(PANEL) * stride;
        let parts = (Self::PARTIAL / sums_len.max(1)).clamp(8, 32).min(rows.div_ceil(64));
        let per_part = rows.div_ceil(parts).next_multiple_of(8);
        let parts = rows.div_ceil(per_part);
        let mut input_grad = Buffer::recycled(if self.needs[0] { rows * in_features } else { 0 });
        let (mut weight_sums, mut bias_sums) = (Buffer::zeroed(parts * sums_len), Buffer::zeroed(parts * out_features));
        let packed = self.needs[0].then(|| Panels::of_rows(self.weight, out_features, in_features));
        let mut input_grads = input_grad.chunks_mut((per_part * in_features).max(1));
        let sums = weight_sums.chunks_mut(sums_len.max(1)).zip(bias_sums.chunks_mut(out_features.max(1))).enumerate();
        let mut work: Vec<Part<'_>> = sums
            .map(|(part, (weight_sums, bias_sums))| Part {
                first: part * per_part,
                rows: per_part.min(rows - part * per_part),
                input_grad: input_grads.next().unwrap_or_default(),
                weight_sums,
                bias_sums,
            })
            .collect();
        parallel::pieces_mut(&mut work, 1, |_, part| self.part(&mut part[0], packed.as_ref()));
        drop(work);
        let mut weight = Buffer::recycled(out_features * in_features);
        let sums = total(&weight_sums, sums_len);
        narrow_rows(&sums, stride, &mut weight, in_features);
        Gradients {
            input: self.needs[0].then_some(input_grad),
            weight: Some(weight),
            bias: self.needs[2].then(|| narrowed(&total(&bias_sums, out_features))),
        }
    }

    fn part(&self, part: &mut Part<'_>, weight: Option<&Panels>) {
        let [rows, in_features, out_features] = self.extents;
        let (block, streamed) = (block_rows(in_features, out_features), is_streamed(rows * in_features));
        let block = block.min(part.rows);
        let mut inner = Buffer::recycled(if self.sums.is_some() { block * out_features } else { 0 });
        let mut left = Buffer::recycled(Panels::len(block, out_features));
        let mut right = Buffer::recycled(Panels::len(block, in_features));
        for first in (0..part.rows).step_by(block) {
            let count = block.min(part.rows - first);
            let at = (part.first + first) * out_features..(part.first + first + count) * out_features;
            let mut grad = &self.grad[at.clone()];
            if let Some(sums) = self.sums {
                gelu_gradient(grad, &sums[at], &mut inner[..grad.len()], part.bias_sums);
                grad = &inner[..grad.len()];
            } else if self.needs[2] {
                add_rows(grad, part.bias_sums);
            }
            if let Some(weight) = weight {
                let out = &mut part.input_grad[first * in_features..][..count * in_features];
                weight.rows(grad, None, out, streamed);
            }
            let input = &self.input[(part.first + first) * in_features..][..count * in_features];
            let left = PanelsView::pack(grad, count, out_features, &mut left);
            let right = PanelsView::pack(input, count, in_features, &mut right);
            for (panel, sums) in part.weight_sums.chunks_mut(PANEL * right.sums_stride()).enumerate() {
                left.add_transposed(panel, right, sums);
            }
        }
    }
}

/// The sum of vectors that lie behind each other, in their order.
fn total(vectors: &[f32], len: usize) -> Buffer<f32> {
    let mut total = Buffer::recycled(len);
    parallel::pieces_mut(&mut total, parallel::PIECE, |index, total| {
        let at = index * parallel::PIECE..index * parallel::PIECE + total.len();
        total.fill(0.0);
        for vector in vectors.chunks_exact(len) {
            simd::dispatch(
                #[inline(always)]
                || {
                    for (total, &value) in total.iter_mut().zip(&vector[at.clone()]) {
                        *total += value;
                    }
                },
            );
        }
    });
    total
}
