//! Reading by index, and its transpose: adding by index.
//!
//! On the processor an index outside of its axis is an error. A GPU's indices are read by its kernels alone, since to
//! look at them the host would have to wait: there, what such an index reads is NaN, and so is every sum of a scatter
//! with such an index.

pub(crate) mod cost;
mod cpu;
pub(crate) mod gpu;

use crate::autograd::{Backward, Function, record};
use crate::tensor::{Buffer, Place, Shape, place};
use crate::{DType, Error, Result, Tensor, dispatch_float};

/// Rows of `weight` (entries, features) at `indices`, `i64` of any shape: the result has the indices' shape and the
/// features last. Derivatives of every order. On a GPU an index outside of the entries is no error: its row is NaN, and
/// so is the whole gradient of `weight`.
///
/// # Errors
/// Where `weight` has other axes, an index on the processor is outside of the entries, or a dtype does not fit.
pub fn embedding(weight: &Tensor, indices: &Tensor) -> Result<Tensor> {
    let [_, features] = weight.dims("embedding", "weight (entries, features)")?;
    let rows = weight.select_rows("embedding", 0, &indices.reshape([indices.elements()])?)?;
    rows.reshape([&indices.shape()[..], &[features]].concat())
}

impl Tensor {
    /// The parts of `axis` at `indices`, `i64` with one axis, in their order. Derivatives of every order. On a GPU an
    /// index outside of the axis is no error: its part is NaN, and so is the whole gradient.
    ///
    /// # Errors
    /// Where the axis does not exist, an index on the processor is outside of it, `indices` has not exactly one axis,
    /// or a dtype does not fit.
    pub fn index_select(&self, axis: isize, indices: &Tensor) -> Result<Tensor> {
        self.select_rows("index_select", self.shape().axis("index_select", axis)?, indices)
    }

    /// This tensor, with part i of `source` added to part `indices[i]` of `axis`; parts that meet are added in order.
    /// Derivatives of every order. On a GPU an index outside of the axis is no error, but makes all of the result NaN.
    ///
    /// # Errors
    /// As [`Tensor::index_select`], and where `source` is not what that would give for this shape.
    pub fn index_add(&self, axis: isize, indices: &Tensor, source: &Tensor) -> Result<Tensor> {
        const OP: &str = "index_add";
        let axis = self.shape().axis(OP, axis)?;
        let [count] = indices.dims(OP, "indices (count)")?;
        self.expect_source(source, with_extent(self.shape(), axis, count), OP)?;
        Layout::new(OP, self.shape(), axis, indices, Reads::Rows)?.scatter(source, Some(self))
    }

    /// For each element of `indices`, `i64`, the element of this tensor with that position on `axis` and the same
    /// position on the other axes, whose extents agree. Derivatives of every order. On a GPU an index outside of the
    /// axis is no error: what it reads is NaN, and so is the whole gradient.
    ///
    /// # Errors
    /// Where the axis does not exist, an index on the processor is outside of it, other extents differ, or a dtype does
    /// not fit.
    pub fn gather(&self, axis: isize, indices: &Tensor) -> Result<Tensor> {
        self.element_layout("gather", axis, indices)?.gather(self)
    }

    /// This tensor, with each element of `source` added at its index on `axis` and its own position on the other axes;
    /// elements that meet are added in order. `indices`, `i64`, has the shape of `source`. Derivatives of every order.
    /// On a GPU an index outside of the axis is no error, but makes all of the result NaN.
    ///
    /// # Errors
    /// As [`Tensor::gather`], and where `source` and `indices` differ in shape.
    pub fn scatter_add(&self, axis: isize, indices: &Tensor, source: &Tensor) -> Result<Tensor> {
        self.expect_source(source, indices.shape().clone(), "scatter_add")?;
        self.element_layout("scatter_add", axis, indices)?.scatter(source, Some(self))
    }

    fn select_rows(&self, op: &'static str, axis: usize, indices: &Tensor) -> Result<Tensor> {
        indices.dims::<1>(op, "indices (count)")?;
        Layout::new(op, self.shape(), axis, indices, Reads::Rows)?.gather(self)
    }

    fn element_layout(&self, op: &'static str, axis: isize, indices: &Tensor) -> Result<Layout> {
        let axis = self.shape().axis(op, axis)?;
        let extent = indices.shape().get(axis).copied().unwrap_or_default();
        if *indices.shape() != with_extent(self.shape(), axis, extent) {
            let message = format!("indices {} on axis {axis} of {}", indices.shape(), self.shape());
            return Err(Error::shape(op, message));
        }
        Layout::new(op, self.shape(), axis, indices, Reads::Elements)
    }

    fn expect_source(&self, source: &Tensor, shape: Shape, op: &'static str) -> Result<()> {
        source.expect_dtype(op, self.dtype())?;
        if *source.shape() != shape {
            return Err(Error::shape(op, format!("source {}, expected {shape}", source.shape())));
        }
        Ok(())
    }
}

fn with_extent(shape: &Shape, axis: usize, extent: usize) -> Shape {
    [&shape[..axis], &[extent], &shape[axis + 1..]].concat().into()
}

/// What one index stands for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reads {
    /// A whole part of the axis.
    Rows,
    /// An element.
    Elements,
}

/// The source is (outer, source, inner), the result of the gather (outer, result, inner).
#[derive(Clone, Copy)]
struct Extents {
    outer: usize,
    source: usize,
    result: usize,
    inner: usize,
}

/// Where a gather reads and its transpose adds: tensors are (outer, axis, inner).
#[derive(Clone)]
struct Layout {
    op: &'static str,
    /// Of the tensor that is read.
    source: Shape,
    /// Of what is read.
    result: Shape,
    axis: usize,
    reads: Reads,
    /// `i64`; on the processor, all inside of the axis.
    indices: Tensor,
}

impl Layout {
    fn new(op: &'static str, source: &Shape, axis: usize, indices: &Tensor, reads: Reads) -> Result<Self> {
        indices.expect_dtype(op, DType::I64)?;
        let extent = source[axis];
        if let Place::Host = place(op, &[indices])? {
            let values = indices.data::<i64>()?;
            let outside = |&index: &i64| usize::try_from(index).map_or(true, |index| index >= extent);
            if let Some(at) = values.iter().position(outside) {
                let message = format!("index {} (number {at}) on axis {axis} of extent {extent}", values[at]);
                return Err(Error::argument(op, message));
            }
        }
        let result = match reads {
            Reads::Rows => with_extent(source, axis, indices.elements()),
            Reads::Elements => indices.shape().clone(),
        };
        result.checked_elements(op, size_of::<f64>())?;
        Ok(Layout { op, source: source.clone(), result, axis, reads, indices: indices.clone() })
    }

    fn extents(&self) -> Extents {
        Extents {
            outer: self.source[..self.axis].iter().product(),
            source: self.source[self.axis],
            result: self.result[self.axis],
            inner: self.source[self.axis + 1..].iter().product(),
        }
    }

    fn gather(&self, source: &Tensor) -> Result<Tensor> {
        let (op, dtype) = (self.op, source.dtype());
        source.expect_float(op)?;
        let output = match place(op, &[source, &self.indices])? {
            Place::Gpu(gpu) => gpu::gather(gpu, self, source)?,
            Place::Host => dispatch_float!(op, dtype, T => {
                let (values, indices) = (source.floats::<T>(op)?, self.indices.data()?);
                let gathered = match self.reads {
                    Reads::Rows => cpu::gather_rows(&values, indices, self.extents()),
                    Reads::Elements => cpu::gather_elements(&values, indices, self.extents()),
                };
                Tensor::from_floats(gathered, &self.result, dtype)
            })?,
        };
        Ok(record(output, &[source], |_| GatherRule(self.clone())))
    }

    /// The transpose of `gather`, added to `base`, or to zeros.
    fn scatter(&self, values: &Tensor, base: Option<&Tensor>) -> Result<Tensor> {
        let (op, dtype) = (self.op, values.dtype());
        values.expect_float(op)?;
        let output = match place(op, &[values, &self.indices, base.unwrap_or(values)])? {
            Place::Gpu(gpu) => gpu::scatter(gpu, self, values, base)?,
            Place::Host => dispatch_float!(op, dtype, T => {
                let (values, indices) = (values.floats::<T>(op)?, self.indices.data()?);
                let mut sums = match base {
                    Some(base) => Buffer::copy_of(&base.floats::<T>(op)?),
                    None => Buffer::zeroed(self.source.elements()),
                };
                match self.reads {
                    Reads::Rows => cpu::scatter_rows(&values, indices, self.extents(), &mut sums),
                    Reads::Elements => cpu::scatter_elements(&values, indices, self.extents(), &mut sums),
                }
                Tensor::from_floats(sums, &self.source, dtype)
            })?,
        };
        let inputs: Vec<&Tensor> = [Some(values), base].into_iter().flatten().collect();
        Ok(record(output, &inputs, |_| ScatterRule(self.clone())))
    }
}

struct GatherRule(Layout);

impl Function for GatherRule {
    fn name(&self) -> &'static str {
        self.0.op
    }

    fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(self.0.scatter(backward.grad(), None)?)])
    }
}

struct ScatterRule(Layout);

impl Function for ScatterRule {
    fn name(&self) -> &'static str {
        self.0.op
    }

    fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let values = if backward.needs(0) { Some(self.0.gather(backward.grad())?) } else { None };
        Ok(vec![values, Some(backward.grad().clone())])
    }
}
