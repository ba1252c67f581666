//! Sums, means, extrema and arg-extrema over axes. Each sum has a fixed order, so results do not depend on threads.

pub(crate) mod cost;
mod cpu;
pub(crate) mod gpu;

use crate::autograd::{Backward, Function, record};
use crate::tensor::{Place, Shape, place};
use crate::{Error, Result, Tensor, dispatch_float};

/// How elements along the reduced axes are combined.
#[derive(Clone, Copy)]
enum Reduction {
    /// Their sum, times a factor.
    Sum(f64),
    Max,
}

impl Tensor {
    /// Sum over `axes`, counted from the front or, if negative, from the back; `keep` leaves them with extent 1.
    ///
    /// # Errors
    /// Where an axis does not exist or comes twice, or the dtype is not floating point.
    pub fn sum(&self, axes: &[isize], keep: bool) -> Result<Tensor> {
        self.scaled_sum(&self.reduced_axes("sum", axes)?, keep, 1.0)
    }

    /// Sum of all elements, as a scalar.
    ///
    /// # Errors
    /// Where the dtype is not floating point.
    pub fn sum_all(&self) -> Result<Tensor> {
        self.sum(&(0..self.rank() as isize).collect::<Vec<_>>(), false)
    }

    /// Mean over `axes`; NaN where there is nothing to average.
    ///
    /// # Errors
    /// As [`Tensor::sum`].
    pub fn mean(&self, axes: &[isize], keep: bool) -> Result<Tensor> {
        let reduced = self.reduced_axes("mean", axes)?;
        let count: usize = reduced.iter().map(|&axis| self.shape()[axis]).product();
        self.scaled_sum(&reduced, keep, 1.0 / count as f64)
    }

    /// Mean of all elements, as a scalar.
    ///
    /// # Errors
    /// Where the dtype is not floating point.
    pub fn mean_all(&self) -> Result<Tensor> {
        self.mean(&(0..self.rank() as isize).collect::<Vec<_>>(), false)
    }

    /// The factor comes before the rounding to a half-precision type, where a long sum may overflow.
    fn scaled_sum(&self, reduced: &[usize], keep: bool, factor: f64) -> Result<Tensor> {
        let output = self.reduce(Reduction::Sum(factor), reduced)?;
        let kept = keep_axes(self.shape(), reduced);
        let output = record(output, &[self], |_| SumRule { shape: self.shape().clone(), kept: kept.clone(), factor });
        if keep { output.reshape(kept) } else { Ok(output) }
    }

    /// Largest value over `axes`, NaN where one of them is; equal largest values share the gradient.
    ///
    /// # Errors
    /// As [`Tensor::sum`], and where there is nothing to choose from.
    pub fn max(&self, axes: &[isize], keep: bool) -> Result<Tensor> {
        let reduced = self.reduced_axes("max", axes)?;
        if reduced.iter().any(|&axis| self.shape()[axis] == 0) {
            return Err(Error::shape("max", format!("an axis of {} is empty", self.shape())));
        }
        let kept = keep_axes(self.shape(), &reduced);
        let output = self.reduce(Reduction::Max, &reduced)?;
        let output = record(output, &[self], |saved| MaxRule { input: self.clone(), saved, kept: kept.clone() });
        if keep { output.reshape(kept) } else { Ok(output) }
    }

    /// Smallest value over `axes`, NaN where one of them is; equal smallest values share the gradient.
    ///
    /// # Errors
    /// As [`Tensor::max`].
    pub fn min(&self, axes: &[isize], keep: bool) -> Result<Tensor> {
        self.neg()?.max(axes, keep)?.neg()
    }

    /// Index of the largest value along the last axis, the first where several are equal, as `i64`; the first NaN where
    /// there is one.
    ///
    /// # Errors
    /// Where there is no last axis or it is empty, or the dtype is not floating point.
    pub fn argmax(&self) -> Result<Tensor> {
        let Some((&last, outer)) = self.shape().split_last().filter(|&(&last, _)| last > 0) else {
            return Err(Error::shape("argmax", format!("shape {} has no values on its last axis", self.shape())));
        };
        self.expect_float("argmax")?;
        if let Place::Gpu(gpu) = place("argmax", &[self])? {
            return gpu::argmax(gpu, self, outer, last);
        }
        dispatch_float!("argmax", self.dtype(), T => {
            Tensor::from_buffer(cpu::argmax(&self.floats::<T>("argmax")?, last), outer)
        })
    }

    /// Sums over the axes that broadcasting `shape` to this tensor's shape stretched.
    ///
    /// # Errors
    /// Where `shape` does not broadcast to this shape.
    pub fn sum_to(&self, shape: &Shape) -> Result<Tensor> {
        if self.shape() == shape {
            return Ok(self.clone());
        }
        if shape.broadcast(self.shape(), "sum_to")? != *self.shape() {
            return Err(Error::shape("sum_to", format!("{shape} does not broadcast to {}", self.shape())));
        }
        let missing = self.rank() - shape.len();
        let stretched = |&axis: &usize| axis < missing || (shape[axis - missing] == 1 && self.shape()[axis] != 1);
        let axes: Vec<isize> = (0..self.rank()).filter(stretched).map(|axis| axis as isize).collect();
        self.sum(&axes, false)?.reshape(shape)
    }

    fn reduced_axes(&self, op: &'static str, axes: &[isize]) -> Result<Vec<usize>> {
        self.expect_float(op)?;
        let mut reduced = axes.iter().map(|&axis| self.shape().axis(op, axis)).collect::<Result<Vec<_>>>()?;
        reduced.sort_unstable();
        if reduced.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(Error::argument(op, format!("axes {axes:?} name one twice")));
        }
        Ok(reduced)
    }

    /// Reduces off the tape. Axes that are neighbours are one loop; others are brought together first.
    fn reduce(&self, reduction: Reduction, axes: &[usize]) -> Result<Tensor> {
        if axes.is_empty() {
            return Ok(self.share(self.shape().clone()));
        }
        if let Place::Gpu(gpu) = place("reduce", &[self])? {
            return gpu::reduce(gpu, reduction, self, axes);
        }
        let kept: Vec<usize> = (0..self.rank()).filter(|axis| !axes.contains(axis)).collect();
        let shape: Vec<usize> = kept.iter().map(|&axis| self.shape()[axis]).collect();
        let dtype = self.dtype();
        let neighbours = axes.windows(2).all(|pair| pair[1] == pair[0] + 1);
        let (source, first) = match (neighbours, axes.first()) {
            (true, Some(&first)) => (self.detach(), first),
            _ => (self.detach().permute(&[&kept[..], axes].concat())?, kept.len()),
        };
        let outer: usize = source.shape()[..first].iter().product();
        let count: usize = source.shape()[first..first + axes.len()].iter().product();
        let inner: usize = source.shape()[first + axes.len()..].iter().product();
        dispatch_float!("reduce", dtype, T => {
            let values = source.floats::<T>("reduce")?;
            let output = match reduction {
                Reduction::Sum(factor) => cpu::sum(&values, [outer, count, inner], factor),
                Reduction::Max => cpu::max(&values, [outer, count, inner]),
            };
            Tensor::from_floats(output, shape, dtype)
        })
    }
}

fn keep_axes(shape: &Shape, reduced: &[usize]) -> Shape {
    let extent = |(axis, &extent): (usize, &usize)| if reduced.contains(&axis) { 1 } else { extent };
    shape.iter().enumerate().map(extent).collect::<Vec<_>>().into()
}

struct SumRule {
    shape: Shape,
    kept: Shape,
    factor: f64,
}

impl Function for SumRule {
    fn name(&self) -> &'static str {
        "sum"
    }

    fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let grad = backward.grad().reshape(&self.kept)?;
        let grad = if self.factor == 1.0 { grad } else { grad.scale(self.factor)? };
        Ok(vec![Some(grad.broadcast_to(&self.shape)?)])
    }
}

struct MaxRule {
    input: Tensor,
    saved: crate::autograd::SavedOutput,
    kept: Shape,
}

impl Function for MaxRule {
    fn name(&self) -> &'static str {
        "max"
    }

    fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let largest = backward.output(&self.saved).reshape(&self.kept)?;
        let chosen = self.input.equal(&largest)?;
        let reduced = (0..self.kept.len()).filter(|&axis| self.kept[axis] != self.input.shape()[axis]);
        let share = chosen.div(&chosen.sum(&reduced.map(|axis| axis as isize).collect::<Vec<_>>(), true)?)?;
        Ok(vec![Some(backward.grad().reshape(&self.kept)?.mul(&share)?)])
    }
}
