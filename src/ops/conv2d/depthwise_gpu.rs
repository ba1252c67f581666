//! Depthwise convolutions: a thread for each position and some neighbouring channels.

use super::Geometry as Convolution;
use super::gpu::{Extents, Pass, extents, grid, pack, parts, sum_parts};
use crate::driver::seam::Address;
use crate::gpu::{Geometry, Gpu, Kernel, Signature};
use crate::{DType, Result, Tensor};

/// For channels in whole vectors, and for any number of them.
const INSTANCES: &[&str] = &["f32", "f32_scalar", "bf16", "bf16_scalar", "f16", "f16_scalar"];
/// output, source, packed weight, bias or null, extents, whether it is the input gradient
const GATHER: Kernel<(Address, Address, Address, Address, Extents, u32)> =
    Kernel::new("conv2d_depthwise", "conv2d_depthwise", INSTANCES);
/// partial sums, input, output gradient, extents, positions of a part
const WEIGHT: Kernel<(Address, Address, Address, Extents, u32)> =
    Kernel::new("conv2d_depthwise", "conv2d_depthwise_weight", INSTANCES);

pub(crate) static KERNELS: &[Signature] = &[GATHER.signature(), WEIGHT.signature()];

/// As in the kernel file: threads of a block along channels and along positions, and taps of a line.
const LANES: usize = 32;
const LINES: usize = 8;
const TAPS: usize = 4;

/// The instance, and the channels of a thread.
fn instance(dtype: DType, channels: usize) -> (String, usize) {
    let vector = 16 / dtype.size();
    if channels.is_multiple_of(vector) { (dtype.name().to_owned(), vector) } else { (format!("{dtype}_scalar"), 1) }
}

/// The weight as (tap, channel).
fn packed(gpu: &'static Gpu, g: &Convolution, weight: &Tensor) -> Result<Tensor> {
    pack(gpu, weight, [1, 1, g.taps(), g.in_channels], [0, 0, 1, g.taps()], g.in_channels)
}

pub(super) fn gather(
    gpu: &'static Gpu,
    g: &Convolution,
    pass: Pass,
    [source, weight]: [&Tensor; 2],
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let shape = if pass == Pass::Forward { g.output_shape() } else { g.input_shape() };
    let output = Tensor::empty_on(gpu, shape, source.dtype())?;
    let (extents, weight) = (extents(g)?, packed(gpu, g, weight)?);
    let (instance, run) = instance(source.dtype(), g.in_channels);
    let bias = bias.map_or(Ok(Address::NULL), Tensor::address)?;
    let geometry = Geometry::for_items(output.elements() / run, 256);
    let arguments =
        (output.address()?, source.address()?, weight.address()?, bias, extents, u32::from(pass != Pass::Forward));
    GATHER.launch(gpu, &instance, geometry, arguments)?;
    Ok(output)
}

pub(super) fn weight_gradient(gpu: &'static Gpu, g: &Convolution, input: &Tensor, grad: &Tensor) -> Result<Tensor> {
    let (extents, channels, taps) = (extents(g)?, g.in_channels, g.taps());
    let (instance, run) = instance(input.dtype(), channels);
    let blocks = channels.div_ceil(run * LANES) * g.kernel[1].div_ceil(TAPS) * g.kernel[0];
    // Two waves of the eight blocks that a multiprocessor holds.
    let most = (16 * gpu.properties().multiprocessors as usize).div_ceil(blocks);
    let (parts, part) = parts(g.batch * g.output[0] * g.output[1], most, LINES);
    let sums = Tensor::empty_on(gpu, [parts, taps, channels], DType::F32)?;
    let geometry = Geometry {
        block: [LANES as u32, LINES as u32, 1],
        ..grid(blocks.saturating_mul(parts), (LANES * LINES) as u32)?
    };
    let arguments = (sums.address()?, input.address()?, grad.address()?, extents, part as u32);
    WEIGHT.launch(gpu, &instance, geometry, arguments)?;
    sum_parts(gpu, g.weight_shape(), input.dtype(), &sums, ([1, channels, 1, taps], [0, 1, 0, channels]))
}
