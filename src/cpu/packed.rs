//! Products with a packed weight, and sums of products over rows: in `f32` by the blocks of [`block_gemm`], in `f64` by the
//! general product. One thread each: convolutions and linear layers share their rows among threads.

use super::Float;
use super::block_gemm::{self, GROUP, LANES, Onto, PANEL, Rows, Strided, Writes};
use super::gemm::{Into, Matrix, Threads, gemm};
use super::parallel;
use crate::tensor::{Buffer, DType};

/// Terms that are summed before they join a longer sum, which keeps errors small.
const DEPTH: usize = 128;
/// The same for [`Packed::rows`], whose short sums are written once.
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

impl<T: Float> Packed<T> {
    /// Packs a row-major weight.
    pub fn new(weight: Buffer<T>, depth: usize, columns: usize) -> Self {
        if !is_f32::<T>() {
            return Packed { data: weight, depth, columns };
        }
        let mut data = Buffer::recycled(depth * columns.next_multiple_of(LANES));
        for (index, panel) in data.chunks_mut(depth * PANEL).enumerate() {
            let first = index * PANEL;
            let (width, used) = (panel_width(columns, first), PANEL.min(columns - first));
            for (row, packed) in panel.chunks_mut(width).enumerate() {
                packed[..used].copy_from_slice(&weight[row * columns + first..][..used]);
                packed[used..].fill(T::ZERO);
            }
        }
        Packed { data, depth, columns }
    }

    /// Packs the transpose of a row-major weight (columns, depth), in parallel.
    pub fn transposed(weight: &[T], depth: usize, columns: usize) -> Self {
        let filled = if is_f32::<T>() { columns.next_multiple_of(LANES) } else { columns };
        let width = if is_f32::<T>() { PANEL } else { columns };
        let mut data = Buffer::recycled(depth * filled);
        parallel::pieces_mut(&mut data, depth * width, |index, panel| {
            let first = index * width;
            let width = panel.len() / depth;
            for column in 0..width {
                let panel = panel[column..].iter_mut().step_by(width);
                match weight.get((first + column) * depth..(first + column + 1) * depth) {
                    Some(weight) => panel.zip(weight).for_each(|(packed, &weight)| *packed = weight),
                    None => panel.for_each(|packed| *packed = T::ZERO),
                }
            }
        });
        Packed { data, depth, columns }
    }

    /// `to = rows · weight + bias` for dense rows of the weight's depth, written as `writes` says where sums are short
    /// enough to be written once.
    pub fn rows(&self, rows: &[T], bias: Option<&[T]>, to: &mut [T], writes: Writes) {
        let count = to.len() / self.columns.max(1);
        let (depth, columns) = (self.depth, self.columns);
        if !is_f32::<T>() || !columns.is_multiple_of(LANES) {
            let into = start(to, bias);
            return self.multiply((rows, depth), (0, depth), count, (to, columns, into));
        }
        let (data, to) = (bytemuck::cast_slice(rows), bytemuck::cast_slice_mut(to));
        let bias: Option<&[f32]> = bias.map(bytemuck::cast_slice);
        let weight: &[f32] = bytemuck::cast_slice(&self.data);
        let chunk = depth.div_ceil(depth.div_ceil(ROW_DEPTH));
        let writes = if chunk < depth && writes == Writes::Streamed { Writes::Fetched } else { writes };
        let (mut starts, mut places) = (vec![0; count], vec![0; count]);
        for column in (0..columns).step_by(PANEL) {
            let width = panel_width(columns, column);
            places.iter_mut().enumerate().for_each(|(row, place)| *place = row * columns + column);
            let panel = &weight[column * depth..][..depth * width];
            for (index, panel) in panel.chunks(chunk * width).enumerate() {
                starts.iter_mut().enumerate().for_each(|(row, start)| *start = row * depth + index * chunk);
                let (onto, writes) = match bias {
                    _ if index > 0 => (Onto::Itself, Writes::Near),
                    Some(bias) => (Onto::Row(&bias[column..][..width]), writes),
                    None => (Onto::Nothing, writes),
                };
                block_gemm::multiply(Rows { data, starts: &starts }, panel, width, (to, &places), onto, writes);
            }
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
        if rows == 0 {
            return;
        }
        let columns = self.columns;
        if !is_f32::<T>() {
            let left = Matrix::strided(data, rows, depth, stride, 1);
            let right = Matrix::row_major(&self.data[first * columns..][..depth * columns], depth, columns);
            return gemm(to, row_stride, left, right, into, Threads::One);
        }
        let (data, to) = (bytemuck::cast_slice(data), bytemuck::cast_slice_mut(to));
        let weight: &[f32] = bytemuck::cast_slice(&self.data);
        // Whole vectors are written: a panel that is not filled goes by way of a buffer.
        let mut scratch = Buffer::<f32>::recycled(if columns.is_multiple_of(LANES) { 0 } else { rows * PANEL });
        let (mut starts, mut places) = (vec![0; rows], vec![0; rows]);
        for column in (0..columns).step_by(PANEL) {
            let (width, used) = (panel_width(columns, column), PANEL.min(columns - column));
            let panel = &weight[column * self.depth + first * width..][..depth * width];
            let direct = used == width;
            for (row, place) in places.iter_mut().enumerate() {
                *place = if direct { row * row_stride + column } else { row * width };
            }
            for (chunk, panel) in panel.chunks(DEPTH * width).enumerate() {
                starts.iter_mut().enumerate().for_each(|(row, start)| *start = row * stride + chunk * DEPTH);
                let add = if direct { into == Into::Add || chunk > 0 } else { chunk > 0 };
                let onto = if add { Onto::Itself } else { Onto::Nothing };
                let to: &mut [f32] = if direct { to } else { &mut scratch };
                block_gemm::multiply(Rows { data, starts: &starts }, panel, width, (to, &places), onto, Writes::Near);
            }
            if !direct {
                for (row, values) in scratch.chunks_exact(width).take(rows).enumerate() {
                    let out = &mut to[row * row_stride + column..][..used];
                    match into {
                        Into::Overwrite => out.copy_from_slice(&values[..used]),
                        Into::Add => out.iter_mut().zip(values).for_each(|(out, value)| *out += value),
                    }
                }
            }
        }
    }
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
pub(crate) fn patch_stride<T: Float>(columns: usize) -> usize {
    if is_f32::<T>() { columns.next_multiple_of(GROUP) } else { columns }
}

/// Length of the sums of [`add_product`].
pub(crate) fn sums_len<T: Float>(columns: usize, features: usize) -> usize {
    patch_stride::<T>(columns) * if is_f32::<T>() { features.next_multiple_of(LANES) } else { features }
}

/// Where the sum of a patch's column and a feature is.
pub(crate) fn sum_place<T: Float>(columns: usize, features: usize, (column, feature): (usize, usize)) -> usize {
    if !is_f32::<T>() {
        return feature * columns + column;
    }
    let first = feature / PANEL * PANEL;
    first * patch_stride::<T>(columns) + column * panel_width(features, first) + feature - first
}

/// `sums += patchesᵀ · grad`: rows of patches are [`patch_stride`] apart, of which those of `f32` are filled up with
/// zeros, rows of the gradient `grad_stride`.
pub(crate) fn add_product<T: Float>(
    (patches, columns): (&[T], usize),
    (grad, grad_stride, features): (&[T], usize, usize),
    rows: usize,
    sums: &mut [T],
) {
    if !is_f32::<T>() {
        let grad = Matrix::strided(grad, rows, features, grad_stride, 1).transposed();
        let patches = Matrix::row_major(&patches[..rows * columns], rows, columns);
        return gemm(sums, columns, grad, patches, Into::Add, Threads::One);
    }
    let stride = patch_stride::<T>(columns);
    let left = Strided { data: bytemuck::cast_slice(patches), stride, columns: stride };
    let (grad, sums): (&[f32], &mut [f32]) = (bytemuck::cast_slice(grad), bytemuck::cast_slice_mut(sums));
    let mut filled = Buffer::<f32>::recycled(if features.is_multiple_of(LANES) { 0 } else { rows * PANEL });
    for (index, sums) in sums.chunks_mut(stride * PANEL).enumerate() {
        let first = index * PANEL;
        let (width, used) = (panel_width(features, first), PANEL.min(features - first));
        let mut right = Strided { data: &grad[first..], stride: grad_stride, columns: width };
        if used < width {
            for (row, filled) in filled.chunks_exact_mut(width).take(rows).enumerate() {
                filled[..used].copy_from_slice(&grad[row * grad_stride + first..][..used]);
                filled[used..].fill(0.0);
            }
            right = Strided { data: &filled, stride: width, columns: width };
        }
        block_gemm::multiply_transposed(left, right, rows, sums);
    }
}
