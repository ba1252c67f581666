//! A warp for each row of logits.

use super::Form;
use crate::driver::seam::Address;
use crate::gpu::{FLOATS, Geometry, Gpu, Kernel, Signature};
use crate::{Result, Tensor};

/// output, input, rows, width, logarithm
const FORWARD: Kernel<(Address, Address, u64, u32, u32)> = Kernel::new("softmax", "softmax_forward", FLOATS);
/// input gradient, output, output gradient, rows, width, logarithm
const BACKWARD: Kernel<(Address, Address, Address, u64, u32, u32)> = Kernel::new("softmax", "softmax_backward", FLOATS);

pub(crate) static KERNELS: &[Signature] = &[FORWARD.signature(), BACKWARD.signature()];

/// As `ROWS` in the kernel file: rows of a block.
const ROWS_PER_BLOCK: usize = 8;

fn geometry(rows: usize) -> Geometry {
    Geometry::blocks(rows.div_ceil(ROWS_PER_BLOCK), 32 * ROWS_PER_BLOCK as u32)
}

pub(super) fn forward(gpu: &'static Gpu, form: Form, input: &Tensor, width: usize) -> Result<Tensor> {
    let output = Tensor::empty_on(gpu, input.shape(), input.dtype())?;
    let rows = input.elements() / width.max(1);
    let arguments = (output.address()?, input.address()?, rows as u64, width as u32, form as u32);
    FORWARD.launch(gpu, input.dtype().name(), geometry(rows), arguments)?;
    Ok(output)
}

pub(super) fn backward(gpu: &'static Gpu, form: Form, output: &Tensor, grad: &Tensor, width: usize) -> Result<Tensor> {
    let gradient = Tensor::empty_on(gpu, grad.shape(), grad.dtype())?;
    let rows = grad.elements() / width.max(1);
    let arguments = (gradient.address()?, output.address()?, grad.address()?, rows as u64, width as u32, form as u32);
    BACKWARD.launch(gpu, grad.dtype().name(), geometry(rows), arguments)?;
    Ok(gradient)
}
