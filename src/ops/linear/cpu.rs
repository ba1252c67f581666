//! Tall products by packed weights, a block of rows at a time: what belongs to a row (bias, GELU, their gradients) is done
//! while the block is in a core's second-level cache. Flat products by [`flat`]; other shapes and `f64` by the
//! general product.

use super::Gradients;
use super::flat::{self, Results};
use crate::cpu::block_gemm::{GROUP, LANES, Writes};
use crate::cpu::gemm::{Into, Matrix, Threads, gemm};
use crate::cpu::packed::{Packed, Patches, add_product, ahead, copy_sums, sums_len};
use crate::cpu::{Float, parallel, simd};
use crate::ops::elementwise::scalar;
use crate::tensor::{Buffer, DType};

/// rows, in, out
type Extents = [usize; 3];

/// Whether the rows are worth a packed weight. Flat products read much weight for each block of rows.
fn is_tall<T: Float>([rows, in_features, out_features]: Extents) -> bool {
    T::DTYPE == DType::F32 && rows >= 1024 && in_features.min(out_features) >= LANES
}

/// Rows whose input, sums and result stay in a second-level cache.
fn block_rows([_, in_features, out_features]: Extents) -> usize {
    const ELEMENTS: usize = 1 << 17;
    (ELEMENTS / (in_features + out_features)).clamp(32, 256) / GROUP * GROUP
}

pub(super) fn forward<T: Float>(input: &[T], weight: &[T], bias: Option<&[T]>, extents: Extents) -> Buffer<T> {
    let [rows, in_features, out_features] = extents;
    let mut output = Buffer::recycled(rows * out_features);
    if is_tall::<T>(extents) {
        let weight = Packed::transposed(weight, in_features, out_features);
        tall_product(input, &weight, bias, extents, &mut output);
        return output;
    }
    if flat::serves::<T>(extents) {
        let results = Results { sums: Some(&mut output), gelu: None };
        flat::forward(input, weight, bias, extents, results);
        return output;
    }
    let into = if let Some(bias) = bias {
        let rows_per_piece = (parallel::PIECE / out_features.max(1)).max(1);
        parallel::pieces_mut(&mut output, rows_per_piece * out_features, |_, piece| {
            piece.chunks_mut(out_features).for_each(|row| row.copy_from_slice(bias));
        });
        Into::Add
    } else {
        Into::Overwrite
    };
    let x = Matrix::row_major(input, rows, in_features);
    let w = Matrix::row_major(weight, out_features, in_features).transposed();
    gemm(&mut output, out_features, x, w, into, Threads::All);
    output
}

fn tall_product<T: Float>(input: &[T], weight: &Packed<T>, bias: Option<&[T]>, extents: Extents, output: &mut [T]) {
    let [_, depth, columns] = extents;
    let (block, writes) = (block_rows(extents), Writes::of_large::<T>(output.len()));
    parallel::pieces_mut(output, block * columns, |index, piece| {
        let (at, len) = (index * block * depth, piece.len() / columns * depth);
        weight.rows(&input[at..at + len], bias, piece, writes, ahead(input, at + len, len));
    });
}

/// GELU of [`forward`], and where `keeps_sums` the sums before it.
pub(super) fn forward_gelu<T: Float>(
    input: &[T],
    weight: &[T],
    bias: Option<&[T]>,
    extents: Extents,
    keeps_sums: bool,
) -> (Buffer<T>, Option<Buffer<T>>) {
    let [rows, in_features, out_features] = extents;
    if flat::serves::<T>(extents) {
        let of_results = || Buffer::recycled(rows * out_features);
        let (mut output, mut sums) = (of_results(), keeps_sums.then(of_results));
        let results = Results { sums: sums.as_deref_mut(), gelu: Some(&mut output) };
        flat::forward(input, weight, bias, extents, results);
        return (output, sums);
    }
    if !is_tall::<T>(extents) {
        let sums = forward(input, weight, bias, extents);
        let mut output = Buffer::recycled(sums.len());
        parallel::map(&sums, &mut output, scalar::gelu);
        return (output, keeps_sums.then_some(sums));
    }
    let weight = Packed::transposed(weight, in_features, out_features);
    let block = block_rows(extents);
    let product = |index: usize, output: &mut [T], sums: &mut [T]| {
        let (at, len) = (index * block * in_features, output.len() / out_features * in_features);
        weight.rows(&input[at..at + len], bias, sums, Writes::Fetched, ahead(input, at + len, len));
        simd::dispatch(
            #[inline(always)]
            || {
                for (out, &sum) in output.iter_mut().zip(&*sums) {
                    *out = scalar::gelu(sum);
                }
            },
        );
    };
    let mut output = Buffer::recycled(rows * out_features);
    if !keeps_sums {
        parallel::pieces_mut(&mut output, block * out_features, |index, output| {
            let mut sums = Buffer::recycled(output.len());
            product(index, output, &mut sums);
        });
        return (output, None);
    }
    let mut sums = Buffer::recycled(rows * out_features);
    let len = block * out_features;
    parallel::pieces_mut2((&mut output, len), (&mut sums, len), product);
    (output, Some(sums))
}

/// Gradients of [`forward`], and where `sums` are given of [`forward_gelu`], by `grad` (rows, out): of those in `needs`
/// (input, weight, bias).
pub(super) fn backward<T: Float>(
    grad: &[T],
    sums: Option<&[T]>,
    input: &[T],
    weight: &[T],
    extents: Extents,
    needs: [bool; 3],
) -> Gradients<Buffer<T>> {
    if is_tall::<T>(extents) && needs[1] && OnePass::<T>::pays(extents) {
        return OnePass { grad, sums, input, weight, extents, needs }.run();
    }
    let Some(sums) = sums else {
        let bias = needs[2].then(|| column_sums(grad, extents[2]));
        return products(grad, input, weight, extents, needs, bias);
    };
    let mut inner = Buffer::recycled(grad.len());
    let bias = parallel::accumulate_writing(&mut inner, extents[2], 64, extents[2], |range, inner, total| {
        let range = range.start * extents[2]..range.end * extents[2];
        gelu_gradient(&grad[range.clone()], &sums[range], inner);
        add_rows(inner, total);
    });
    products(&inner, input, weight, extents, needs, needs[2].then_some(bias))
}

fn products<T: Float>(
    grad: &[T],
    input: &[T],
    weight: &[T],
    extents: Extents,
    needs: [bool; 3],
    bias: Option<Buffer<T>>,
) -> Gradients<Buffer<T>> {
    let [rows, in_features, out_features] = extents;
    let grad_matrix = Matrix::row_major(grad, rows, out_features);
    let input_gradient = || {
        let mut output = Buffer::recycled(rows * in_features);
        if is_tall::<T>(extents) {
            let weight = Packed::new(weight, out_features, in_features);
            tall_product(grad, &weight, None, [rows, out_features, in_features], &mut output);
        } else {
            let weight = Matrix::row_major(weight, out_features, in_features);
            gemm(&mut output, in_features, grad_matrix, weight, Into::Overwrite, Threads::All);
        }
        output
    };
    let weight_gradient = || {
        if is_tall::<T>(extents) && out_features.is_multiple_of(GROUP) {
            return weight_gradient(grad, input, extents);
        }
        let mut output = Buffer::recycled(out_features * in_features);
        let input = Matrix::row_major(input, rows, in_features);
        gemm(&mut output, in_features, grad_matrix.transposed(), input, Into::Overwrite, Threads::All);
        output
    };
    Gradients { input: needs[0].then(input_gradient), weight: needs[1].then(weight_gradient), bias }
}

/// gradᵀ · input, strips of outputs side by side: a strip's sums and a block of the input stay in the second-level cache.
fn weight_gradient<T: Float>(grad: &[T], input: &[T], [rows, in_features, out_features]: Extents) -> Buffer<T> {
    const BLOCK: usize = 128;
    const SUMS: usize = 1 << 17;
    const STRIPS: usize = 16;
    let strip = (SUMS / in_features).min(out_features.div_ceil(STRIPS)).next_multiple_of(GROUP);
    let mut output = Buffer::recycled(out_features * in_features);
    parallel::pieces_mut(&mut output, strip * in_features, |index, output| {
        let columns = output.len() / in_features;
        let mut sums = Buffer::zeroed(sums_len(columns, in_features));
        for first in (0..rows).step_by(BLOCK) {
            let count = BLOCK.min(rows - first);
            let patches =
                Patches { data: &grad[first * out_features + index * strip..], stride: out_features, columns };
            let (at, len) = (first * in_features, count * in_features);
            let block = (&input[at..at + len], in_features, in_features);
            add_product(patches, block, count, &mut sums, [ahead(input, at + len, len), &[]]);
        }
        for (column, row) in output.chunks_exact_mut(in_features).enumerate() {
            copy_sums(&sums, columns, column, row);
        }
    });
    output
}

/// `inner = grad · GELU′(sums)`.
fn gelu_gradient<T: Float>(grad: &[T], sums: &[T], inner: &mut [T]) {
    simd::dispatch(
        #[inline(always)]
        || {
            for (inner, (&grad, &sum)) in inner.iter_mut().zip(grad.iter().zip(sums)) {
                *inner = scalar::gelu_derivative(sum) * grad;
            }
        },
    );
}

/// Adds the rows of `values` to `total`.
fn add_rows<T: Float>(values: &[T], total: &mut [T]) {
    simd::dispatch(
        #[inline(always)]
        || {
            for row in values.chunks_exact(total.len()) {
                for (sum, &value) in total.iter_mut().zip(row) {
                    *sum += value;
                }
            }
        },
    );
}

fn column_sums<T: Float>(values: &[T], columns: usize) -> Buffer<T> {
    parallel::accumulate(values.len() / columns.max(1), 64, columns, |range, total| {
        add_rows(&values[range.start * columns..range.end * columns], total);
    })
}

/// All gradients in one pass over the rows: of each block the gradient of the sums stays in the second-level cache for the
/// bias, the input and the weight, whose sums are there as well.
struct OnePass<'a, T> {
    grad: &'a [T],
    sums: Option<&'a [T]>,
    input: &'a [T],
    weight: &'a [T],
    extents: Extents,
    needs: [bool; 3],
}

/// A run of rows with its share of the sums.
struct Part<'a, T> {
    first: usize,
    rows: usize,
    input_grad: &'a mut [T],
    weight_sums: &'a mut [T],
    bias_sums: &'a mut [T],
}

impl<T: Float> OnePass<'_, T> {
    /// Sums of the weight that the second-level cache of a core holds beside a block.
    const WEIGHT: usize = 160 << 10;
    /// Sums of all parts.
    const PARTIAL: usize = 1 << 21;

    fn pays([_, in_features, out_features]: Extents) -> bool {
        in_features * out_features <= Self::WEIGHT && out_features.is_multiple_of(GROUP)
    }

    fn run(&self) -> Gradients<Buffer<T>> {
        let [rows, in_features, out_features] = self.extents;
        let sums_len = sums_len(out_features, in_features);
        let parts = (Self::PARTIAL / sums_len).clamp(8, 32).min(rows.div_ceil(64));
        let per_part = rows.div_ceil(parts).next_multiple_of(GROUP);
        let parts = rows.div_ceil(per_part);
        let mut input_grad = Buffer::recycled(if self.needs[0] { rows * in_features } else { 0 });
        let (mut weight_sums, mut bias_sums) = (Buffer::zeroed(parts * sums_len), Buffer::zeroed(parts * out_features));
        let packed = self.needs[0].then(|| Packed::new(self.weight, out_features, in_features));
        let mut input_grads = input_grad.chunks_mut(per_part * in_features);
        let sums = weight_sums.chunks_mut(sums_len).zip(bias_sums.chunks_mut(out_features)).enumerate();
        let mut work: Vec<Part<'_, T>> = sums
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
        let total = |sums: &[T], len: usize| {
            let mut total = Buffer::recycled(len);
            parallel::pieces_mut(&mut total, parallel::PIECE, |index, total| {
                let at = index * parallel::PIECE..index * parallel::PIECE + total.len();
                total.copy_from_slice(&sums[at.clone()]);
                sums.chunks_exact(len).skip(1).for_each(|part| add_rows(&part[at.clone()], total));
            });
            total
        };
        let weight_total = total(&weight_sums, sums_len);
        let mut weight = Buffer::recycled(out_features * in_features);
        parallel::pieces_mut(&mut weight, in_features, |feature, row| {
            copy_sums(&weight_total, out_features, feature, row);
        });
        Gradients {
            input: self.needs[0].then_some(input_grad),
            weight: Some(weight),
            bias: self.needs[2].then(|| total(&bias_sums, out_features)),
        }
    }

    fn part(&self, part: &mut Part<'_, T>, weight: Option<&Packed<T>>) {
        let [rows, in_features, out_features] = self.extents;
        // The next block is on its way into the cache, too.
        let block = (block_rows(self.extents) / 2).next_multiple_of(GROUP);
        let writes = Writes::of_large::<T>(rows * in_features);
        let mut scratch = Buffer::recycled(if self.sums.is_some() { block.min(part.rows) * out_features } else { 0 });
        for first in (0..part.rows).step_by(block) {
            let count = block.min(part.rows - first);
            let at = part.first + first;
            let of = |features: usize| at * features..(at + count) * features;
            let next = |data, features| ahead(data, (at + count) * features, count * features);
            let mut grad = &self.grad[of(out_features)];
            if let Some(sums) = self.sums {
                let inner = &mut scratch[..grad.len()];
                gelu_gradient(grad, &sums[of(out_features)], inner);
                grad = inner;
            }
            if self.needs[2] {
                add_rows(grad, part.bias_sums);
            }
            if let Some(weight) = weight {
                let out = &mut part.input_grad[first * in_features..][..count * in_features];
                weight.rows(grad, None, out, writes, next(self.grad, out_features));
            }
            let patches = Patches { data: grad, stride: out_features, columns: out_features };
            let input = (&self.input[of(in_features)], in_features, in_features);
            let sums = self.sums.map_or(&[][..], |sums| next(sums, out_features));
            let next = [sums, next(self.input, in_features)];
            add_product(patches, input, count, part.weight_sums, next);
        }
    }
}
