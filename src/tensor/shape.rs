//! Shapes of row-major contiguous tensors.

use std::ops::Deref;

use crate::{Error, Result};

/// The extents of a tensor's axes, outermost first. A scalar has none.
///
/// ```
/// use gridgrad::Shape;
/// let shape = Shape::from([2, 3, 4]);
/// assert_eq!((shape.elements(), shape.len(), shape[1]), (24, 3, 3));
/// assert_eq!(shape.strides(), [12, 4, 1]);
/// assert_eq!(shape.to_string(), "(2, 3, 4)");
/// ```
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub struct Shape(Vec<usize>);

impl Shape {
    /// The product of all extents.
    pub fn elements(&self) -> usize {
        self.0.iter().product()
    }

    /// The product of all extents, or an error of `op` where it does not fit in memory's address range.
    pub(crate) fn checked_elements(&self, op: &'static str, element_size: usize) -> Result<usize> {
        let product = self.0.iter().try_fold(1usize, |product, &extent| product.checked_mul(extent));
        product
            .filter(|&n| n.checked_mul(element_size).is_some_and(|bytes| isize::try_from(bytes).is_ok()))
            .ok_or_else(|| Error::shape(op, format!("{self} has too many elements for this machine")))
    }

    /// Row-major strides in elements.
    pub fn strides(&self) -> Vec<usize> {
        let mut strides = vec![1; self.0.len()];
        for axis in (1..self.0.len()).rev() {
            strides[axis - 1] = strides[axis] * self.0[axis];
        }
        strides
    }

    /// Turns an axis counted from the front (0, 1, …) or the back (-1, -2, …) into one from the front.
    pub(crate) fn axis(&self, op: &'static str, axis: isize) -> Result<usize> {
        let rank = self.0.len() as isize;
        let from_front = if axis < 0 { axis + rank } else { axis };
        if (0..rank).contains(&from_front) {
            Ok(from_front as usize)
        } else {
            Err(Error::argument(op, format!("axis {axis} of a tensor of shape {self}")))
        }
    }

    /// The shape that both broadcast to, by NumPy's rule: aligned at the last axis, extent 1 stretches.
    pub(crate) fn broadcast(&self, other: &Shape, op: &'static str) -> Result<Shape> {
        let rank = self.0.len().max(other.0.len());
        let extent = |shape: &Shape, axis: usize| (axis + shape.0.len()).checked_sub(rank).map_or(1, |i| shape.0[i]);
        (0..rank)
            .map(|axis| match (extent(self, axis), extent(other, axis)) {
                (a, b) if a == b || b == 1 => Ok(a),
                (1, b) => Ok(b),
                _ => Err(Error::shape(op, format!("{self} and {other} do not broadcast"))),
            })
            .collect::<Result<Vec<_>>>()
            .map(Shape)
    }
}

impl Deref for Shape {
    type Target = [usize];
    fn deref(&self) -> &[usize] {
        &self.0
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let extents: Vec<String> = self.0.iter().map(usize::to_string).collect();
        write!(f, "({})", extents.join(", "))
    }
}

impl std::fmt::Debug for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

impl From<Vec<usize>> for Shape {
    fn from(extents: Vec<usize>) -> Self {
        Shape(extents)
    }
}

impl From<&[usize]> for Shape {
    fn from(extents: &[usize]) -> Self {
        Shape(extents.to_vec())
    }
}

impl<const N: usize> From<[usize; N]> for Shape {
    fn from(extents: [usize; N]) -> Self {
        Shape(extents.to_vec())
    }
}

impl From<&Shape> for Shape {
    fn from(shape: &Shape) -> Self {
        shape.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broadcasting_follows_numpy() {
        let shape = |extents: &[usize]| Shape::from(extents);
        assert_eq!(shape(&[8, 1, 6]).broadcast(&shape(&[7, 1]), "add").unwrap(), shape(&[8, 7, 6]));
        assert_eq!(shape(&[]).broadcast(&shape(&[3]), "add").unwrap(), shape(&[3]));
        assert_eq!(shape(&[0, 3]).broadcast(&shape(&[1]), "add").unwrap(), shape(&[0, 3]));
        let error = shape(&[2, 3]).broadcast(&shape(&[2]), "add").unwrap_err().to_string();
        assert_eq!(error, "add: (2, 3) and (2) do not broadcast");
    }

    #[test]
    fn axes_count_from_both_ends_and_overflow_is_an_error() {
        let shape = Shape::from([2, 3]);
        assert_eq!(shape.axis("sum", -1).unwrap(), 1);
        assert!(shape.axis("sum", 2).is_err());
        assert!(Shape::from([usize::MAX, 2]).checked_elements("zeros", 1).is_err());
    }
}
