//! Largest values over windows.

use cudarc::cudnn::sys;

use super::{Cudnn, Layout, PoolingDescriptor, TensorDescriptor, Windows, accept, int, one, zero};
use crate::{DType, Error, Result, Tensor};

/// The largest values over windows of channels-last maps, forward and backward.
pub struct MaxPool<'a> {
    cudnn: &'a Cudnn,
    dtype: DType,
    elements: [usize; 2],
    x: TensorDescriptor,
    y: TensorDescriptor,
    windows: PoolingDescriptor,
}

impl<'a> MaxPool<'a> {
    /// For these windows; their `out` channels are those of the input.
    ///
    /// # Errors
    /// Where the library does not take such maps.
    pub fn new(cudnn: &'a Cudnn, windows: Windows) -> Result<Self> {
        let Windows { dtype, input: [n, h, w, c], side, stride, padding, .. } = windows;
        let no_window = || Error::shape("cudnn", format!("{windows:?} has no window"));
        let [rows, columns] = windows.output_map().ok_or_else(no_window)?;
        let descriptor = PoolingDescriptor::new(cudnn)?;
        let [side, stride, padding] = [int(side)?, int(stride)?, int(padding)?];
        let mode = sys::cudnnPoolingMode_t::CUDNN_POOLING_MAX;
        let nan = sys::cudnnNanPropagation_t::CUDNN_PROPAGATE_NAN;
        // SAFETY: the descriptor is alive.
        let status = unsafe {
            sys::cudnnSetPooling2dDescriptor(descriptor.0, mode, nan, side, side, padding, padding, stride, stride)
        };
        accept(cudnn.gpu, "cudnnSetPooling2dDescriptor", status)?;
        Ok(MaxPool {
            cudnn,
            dtype,
            elements: [n * h * w * c, n * rows * columns * c],
            x: TensorDescriptor::map(cudnn, Layout::ChannelsLast, dtype, [n, c, h, w])?,
            y: TensorDescriptor::map(cudnn, Layout::ChannelsLast, dtype, [n, c, rows, columns])?,
            windows: descriptor,
        })
    }

    /// `output` from `input`.
    ///
    /// # Errors
    /// Where tensors do not fit, or the library fails.
    pub fn forward(&self, input: &Tensor, output: &mut Tensor) -> Result<()> {
        let x = self.cudnn.read(input, self.dtype, self.elements[0])?;
        let y = self.cudnn.write(output, self.dtype, self.elements[1])?;
        self.cudnn.call("cudnnPoolingForward", |handle| {
            // SAFETY: the descriptors are alive, and both addresses are of live memory as large as they say.
            unsafe { sys::cudnnPoolingForward(handle, self.windows.0, one(), self.x.0, x, zero(), self.y.0, y) }
        })
    }

    /// The gradient of the input from input, output and the output's gradient.
    ///
    /// # Errors
    /// As [`MaxPool::forward`].
    pub fn backward(&self, input: &Tensor, output: &Tensor, grad: &Tensor, input_grad: &mut Tensor) -> Result<()> {
        let [inputs, outputs] = self.elements;
        let x = self.cudnn.read(input, self.dtype, inputs)?;
        let y = self.cudnn.read(output, self.dtype, outputs)?;
        let dy = self.cudnn.read(grad, self.dtype, outputs)?;
        let dx = self.cudnn.write(input_grad, self.dtype, inputs)?;
        let (small, large) = (self.y.0, self.x.0);
        self.cudnn.call("cudnnPoolingBackward", |handle| {
            let windows = self.windows.0;
            // SAFETY: the descriptors are alive, and all addresses are of live memory as large as they say.
            unsafe {
                sys::cudnnPoolingBackward(handle, windows, one(), small, y, small, dy, large, x, zero(), large, dx)
            }
        })
    }
}
