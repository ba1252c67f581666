//! Largest values and averages over windows of a map.

pub(crate) mod cost;
mod cpu;
pub(crate) mod gpu;

use std::ops::Range;
use std::sync::Arc;

use crate::autograd::{Backward, Function, record};
use crate::ops::resample::{Axis, Rule, resample};
use crate::tensor::{Place, Shape, dispatch_stored, place};
use crate::{Error, Result, Tensor};

/// How a window moves over a map. Pairs are (vertical, horizontal).
///
/// ```
/// use gridgrad::ops::{Pool2dOptions, max_pool2d};
/// use gridgrad::{DType, Tensor};
/// let map = Tensor::from_index([1, 2, 4, 1], DType::F32, |i| i as f64)?;
/// assert_eq!(max_pool2d(&map, Pool2dOptions::tiling([2, 2]))?.to_vec::<f32>()?, [5.0, 7.0]);
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool2dOptions {
    /// Extents of the window.
    pub kernel: [usize; 2],
    /// Steps between neighbouring windows, in input positions.
    pub stride: [usize; 2],
    /// Positions added on each side of the input, at most half the window.
    pub padding: [usize; 2],
    /// Whether a last window that reaches beyond the padded input counts, if it begins inside of input and padding
    /// before it.
    pub ceil_mode: bool,
    /// Whether an average counts padded positions, as zeros. The maximum never sees them.
    pub count_include_pad: bool,
}

impl Pool2dOptions {
    /// Windows that tile the map: stride `kernel`, no padding.
    pub fn tiling(kernel: [usize; 2]) -> Self {
        Pool2dOptions { kernel, stride: kernel, padding: [0; 2], ceil_mode: false, count_include_pad: true }
    }

    /// The mean along one axis of a map.
    fn rule(&self, axis: usize) -> Rule {
        let Pool2dOptions { kernel, stride, padding, count_include_pad, .. } = *self;
        Rule::Windows { kernel: kernel[axis], stride: stride[axis], padding: padding[axis], count_include_pad }
    }

    /// The windows along one axis of a map.
    fn windows(&self, op: &'static str, input: &Tensor, axis: usize) -> Result<Vec<Window>> {
        let (extent, kernel) = (input.shape()[axis + 1], self.kernel[axis]);
        let (stride, padding) = (self.stride[axis], self.padding[axis]);
        let refuse = |reason: &str| Err(Error::argument(op, format!("{reason}: input {}, {self:?}", input.shape())));
        if kernel == 0 || stride == 0 {
            return refuse("kernel and stride must be positive");
        }
        if padding > kernel / 2 {
            return refuse("padding is more than half the kernel");
        }
        let padded = padding.checked_mul(2).and_then(|both| both.checked_add(extent));
        let Some(free) = padded.and_then(|padded| padded.checked_sub(kernel)).filter(|_| extent > 0) else {
            return refuse("the kernel is larger than the padded input");
        };
        let mut count = free / stride + 1;
        // The next window begins at count · stride, which is at most free + stride.
        if self.ceil_mode && free % stride > 0 && (count * stride) < extent + padding {
            count += 1;
        }
        let window = |index: usize| {
            let (start, end) = (index * stride, (index * stride + kernel).min(extent + 2 * padding));
            let inside = start.max(padding) - padding..(end.max(padding) - padding).min(extent);
            Window { counted: if self.count_include_pad { end - start } else { inside.len() }, inside }
        };
        Ok((0..count).map(window).collect())
    }
}

/// A window along one axis.
struct Window {
    /// Input positions.
    inside: Range<usize>,
    /// Positions that an average counts.
    counted: usize,
}

fn averages(rule: Rule, input: usize, windows: Vec<Window>) -> Arc<Axis> {
    let row = |window: Window| {
        let weight = 1.0 / window.counted as f64;
        window.inside.map(|position| (position, weight)).collect()
    };
    Axis::new(rule, input, windows.into_iter().map(row))
}

/// The mean over each window of `input` (batch, height, width, channels). Derivatives of every order.
///
/// # Errors
/// Where `input` is not such a map or is empty, kernel or stride is 0, the padding exceeds half the kernel, or the
/// kernel exceeds the padded input.
pub fn avg_pool2d(input: &Tensor, options: Pool2dOptions) -> Result<Tensor> {
    const OP: &str = "avg_pool2d";
    let [_, height, width, _] = input.dims(OP, "input (batch, height, width, channels)")?;
    let (vertical, horizontal) = (options.windows(OP, input, 0)?, options.windows(OP, input, 1)?);
    let [down, across] = [0, 1].map(|axis| options.rule(axis));
    resample(OP, input, [&averages(down, height, vertical), &averages(across, width, horizontal)])
}

/// The mean over `size` (height, width) windows that cover `input` (batch, height, width, channels) evenly: window i
/// of n reaches from ⌊i h / n⌋ to ⌈(i + 1) h / n⌉. Derivatives of every order.
///
/// # Errors
/// Where `input` is not such a map, or an extent of it or of `size` is 0.
pub fn adaptive_avg_pool2d(input: &Tensor, size: [usize; 2]) -> Result<Tensor> {
    const OP: &str = "adaptive_avg_pool2d";
    let [_, height, width, channels] = input.dims(OP, "input (batch, height, width, channels)")?;
    if [height, width].contains(&0) || size.contains(&0) {
        return Err(Error::shape(OP, format!("input {} to size {size:?}: extents must be positive", input.shape())));
    }
    Shape::from([size[0], size[1], channels.max(1)]).checked_elements(OP, size_of::<f64>())?;
    let axis = |extent: usize, count: usize| {
        let bound = |index: usize| index as u128 * extent as u128;
        let window = |index: usize| {
            let start = (bound(index) / count as u128) as usize;
            let inside = start..bound(index + 1).div_ceil(count as u128) as usize;
            Window { counted: inside.len(), inside }
        };
        averages(Rule::Adaptive, extent, (0..count).map(window).collect())
    };
    resample(OP, input, [&axis(height, size[0]), &axis(width, size[1])])
}

/// The mean over all positions of `input` (batch, height, width, channels), of shape (batch, channels). Derivatives of
/// every order.
///
/// # Errors
/// Where `input` is not such a map, or has no positions.
pub fn global_avg_pool2d(input: &Tensor) -> Result<Tensor> {
    const OP: &str = "global_avg_pool2d";
    let [_, height, width, _] = input.dims(OP, "input (batch, height, width, channels)")?;
    if height == 0 || width == 0 {
        return Err(Error::shape(OP, format!("input {} has no positions", input.shape())));
    }
    input.mean(&[1, 2], false)
}

/// The largest value in each window of `input` (batch, height, width, channels); the first of equal ones has the
/// gradient, and NaN is larger than any number. Derivatives of every order.
///
/// # Errors
/// As [`avg_pool2d`], and for maps of more than 2³² positions.
pub fn max_pool2d(input: &Tensor, options: Pool2dOptions) -> Result<Tensor> {
    const OP: &str = "max_pool2d";
    let [batch, height, width, channels] = input.dims(OP, "input (batch, height, width, channels)")?;
    let windows = [options.windows(OP, input, 0)?, options.windows(OP, input, 1)?];
    let shape = Shape::from([batch, windows[0].len(), windows[1].len(), channels]);
    shape.checked_elements(OP, size_of::<f64>())?;
    if u32::try_from(height * width).is_err() {
        return Err(Error::shape(OP, format!("input {} has more than 2^32 positions", input.shape())));
    }
    let dtype = input.dtype();
    let choice = |positions| Choice { positions, options, input: input.shape().clone(), output: shape.clone() };
    let (output, positions) = match place(OP, &[input])? {
        Place::Gpu(gpu) => gpu::max_pool(gpu, input, &shape, options)?,
        Place::Host => dispatch_stored!(OP, dtype, (S, T) => {
            let values = input.stored::<S>(OP)?;
            let (largest, positions) = cpu::max_pool::<S, T>(&values, [batch, height, width, channels], &windows);
            let positions = Tensor::from_buffer(positions, [shape.elements(), size_of::<u32>()])?;
            Tensor::from_stored(largest, &shape, dtype).map(|largest| (largest, positions))
        })?,
    };
    Ok(record(output, &[input], |_| ChoiceRule { choice: choice(positions), scatter: false }))
}

/// For each element of `output`, (batch, height', width', channels), the position of the input that it was taken from,
/// in the same image and channel.
#[derive(Clone)]
struct Choice {
    /// The bytes of `u32` values.
    positions: Tensor,
    options: Pool2dOptions,
    input: Shape,
    output: Shape,
}

impl Choice {
    /// The chosen elements of a tensor of the input's shape.
    fn gather(&self, source: &Tensor) -> Result<Tensor> {
        self.apply(source, false)
    }

    /// The transpose of `gather`: each element added where it was taken from.
    fn scatter(&self, source: &Tensor) -> Result<Tensor> {
        self.apply(source, true)
    }

    fn apply(&self, source: &Tensor, scatter: bool) -> Result<Tensor> {
        const OP: &str = "max_pool2d";
        let (dtype, channels) = (source.dtype(), self.input[3]);
        let (inputs, outputs) = (self.input[1] * self.input[2], self.output[1] * self.output[2]);
        let output = match place(OP, &[source, &self.positions])? {
            Place::Gpu(gpu) => gpu::choose(gpu, source, self, scatter)?,
            Place::Host => dispatch_stored!(OP, dtype, (S, T) => {
                let values = source.stored::<S>(OP)?;
                let positions = bytemuck::cast_slice(self.positions.raw_bytes()?);
                let (values, shape) = if scatter {
                    (cpu::scatter::<S, T>(&values, positions, inputs, outputs, channels), &self.input)
                } else {
                    (cpu::gather(&values, positions, inputs, outputs, channels), &self.output)
                };
                Tensor::from_stored(values, shape, dtype)
            })?,
        };
        Ok(record(output, &[source], |_| ChoiceRule { choice: self.clone(), scatter }))
    }
}

struct ChoiceRule {
    choice: Choice,
    /// Whether the recorded function is the scatter, and not the gather.
    scatter: bool,
}

impl Function for ChoiceRule {
    fn name(&self) -> &'static str {
        "max_pool2d"
    }

    fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let grad = backward.grad();
        Ok(vec![Some(if self.scatter { self.choice.gather(grad)? } else { self.choice.scatter(grad)? })])
    }
}
