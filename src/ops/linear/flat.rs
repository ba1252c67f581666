//! Flat products in `f32`: fewer rows than are worth a weight packed beforehand. Their gradients go to the general product,
//! which reads its operands as they lie and is as fast from 128 rows on.
//!
//! A task computes a strip of columns for all rows: over chunks of the depth it packs one panel of its weight after the
//! other and multiplies all rows by it at once, asking for the next panel's weight meanwhile. A chunk of the rows and the
//! strip's sums stay in the second-level cache, the panel in the first; each weight is read once, by the task that packs it.
//! Of few rows the products are dot products with the weight as it lies: packing it would cost as much as they do.

use crate::cpu::block_gemm::{self, LANES, Onto, PANEL, Strided, Writes};
use crate::cpu::packed::pack_transposed;
use crate::cpu::{Float, dots, parallel, simd};
use crate::ops::elementwise::scalar;
use crate::tensor::{Buffer, DType};

/// Whether products of these extents (rows, in, out) are computed here.
pub(super) fn serves<T: Float>([rows, in_features, out_features]: [usize; 3]) -> bool {
    T::DTYPE == DType::F32 && (1..1024).contains(&rows) && in_features.min(out_features) >= 64
}

/// Rows up to which dot products with the weight as it lies are faster than products with packed panels of it.
const FEW: usize = 128;

/// Columns of one task: enough tasks for several threads, each with some use of the rows it reads.
fn strip_width(columns: usize) -> usize {
    const TASKS: usize = 12;
    const MOST: usize = 4 * PANEL;
    columns.div_ceil(TASKS).next_multiple_of(PANEL).min(MOST)
}

/// Where results go, (rows, out) each.
pub(super) struct Results<'a, T> {
    /// The product and the bias.
    pub sums: Option<&'a mut [T]>,
    /// GELU of the sums.
    pub gelu: Option<&'a mut [T]>,
}

/// `input · weightᵀ + bias` into `results`.
pub(super) fn forward<T: Float>(
    input: &[T],
    weight: &[T],
    bias: Option<&[T]>,
    extents: [usize; 3],
    results: Results<'_, T>,
) {
    let width = strip_width(extents[2]);
    let [sums, gelu] = [results.sums, results.gelu].map(|output| split(output, extents[2], width));
    let mut strips: Vec<Strip<'_>> = sums.into_iter().zip(gelu).map(|(sums, gelu)| Strip { sums, gelu }).collect();
    let (input, weight) = (bytemuck::cast_slice(input), bytemuck::cast_slice(weight));
    let product = Product { input, weight, bias: bias.map(bytemuck::cast_slice), extents };
    parallel::pieces_mut(&mut strips, 1, |index, strip| product.strip(index * width, width, &mut strip[0]));
}

/// The pieces of the rows in each strip.
fn split<T: Float>(output: Option<&mut [T]>, columns: usize, width: usize) -> Vec<Vec<&mut [f32]>> {
    let widths: Vec<usize> = (0..columns).step_by(width).map(|first| width.min(columns - first)).collect();
    parallel::columns_mut(bytemuck::cast_slice_mut(output.unwrap_or_default()), &widths)
}

/// A piece of each row of the results that there are.
struct Strip<'a> {
    sums: Vec<&'a mut [f32]>,
    gelu: Vec<&'a mut [f32]>,
}

impl Strip<'_> {
    /// Writes the results of sums whose rows are `stride` apart.
    fn write(&mut self, sums: &[f32], stride: usize) {
        for (out, sums) in self.sums.iter_mut().zip(sums.chunks_exact(stride)) {
            out.copy_from_slice(&sums[..out.len()]);
        }
        simd::dispatch(
            #[inline(always)]
            || {
                for (out, sums) in self.gelu.iter_mut().zip(sums.chunks_exact(stride)) {
                    for (out, &sum) in out.iter_mut().zip(sums) {
                        *out = scalar::gelu(sum);
                    }
                }
            },
        );
    }
}

struct Product<'a> {
    input: &'a [f32],
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
    /// rows, in, out
    extents: [usize; 3],
}

impl Product<'_> {
    /// Terms that are summed before they join a longer sum: so few that they stay near for all rows.
    fn chunk(&self) -> usize {
        const MOST: usize = 256;
        const ELEMENTS: usize = 1 << 17;
        let [rows, depth, _] = self.extents;
        depth.div_ceil(depth.div_ceil(MOST.min(ELEMENTS / rows)))
    }

    /// Computes up to `width` columns from `first` on.
    fn strip(&self, first: usize, width: usize, strip: &mut Strip<'_>) {
        if self.extents[0] <= FEW { self.dots(first, width, strip) } else { self.panels(first, width, strip) }
    }

    /// By dot products: some rows of the weight, of as many elements as the nearest cache holds of them, with all of the input.
    fn dots(&self, first: usize, width: usize, strip: &mut Strip<'_>) {
        const TOGETHER: usize = 8;
        const MOST: usize = 512;
        let [rows, depth, columns] = self.extents;
        let columns = width.min(columns - first);
        let chunk = depth.div_ceil(depth.div_ceil(MOST)).next_multiple_of(LANES);
        let mut sums = Buffer::<f32>::recycled(rows * columns);
        for row in sums.chunks_exact_mut(columns) {
            match self.bias {
                Some(bias) => row.copy_from_slice(&bias[first..][..columns]),
                None => row.fill(0.0),
            }
        }
        for at in (0..depth).step_by(chunk) {
            let len = chunk.min(depth - at);
            let left = Strided { data: &self.input[at..], stride: depth, columns: len };
            for column in (0..columns).step_by(TOGETHER) {
                let used = TOGETHER.min(columns - column);
                let right =
                    Strided { data: &self.weight[(first + column) * depth + at..], stride: depth, columns: len };
                let next = if column + used < columns { [at, first + column + used] } else { [at + chunk, first] };
                let ahead = self.ahead(next, len, TOGETHER);
                dots::add_dots(left, right, [rows, used], &mut sums[column..], columns, ahead);
            }
        }
        strip.write(&sums, columns);
    }

    /// By panels of the weight, which are packed one at a time.
    fn panels(&self, first: usize, width: usize, strip: &mut Strip<'_>) {
        let [rows, depth, columns] = self.extents;
        let (chunk, columns) = (self.chunk(), width.min(columns - first));
        // Columns that fill the last vector are zeros and stay here.
        let stride = columns.next_multiple_of(LANES);
        let mut start = Buffer::<f32>::zeroed(stride);
        if let Some(bias) = self.bias {
            start[..columns].copy_from_slice(&bias[first..][..columns]);
        }
        let mut sums = Buffer::<f32>::recycled(rows * stride);
        let mut packed = Buffer::<f32>::recycled(chunk * PANEL);
        for at in (0..depth).step_by(chunk) {
            let len = chunk.min(depth - at);
            for column in (0..columns).step_by(PANEL) {
                let (width, used) = (PANEL.min(stride - column), PANEL.min(columns - column));
                let panel = &mut packed[..len * width];
                if used < width {
                    panel.chunks_exact_mut(width).for_each(|row| row[used..].fill(0.0));
                }
                pack_transposed(&self.weight[(first + column) * depth + at..], depth, panel, width, used);
                let onto = if at > 0 { Onto::Itself } else { Onto::Row(&start[column..][..width]) };
                let next = if column + PANEL < columns { [at, first + column + PANEL] } else { [at + chunk, first] };
                let product = block_gemm::Product {
                    rows: Strided { data: &self.input[at..], stride: depth, columns: len },
                    runs: [0],
                    count: rows,
                    panel,
                    width,
                    destination: &mut sums[column..],
                    places: stride,
                    onto,
                    writes: Writes::Near,
                    terms: chunk,
                    ahead: self.ahead(next, len, PANEL),
                };
                product.run();
            }
        }
        strip.write(&sums, stride);
    }

    /// The weight of so many columns from depth `at` and column `first` on, where there is one.
    fn ahead(&self, [at, first]: [usize; 2], len: usize, columns: usize) -> Strided<'_> {
        let depth = self.extents[1];
        let data = if at < depth { &self.weight[first * depth + at..] } else { &[] };
        Strided { data: &data[..data.len().min(columns * depth)], stride: depth, columns: len }
    }
}
