//! Affine maps in `bf16`, where the processor multiplies it: a block of rows at a time, with bias and GELU on the `f32` sums
//! while these are in a core's second-level cache. No operand is converted as a whole.

use super::Gradients;
use crate::cpu::bf16::{PANEL, Panels, PanelsView, add_rows, bf16, narrow, narrowed, widen};
use crate::cpu::{parallel, simd};
use crate::ops::elementwise::scalar;
use crate::tensor::Buffer;

/// rows, in, out
type Extents = [usize; 3];

/// Rows whose input, sums and result stay in a second-level cache.
fn block_rows([_, in_features, out_features]: Extents) -> usize {
    const ELEMENTS: usize = 1 << 17;
    (ELEMENTS / (in_features + out_features).max(1)).clamp(32, 256) / 8 * 8
}

/// Whether a result of so many elements goes past the caches.
fn is_streamed(elements: usize) -> bool {
    const CACHED_BYTES: usize = 16 << 20;
    elements * size_of::<bf16>() > CACHED_BYTES
}

pub(super) fn forward(input: &[bf16], weight: &[bf16], bias: Option<&[bf16]>, extents: Extents) -> Buffer<bf16> {
    let [_, in_features, out_features] = extents;
    product(input, &Panels::of_columns(weight, in_features, out_features), bias, extents)
}

/// `input · weight + bias`, for a weight of in × out.
fn product(input: &[bf16], weight: &Panels, bias: Option<&[bf16]>, extents: Extents) -> Buffer<bf16> {
    let [rows, in_features, out_features] = extents;
    let mut output = Buffer::recycled(rows * out_features);
    let (block, streamed) = (block_rows(extents), is_streamed(output.len()));
    parallel::pieces_mut(&mut output, block * out_features, |index, output| {
        let input = &input[index * block * in_features..][..output.len() / out_features * in_features];
        weight.rows(input, bias, output, streamed);
    });
    output
}

/// GELU of [`forward`], and where `keeps_sums` the sums before it.
pub(super) fn forward_gelu(
    input: &[bf16],
    weight: &[bf16],
    bias: Option<&[bf16]>,
    extents: Extents,
    keeps_sums: bool,
) -> (Buffer<bf16>, Option<Buffer<bf16>>) {
    let [rows, in_features, out_features] = extents;
    let weight = Panels::of_columns(weight, in_features, out_features);
    let block = block_rows(extents);
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
        product(grad, &weight, None, [rows, out_features, in_features])
    };
    Gradients {
        input: needs[0].then(input_gradient),
        weight: needs[1].then(|| transposed_product((grad, out_features), (input, in_features), rows)),
        bias: needs[2].then(|| bias_sums.unwrap_or_else(|| column_sums(grad, out_features))),
    }
}

/// `leftᵀ · right` for two matrices of so many rows and their own columns, as (columns of the left, columns of the right).
pub(crate) fn transposed_product(
    (left, rows_of_result): (&[bf16], usize),
    (right, columns): (&[bf16], usize),
    depth: usize,
) -> Buffer<bf16> {
    let (left, right) = (Panels::of_rows(left, depth, rows_of_result), Panels::of_rows(right, depth, columns));
    let mut output = Buffer::recycled(rows_of_result * columns);
    parallel::pieces_mut(&mut output, PANEL * columns, |panel, output| {
        let mut sums = Buffer::<f32>::zeroed(PANEL * right.view().sums_stride());
        left.view().add_transposed(panel, right.view(), &mut sums);
        narrow_rows(&sums, right.view().sums_stride(), output, columns);
    });
    output
}

/// Rounds rows of `columns` from sums that are `stride` apart.
fn narrow_rows(sums: &[f32], stride: usize, to: &mut [bf16], columns: usize) {
    simd::dispatch(
        #[inline(always)]
        || {
            for (to, sums) in to.chunks_exact_mut(columns.max(1)).zip(sums.chunks_exact(stride.max(1))) {
                for (to, &sum) in to.iter_mut().zip(sums) {
                    *to = narrow(sum);
                }
            }
        },
    );
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
        let (block, streamed) = (block_rows(self.extents), is_streamed(rows * in_features));
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
