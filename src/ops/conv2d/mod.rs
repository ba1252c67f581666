//! Convolutions of channels-last maps, and their transposes.
//!
//! A convolution y = conv(x, w) is linear in x and in w, so the number ⟨g, conv(x, w)⟩ has three derivatives: by g the
//! convolution itself, by x the input gradient and by w the weight gradient. Each of the three is linear in the two
//! arguments that are left, and each is a recorded function whose backward rule is the other two. So convolutions have
//! derivatives of every order.

mod bf16;
pub(crate) mod cost;
mod cpu;
mod depthwise;
pub(crate) mod depthwise_gpu;
pub(super) mod direct;
mod each;
mod geometry;
pub(crate) mod gpu;
mod patches;
mod scatter;
mod winograd;

pub(super) use geometry::Geometry;
use geometry::window;

use crate::autograd::{Backward, Function, record};
use crate::tensor::{Place, Shape, Weight, place};
use crate::{Error, Result, Tensor, dispatch_float};

pub use each::{conv2d_each, linear_each};

/// How a kernel moves over a map. Pairs are (vertical, horizontal).
///
/// ```
/// use gridgrad::ops::{Conv2dOptions, conv2d};
/// use gridgrad::{DType, Tensor};
/// let map = Tensor::ones([1, 8, 8, 4], DType::F32)?; // (batch, height, width, channels)
/// let weight = Tensor::ones([4, 1, 3, 3], DType::F32)?; // (out, in / groups, height, width)
/// let options = Conv2dOptions { stride: [2, 2], padding: [1, 1], groups: 4, ..Conv2dOptions::default() };
/// assert_eq!(conv2d(&map, &weight, None, options)?.shape().to_vec(), [1, 4, 4, 4]);
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conv2dOptions {
    /// Steps between neighbouring windows, in input positions.
    pub stride: [usize; 2],
    /// Zeros added on each side of the input.
    pub padding: [usize; 2],
    /// Distance between neighbouring taps of the kernel, in input positions.
    pub dilation: [usize; 2],
    /// Number of equal parts that the channels are cut into; a part of the output sees its part of the input alone.
    pub groups: usize,
}

impl Default for Conv2dOptions {
    /// Stride 1, no padding, dilation 1, one group.
    fn default() -> Self {
        Conv2dOptions { stride: [1; 2], padding: [0; 2], dilation: [1; 2], groups: 1 }
    }
}

/// Convolves `input` (batch, height, width, channels) with `weight` (out, channels / groups, kernel height, kernel
/// width) and adds `bias` (out). The result is (batch, height', width', out) with
/// height' = ⌊(height + 2 padding − dilation (kernel height − 1) − 1) / stride⌋ + 1.
///
/// As everywhere in this field, the kernel is not flipped. Derivatives of every order.
///
/// # Errors
/// Where extents, groups or dtypes do not fit together, a stride or dilation is 0, or the kernel is larger than the
/// padded input.
pub fn conv2d(input: &Tensor, weight: &Tensor, bias: Option<&Tensor>, options: Conv2dOptions) -> Result<Tensor> {
    const OP: &str = "conv2d";
    let maps = input.dims(OP, "input (batch, height, width, channels)")?;
    let weights = weight.dims(OP, "weight (out, in / groups, kernel height, kernel width)")?;
    let geometry = Geometry::forward(OP, maps, weights, options)?;
    check_parameters(OP, input, weight, bias, &[geometry.out_channels])?;
    Map::Output.apply(input, weight, bias, geometry)
}

/// The transpose of [`conv2d`]: what turns the gradient of its output into that of its input, here with `input` (batch,
/// height, width, channels), `weight` (channels, out / groups, kernel height, kernel width) and `bias` (out). The result
/// is (batch, height', width', out) with
/// height' = (height − 1) stride − 2 padding + dilation (kernel height − 1) + output padding + 1.
///
/// `output_padding` chooses among the extents that a convolution of this stride maps to `input`'s.
///
/// # Errors
/// Where extents, groups or dtypes do not fit together, a stride or dilation is 0, the output padding is neither below
/// the stride nor below the dilation, or nothing is left of the result.
pub fn conv_transpose2d(
    input: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    options: Conv2dOptions,
    output_padding: [usize; 2],
) -> Result<Tensor> {
    const OP: &str = "conv_transpose2d";
    let [batch, height, width, channels] = input.dims(OP, "input (batch, height, width, channels)")?;
    let weights = weight.dims(OP, "weight (channels, out / groups, kernel height, kernel width)")?;
    Geometry::check(OP, weights, options)?;
    let [in_weight, group_outputs, kernel @ ..] = weights;
    if in_weight != channels {
        return Err(Error::shape(OP, format!("input {}, weight {}", input.shape(), weight.shape())));
    }
    let too_large = || Error::shape(OP, format!("weight {} with {options:?} overflows", weight.shape()));
    let features = group_outputs.checked_mul(options.groups).ok_or_else(too_large)?;
    check_parameters(OP, input, weight, bias, &[features])?;
    let output_extents = [height, width];
    let extent = |axis: usize| {
        let (stride, dilation) = (options.stride[axis], options.dilation[axis]);
        if output_padding[axis] >= stride.max(dilation) {
            let message = format!("output padding {output_padding:?} must be below stride or dilation of {options:?}");
            return Err(Error::argument(OP, message));
        }
        let covered = output_extents[axis].checked_sub(1).and_then(|steps| steps.checked_mul(stride));
        let whole = covered.zip(window(kernel[axis], dilation)).and_then(|(c, w)| c.checked_add(w));
        let whole = whole.and_then(|whole| whole.checked_add(output_padding[axis]));
        let cropped = whole.zip(options.padding[axis].checked_mul(2)).and_then(|(whole, crop)| whole.checked_sub(crop));
        cropped.filter(|&extent| extent > 0).ok_or_else(|| {
            let message = format!("input {} with kernel {kernel:?} and {options:?} leaves no output", input.shape());
            Error::shape(OP, message)
        })
    };
    let geometry = Geometry {
        batch,
        input: [extent(0)?, extent(1)?],
        output: output_extents,
        in_channels: features,
        out_channels: channels,
        kernel,
        options,
    };
    geometry.input_shape().checked_elements(OP, size_of::<f64>())?;
    Map::Input.apply(input, weight, bias, geometry)
}

fn check_parameters(
    op: &'static str,
    input: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    expected: &[usize],
) -> Result<()> {
    input.expect_float(op)?;
    [Some(weight), bias].into_iter().flatten().try_for_each(|parameter| parameter.expect_dtype(op, input.dtype()))?;
    match bias.filter(|bias| **bias.shape() != *expected) {
        Some(bias) => {
            let channels = expected.last().copied().unwrap_or(0);
            let message =
                format!("bias {} for {channels} output channels, expected {}", bias.shape(), Shape::from(expected));
            Err(Error::shape(op, message))
        }
        None => Ok(()),
    }
}

/// The derivatives of ⟨y, conv(x, w)⟩, each named by the argument whose shape it has.
#[derive(Clone, Copy)]
enum Map {
    /// (x, w) ↦ y
    Output,
    /// (y, w) ↦ x
    Input,
    /// (x, y) ↦ w
    Weight,
}

impl Map {
    fn apply(self, first: &Tensor, second: &Tensor, bias: Option<&Tensor>, geometry: Geometry) -> Result<Tensor> {
        let (op, dtype) = (self.name(), first.dtype());
        let inputs: Vec<&Tensor> = [Some(first), Some(second), bias].into_iter().flatten().collect();
        let output = match place(op, &inputs)? {
            Place::Gpu(gpu) => match self {
                Map::Output => gpu::gather(gpu, &geometry, gpu::Pass::Forward, [first, second], bias, None)?,
                Map::Input => gpu::gather(gpu, &geometry, gpu::Pass::InputGradient, [first, second], bias, None)?,
                Map::Weight => gpu::weight_gradient(gpu, &geometry, [first, second], None)?,
            },
            Place::Host if bf16::takes(self, &geometry, dtype) => {
                let (bias, weight) = (bias.map(Tensor::data).transpose()?, Weight::of(second, second.data()?));
                let values = bf16::apply(self, &geometry, first.data()?, weight, bias);
                Tensor::from_buffer(values, self.result_shape(&geometry))?
            }
            Place::Host => dispatch_float!(op, dtype, T => {
                let (a, b) = (first.floats::<T>(op)?, second.floats::<T>(op)?);
                let bias = bias.map(|bias| bias.floats::<T>(op)).transpose()?;
                let values = cpu::apply(self, &geometry, &a, Weight::of(second, &b), bias.as_deref());
                Tensor::from_floats(values, self.result_shape(&geometry), dtype)
            })?,
        };
        Ok(record(output, &inputs, |_| ConvRule { map: self, first: first.clone(), second: second.clone(), geometry }))
    }

    /// The gradients of both arguments, as maps of two arguments. The gradient stands in the place of the map's result;
    /// the map of the place that is asked for takes it there.
    fn derivatives<'a>(
        self,
        grad: &'a Tensor,
        first: &'a Tensor,
        second: &'a Tensor,
    ) -> [(Map, &'a Tensor, &'a Tensor); 2] {
        match self {
            Map::Output => [(Map::Input, grad, second), (Map::Weight, first, grad)],
            Map::Input => [(Map::Output, grad, second), (Map::Weight, grad, first)],
            Map::Weight => [(Map::Input, second, grad), (Map::Output, first, grad)],
        }
    }

    fn result_shape(self, geometry: &Geometry) -> Shape {
        match self {
            Map::Output => geometry.output_shape(),
            Map::Input => geometry.input_shape(),
            Map::Weight => geometry.weight_shape(),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Map::Output => "conv2d",
            Map::Input => "conv2d input gradient",
            Map::Weight => "conv2d weight gradient",
        }
    }
}

struct ConvRule {
    map: Map,
    first: Tensor,
    second: Tensor,
    geometry: Geometry,
}

impl Function for ConvRule {
    fn name(&self) -> &'static str {
        self.map.name()
    }

    fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let grad = backward.grad();
        let [of_first, of_second] = self.map.derivatives(grad, &self.first, &self.second);
        let gradient = |index: usize, (map, a, b): (Map, &Tensor, &Tensor)| {
            if backward.needs(index) { map.apply(a, b, None, self.geometry).map(Some) } else { Ok(None) }
        };
        let bias = if backward.needs(2) { Some(grad.sum(&[0, 1, 2], false)?) } else { None };
        Ok(vec![gradient(0, of_first)?, gradient(1, of_second)?, bias])
    }
}
