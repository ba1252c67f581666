//! Softmax of rows.

use cudarc::cudnn::sys;

use super::{Cudnn, Layout, TensorDescriptor, one, zero};
use crate::{DType, Result, Tensor};

/// Softmax of rows, forward and backward.
pub struct Softmax<'a> {
    cudnn: &'a Cudnn,
    dtype: DType,
    elements: usize,
    rows: TensorDescriptor,
}

const ALGORITHM: sys::cudnnSoftmaxAlgorithm_t = sys::cudnnSoftmaxAlgorithm_t::CUDNN_SOFTMAX_ACCURATE;
const MODE: sys::cudnnSoftmaxMode_t = sys::cudnnSoftmaxMode_t::CUDNN_SOFTMAX_MODE_INSTANCE;

impl<'a> Softmax<'a> {
    /// For tensors of `rows` rows of `width` elements.
    ///
    /// # Errors
    /// Where the library does not take such tensors.
    pub fn new(cudnn: &'a Cudnn, dtype: DType, rows: usize, width: usize) -> Result<Self> {
        let descriptor = TensorDescriptor::map(cudnn, Layout::ChannelsFirst, dtype, [rows, width, 1, 1])?;
        Ok(Softmax { cudnn, dtype, elements: rows * width, rows: descriptor })
    }

    /// `output` from `input`.
    ///
    /// # Errors
    /// Where tensors do not fit, or the library fails.
    pub fn forward(&self, input: &Tensor, output: &mut Tensor) -> Result<()> {
        let x = self.cudnn.read(input, self.dtype, self.elements)?;
        let y = self.cudnn.write(output, self.dtype, self.elements)?;
        let rows = self.rows.0;
        self.cudnn.call("cudnnSoftmaxForward", |handle| {
            // SAFETY: the descriptor is alive, and both addresses are of live memory as large as it says.
            unsafe { sys::cudnnSoftmaxForward(handle, ALGORITHM, MODE, one(), rows, x, zero(), rows, y) }
        })
    }

    /// The gradient of the input from the output and its gradient.
    ///
    /// # Errors
    /// As [`Softmax::forward`].
    pub fn backward(&self, output: &Tensor, grad: &Tensor, input_grad: &mut Tensor) -> Result<()> {
        let y = self.cudnn.read(output, self.dtype, self.elements)?;
        let dy = self.cudnn.read(grad, self.dtype, self.elements)?;
        let dx = self.cudnn.write(input_grad, self.dtype, self.elements)?;
        let rows = self.rows.0;
        self.cudnn.call("cudnnSoftmaxBackward", |handle| {
            // SAFETY: the descriptor is alive, and all addresses are of live memory as large as it says.
            unsafe { sys::cudnnSoftmaxBackward(handle, ALGORITHM, MODE, one(), rows, y, rows, dy, zero(), rows, dx) }
        })
    }
}
