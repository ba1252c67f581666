//! Convolutions over a leading model axis: every model convolves its own maps with its own weight.

use super::{Conv2dOptions, Geometry, Map, bf16, check_parameters, cpu, gpu};
use crate::autograd::{Backward, Function, record};
use crate::ops::Counts;
use crate::tensor::{Buffer, Element, Place, Shape, Weight, place};
use crate::{Error, Result, Tensor, dispatch_float};

/// [`conv2d`](super::conv2d) for every model: `input` (models, batch, height, width, channels), `weight` (models, out,
/// channels, kernel height, kernel width) and `bias` (models, out) give (models, batch, height', width', out).
///
/// The numbers of a model are a function of its own real samples, weight and bias; see [`Counts`]. Padding of zeros in
/// the input stays padding, and so it does in the gradients if that of the output is zero there. Derivatives of every
/// order.
///
/// # Errors
/// As [`conv2d`](super::conv2d), and where the models or counts do not fit, or there is more than one group.
pub fn conv2d_each(
    input: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    counts: &Counts,
    options: Conv2dOptions,
) -> Result<Tensor> {
    const OP: &str = "conv2d_each";
    let [models, maps @ ..] = input.dims::<5>(OP, "input (models, batch, height, width, channels)")?;
    let [of_weight, weights @ ..] = weight.dims::<5>(OP, "weight (models, out, in, kernel height, kernel width)")?;
    if of_weight != models || options.groups != 1 {
        let message = format!(
            "input {}, weight {}, {} groups; expected as many models in both and one group",
            input.shape(),
            weight.shape(),
            options.groups
        );
        return Err(Error::shape(OP, message));
    }
    let geometry = Geometry::forward(OP, maps, weights, options)?;
    check_parameters(OP, input, weight, bias, &[models, geometry.out_channels])?;
    counts.check(OP, [models, geometry.batch], place(OP, &[input])?)?;
    apply(Map::Output, [input, weight], bias, geometry, counts)
}

/// y = x Wᵀ + b for every model: `input` (models, batch, in), `weight` (models, out, in) and `bias` (models, out) give
/// (models, batch, out). As [`conv2d_each`], of which it is the case of one position.
///
/// # Errors
/// Where shapes, dtypes or counts do not fit.
pub fn linear_each(input: &Tensor, weight: &Tensor, bias: Option<&Tensor>, counts: &Counts) -> Result<Tensor> {
    const OP: &str = "linear_each";
    let [models, batch, features] = input.dims::<3>(OP, "input (models, batch, in)")?;
    let [of_weight, out, in_weight] = weight.dims::<3>(OP, "weight (models, out, in)")?;
    let (maps, weights) = ([models, batch, 1, 1, features], [of_weight, out, in_weight, 1, 1]);
    let options = Conv2dOptions::default();
    conv2d_each(&input.reshape(maps)?, &weight.reshape(weights)?, bias, counts, options)?.reshape([models, batch, out])
}

impl Map {
    /// Shapes of its arguments and of its result, for one model.
    fn shapes(self, g: &Geometry) -> [Shape; 3] {
        let (x, w, y) = (g.input_shape(), g.weight_shape(), g.output_shape());
        match self {
            Map::Output => [x, w, y],
            Map::Input => [y, w, x],
            Map::Weight => [x, y, w],
        }
    }
}

fn apply(
    map: Map,
    arguments: [&Tensor; 2],
    bias: Option<&Tensor>,
    geometry: Geometry,
    counts: &Counts,
) -> Result<Tensor> {
    let [first, second] = arguments;
    let (op, dtype, models) = (map.name(), first.dtype(), counts.models());
    let inputs: Vec<&Tensor> = [Some(first), Some(second), bias].into_iter().flatten().collect();
    let output = match place(op, &inputs)? {
        Place::Gpu(gpu) => match map {
            Map::Output => gpu::gather(gpu, &geometry, gpu::Pass::Forward, arguments, bias, Some(models))?,
            Map::Input => gpu::gather(gpu, &geometry, gpu::Pass::InputGradient, arguments, None, Some(models))?,
            Map::Weight => gpu::weight_gradient(gpu, &geometry, arguments, Some(models))?,
        },
        Place::Host if bf16::takes(map, &geometry, dtype) => {
            let (bias, weight) = (bias.map(Tensor::data).transpose()?, Weight::of(second, second.data()?));
            let values = on_host(map, first.data()?, weight, bias, &geometry, counts, bf16::apply);
            Tensor::from_buffer(values, [&[models], &map.result_shape(&geometry)[..]].concat())?
        }
        Place::Host => dispatch_float!(op, dtype, T => {
            let (a, b) = (first.floats::<T>(op)?, second.floats::<T>(op)?);
            let bias = bias.map(|bias| bias.floats::<T>(op)).transpose()?;
            let values = on_host(map, &a, Weight::of(second, &b), bias.as_deref(), &geometry, counts, cpu::apply);
            Tensor::from_floats(values, [&[models], &map.result_shape(&geometry)[..]].concat(), dtype)
        })?,
    };
    Ok(record(output, &inputs, |_| EachRule {
        map,
        first: first.clone(),
        second: second.clone(),
        geometry,
        counts: counts.clone(),
    }))
}

/// Each model as a convolution of its own, over its real samples.
fn on_host<E: Element>(
    map: Map,
    first: &[E],
    second: Weight<'_, E>,
    bias: Option<&[E]>,
    geometry: &Geometry,
    counts: &Counts,
    apply: fn(Map, &Geometry, &[E], Weight<'_, E>, Option<&[E]>) -> Buffer<E>,
) -> Buffer<E> {
    let lengths = map.shapes(geometry).map(|shape| shape.elements());
    counts.collect(lengths[2], |model, count| {
        let own = Geometry { batch: count, ..*geometry };
        let [of_first, of_second, _] = map.shapes(&own).map(|shape| shape.elements());
        let a = &first[model * lengths[0]..][..of_first];
        let b = &second.values[model * lengths[1]..][..of_second];
        let bias = bias.map(|bias| &bias[model * own.out_channels..][..own.out_channels]);
        // What is kept of a tensor is of all of it.
        let b = if counts.models() == 1 { Weight { values: b, ..second } } else { b.into() };
        apply(map, &own, a, b, bias)
    })
}

struct EachRule {
    map: Map,
    first: Tensor,
    second: Tensor,
    geometry: Geometry,
    counts: Counts,
}

impl Function for EachRule {
    fn name(&self) -> &'static str {
        self.map.name()
    }

    fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let [of_first, of_second] = self.map.derivatives(backward.grad(), &self.first, &self.second);
        let gradient = |index: usize, (map, a, b): (Map, &Tensor, &Tensor)| {
            let wanted = backward.needs(index);
            wanted.then(|| apply(map, [a, b], None, self.geometry, &self.counts)).transpose()
        };
        let bias = if backward.needs(2) { Some(self.bias_gradient(backward.grad())?) } else { None };
        Ok(vec![gradient(0, of_first)?, gradient(1, of_second)?, bias])
    }
}

impl EachRule {
    /// The sum over samples and positions: the weight gradient of a map of ones, of which the bias is the weight. So it
    /// is cut into pieces as that is.
    fn bias_gradient(&self, grad: &Tensor) -> Result<Tensor> {
        let g = self.geometry;
        let models = self.counts.models();
        let shape = [models, g.batch, g.output[0], g.output[1], 1];
        let ones = match grad.gpu() {
            Some(gpu) => crate::ops::gpu::full(gpu, shape, 1.0, grad.dtype())?,
            None => Tensor::ones(shape, grad.dtype())?,
        };
        let options = Conv2dOptions::default();
        let of_ones = Geometry { input: g.output, in_channels: 1, kernel: [1; 2], options, ..g };
        apply(Map::Weight, [&ones, grad], None, of_ones, &self.counts)?.reshape([models, g.out_channels])
    }
}
