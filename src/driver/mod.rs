//! GPUs: whether there is one, and the seam through which all GPU code reaches it.
//!
//! Two drivers stand behind the seam: NVIDIA's, loaded when first asked for and never linked, so that the same binary
//! starts on machines with and without one; and the emulator, which runs the same kernels on the processor.

// Drivers are C libraries, and kernels are C++. This module is the only one of the crate that calls foreign code.
#![allow(unsafe_code)]
#![cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "no driver uses all of the seam"))]

#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(feature = "emulator")]
pub mod emulator;
pub(crate) mod fatbin;
pub(crate) mod image;
mod probe;
pub(crate) mod seam;

use seam::{Arguments, Driver, Function, Geometry, MatrixProduct};

use crate::tensor::Device;
use crate::{Error, Result};

#[cfg(feature = "cudnn")]
pub use cuda::cudnn;
pub use image::kernels_built;
pub use probe::*;

/// The driver of `device`.
///
/// # Errors
/// Where this machine or this build does not offer the device.
pub(crate) fn open(device: Device) -> Result<Box<dyn Driver>> {
    require(device)?;
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(ordinal) => Ok(Box::new(cuda::Cuda::new(ordinal)?)),
        #[cfg(feature = "emulator")]
        Device::Emulated => Ok(Box::new(emulator::Emulator::new()?)),
        device => Err(Error::DeviceUnavailable { device, reason: "it has no driver in this build".into() }),
    }
}

/// Runs a kernel, if the arguments are of the sizes that it was compiled with.
///
/// # Errors
/// Where they are not, or the device refuses.
pub(crate) fn launch(
    driver: &dyn Driver,
    function: &Function,
    geometry: Geometry,
    arguments: &Arguments,
) -> Result<()> {
    if !arguments.sizes().eq(function.parameters.iter().copied()) {
        let reason = format!(
            "compiled with parameters of {:?} bytes, called with {:?}; build the crate again from clean",
            function.parameters,
            arguments.sizes().collect::<Vec<_>>()
        );
        return Err(Error::Kernel { device: driver.device(), kernel: function.name.clone(), reason });
    }
    // SAFETY: number and sizes are the kernel's. Addresses come from tensors that the caller holds, and freed memory is
    // only reused by later work of the same stream. That kernels stay within their buffers is what the emulator's guard
    // pages test for every op.
    unsafe { driver.launch(function, geometry, arguments) }
}

/// Whether cuBLASLt, to which a GPU's matrix products go where they can, is found on this machine.
pub fn has_cublaslt() -> bool {
    #[cfg(feature = "cuda")]
    return cuda::has_cublaslt();
    #[cfg(not(feature = "cuda"))]
    false
}

/// A matrix product by the vendor's library; false where there is none for it.
///
/// # Errors
/// Where the library fails.
pub(crate) fn matrix_product(driver: &dyn Driver, product: &MatrixProduct) -> Result<bool> {
    // SAFETY: addresses come from tensors that the caller holds, whose extents are those of the description.
    unsafe { driver.matrix_product(product) }
}
