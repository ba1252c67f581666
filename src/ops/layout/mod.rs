//! Changes of shape, order and type: reshape, permute, narrow, pad, concat, broadcast and cast.

pub(crate) mod cost;
mod cpu;
pub(crate) mod gpu;

use crate::autograd::{Backward, Function, record};
use crate::ops::strided::broadcast_strides;
use crate::tensor::{Buffer, Place, Shape, place};
use crate::{DType, Error, Result, Tensor, dispatch_dtype};

impl Tensor {
    /// The same elements in row-major order under another shape, sharing memory.
    ///
    /// # Errors
    /// Where the number of elements differs.
    pub fn reshape(&self, shape: impl Into<Shape>) -> Result<Tensor> {
        let shape = shape.into();
        if shape.checked_elements("reshape", 1)? != self.elements() {
            return Err(Error::shape("reshape", format!("{} does not reshape to {shape}", self.shape())));
        }
        Ok(record(self.share(shape), &[self], |_| ReshapeRule { shape: self.shape().clone() }))
    }

    /// Reorders axes: axis i of the result is axis `order[i]` of this tensor.
    ///
    /// # Errors
    /// Where `order` does not name every axis once.
    pub fn permute(&self, order: &[usize]) -> Result<Tensor> {
        let mut sorted = order.to_vec();
        sorted.sort_unstable();
        if !sorted.iter().copied().eq(0..self.rank()) {
            return Err(Error::argument("permute", format!("{order:?} does not order the axes of {}", self.shape())));
        }
        let shape: Vec<usize> = order.iter().map(|&axis| self.shape()[axis]).collect();
        let strides = self.shape().strides();
        let strides: Vec<usize> = order.iter().map(|&axis| strides[axis]).collect();
        let output = match place("permute", &[self])? {
            Place::Gpu(gpu) => gpu::permute(gpu, self, shape.into(), &strides)?,
            Place::Host => dispatch_dtype!(self.dtype(), T => {
                Tensor::from_buffer(cpu::gather_strided(self.data::<T>()?, &shape, &strides), shape)?
            }),
        };
        Ok(record(output, &[self], |_| PermuteRule { order: order.to_vec() }))
    }

    /// Swaps two axes, counted from the front or, if negative, from the back.
    ///
    /// # Errors
    /// Where an axis does not exist.
    pub fn transpose(&self, first: isize, second: isize) -> Result<Tensor> {
        let (first, second) = (self.shape().axis("transpose", first)?, self.shape().axis("transpose", second)?);
        let mut order: Vec<usize> = (0..self.rank()).collect();
        order.swap(first, second);
        self.permute(&order)
    }

    /// The part of `axis` from `start`, `len` long.
    ///
    /// # Errors
    /// Where the part lies outside the axis.
    pub fn narrow(&self, axis: isize, start: usize, len: usize) -> Result<Tensor> {
        let axis = self.shape().axis("narrow", axis)?;
        let extent = self.shape()[axis];
        if start.checked_add(len).is_none_or(|end| end > extent) {
            let message = format!("{len} from {start} on axis {axis} of shape {}", self.shape());
            return Err(Error::argument("narrow", message));
        }
        let mut shape = self.shape().to_vec();
        shape[axis] = len;
        let inner: usize = shape[axis + 1..].iter().product();
        let output = match place("narrow", &[self])? {
            Place::Gpu(gpu) => gpu::narrow(gpu, self, shape.into(), axis, start)?,
            Place::Host => dispatch_dtype!(self.dtype(), T => {
                let (mut output, row) = (Buffer::<T>::recycled(shape.iter().product()), len * inner);
                cpu::copy_rows(self.data::<T>()?, extent * inner, start * inner, &mut output, row, 0, row);
                Tensor::from_buffer(output, shape)?
            }),
        };
        Ok(record(output, &[self], |_| NarrowRule { axis, before: start, after: extent - start - len }))
    }

    /// Extends `axis` with zeros, `before` and `after` its content.
    ///
    /// # Errors
    /// Where the axis does not exist or the result is too large.
    pub fn pad(&self, axis: isize, before: usize, after: usize) -> Result<Tensor> {
        let axis = self.shape().axis("pad", axis)?;
        let extent = self.shape()[axis];
        let mut shape = self.shape().clone();
        let padded = extent.checked_add(before).and_then(|n| n.checked_add(after));
        let padded = padded.ok_or_else(|| Error::argument("pad", format!("{before} and {after} overflow")))?;
        shape = Shape::from([&shape[..axis], &[padded], &shape[axis + 1..]].concat());
        let elements = shape.checked_elements("pad", self.dtype().size())?;
        let inner: usize = shape[axis + 1..].iter().product();
        let output = match place("pad", &[self])? {
            Place::Gpu(gpu) => gpu::pad(gpu, self, shape, axis, before)?,
            Place::Host => dispatch_dtype!(self.dtype(), T => {
                let (mut output, row) = (Buffer::<T>::zeroed(elements), extent * inner);
                cpu::copy_rows(self.data::<T>()?, row, 0, &mut output, padded * inner, before * inner, row);
                Tensor::from_buffer(output, shape)?
            }),
        };
        Ok(record(output, &[self], |_| PadRule { axis, before, extent }))
    }

    /// Stretches axes of extent 1, and adds axes in front, to reach `shape`.
    ///
    /// # Errors
    /// Where this shape does not broadcast to `shape`.
    pub fn broadcast_to(&self, shape: impl Into<Shape>) -> Result<Tensor> {
        let shape = shape.into();
        if *self.shape() == shape {
            return Ok(self.clone());
        }
        if self.shape().broadcast(&shape, "broadcast_to")? != shape {
            return Err(Error::shape("broadcast_to", format!("{} does not broadcast to {shape}", self.shape())));
        }
        shape.checked_elements("broadcast_to", self.dtype().size())?;
        let output = match place("broadcast_to", &[self])? {
            Place::Gpu(gpu) => gpu::broadcast(gpu, self, shape)?,
            Place::Host => dispatch_dtype!(self.dtype(), T => {
                let strides = broadcast_strides(self.shape(), &shape);
                Tensor::from_buffer(cpu::gather_strided(self.data::<T>()?, &shape, &strides), shape)?
            }),
        };
        Ok(record(output, &[self], |_| BroadcastRule { shape: self.shape().clone() }))
    }

    /// The values as `dtype`; gradients come back in this tensor's dtype.
    ///
    /// # Errors
    /// Never for the present dtypes.
    pub fn cast(&self, dtype: DType) -> Result<Tensor> {
        if dtype == self.dtype() {
            return Ok(self.clone());
        }
        let output = self.detach().cast_values(dtype)?;
        if !dtype.is_float() {
            return Ok(output);
        }
        Ok(record(output, &[self], |_| CastRule { dtype: self.dtype() }))
    }
}

/// Joins tensors along `axis`; all other extents and the dtypes agree.
///
/// # Errors
/// Where there is no tensor, or extents or dtypes differ.
pub fn concat(tensors: &[&Tensor], axis: isize) -> Result<Tensor> {
    let Some(&first) = tensors.first() else {
        return Err(Error::argument("concat", "no tensors to join"));
    };
    let axis = first.shape().axis("concat", axis)?;
    let others = |shape: &Shape| [&shape[..axis], &shape[axis + 1..]].concat();
    for tensor in tensors {
        tensor.expect_dtype("concat", first.dtype())?;
        if tensor.rank() != first.rank() || others(tensor.shape()) != others(first.shape()) {
            let message = format!("{} and {} do not join on axis {axis}", first.shape(), tensor.shape());
            return Err(Error::shape("concat", message));
        }
    }
    let extents: Vec<usize> = tensors.iter().map(|tensor| tensor.shape()[axis]).collect();
    let mut shape = first.shape().to_vec();
    shape[axis] = extents.iter().sum();
    let output = match place("concat", tensors)? {
        Place::Gpu(gpu) => gpu::concat(gpu, tensors, shape.into(), axis)?,
        Place::Host => dispatch_dtype!(first.dtype(), T => {
            let inner: usize = shape[axis + 1..].iter().product();
            let mut output = Buffer::<T>::recycled(shape.iter().product());
            let mut at = 0;
            for (tensor, extent) in tensors.iter().zip(&extents) {
                let row = extent * inner;
                cpu::copy_rows(tensor.data::<T>()?, row, 0, &mut output, shape[axis] * inner, at, row);
                at += row;
            }
            Tensor::from_buffer(output, shape)?
        }),
    };
    Ok(record(output, tensors, |_| ConcatRule { axis, extents }))
}

/// Declares a rule whose gradient of its one input is a single expression.
macro_rules! linear_rule {
    ($rule:ident { $($field:ident: $type:ty),* }, $name:literal, ($self:ident, $grad:ident) => $gradient:expr) => {
        struct $rule {
            $($field: $type,)*
        }

        impl Function for $rule {
            fn name(&self) -> &'static str {
                $name
            }

            fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
                let ($self, $grad) = (self, backward.grad());
                Ok(vec![Some($gradient?)])
            }
        }
    };
}

linear_rule!(ReshapeRule { shape: Shape }, "reshape", (rule, grad) => grad.reshape(&rule.shape));
linear_rule!(PermuteRule { order: Vec<usize> }, "permute", (rule, grad) => {
    let mut inverse = vec![0; rule.order.len()];
    rule.order.iter().enumerate().for_each(|(to, &from)| inverse[from] = to);
    grad.permute(&inverse)
});
linear_rule!(NarrowRule { axis: usize, before: usize, after: usize }, "narrow", (rule, grad) => {
    grad.pad(rule.axis as isize, rule.before, rule.after)
});
linear_rule!(PadRule { axis: usize, before: usize, extent: usize }, "pad", (rule, grad) => {
    grad.narrow(rule.axis as isize, rule.before, rule.extent)
});
linear_rule!(BroadcastRule { shape: Shape }, "broadcast_to", (rule, grad) => grad.sum_to(&rule.shape));
linear_rule!(CastRule { dtype: DType }, "cast", (rule, grad) => grad.cast(rule.dtype));

struct ConcatRule {
    axis: usize,
    extents: Vec<usize>,
}

impl Function for ConcatRule {
    fn name(&self) -> &'static str {
        "concat"
    }

    fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let mut start = 0;
        let mut part = |(index, &extent): (usize, &usize)| {
            let gradient = if backward.needs(index) {
                Some(backward.grad().narrow(self.axis as isize, start, extent)?)
            } else {
                None
            };
            start += extent;
            Ok(gradient)
        };
        self.extents.iter().enumerate().map(&mut part).collect()
    }
}
