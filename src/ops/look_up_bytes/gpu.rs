//! Blocks that hold the table and stride over the bytes.

use super::ROW;
use crate::driver::seam::Address;
use crate::gpu::{FLOATS, Geometry, Gpu, Kernel, Signature};
use crate::{Result, Tensor};

/// output, bytes, table, elements, channels
const LOOK_UP_BYTES: Kernel<(Address, Address, Address, u64, u32)> =
    Kernel::new("look_up_bytes", "look_up_bytes", FLOATS);

pub(crate) static KERNELS: &[Signature] = &[LOOK_UP_BYTES.signature()];

/// As in the kernel file.
const THREADS: u32 = 256;
const BYTES_PER_THREAD: usize = 16;
/// Blocks that a multiprocessor holds at once, by their registers.
const BLOCKS_PER_MULTIPROCESSOR: usize = 6;

pub(super) fn look_up(gpu: &'static Gpu, bytes: &Tensor, table: &Tensor, channels: usize) -> Result<Tensor> {
    let (elements, dtype) = (bytes.elements(), table.dtype());
    let output = Tensor::empty_on(gpu, bytes.shape(), dtype)?;
    let tiles = elements.div_ceil(THREADS as usize * BYTES_PER_THREAD);
    let blocks = tiles.min(BLOCKS_PER_MULTIPROCESSOR * gpu.properties().multiprocessors as usize);
    let geometry = Geometry::blocks(blocks, THREADS).with_shared(channels * ROW * dtype.size());
    let arguments = (output.address()?, bytes.address()?, table.address()?, elements as u64, channels as u32);
    LOOK_UP_BYTES.launch(gpu, dtype.name(), geometry, arguments)?;
    Ok(output)
}
