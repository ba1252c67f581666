//! Loops over strided operands: what broadcasting, reordering and slicing have in common.

use crate::tensor::Shape;
use crate::{Error, Result};

/// One axis of a loop over `N` operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Axis<const N: usize> {
    pub extent: usize,
    /// Elements from one position to the next, operand by operand; 0 where one is stretched.
    pub steps: [usize; N],
}

/// Strides with which `operand` is read as `shape`, to which it broadcasts.
pub(crate) fn broadcast_strides(operand: &Shape, shape: &Shape) -> Vec<usize> {
    let missing = shape.len() - operand.len();
    let strides = operand.strides();
    let stride = |axis: usize| match axis.checked_sub(missing) {
        Some(axis) if operand[axis] != 1 => strides[axis],
        _ => 0,
    };
    (0..shape.len()).map(stride).collect()
}

/// Merges neighbouring axes over which all operands advance evenly, and drops those of extent 1.
pub(crate) fn collapse<const N: usize>(shape: &[usize], strides: [&[usize]; N]) -> Vec<Axis<N>> {
    let mut axes: Vec<Axis<N>> = Vec::new();
    for (axis, &extent) in shape.iter().enumerate() {
        let steps = strides.map(|strides| strides[axis]);
        match axes.last_mut() {
            _ if extent == 1 => {}
            Some(outer) if outer.steps == steps.map(|step| step * extent) => {
                *outer = Axis { extent: outer.extent * extent, steps };
            }
            _ => axes.push(Axis { extent, steps }),
        }
    }
    axes
}

/// As `MOST_AXES` of `kernels/common/strided.cuh`.
pub(crate) const MOST_AXES: usize = 8;

/// A number for each axis, as a kernel's argument.
pub(crate) type Column = [u64; MOST_AXES];

/// Axes as kernels take them: how many, their extents, and each operand's steps.
///
/// # Errors
/// Where there are more than [`MOST_AXES`].
pub(crate) fn columns<const N: usize>(op: &'static str, axes: &[Axis<N>]) -> Result<(u32, Column, [Column; N])> {
    if axes.len() > MOST_AXES {
        let message = format!("{} axes that cannot be merged, a GPU takes {MOST_AXES}: {axes:?}", axes.len());
        return Err(Error::shape(op, message));
    }
    let (mut extents, mut steps) = ([1; MOST_AXES], [[0; MOST_AXES]; N]);
    for (index, axis) in axes.iter().enumerate() {
        extents[index] = axis.extent as u64;
        for (column, &step) in steps.iter_mut().zip(&axis.steps) {
            column[index] = step as u64;
        }
    }
    Ok((axes.len() as u32, extents, steps))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_merge_where_every_operand_advances_evenly() {
        let (shape, row) = (Shape::from([2, 3, 1, 4]), Shape::from([1, 4]));
        let axes = collapse(&shape, [&shape.strides(), &broadcast_strides(&row, &shape)]);
        assert_eq!(axes, [Axis { extent: 6, steps: [4, 0] }, Axis { extent: 4, steps: [1, 1] }]);
        assert_eq!(collapse(&shape, [&shape.strides()]), [Axis { extent: 24, steps: [1] }]);
        assert!(collapse::<1>(&[1, 1], [&[1, 1]]).is_empty());
    }

    #[test]
    fn too_many_axes_are_an_error() {
        let axes = vec![Axis { extent: 2, steps: [0] }; MOST_AXES + 1];
        assert!(columns("permute", &axes).unwrap_err().to_string().contains("9 axes"));
        let (rank, extents, [steps]) = columns("permute", &[Axis { extent: 5, steps: [3] }]).unwrap();
        assert_eq!((rank, extents[0], steps[0]), (1, 5, 3));
    }
}
