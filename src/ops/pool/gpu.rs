//! A thread for each position of the result and some neighbouring channels.

use super::Law;
use crate::driver::seam::Address;
use crate::gpu::{FLOATS, Geometry, Gpu, Kernel, Signature};
use crate::tensor::Shape;
use crate::{DType, Error, Result, Tensor};

/// Batch, channels, and for each axis: extent, windows, kernel (0 for even windows), stride, padding, whether averages
/// count it. `Pool` of the kernel file.
pub(super) type Extents = [u32; 14];

/// For channels in whole vectors, and for any number of them.
const INSTANCES: &[&str] = &["f32", "f32_scalar", "bf16", "bf16_scalar", "f16", "f16_scalar"];
/// output, places, input, extents
const MAX: Kernel<(Address, Address, Address, Extents)> = Kernel::new("pool", "max_pool", INSTANCES);
/// output, input, places, extents
const GATHER: Kernel<(Address, Address, Address, Extents)> = Kernel::new("pool", "max_pool_gather", FLOATS);
/// output, input, places, extents
const SCATTER: Kernel<(Address, Address, Address, Extents)> = Kernel::new("pool", "max_pool_scatter", INSTANCES);
/// output, input, extents
const AVERAGE: Kernel<(Address, Address, Extents)> = Kernel::new("pool", "average_pool", INSTANCES);
/// output, input, extents
const SPREAD: Kernel<(Address, Address, Extents)> = Kernel::new("pool", "average_pool_spread", INSTANCES);

pub(crate) static KERNELS: &[Signature] =
    &[MAX.signature(), GATHER.signature(), SCATTER.signature(), AVERAGE.signature(), SPREAD.signature()];

/// The kernels count positions in 31 bits, elements in 64.
fn extents(op: &'static str, batch: usize, channels: usize, laws: [Law; 2]) -> Result<Extents> {
    const MOST: usize = 1 << 30;
    let axis = |law: Law| match law {
        Law::Sliding { extent, count, kernel, stride, padding, count_padding } => {
            // A stride beyond the padded input has one window, as any other such stride.
            let stride = stride.min(extent + 2 * padding + 1);
            ([extent, count, kernel, stride, padding, usize::from(count_padding)], extent + 2 * padding)
        }
        Law::Even { extent, count } => ([extent, count, 0, 1, 0, 0], extent.saturating_mul(count)),
    };
    let [(vertical, reach_y), (horizontal, reach_x)] = laws.map(axis);
    let positions = |at: usize| batch.saturating_mul(vertical[at]).saturating_mul(horizontal[at]);
    if [positions(0), positions(1), reach_y, reach_x, channels].iter().any(|&count| count > MOST) {
        let message = format!("{laws:?}, batch {batch}: more than 2^30 positions are not supported on a GPU");
        return Err(Error::shape(op, message));
    }
    let mut extents = [0; 14];
    let values = [batch, channels].into_iter().chain(vertical).chain(horizontal);
    extents.iter_mut().zip(values).for_each(|(extent, value)| *extent = value as u32);
    Ok(extents)
}

/// The instance, and the threads for a result.
fn launch_shape(result: &Tensor) -> (String, Geometry) {
    let (dtype, channels) = (result.dtype(), result.shape().last().copied().unwrap_or(1));
    let vector = 16 / dtype.size();
    let (instance, run) =
        if channels.is_multiple_of(vector) { (dtype.name().to_owned(), vector) } else { (format!("{dtype}_scalar"), 1) };
    (instance, Geometry::for_items(result.elements() / run, 256))
}

/// The largest values (batch, windows, windows, channels), and the bytes of their places in `u32`.
pub(super) fn max_pool(
    gpu: &'static Gpu,
    op: &'static str,
    input: &Tensor,
    shape: &Shape,
    laws: [Law; 2],
) -> Result<(Tensor, Tensor)> {
    let extents = extents(op, shape[0], shape[3], laws)?;
    let output = Tensor::empty_on(gpu, shape, input.dtype())?;
    let places = Tensor::empty_on(gpu, [output.elements(), size_of::<u32>()], DType::U8)?;
    let (instance, geometry) = launch_shape(&output);
    MAX.launch(gpu, &instance, geometry, (output.address()?, places.address()?, input.address()?, extents))?;
    Ok((output, places))
}

/// From `source` to a tensor of `shape`: the chosen elements of a map, or with `scatter` elements added where they were
/// chosen from.
pub(super) fn choose(
    gpu: &'static Gpu,
    op: &'static str,
    (source, places): (&Tensor, &Tensor),
    shape: &Shape,
    laws: [Law; 2],
    scatter: bool,
) -> Result<Tensor> {
    let extents = extents(op, shape[0], shape[3], laws)?;
    let output = Tensor::empty_on(gpu, shape, source.dtype())?;
    let arguments = (output.address()?, source.address()?, places.address()?, extents);
    if scatter {
        let (instance, geometry) = launch_shape(&output);
        SCATTER.launch(gpu, &instance, geometry, arguments)?;
    } else {
        GATHER.launch(gpu, source.dtype().name(), Geometry::for_items(output.elements(), 256), arguments)?;
    }
    Ok(output)
}

/// The averages over windows, or with `spread` their transpose.
pub(super) fn average(
    gpu: &'static Gpu,
    op: &'static str,
    input: &Tensor,
    shape: &Shape,
    laws: [Law; 2],
    spread: bool,
) -> Result<Tensor> {
    let extents = extents(op, shape[0], shape[3], laws)?;
    let output = Tensor::empty_on(gpu, shape, input.dtype())?;
    let (instance, geometry) = launch_shape(&output);
    let kernel = if spread { SPREAD } else { AVERAGE };
    kernel.launch(gpu, &instance, geometry, (output.address()?, input.address()?, extents))?;
    Ok(output)
}
