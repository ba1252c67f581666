//! Reductions in chunks whose number depends on the shape alone, and whose results are reduced again.

use super::Reduction;
use crate::driver::seam::Address;
use crate::gpu::{FLOATS, Geometry, Gpu, Kernel, Signature};
use crate::{DType, Error, Result, Tensor};

/// output, its dtype, input, outer, count, splits, elements of a chunk, lanes for each, factor
type Rows = Kernel<(Address, u32, Address, u64, u64, u64, u64, u32, f32)>;
/// output, its dtype, input, outer, count, inner, splits, rows of a chunk, factor
type Columns = Kernel<(Address, u32, Address, u64, u64, u64, u64, u64, f32)>;

const SUM_ROWS: Rows = Kernel::new("reduce", "sum_rows", FLOATS);
const MAX_ROWS: Rows = Kernel::new("reduce", "max_rows", FLOATS);
const SUM_COLUMNS: Columns = Kernel::new("reduce", "sum_columns", FLOATS);
const MAX_COLUMNS: Columns = Kernel::new("reduce", "max_columns", FLOATS);
/// output, input, rows, elements of a row
const ARGMAX: Kernel<(Address, Address, u64, u32)> = Kernel::new("reduce", "argmax", FLOATS);

pub(crate) static KERNELS: &[Signature] =
    &[SUM_ROWS.signature(), MAX_ROWS.signature(), SUM_COLUMNS.signature(), MAX_COLUMNS.signature(), ARGMAX.signature()];

const THREADS: usize = 256;

/// `Kind` of the kernel file.
fn kind(dtype: DType) -> u32 {
    match dtype {
        DType::Bf16 => 1,
        DType::F16 => 2,
        _ => 0,
    }
}

/// Into how many chunks `count` is cut, and how long they are: enough for `wanted` chunks in all where `others` are
/// there already, none shorter than `shortest` nor longer than `longest`, and multiples of `step`.
fn cut(count: usize, [others, wanted]: [usize; 2], [shortest, longest]: [usize; 2], step: usize) -> (usize, usize) {
    let splits = wanted.div_ceil(others.max(1)).min(count / shortest).max(count.div_ceil(longest)).max(1);
    let chunk = count.div_ceil(splits).next_multiple_of(step).max(step);
    (count.div_ceil(chunk).max(1), chunk)
}

/// Reduces over `axes`, in ascending order and at least one, to `dtype` of the input. Axes that are neighbours are
/// reduced together; sets of them one after the other, the last first.
pub(super) fn reduce(gpu: &'static Gpu, reduction: Reduction, input: &Tensor, axes: &[usize]) -> Result<Tensor> {
    let mut values = input.detach();
    let mut axes = axes;
    while let Some(&last) = axes.last() {
        let together = (0..axes.len()).rev().take_while(|&at| axes[at] + (axes.len() - 1 - at) == last).count();
        let (rest, set) = axes.split_at(axes.len() - together);
        let (first, shape) = (set[0], values.shape().to_vec());
        let extents = [&shape[..first], &shape[first..=last], &shape[last + 1..]];
        // Between the sets, f32; the factor comes with the last.
        let (reduction, dtype) = match reduction {
            Reduction::Sum(_) if !rest.is_empty() => (Reduction::Sum(1.0), DType::F32),
            Reduction::Max if !rest.is_empty() => (reduction, DType::F32),
            _ => (reduction, input.dtype()),
        };
        let reduced = middle(gpu, reduction, &values, extents.map(|extents| extents.iter().product()), dtype)?;
        values = reduced.reshape([extents[0], extents[2]].concat())?;
        axes = rest;
    }
    Ok(values)
}

/// Reduces (outer, count, inner) over the middle axis to (outer, inner).
fn middle(
    gpu: &'static Gpu,
    reduction: Reduction,
    values: &Tensor,
    [outer, count, inner]: [usize; 3],
    dtype: DType,
) -> Result<Tensor> {
    let (splits, chunk) = if inner == 1 {
        cut(count, [outer, 2048], [2048, 16384], THREADS)
    } else {
        let (columns, rows) = columns_block(inner);
        cut(count, [outer * inner.div_ceil(columns), 1024], [16 * rows, 512 * rows], rows)
    };
    if splits == 1 {
        let output = Tensor::empty_on(gpu, [outer, inner], dtype)?;
        launch(gpu, reduction, values, &output, [outer, count, inner], (splits, chunk))?;
        return Ok(output);
    }
    let partial = Tensor::empty_on(gpu, [outer, splits, inner], DType::F32)?;
    let first = if let Reduction::Sum(_) = reduction { Reduction::Sum(1.0) } else { reduction };
    launch(gpu, first, values, &partial, [outer, count, inner], (splits, chunk))?;
    middle(gpu, reduction, &partial, [outer, splits, inner], dtype)
}

/// Columns and rows that a block of the column kernels takes at a time.
fn columns_block(inner: usize) -> (usize, usize) {
    if inner.is_multiple_of(4) { (32, 32) } else { (32, 8) }
}

fn launch(
    gpu: &'static Gpu,
    reduction: Reduction,
    values: &Tensor,
    output: &Tensor,
    shape: [usize; 3],
    (splits, chunk): (usize, usize),
) -> Result<()> {
    let (rows, columns, factor) = match reduction {
        Reduction::Sum(factor) => (SUM_ROWS, SUM_COLUMNS, factor as f32),
        Reduction::Max => (MAX_ROWS, MAX_COLUMNS, 1.0),
    };
    let instance = values.dtype().name();
    let (output, input, kind) = (output.address()?, values.address()?, kind(output.dtype()));
    let [outer, count, inner] = shape;
    let [o, c, i, s, length] = [outer, count, inner, splits, chunk].map(|number| number as u64);
    if inner == 1 {
        let width = 16 / values.dtype().size();
        let loads = if count.is_multiple_of(width) { count.min(chunk) / width } else { count.min(chunk) };
        let lanes = loads.next_power_of_two().clamp(1, 32);
        let geometry = Geometry::blocks((outer * splits).div_ceil(THREADS / lanes), THREADS as u32);
        rows.launch(gpu, instance, geometry, (output, kind, input, o, c, s, length, lanes as u32, factor))
    } else {
        let blocks = outer * splits * inner.div_ceil(columns_block(inner).0);
        let geometry = Geometry::blocks(blocks, THREADS as u32);
        columns.launch(gpu, instance, geometry, (output, kind, input, o, c, i, s, length, factor))
    }
}

/// Over rows of `count` elements.
pub(super) fn argmax(gpu: &'static Gpu, input: &Tensor, outer: &[usize], count: usize) -> Result<Tensor> {
    let count = u32::try_from(count)
        .map_err(|_| Error::shape("argmax", format!("rows of {count} elements, a GPU takes fewer than 2^32")))?;
    let output = Tensor::empty_on(gpu, outer, DType::I64)?;
    let arguments = (output.address()?, input.address()?, output.elements() as u64, count);
    let geometry = Geometry::blocks(output.elements().div_ceil(THREADS / 32), THREADS as u32);
    ARGMAX.launch(gpu, input.dtype().name(), geometry, arguments)?;
    Ok(output)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_what_is_cut_and_get_fewer() {
        for count in [0, 1, 2047, 4095, 4096, 5000, 16_384, 1_000_003, 50_000_000] {
            for others in [0, 1, 7, 3000] {
                let (splits, chunk) = cut(count, [others, 2048], [2048, 16384], 256);
                assert!(splits * chunk >= count && (splits - 1) * chunk <= count, "{count}: {splits} of {chunk}");
                assert!(splits == 1 || splits * 1024 <= count, "{count}: {splits} chunks");
                assert!(chunk <= 16384, "{count}: chunks of {chunk}");
            }
        }
        assert_eq!(cut(4095, [1, 2048], [2048, 16384], 256).0, 1);
        assert_eq!(cut(16_000, [3000, 2048], [2048, 16384], 256).0, 1);
    }
}
