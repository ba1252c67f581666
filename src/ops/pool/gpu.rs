//! A thread for each position of the result and some neighbouring channels. Averages are the room of `resample`.

use super::{Choice, Pool2dOptions};
use crate::driver::seam::Address;
use crate::gpu::{FLOATS, Geometry, Gpu, Kernel, Signature};
use crate::tensor::Shape;
use crate::{DType, Error, Result, Tensor};

const OP: &str = "max_pool2d";

/// Batch, channels, and for each axis: extent, windows, kernel, stride, padding. `Pool` of the kernel file.
type Extents = [u32; 12];

/// For channels in whole vectors, and for any number of them.
const INSTANCES: &[&str] = &["f32", "f32_scalar", "bf16", "bf16_scalar", "f16", "f16_scalar"];
/// output, places, input, extents
const MAX: Kernel<(Address, Address, Address, Extents)> = Kernel::new("pool", "max_pool", INSTANCES);
/// output, input, places, extents
const GATHER: Kernel<(Address, Address, Address, Extents)> = Kernel::new("pool", "max_pool_gather", FLOATS);
/// output, input, places, extents
const SCATTER: Kernel<(Address, Address, Address, Extents)> = Kernel::new("pool", "max_pool_scatter", INSTANCES);

pub(crate) static KERNELS: &[Signature] = &[MAX.signature(), GATHER.signature(), SCATTER.signature()];

/// The kernels count positions in 31 bits, elements in 64.
fn extents(input: &Shape, output: &Shape, options: Pool2dOptions) -> Result<Extents> {
    const MOST: usize = 1 << 30;
    let axis = |axis: usize| {
        let (extent, padding) = (input[axis + 1], options.padding[axis]);
        // A stride beyond the padded input has one window, as any other such stride.
        let stride = options.stride[axis].min(extent + 2 * padding + 1);
        [extent, output[axis + 1], options.kernel[axis], stride, padding]
    };
    let ([batch, channels], [vertical, horizontal]) = ([input[0], input[3]], [axis(0), axis(1)]);
    let positions = |at: usize| batch.saturating_mul(vertical[at]).saturating_mul(horizontal[at]);
    if [positions(0), positions(1), vertical[3], horizontal[3], channels].iter().any(|&count| count > MOST) {
        let message = format!("input {input}, {options:?}: more than 2^30 positions are not supported on a GPU");
        return Err(Error::shape(OP, message));
    }
    let mut extents = [0; 12];
    let values = [batch, channels].into_iter().chain(vertical).chain(horizontal);
    extents.iter_mut().zip(values).for_each(|(extent, value)| *extent = value as u32);
    Ok(extents)
}

/// The instance, and the threads for a result.
fn launch_shape(result: &Tensor) -> (String, Geometry) {
    let (dtype, channels) = (result.dtype(), result.shape().last().copied().unwrap_or(1));
    let vector = 16 / dtype.size();
    let (instance, run) = if channels.is_multiple_of(vector) {
        (dtype.name().to_owned(), vector)
    } else {
        (format!("{dtype}_scalar"), 1)
    };
    (instance, Geometry::for_items(result.elements() / run, 256))
}

/// The largest values, of `shape`, and the bytes of their places in `u32`.
pub(super) fn max_pool(
    gpu: &'static Gpu,
    input: &Tensor,
    shape: &Shape,
    options: Pool2dOptions,
) -> Result<(Tensor, Tensor)> {
    let extents = extents(input.shape(), shape, options)?;
    let output = Tensor::empty_on(gpu, shape, input.dtype())?;
    let places = Tensor::empty_on(gpu, [output.elements(), size_of::<u32>()], DType::U8)?;
    let (instance, geometry) = launch_shape(&output);
    MAX.launch(gpu, &instance, geometry, (output.address()?, places.address()?, input.address()?, extents))?;
    Ok((output, places))
}

/// The chosen elements of `source`, or with `scatter` its elements added where they were chosen from.
pub(super) fn choose(gpu: &'static Gpu, source: &Tensor, choice: &Choice, scatter: bool) -> Result<Tensor> {
    let extents = extents(&choice.input, &choice.output, choice.options)?;
    let output = Tensor::empty_on(gpu, if scatter { &choice.input } else { &choice.output }, source.dtype())?;
    let arguments = (output.address()?, source.address()?, choice.positions.address()?, extents);
    if scatter {
        let (instance, geometry) = launch_shape(&output);
        SCATTER.launch(gpu, &instance, geometry, arguments)?;
    } else {
        GATHER.launch(gpu, source.dtype().name(), Geometry::for_items(output.elements(), 256), arguments)?;
    }
    Ok(output)
}
