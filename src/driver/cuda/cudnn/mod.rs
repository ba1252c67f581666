//! NVIDIA's cuDNN on the crate's tensors: what benchmarks compare this crate's kernels with. No op of the crate uses it.
//!
//! The library is loaded when first asked for, as cuBLASLt is; its work goes into the device's one stream. Descriptors
//! are made once per problem and kept, so that a call costs what it costs a program that does the same.

mod convolution;
mod norm;
mod pool;
mod softmax;

use std::ffi::c_void;

use cudarc::cudnn::sys::{self, cudnnStatus_t as Status};

use super::libraries;
use crate::gpu::Gpu;
use crate::{DType, Device, Error, Result, Tensor};

pub use convolution::{Convolution, Layout, Pass, Windows};
pub use norm::BatchNorm;
pub use pool::MaxPool;
pub use softmax::Softmax;

/// What this module calls. A library that lacks one of these would make `cudarc` panic when it is called.
const CALLS: &[&str] = &[
    "cudnnBatchNormalizationBackwardEx",
    "cudnnBatchNormalizationForwardTrainingEx",
    "cudnnConvolutionBackwardData",
    "cudnnConvolutionBackwardFilter",
    "cudnnConvolutionForward",
    "cudnnCreate",
    "cudnnCreateConvolutionDescriptor",
    "cudnnCreateFilterDescriptor",
    "cudnnCreatePoolingDescriptor",
    "cudnnCreateTensorDescriptor",
    "cudnnDeriveBNTensorDescriptor",
    "cudnnDestroy",
    "cudnnDestroyConvolutionDescriptor",
    "cudnnDestroyFilterDescriptor",
    "cudnnDestroyPoolingDescriptor",
    "cudnnDestroyTensorDescriptor",
    "cudnnFindConvolutionBackwardDataAlgorithmEx",
    "cudnnFindConvolutionBackwardFilterAlgorithmEx",
    "cudnnFindConvolutionForwardAlgorithmEx",
    "cudnnGetBatchNormalizationBackwardExWorkspaceSize",
    "cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize",
    "cudnnGetBatchNormalizationTrainingExReserveSpaceSize",
    "cudnnGetVersion",
    "cudnnPoolingBackward",
    "cudnnPoolingForward",
    "cudnnSetConvolution2dDescriptor",
    "cudnnSetConvolutionMathType",
    "cudnnSetFilter4dDescriptor",
    "cudnnSetPooling2dDescriptor",
    "cudnnSetStream",
    "cudnnSetTensor4dDescriptor",
    "cudnnSoftmaxBackward",
    "cudnnSoftmaxForward",
];

/// cuDNN on one GPU.
pub struct Cudnn {
    gpu: &'static Gpu,
    handle: sys::cudnnHandle_t,
}

impl std::fmt::Debug for Cudnn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Cudnn({}, {})", self.version(), self.gpu.device())
    }
}

impl Cudnn {
    /// The library on `device`.
    ///
    /// # Errors
    /// `DeviceUnavailable` with the reason where this machine has no such GPU or no cuDNN 9.
    pub fn open(device: Device) -> Result<Self> {
        let unavailable = |reason: String| Error::DeviceUnavailable { device, reason };
        if !matches!(device, Device::Cuda(_)) {
            return Err(unavailable("cuDNN computes on NVIDIA GPUs".into()));
        }
        let gpu = Gpu::open(device)?;
        if !libraries::load_cudnn() {
            return Err(unavailable("no cuDNN 9 was found".into()));
        }
        // SAFETY: the library was just found; the symbols are looked up and neither called nor read.
        let absent = CALLS.iter().find(|call| unsafe { sys::culib().get::<*const c_void>(**call) }.is_err());
        if let Some(call) = absent {
            return Err(unavailable(format!("cuDNN has no {call}; install version 9")));
        }
        let mut handle = std::ptr::null_mut();
        gpu.driver().lend_stream(&mut |stream| {
            // SAFETY: writes one pointer to a place that outlives the call; the context is current.
            let status = unsafe { sys::cudnnCreate(&mut handle) };
            if status != Status::CUDNN_STATUS_SUCCESS {
                return Err(unavailable(format!("cudnnCreate: {status:?}")));
            }
            // SAFETY: the handle was just made; the stream lives as long as the process.
            accept(gpu, "cudnnSetStream", unsafe { sys::cudnnSetStream(handle, stream.cast()) })
        })?;
        Ok(Cudnn { gpu, handle })
    }

    /// The library's version: 91900 is 9.19.0.
    pub fn version(&self) -> usize {
        // SAFETY: takes and returns numbers.
        unsafe { sys::cudnnGetVersion() }
    }

    /// Makes a call of the library with the context current.
    fn call(&self, name: &'static str, body: impl Fn(sys::cudnnHandle_t) -> Status) -> Result<()> {
        self.gpu.driver().lend_stream(&mut |_| accept(self.gpu, name, body(self.handle)))
    }

    /// The address of a tensor to read, which must be on this GPU, of this dtype and size.
    fn read(&self, tensor: &Tensor, dtype: DType, elements: usize) -> Result<*const c_void> {
        self.expect(tensor, dtype, elements)?;
        Ok(tensor.address()?.0 as *const c_void)
    }

    /// The address of a tensor to write.
    fn write(&self, tensor: &mut Tensor, dtype: DType, elements: usize) -> Result<*mut c_void> {
        self.expect(tensor, dtype, elements)?;
        Ok(tensor.address_mut()?.0 as *mut c_void)
    }

    fn expect(&self, tensor: &Tensor, dtype: DType, elements: usize) -> Result<()> {
        const OP: &str = "cudnn";
        tensor.expect_dtype(OP, dtype)?;
        if tensor.device() != self.gpu.device() {
            return Err(Error::DeviceMismatch { op: OP, left: self.gpu.device(), right: tensor.device() });
        }
        if tensor.elements() != elements {
            return Err(Error::shape(OP, format!("a tensor {}; expected {elements} elements", tensor.shape())));
        }
        Ok(())
    }

    /// Memory that calls work in; null where they need none.
    fn workspace(&self, bytes: usize) -> Result<Option<crate::gpu::Memory>> {
        if bytes == 0 { Ok(None) } else { self.gpu.allocate(bytes).map(Some) }
    }
}

impl Drop for Cudnn {
    fn drop(&mut self) {
        // Nobody is left to tell of a failure.
        // SAFETY: the handle is ours and not used any more; objects that use it borrow `self`.
        let _ = self.call("cudnnDestroy", |handle| unsafe { sys::cudnnDestroy(handle) });
    }
}

fn accept(gpu: &Gpu, call: &'static str, status: Status) -> Result<()> {
    match status {
        Status::CUDNN_STATUS_SUCCESS => Ok(()),
        status => Err(Error::Gpu { device: gpu.device(), call, reason: format!("{status:?}") }),
    }
}

fn pointer(memory: &Option<crate::gpu::Memory>) -> *mut c_void {
    memory.as_ref().map_or(std::ptr::null_mut(), |memory| memory.address().0 as *mut c_void)
}

fn bytes(memory: &Option<crate::gpu::Memory>) -> usize {
    memory.as_ref().map_or(0, crate::gpu::Memory::bytes)
}

/// An extent as the library counts.
fn int(extent: usize) -> Result<i32> {
    i32::try_from(extent).map_err(|_| Error::shape("cudnn", format!("an extent of {extent} has more than 31 bits")))
}

fn data_type(dtype: DType) -> Result<sys::cudnnDataType_t> {
    match dtype {
        DType::F32 => Ok(sys::cudnnDataType_t::CUDNN_DATA_FLOAT),
        DType::Bf16 => Ok(sys::cudnnDataType_t::CUDNN_DATA_BFLOAT16),
        DType::F16 => Ok(sys::cudnnDataType_t::CUDNN_DATA_HALF),
        got => Err(Error::DType { op: "cudnn", got, expected: "f32, bf16 or f16".into() }),
    }
}

/// The factors of a result and of what was there before, which calls read as `f32` for all dtypes of this module.
static ONE: f32 = 1.0;
static ZERO: f32 = 0.0;

fn one() -> *const c_void {
    (&raw const ONE).cast()
}

fn zero() -> *const c_void {
    (&raw const ZERO).cast()
}

/// Declares an owned descriptor of the library.
macro_rules! descriptor {
    ($(#[$doc:meta])* $name:ident($raw:ty), $create:ident, $destroy:ident) => {
        $(#[$doc])*
        struct $name($raw);

        impl $name {
            fn new(cudnn: &Cudnn) -> Result<Self> {
                let mut raw = std::ptr::null_mut();
                // SAFETY: writes one pointer to a place that outlives the call.
                let status = unsafe { sys::$create(&mut raw) };
                accept(cudnn.gpu, stringify!($create), status)?;
                Ok($name(raw))
            }
        }

        impl Drop for $name {
            fn drop(&mut self) {
                // SAFETY: the descriptor is ours and not used any more; launched work has no need of it. That fails
                // only for what is not a descriptor.
                let _ = unsafe { sys::$destroy(self.0) };
            }
        }
    };
}

descriptor! {
    /// Extents and layout of a tensor.
    TensorDescriptor(sys::cudnnTensorDescriptor_t), cudnnCreateTensorDescriptor, cudnnDestroyTensorDescriptor
}

descriptor! {
    /// Extents and layout of a convolution's weight.
    FilterDescriptor(sys::cudnnFilterDescriptor_t), cudnnCreateFilterDescriptor, cudnnDestroyFilterDescriptor
}

descriptor! {
    /// Padding, strides and arithmetic of a convolution.
    ConvolutionDescriptor(sys::cudnnConvolutionDescriptor_t),
    cudnnCreateConvolutionDescriptor, cudnnDestroyConvolutionDescriptor
}

descriptor! {
    /// Windows of a pooling.
    PoolingDescriptor(sys::cudnnPoolingDescriptor_t), cudnnCreatePoolingDescriptor, cudnnDestroyPoolingDescriptor
}

impl TensorDescriptor {
    /// A dense map (batch, channels, height, width), in either layout.
    fn map(cudnn: &Cudnn, layout: Layout, dtype: DType, extents: [usize; 4]) -> Result<Self> {
        let descriptor = Self::new(cudnn)?;
        let [n, c, h, w] = [int(extents[0])?, int(extents[1])?, int(extents[2])?, int(extents[3])?];
        // SAFETY: the descriptor is alive.
        let status =
            unsafe { sys::cudnnSetTensor4dDescriptor(descriptor.0, layout.format(), data_type(dtype)?, n, c, h, w) };
        accept(cudnn.gpu, "cudnnSetTensor4dDescriptor", status)?;
        Ok(descriptor)
    }
}
#[cfg(test)]
mod tests;
