//! Batch normalisation while training.

use std::ptr::{null, null_mut};

use cudarc::cudnn::sys;

use super::{Cudnn, Layout, TensorDescriptor, accept, bytes, one, pointer, zero};
use crate::gpu::Memory;
use crate::{DType, Result, Tensor};

/// Batch normalisation of channels-last maps by the batch's own statistics, forward and backward, with weights, biases and
/// statistics in `f32`.
pub struct BatchNorm<'a> {
    cudnn: &'a Cudnn,
    dtype: DType,
    elements: usize,
    channels: usize,
    eps: f64,
    map: TensorDescriptor,
    parameters: TensorDescriptor,
    workspaces: [Option<Memory>; 2],
    /// What the forward pass leaves for the backward pass.
    reserve: Option<Memory>,
    /// Mean and inverse deviation, likewise.
    mean: Tensor,
    deviation: Tensor,
}

const MODE: sys::cudnnBatchNormMode_t = sys::cudnnBatchNormMode_t::CUDNN_BATCHNORM_SPATIAL_PERSISTENT;
const OPS: sys::cudnnBatchNormOps_t = sys::cudnnBatchNormOps_t::CUDNN_BATCHNORM_OPS_BN;

impl<'a> BatchNorm<'a> {
    /// For maps of (batch, height, width, channels).
    ///
    /// # Errors
    /// Where the library does not take such maps.
    pub fn new(cudnn: &'a Cudnn, dtype: DType, extents: [usize; 4], eps: f64) -> Result<Self> {
        let [n, h, w, c] = extents;
        let map = TensorDescriptor::map(cudnn, Layout::ChannelsLast, dtype, [n, c, h, w])?;
        let parameters = TensorDescriptor::new(cudnn)?;
        // SAFETY: both descriptors are alive.
        let status = unsafe { sys::cudnnDeriveBNTensorDescriptor(parameters.0, map.0, MODE) };
        accept(cudnn.gpu, "cudnnDeriveBNTensorDescriptor", status)?;
        let (x, p) = (map.0, parameters.0);
        let [mut forward, mut backward, mut reserve] = [0usize; 3];
        let (to_forward, to_backward, to_reserve) = (&raw mut forward, &raw mut backward, &raw mut reserve);
        cudnn.call("cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize", |handle| {
            // SAFETY: the descriptors are alive; z and the activation do not exist for these ops. One size is written to
            // a place that outlives the call.
            unsafe {
                sys::cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(
                    handle,
                    MODE,
                    OPS,
                    x,
                    null_mut(),
                    x,
                    p,
                    null_mut(),
                    to_forward,
                )
            }
        })?;
        cudnn.call("cudnnGetBatchNormalizationBackwardExWorkspaceSize", |handle| {
            // SAFETY: as above; without an activation y is not needed either.
            unsafe {
                sys::cudnnGetBatchNormalizationBackwardExWorkspaceSize(
                    handle,
                    MODE,
                    OPS,
                    x,
                    null_mut(),
                    x,
                    null_mut(),
                    x,
                    p,
                    null_mut(),
                    to_backward,
                )
            }
        })?;
        cudnn.call("cudnnGetBatchNormalizationTrainingExReserveSpaceSize", |handle| {
            // SAFETY: as above.
            unsafe {
                sys::cudnnGetBatchNormalizationTrainingExReserveSpaceSize(handle, MODE, OPS, null_mut(), x, to_reserve)
            }
        })?;
        Ok(BatchNorm {
            workspaces: [cudnn.workspace(forward)?, cudnn.workspace(backward)?],
            reserve: cudnn.workspace(reserve)?,
            mean: Tensor::empty_on(cudnn.gpu, [c], DType::F32)?,
            deviation: Tensor::empty_on(cudnn.gpu, [c], DType::F32)?,
            elements: n * h * w * c,
            channels: c,
            cudnn,
            dtype,
            eps,
            map,
            parameters,
        })
    }

    /// `output` from `input`, weight and bias (channels).
    ///
    /// # Errors
    /// Where tensors do not fit, or the library fails.
    pub fn forward(&mut self, input: &Tensor, [weight, bias]: [&Tensor; 2], output: &mut Tensor) -> Result<()> {
        let x = self.cudnn.read(input, self.dtype, self.elements)?;
        let scale = self.cudnn.read(weight, DType::F32, self.channels)?;
        let shift = self.cudnn.read(bias, DType::F32, self.channels)?;
        let y = self.cudnn.write(output, self.dtype, self.elements)?;
        let mean = self.cudnn.write(&mut self.mean, DType::F32, self.channels)?;
        let deviation = self.cudnn.write(&mut self.deviation, DType::F32, self.channels)?;
        let (map, parameters) = (self.map.0, self.parameters.0);
        let ([workspace, _], reserve) = (&self.workspaces, &self.reserve);
        self.cudnn.call("cudnnBatchNormalizationForwardTrainingEx", |handle| {
            // SAFETY: descriptors and work memory live as long as `self`, all addresses are of live memory as large as
            // the descriptors say; z, running statistics and activation are absent, which these ops allow.
            unsafe {
                sys::cudnnBatchNormalizationForwardTrainingEx(
                    handle,
                    MODE,
                    OPS,
                    one(),
                    zero(),
                    map,
                    x,
                    null_mut(),
                    null(),
                    map,
                    y,
                    parameters,
                    scale,
                    shift,
                    1.0,
                    null_mut(),
                    null_mut(),
                    self.eps,
                    mean,
                    deviation,
                    null_mut(),
                    pointer(workspace),
                    bytes(workspace),
                    pointer(reserve),
                    bytes(reserve),
                )
            }
        })
    }

    /// The gradients of input, weight and bias, after [`BatchNorm::forward`] of the same input.
    ///
    /// # Errors
    /// As [`BatchNorm::forward`].
    pub fn backward(
        &self,
        input: &Tensor,
        [weight, bias]: [&Tensor; 2],
        grad: &Tensor,
        [input_grad, weight_grad, bias_grad]: [&mut Tensor; 3],
    ) -> Result<()> {
        let x = self.cudnn.read(input, self.dtype, self.elements)?;
        let dy = self.cudnn.read(grad, self.dtype, self.elements)?;
        let scale = self.cudnn.read(weight, DType::F32, self.channels)?;
        let shift = self.cudnn.read(bias, DType::F32, self.channels)?;
        let mean = self.cudnn.read(&self.mean, DType::F32, self.channels)?;
        let deviation = self.cudnn.read(&self.deviation, DType::F32, self.channels)?;
        let dx = self.cudnn.write(input_grad, self.dtype, self.elements)?;
        let dscale = self.cudnn.write(weight_grad, DType::F32, self.channels)?;
        let dshift = self.cudnn.write(bias_grad, DType::F32, self.channels)?;
        let (map, parameters) = (self.map.0, self.parameters.0);
        let ([_, workspace], reserve) = (&self.workspaces, &self.reserve);
        self.cudnn.call("cudnnBatchNormalizationBackwardEx", |handle| {
            // SAFETY: as for the forward pass; y and the gradient of z are absent, which these ops allow.
            unsafe {
                sys::cudnnBatchNormalizationBackwardEx(
                    handle,
                    MODE,
                    OPS,
                    one(),
                    zero(),
                    one(),
                    zero(),
                    map,
                    x,
                    null_mut(),
                    null(),
                    map,
                    dy,
                    null_mut(),
                    null_mut(),
                    map,
                    dx,
                    parameters,
                    scale,
                    shift,
                    dscale,
                    dshift,
                    self.eps,
                    mean,
                    deviation,
                    null_mut(),
                    pointer(workspace),
                    bytes(workspace),
                    pointer(reserve),
                    bytes(reserve),
                )
            }
        })
    }
}
