//! Copies in units as large as the strides allow, by tiles where rows become columns.

use crate::driver::seam::Address;
use crate::gpu::{Geometry, Gpu, Kernel, Signature};
use crate::ops::strided::{Axis, Column, broadcast_strides, collapse, columns};
use crate::tensor::Shape;
use crate::{Result, Tensor};

/// The suffixes of kernels that move units of 1 to 16 bytes.
const UNITS: &[&str] = &["b1", "b2", "b4", "b8", "b16"];

/// output, input, units, number of axes, extents, output steps, input steps
const COPY: Kernel<(Address, Address, u64, u32, Column, Column, Column)> = Kernel::new("layout", "copy", UNITS);
/// output, input, rows, columns, row stride in the output, column stride in the input, tiles, then the axes around the
/// matrices as above
const TRANSPOSE: Kernel<(Address, Address, u64, u64, u64, u64, u64, u32, Column, Column, Column)> =
    Kernel::new("layout", "transpose", UNITS);
/// output, input, units of the output, of its rows, before the content, of the content's rows
const PAD: Kernel<(Address, Address, u64, u64, u64, u64)> = Kernel::new("layout", "pad", UNITS);

pub(crate) static KERNELS: &[Signature] = &[COPY.signature(), TRANSPOSE.signature(), PAD.signature()];

const THREADS: u32 = 256;
/// Units along each side of a tile.
const TILE: usize = 32;
/// Shorter rows or columns would leave most of a tile empty.
const LEAST_SIDE: usize = 16;

/// Which operand a step belongs to.
const OUTPUT: usize = 0;
const INPUT: usize = 1;

/// The largest power of two that divides all of `lengths` and makes units of at most 16 bytes.
fn elements_per_unit(element_size: usize, lengths: impl IntoIterator<Item = usize>) -> usize {
    let bits = lengths.into_iter().fold(16 / element_size, |bits, length| bits | length);
    1 << bits.trailing_zeros()
}

fn instance(unit: usize) -> &'static str {
    UNITS[unit.trailing_zeros() as usize]
}

/// Where a copy reads and writes: positions of `shape`, with the strides and the first element of both sides.
struct Copy<'a> {
    shape: &'a [usize],
    to: (&'a [usize], usize),
    from: (&'a [usize], usize),
}

impl Copy<'_> {
    fn launch(&self, op: &'static str, gpu: &'static Gpu, output: &Tensor, input: &Tensor) -> Result<()> {
        let size = input.dtype().size();
        let mut axes = collapse(self.shape, [self.to.0, self.from.0]);
        let unit = size * widen(&mut axes, size, [self.to.1, self.from.1]);
        let output = output.address()?.offset(self.to.1 * size);
        let input = input.address()?.offset(self.from.1 * size);
        if let Some(matrix) = take_matrix(&mut axes) {
            return matrix.launch(op, gpu, instance(unit), (output, input), &axes);
        }
        let units: usize = axes.iter().map(|axis| axis.extent).product();
        let (rank, extents, [to, from]) = columns(op, &axes)?;
        let arguments = (output, input, units as u64, rank, extents, to, from);
        COPY.launch(gpu, instance(unit), Geometry::for_items(units, THREADS), arguments)
    }
}

/// Joins neighbouring elements into units where both sides keep them together: how many make one.
fn widen(axes: &mut Vec<Axis<2>>, size: usize, offsets: [usize; 2]) -> usize {
    let Some((last, outer)) = axes.split_last_mut().filter(|(last, _)| last.steps == [1, 1]) else { return 1 };
    let steps = outer.iter().flat_map(|axis| axis.steps);
    let count = elements_per_unit(size, steps.chain([last.extent]).chain(offsets));
    last.extent /= count;
    outer.iter_mut().for_each(|axis| axis.steps = axis.steps.map(|step| step / count));
    if last.extent == 1 {
        axes.pop();
    }
    count
}

/// Two axes of a copy: the input's innermost one, and the output's.
struct Matrix {
    rows: Axis<2>,
    columns: Axis<2>,
}

/// Takes the two axes out, if they are different and long.
fn take_matrix(axes: &mut Vec<Axis<2>>) -> Option<Matrix> {
    let long = |axis: &Axis<2>, side: usize| axis.steps[side] == 1 && axis.extent >= LEAST_SIDE;
    let row = axes.iter().position(|axis| long(axis, INPUT))?;
    let column = axes.iter().position(|axis| long(axis, OUTPUT)).filter(|&column| column > row)?;
    let (columns, rows) = (axes.remove(column), axes.remove(row));
    Some(Matrix { rows, columns })
}

impl Matrix {
    fn launch(
        &self,
        op: &'static str,
        gpu: &'static Gpu,
        instance: &str,
        (output, input): (Address, Address),
        around: &[Axis<2>],
    ) -> Result<()> {
        let (rank, extents, [to, from]) = columns(op, around)?;
        let matrices: usize = around.iter().map(|axis| axis.extent).product();
        let tiles = matrices * self.rows.extent.div_ceil(TILE) * self.columns.extent.div_ceil(TILE);
        let arguments = (
            output,
            input,
            self.rows.extent as u64,
            self.columns.extent as u64,
            self.rows.steps[OUTPUT] as u64,
            self.columns.steps[INPUT] as u64,
            tiles as u64,
            rank,
            extents,
            to,
            from,
        );
        TRANSPOSE.launch(gpu, instance, Geometry::blocks(tiles, THREADS), arguments)
    }
}

/// `input` read as `shape` with `strides`.
fn gather(op: &'static str, gpu: &'static Gpu, input: &Tensor, shape: Shape, strides: &[usize]) -> Result<Tensor> {
    let output = Tensor::empty_on(gpu, shape, input.dtype())?;
    let to = output.shape().strides();
    Copy { shape: output.shape(), to: (&to, 0), from: (strides, 0) }.launch(op, gpu, &output, input)?;
    Ok(output)
}

pub(super) fn permute(gpu: &'static Gpu, input: &Tensor, shape: Shape, strides: &[usize]) -> Result<Tensor> {
    gather("permute", gpu, input, shape, strides)
}

pub(super) fn broadcast(gpu: &'static Gpu, input: &Tensor, shape: Shape) -> Result<Tensor> {
    let strides = broadcast_strides(input.shape(), &shape);
    gather("broadcast_to", gpu, input, shape, &strides)
}

pub(super) fn narrow(gpu: &'static Gpu, input: &Tensor, shape: Shape, axis: usize, start: usize) -> Result<Tensor> {
    let output = Tensor::empty_on(gpu, shape, input.dtype())?;
    let (to, from) = (output.shape().strides(), input.shape().strides());
    let copy = Copy { shape: output.shape(), to: (&to, 0), from: (&from, start * from[axis]) };
    copy.launch("narrow", gpu, &output, input)?;
    Ok(output)
}

pub(super) fn pad(gpu: &'static Gpu, input: &Tensor, shape: Shape, axis: usize, before: usize) -> Result<Tensor> {
    let output = Tensor::empty_on(gpu, shape, input.dtype())?;
    let inner: usize = input.shape()[axis + 1..].iter().product();
    let row = [output.shape()[axis], before, input.shape()[axis]].map(|extent| extent * inner);
    let size = input.dtype().size();
    let count = elements_per_unit(size, row);
    let [padded, before, width] = row.map(|elements| (elements / count) as u64);
    let units = output.elements() / count;
    let arguments = (output.address()?, input.address()?, units as u64, padded, before, width);
    PAD.launch(gpu, instance(size * count), Geometry::for_items(units, THREADS), arguments)?;
    Ok(output)
}

pub(super) fn concat(gpu: &'static Gpu, tensors: &[&Tensor], shape: Shape, axis: usize) -> Result<Tensor> {
    let output = Tensor::empty_on(gpu, shape, tensors[0].dtype())?;
    let to = output.shape().strides();
    let mut start = 0;
    for tensor in tensors {
        let from = tensor.shape().strides();
        let copy = Copy { shape: tensor.shape(), to: (&to, start * to[axis]), from: (&from, 0) };
        copy.launch("concat", gpu, &output, tensor)?;
        start += tensor.shape()[axis];
    }
    Ok(output)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_as_large_as_all_lengths_allow() {
        assert_eq!(elements_per_unit(4, [12, 8]), 4);
        assert_eq!(elements_per_unit(2, [12, 8]), 4);
        assert_eq!(elements_per_unit(1, [7, 8]), 1);
        assert_eq!(elements_per_unit(8, [0, 0]), 2);
    }

    #[test]
    fn whole_units_of_an_inner_axis_take_the_axis_along() {
        // (tokens, heads, 8) read as (heads, tokens, 8), in bf16: 8 elements are one unit.
        let mut axes = collapse(&[4, 49, 8], [&[392, 8, 1], &[8, 32, 1]]);
        assert_eq!(widen(&mut axes, 2, [0, 0]), 8);
        assert_eq!(axes, [Axis { extent: 4, steps: [49, 1] }, Axis { extent: 49, steps: [1, 4] }]);
        assert!(take_matrix(&mut axes).is_none());
    }
}
