//! Largest values and averages over windows of a map.

mod cpu;
pub(crate) mod gpu;

use std::ops::Range;
use std::sync::Arc;

use crate::autograd::{Backward, Function, record};
use crate::gpu::Gpu;
use crate::ops::resample::{Axis, resample};
use crate::tensor::{Place, Shape, place};
use crate::{Error, Result, Tensor, dispatch_float};

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

    /// The windows along one axis of a map.
    fn law(&self, op: &'static str, input: &Tensor, axis: usize) -> Result<Law> {
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
        Ok(Law::Sliding { extent, count, kernel, stride, padding, count_padding: self.count_include_pad })
    }
}

/// Which windows there are along one axis.
#[derive(Clone, Copy, Debug)]
enum Law {
    /// `kernel` positions each, `stride` apart, over an extent with padding, which averages may count.
    Sliding { extent: usize, count: usize, kernel: usize, stride: usize, padding: usize, count_padding: bool },
    /// Window i of n reaches from ⌊i extent / n⌋ to ⌈(i + 1) extent / n⌉.
    Even { extent: usize, count: usize },
}

/// A window along one axis.
struct Window {
    /// Input positions.
    inside: Range<usize>,
    /// Positions that an average counts.
    counted: usize,
}

impl Law {
    fn extent(self) -> usize {
        let (Law::Sliding { extent, .. } | Law::Even { extent, .. }) = self;
        extent
    }

    fn count(self) -> usize {
        let (Law::Sliding { count, .. } | Law::Even { count, .. }) = self;
        count
    }

    fn window(self, index: usize) -> Window {
        match self {
            Law::Sliding { extent, kernel, stride, padding, count_padding, .. } => {
                let (start, end) = (index * stride, (index * stride + kernel).min(extent + 2 * padding));
                let inside = start.max(padding) - padding..(end.max(padding) - padding).min(extent);
                Window { counted: if count_padding { end - start } else { inside.len() }, inside }
            }
            Law::Even { extent, count } => {
                let bound = |index: usize| index as u128 * extent as u128;
                let start = (bound(index) / count as u128) as usize;
                let inside = start..bound(index + 1).div_ceil(count as u128) as usize;
                Window { counted: inside.len(), inside }
            }
        }
    }

    fn windows(self) -> Vec<Window> {
        (0..self.count()).map(|index| self.window(index)).collect()
    }

    /// What averaging over the windows makes of a line.
    fn averages(self) -> Arc<Axis> {
        let row = |window: Window| {
            let weight = 1.0 / window.counted as f64;
            window.inside.map(|position| (position, weight)).collect()
        };
        Axis::new(self.extent(), self.windows().into_iter().map(row))
    }
}

/// The averages over windows of `input` by `laws` (vertical, horizontal).
fn average(op: &'static str, input: &Tensor, laws: [Law; 2]) -> Result<Tensor> {
    match place(op, &[input])? {
        Place::Gpu(gpu) => average_on(gpu, op, input, laws, false),
        Place::Host => resample(op, input, [&laws[0].averages(), &laws[1].averages()]),
    }
}

/// On a GPU the averages, or with `spread` their transpose, each the gradient of the other.
fn average_on(gpu: &'static Gpu, op: &'static str, input: &Tensor, laws: [Law; 2], spread: bool) -> Result<Tensor> {
    let extent = |law: Law| if spread { law.extent() } else { law.count() };
    let shape = Shape::from([input.shape()[0], extent(laws[0]), extent(laws[1]), input.shape()[3]]);
    shape.checked_elements(op, size_of::<f64>())?;
    let output = gpu::average(gpu, op, input, &shape, laws, spread)?;
    Ok(record(output, &[input], |_| AverageRule { gpu, op, laws, spread }))
}

struct AverageRule {
    gpu: &'static Gpu,
    op: &'static str,
    laws: [Law; 2],
    /// Whether the recorded function is the transpose.
    spread: bool,
}

impl Function for AverageRule {
    fn name(&self) -> &'static str {
        self.op
    }

    fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let grad = backward.grad();
        Ok(vec![Some(average_on(self.gpu, self.op, grad, self.laws, !self.spread)?)])
    }
}

/// The mean over each window of `input` (batch, height, width, channels). Derivatives of every order.
///
/// # Errors
/// Where `input` is not such a map or is empty, kernel or stride is 0, the padding exceeds half the kernel, or the
/// kernel exceeds the padded input.
pub fn avg_pool2d(input: &Tensor, options: Pool2dOptions) -> Result<Tensor> {
    const OP: &str = "avg_pool2d";
    input.dims::<4>(OP, "input (batch, height, width, channels)")?;
    input.expect_float(OP)?;
    average(OP, input, [options.law(OP, input, 0)?, options.law(OP, input, 1)?])
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
    input.expect_float(OP)?;
    average(OP, input, [Law::Even { extent: height, count: size[0] }, Law::Even { extent: width, count: size[1] }])
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
    let laws = [options.law(OP, input, 0)?, options.law(OP, input, 1)?];
    let shape = Shape::from([batch, laws[0].count(), laws[1].count(), channels]);
    shape.checked_elements(OP, size_of::<f64>())?;
    if u32::try_from(height * width).is_err() {
        return Err(Error::shape(OP, format!("input {} has more than 2^32 positions", input.shape())));
    }
    let dtype = input.dtype();
    input.expect_float(OP)?;
    let (output, positions) = match place(OP, &[input])? {
        Place::Gpu(gpu) => gpu::max_pool(gpu, OP, input, &shape, laws)?,
        Place::Host => dispatch_float!(OP, dtype, T => {
            let (input, windows) = (input.floats::<T>(OP)?, laws.map(Law::windows));
            let (largest, positions) = cpu::max_pool(&input, [batch, height, width, channels], &windows);
            let places = Tensor::from_buffer(positions, [shape.elements(), size_of::<u32>()])?;
            Tensor::from_floats(largest, &shape, dtype).map(|largest| (largest, places))
        })?,
    };
    let choice = || Choice { positions, laws, input: input.shape().clone(), output: shape };
    Ok(record(output, &[input], |_| ChoiceRule { choice: choice(), scatter: false }))
}

/// For each element of `output`, (batch, height', width', channels), the position of the input that it was taken from,
/// in the same image and channel.
#[derive(Clone)]
struct Choice {
    /// The bytes of `u32` values.
    positions: Tensor,
    laws: [Law; 2],
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
        let shape = if scatter { &self.input } else { &self.output };
        let output = match place(OP, &[source, &self.positions])? {
            Place::Gpu(gpu) => gpu::choose(gpu, OP, (source, &self.positions), shape, self.laws, scatter)?,
            Place::Host => dispatch_float!(OP, dtype, T => {
                let (values, positions) =
                    (source.floats::<T>(OP)?, bytemuck::cast_slice(self.positions.raw_bytes()?));
                let values = if scatter {
                    cpu::scatter(&values, positions, inputs, outputs, channels)
                } else {
                    cpu::gather(&values, positions, inputs, outputs, channels)
                };
                Tensor::from_floats(values, shape, dtype)
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
