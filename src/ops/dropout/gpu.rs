//! A thread for 16 bytes; the mask is made from the stream's words as on the processor.

use super::{Granularity, Mask};
use crate::driver::seam::Address;
use crate::gpu::{FLOATS, Geometry, Gpu, Kernel, Signature};
use crate::random::Philox;
use crate::{Result, Tensor};

/// `RandomStream` of the kernels.
type Stream = [u32; 14];

/// output, input, elements, threshold, scale, stream
const DROPOUT: Kernel<(Address, Address, u64, u32, f32, Stream)> = Kernel::new("dropout", "dropout", FLOATS);
/// output, input, elements, elements of a sample, threshold, scale, stream
const DROP_PATH: Kernel<(Address, Address, u64, u64, u32, f32, Stream)> = Kernel::new("dropout", "drop_path", FLOATS);

pub(crate) static KERNELS: &[Signature] = &[DROPOUT.signature(), DROP_PATH.signature()];

const THREADS: u32 = 256;
/// What a thread loads at once.
const BYTES_PER_THREAD: usize = 16;

pub(super) fn apply(
    gpu: &'static Gpu,
    input: &Tensor,
    granularity: Granularity,
    mask: Mask,
    stream: Philox,
) -> Result<Tensor> {
    let (elements, dtype) = (input.elements(), input.dtype());
    let output = Tensor::empty_on(gpu, input.shape(), dtype)?;
    let (to, from, stream) = (output.address()?, input.address()?, stream.argument());
    let (count, threshold, scale) = (elements as u64, mask.threshold, mask.scale as f32);
    let geometry = Geometry::for_items((elements * dtype.size()).div_ceil(BYTES_PER_THREAD), THREADS);
    match granularity {
        Granularity::Element => {
            DROPOUT.launch(gpu, dtype.name(), geometry, (to, from, count, threshold, scale, stream))?;
        }
        Granularity::Sample => {
            let sample: usize = input.shape()[1..].iter().product();
            DROP_PATH.launch(
                gpu,
                dtype.name(),
                geometry,
                (to, from, count, sample as u64, threshold, scale, stream),
            )?;
        }
    }
    Ok(output)
}
