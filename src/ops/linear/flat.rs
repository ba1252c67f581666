//! Flat products in `f32`: fewer rows than are worth a weight packed beforehand.
//!
//! A task computes a strip of columns for all rows: over chunks of the depth it packs one panel of its weight after the
//! other and multiplies all rows by it at once, asking for the next panel's weight meanwhile. A chunk of the rows and the
//! strip's sums stay in the second-level cache, the panel in the first; each weight is read once, by the task that packs it.

use crate::cpu::block_gemm::{self, GROUP, LANES, Onto, PANEL, Rows, Strided, Writes};
use crate::cpu::packed::{Packed, pack_transposed};
use crate::cpu::{Float, parallel, simd};
use crate::ops::elementwise::scalar;
use crate::tensor::{Buffer, DType};

/// Whether products of these extents (rows, in, out) are computed here.
pub(super) fn serves<T: Float>([rows, in_features, out_features]: [usize; 3]) -> bool {
    T::DTYPE == DType::F32 && (128..1024).contains(&rows) && in_features.min(out_features) >= 64
}

/// Columns or rows of a result that one task computes: enough tasks for several threads, each with some reuse.
fn per_task(count: usize, unit: usize) -> usize {
    const TASKS: usize = 12;
    const MOST: usize = 128;
    count.div_ceil(TASKS).next_multiple_of(unit).min(MOST)
}

/// The right operand, (depth, columns), in a slice.
#[derive(Clone, Copy)]
pub(super) enum Weight<'a, T> {
    /// Row-major.
    Plain(&'a [T]),
    /// The transpose, (columns, depth), is row-major.
    Transposed(&'a [T]),
}

/// Where results go, (rows, columns) each.
pub(super) struct Results<'a, T> {
    /// The product and the bias.
    pub sums: Option<&'a mut [T]>,
    /// GELU of the sums.
    pub gelu: Option<&'a mut [T]>,
}

/// `rows · weight + bias` into `results`; extents are those of the product: rows, depth, columns.
pub(super) fn product<T: Float>(
    rows: &[T],
    weight: Weight<'_, T>,
    bias: Option<&[T]>,
    extents: [usize; 3],
    results: Results<'_, T>,
) {
    let weight = match weight {
        Weight::Plain(data) => Weight::Plain(bytemuck::cast_slice(data)),
        Weight::Transposed(data) => Weight::Transposed(bytemuck::cast_slice(data)),
    };
    let (rows, bias) = (bytemuck::cast_slice(rows), bias.map(bytemuck::cast_slice));
    let strip = per_task(extents[2], PANEL);
    let [sums, gelu] = [results.sums, results.gelu].map(|output| split(output, extents[2], strip));
    let mut tasks: Vec<Task<'_>> = sums.into_iter().zip(gelu).map(|(sums, gelu)| Task { sums, gelu }).collect();
    let flat = Flat { rows, weight, bias, extents };
    parallel::pieces_mut(&mut tasks, 1, |index, task| flat.strip(index * strip, strip, &mut task[0]));
}

/// The rows' pieces in each strip.
fn split<T: Float>(output: Option<&mut [T]>, columns: usize, strip: usize) -> Vec<Vec<&mut [f32]>> {
    let mut strips: Vec<Vec<&mut [f32]>> = (0..columns.div_ceil(strip)).map(|_| Vec::new()).collect();
    for row in bytemuck::cast_slice_mut(output.unwrap_or_default()).chunks_mut(columns) {
        strips.iter_mut().zip(row.chunks_mut(strip)).for_each(|(strip, piece)| strip.push(piece));
    }
    strips
}

/// A strip of each row of the results, or of none.
struct Task<'a> {
    sums: Vec<&'a mut [f32]>,
    gelu: Vec<&'a mut [f32]>,
}

impl Task<'_> {
    /// Takes over sums whose rows are `stride` apart.
    fn write(&mut self, sums: &[f32], stride: usize) {
        simd::dispatch(
            #[inline(always)]
            || {
                for (row, out) in self.sums.iter_mut().enumerate() {
                    out.copy_from_slice(&sums[row * stride..][..out.len()]);
                }
                for (row, out) in self.gelu.iter_mut().enumerate() {
                    for (out, &sum) in out.iter_mut().zip(&sums[row * stride..]) {
                        *out = scalar::gelu(sum);
                    }
                }
            },
        );
    }
}

struct Flat<'a> {
    rows: &'a [f32],
    weight: Weight<'a, f32>,
    bias: Option<&'a [f32]>,
    /// rows, depth, columns
    extents: [usize; 3],
}

impl Flat<'_> {
    /// Terms that are summed before they join a longer sum: few enough that they stay near for all rows.
    fn chunk(&self) -> usize {
        const MOST: usize = 256;
        const ELEMENTS: usize = 1 << 17;
        let [rows, depth, _] = self.extents;
        depth.div_ceil(depth.div_ceil(MOST.min(ELEMENTS / rows)))
    }

    /// Computes up to `strip` columns from `first` on.
    fn strip(&self, first: usize, strip: usize, task: &mut Task<'_>) {
        let [rows, depth, columns] = self.extents;
        let (chunk, columns) = (self.chunk(), strip.min(columns - first));
        let stride = columns.next_multiple_of(LANES);
        let mut start = Buffer::<f32>::zeroed(stride);
        if let Some(bias) = self.bias {
            start[..columns].copy_from_slice(&bias[first..][..columns]);
        }
        let mut sums = Buffer::recycled(rows * stride);
        let mut packed = Buffer::<f32>::recycled(chunk * PANEL);
        let (mut starts, mut places) = (vec![0; rows], vec![0; rows]);
        for at in (0..depth).step_by(chunk) {
            let len = chunk.min(depth - at);
            starts.iter_mut().enumerate().for_each(|(row, start)| *start = row * depth + at);
            for column in (0..stride).step_by(PANEL) {
                let (width, used) = (PANEL.min(stride - column), PANEL.min(columns - column));
                let panel = &mut packed[..len * width];
                self.pack([at, first + column], panel, width, used);
                places.iter_mut().enumerate().for_each(|(row, place)| *place = row * stride + column);
                let onto = if at > 0 { Onto::Itself } else { Onto::Row(&start[column..][..width]) };
                let next = if column + PANEL < stride { [at, first + column + PANEL] } else { [at + chunk, first] };
                let rows = Rows { data: self.rows, starts: &starts };
                let to = (&mut sums[..], &places[..]);
                block_gemm::multiply_ahead(rows, panel, width, to, onto, Writes::Near, self.ahead(next, len));
            }
        }
        task.write(&sums, stride);
    }

    /// Packs `used` columns from `first` on, filled up with zeros to `width`.
    fn pack(&self, [at, first]: [usize; 2], panel: &mut [f32], width: usize, used: usize) {
        let [_, depth, columns] = self.extents;
        if used < width {
            panel.chunks_exact_mut(width).for_each(|row| row[used..].fill(0.0));
        }
        match self.weight {
            Weight::Plain(weight) => {
                for (row, packed) in panel.chunks_exact_mut(width).enumerate() {
                    packed[..used].copy_from_slice(&weight[(at + row) * columns + first..][..used]);
                }
            }
            Weight::Transposed(weight) => pack_transposed(&weight[first * depth + at..], depth, panel, width, used),
        }
    }

    /// The weight of the panel that begins at row `at` and column `first`, as long as the one before: what its packing
    /// will read.
    fn ahead(&self, [at, first]: [usize; 2], len: usize) -> Strided<'_> {
        let [_, depth, columns] = self.extents;
        let (data, from, rows, stride, columns) = match self.weight {
            Weight::Plain(weight) => (weight, at * columns + first, len, columns, PANEL),
            Weight::Transposed(weight) => (weight, first * depth + at, PANEL, depth, len),
        };
        let data = if at < depth { data.get(from..).unwrap_or_default() } else { &[] };
        Strided { data: &data[..data.len().min(rows * stride)], stride, columns }
    }
}

/// gradᵀ · input, (out, in), for extents rows, in, out: runs of outputs side by side.
pub(super) fn weight_gradient<T: Float>(grad: &[T], input: &[T], extents: [usize; 3]) -> Buffer<T> {
    let [rows, in_features, out_features] = extents;
    let input = Packed::new(input, rows, in_features);
    let outputs = per_task(out_features, GROUP);
    let mut gradient = Buffer::recycled(out_features * in_features);
    parallel::pieces_mut(&mut gradient, outputs * in_features, |index, gradient| {
        let mut transposed = Buffer::recycled(gradient.len() / in_features * rows);
        pack_transposed(&grad[index * outputs..], out_features, &mut transposed, rows, rows);
        input.rows(&transposed, None, gradient, Writes::of_large::<T>(out_features * in_features), &[]);
    });
    gradient
}
