//! Maps that are resampled along each axis by itself: what average pooling and interpolation share.
//!
//! Every output line is a weighted sum of input lines, and every output column of input columns. Such a map is linear,
//! and its transpose is another one of its kind, so it has derivatives of every order.

pub(crate) mod cost;
mod cpu;
pub(crate) mod gpu;

use std::sync::Arc;

use crate::autograd::{Backward, Function, record};
use crate::tensor::{Place, place};
use crate::{Result, Tensor, dispatch_float};

/// From which an axis's entries follow. `kernels/resample.cu` has the formulas.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Rule {
    /// The pixel in which the position lies.
    Nearest,
    /// Between two pixels.
    Linear { align_corners: bool },
    /// Among four pixels.
    Cubic { align_corners: bool },
    /// The mean of a window that moves.
    Windows { kernel: usize, stride: usize, padding: usize, count_include_pad: bool },
    /// The mean of windows that cover the axis evenly.
    Adaptive,
}

/// A sparse matrix along one axis: for each output position, the input positions that it reads and their weights.
pub(crate) struct Axis {
    rule: Rule,
    /// Whether this is the transpose of the rule's axis.
    transposed: bool,
    /// Number of input positions.
    input: usize,
    /// Row `i` is `entries[starts[i]..starts[i + 1]]`.
    starts: Vec<usize>,
    entries: Vec<(usize, f64)>,
}

impl Axis {
    /// An axis from `input` positions to those of `rows`: (position, weight) pairs for each, as `rule` has them. Zero
    /// weights are dropped.
    pub fn new(rule: Rule, input: usize, rows: impl IntoIterator<Item = Vec<(usize, f64)>>) -> Arc<Self> {
        Self::collected(rule, false, input, rows)
    }

    fn collected(
        rule: Rule,
        transposed: bool,
        input: usize,
        rows: impl IntoIterator<Item = Vec<(usize, f64)>>,
    ) -> Arc<Self> {
        let (mut starts, mut entries) = (vec![0], Vec::new());
        for row in rows {
            entries.extend(row.into_iter().filter(|&(_, weight)| weight != 0.0));
            starts.push(entries.len());
        }
        Arc::new(Axis { rule, transposed, input, starts, entries })
    }

    fn output(&self) -> usize {
        self.starts.len() - 1
    }

    fn row(&self, position: usize) -> &[(usize, f64)] {
        &self.entries[self.starts[position]..self.starts[position + 1]]
    }

    fn transposed(&self) -> Arc<Self> {
        let mut rows = vec![Vec::new(); self.input];
        for output in 0..self.output() {
            self.row(output).iter().for_each(|&(input, weight)| rows[input].push((output, weight)));
        }
        Self::collected(self.rule, !self.transposed, self.output(), rows)
    }
}

/// Resamples `input` (batch, height, width, channels) by `axes` (vertical, horizontal), whose input extents the caller
/// has taken from it, on behalf of `op`.
pub(crate) fn resample(op: &'static str, input: &Tensor, axes: [&Arc<Axis>; 2]) -> Result<Tensor> {
    let [batch, height, width, channels] = input.dims(op, "input (batch, height, width, channels)")?;
    debug_assert_eq!([height, width], axes.map(|axis| axis.input));
    let shape = crate::Shape::from([batch, axes[0].output(), axes[1].output(), channels]);
    shape.checked_elements(op, size_of::<f64>())?;
    let dtype = input.dtype();
    input.expect_float(op)?;
    let output = match place(op, &[input])? {
        Place::Gpu(gpu) => gpu::resample(gpu, op, input, shape, axes)?,
        Place::Host => dispatch_float!(op, dtype, T => {
            Tensor::from_floats(cpu::resample(&input.floats::<T>(op)?, batch, channels, axes), shape, dtype)
        })?,
    };
    Ok(record(output, &[input], |_| ResampleRule { op, axes: axes.map(Arc::clone) }))
}

struct ResampleRule {
    op: &'static str,
    axes: [Arc<Axis>; 2],
}

impl Function for ResampleRule {
    fn name(&self) -> &'static str {
        self.op
    }

    fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let [vertical, horizontal] = [self.axes[0].transposed(), self.axes[1].transposed()];
        Ok(vec![Some(resample(self.op, backward.grad(), [&vertical, &horizontal])?)])
    }
}
