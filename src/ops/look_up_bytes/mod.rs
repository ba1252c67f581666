//! Values of bytes by a table for each channel.

pub(crate) mod cost;
mod cpu;
pub(crate) mod gpu;

pub(crate) use cpu::look_up;

use crate::tensor::{Buffer, Element, Place, place};
use crate::{DType, Error, Result, Tensor};

const OP: &str = "look_up_bytes";

/// Values of a byte.
const ROW: usize = 256;
/// Channels whose table every GPU holds in the shared memory of a block.
const MAX_CHANNELS: usize = 32;

/// The value of every byte by its channel's table: y(…, c) = table(c, x(…, c)). So images travel as they are stored, and
/// become normalised numbers, in the type that a model computes in, where they arrive. Not differentiable.
///
/// `bytes` is (…, channels) in `u8`, with 1 to 32 channels; `table` is (channels, 256) of a floating-point type, which is
/// that of the result. A result in half precision has the bits of the `f32` result cast to it.
///
/// ```
/// use gridgrad::{Tensor, ops};
/// let images = Tensor::new(&[0u8, 51, 255, 102], [1, 2, 2, 1])?; // (batch, height, width, channels)
/// let table: Vec<f32> = (0..256).map(|byte| byte as f32 / 255.0 - 0.5).collect();
/// let normalised = ops::look_up_bytes(&images, &Tensor::new(&table, [1, 256])?)?;
/// assert_eq!(normalised.to_vec::<f32>()?, [-0.5, 0.2 - 0.5, 0.5, 0.4 - 0.5]);
/// # Ok::<(), gridgrad::Error>(())
/// ```
///
/// # Errors
/// Where shapes, dtypes or devices do not fit.
pub fn look_up_bytes(bytes: &Tensor, table: &Tensor) -> Result<Tensor> {
    bytes.expect_dtype(OP, DType::U8)?;
    table.expect_float(OP)?;
    let channels = bytes.shape().last().copied().unwrap_or(0);
    if !(1..=MAX_CHANNELS).contains(&channels) {
        return Err(Error::shape(OP, format!("bytes {}, expected (…, channels) with 1 to 32 channels", bytes.shape())));
    }
    if **table.shape() != [channels, ROW] {
        return Err(Error::shape(OP, format!("table {}, expected ({channels}, {ROW})", table.shape())));
    }
    match place(OP, &[bytes, table])? {
        Place::Gpu(gpu) => gpu::look_up(gpu, bytes, table, channels),
        Place::Host => crate::dispatch_dtype!(table.dtype(), T => on_host::<T>(bytes, table)),
    }
}

fn on_host<T: Element>(bytes: &Tensor, table: &Tensor) -> Result<Tensor> {
    let mut values = Buffer::<T>::recycled(bytes.elements());
    cpu::look_up_in_parallel(&mut values, bytes.data()?, table.data()?);
    Tensor::from_buffer(values, bytes.shape().clone())
}
