//! Asks, at run time, whether this machine has a GPU. Every answer is in words that say what to do next.

use std::sync::OnceLock;

use super::image::kernels_built;
use crate::tensor::Device;
use crate::{Error, Result};

#[cfg(test)]
mod tests;

/// The oldest driver that works, as CUDA counts: 1000 × major + 10 × minor.
pub const OLDEST_DRIVER: i32 = 13_000;

/// The oldest compute capability that kernels are compiled for, (major, minor).
pub const OLDEST_GPU: (i32, i32) = (8, 0);

/// One GPU, as its driver describes it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct GpuInfo {
    /// The number that `--device cuda:N` takes.
    pub ordinal: usize,
    /// The product's name.
    pub name: String,
    /// Compute capability, (major, minor).
    pub compute_capability: (i32, i32),
    /// Memory of the card, in bytes.
    pub total_memory_bytes: usize,
    /// The newest CUDA version that the driver understands: 1000 × major + 10 × minor.
    pub driver_version: i32,
}

/// Why no GPU can be used, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NoGpu {
    /// The crate was compiled without its feature `cuda`.
    #[error("gridgrad was built without GPU support; build it again with `--features cuda`")]
    FeatureOff,
    /// The crate was compiled where there was no nvcc, so it holds no kernels.
    #[error(
        "gridgrad was built without nvcc, so it has no GPU kernels; run `python3 scripts/install_nvcc.py` and build it again"
    )]
    BuiltWithoutNvcc,
    /// No driver library on the loader's path.
    #[error("no NVIDIA driver was found (libcuda.so.1 or nvcuda.dll); install one if the machine has an NVIDIA GPU")]
    NoDriver,
    /// The driver works and sees no GPU.
    #[error(
        "the NVIDIA driver finds no GPU; check that `nvidia-smi` lists one and that CUDA_VISIBLE_DEVICES doesn't hide it"
    )]
    NoDevice,
    /// The library found is the one that developers link against, not a driver.
    #[error(
        "the libcuda found is the CUDA toolkit's stub, not a driver; take the toolkit's `stubs` folder out of LD_LIBRARY_PATH"
    )]
    StubLibrary,
    /// The driver is older than the functions that the crate calls.
    #[error(
        "the NVIDIA driver supports CUDA {}, but gridgrad needs CUDA {}; install a newer driver",
        cuda_version(*have), cuda_version(*need)
    )]
    DriverTooOld {
        /// The CUDA version that the driver supports: 1000 × major + 10 × minor.
        have: i32,
        /// The CUDA version needed, counted likewise.
        need: i32,
    },
    /// The driver refused with an error of its own.
    #[error("the NVIDIA driver refuses to start ({0}); see whether `nvidia-smi` works, and restart the machine if not")]
    Driver(String),
}

/// A CUDA version as people write it: 12020 is `12.2`.
pub fn cuda_version(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// The GPUs of this machine, at least one, or why there is none. Asks the driver once and keeps the answer.
///
/// ```
/// match gridgrad::driver::probe() {
///     Ok(gpus) => assert!(!gpus.is_empty()),
///     Err(reason) => println!("computing on the processor: {reason}"),
/// }
/// ```
pub fn probe() -> std::result::Result<Vec<GpuInfo>, NoGpu> {
    static ANSWER: OnceLock<std::result::Result<Vec<GpuInfo>, NoGpu>> = OnceLock::new();
    ANSWER.get_or_init(ask_driver).clone()
}

/// Checks that tensors can live on `device`.
///
/// # Errors
/// [`Error::DeviceUnavailable`] with the reason, for every device but [`Device::Cpu`] that this machine or this build
/// does not offer.
///
/// ```
/// use gridgrad::{Device, driver};
/// driver::require(Device::Cpu)?;
/// if let Err(reason) = driver::require(Device::Cuda(0)) {
///     println!("{reason}");
/// }
/// # Ok::<(), gridgrad::Error>(())
/// ```
pub fn require(device: Device) -> Result<()> {
    match device {
        Device::Cpu => Ok(()),
        Device::Cuda(ordinal) => usable(ordinal, &probe(), kernels_built()),
        Device::Emulated if cfg!(feature = "emulator") => Ok(()),
        Device::Emulated => {
            Err("gridgrad was built without the emulator; build it again with `--features emulator`".into())
        }
    }
    .map_err(|reason| Error::DeviceUnavailable { device, reason })
}

/// The first GPU that can compute, or else the processor.
///
/// ```
/// use gridgrad::driver;
/// assert!(driver::require(driver::best()).is_ok());
/// ```
pub fn best() -> Device {
    best_of(&probe(), kernels_built())
}

fn best_of(probed: &std::result::Result<Vec<GpuInfo>, NoGpu>, kernels_built: bool) -> Device {
    let ordinals = probed.iter().flatten().map(|gpu| gpu.ordinal);
    ordinals.into_iter().find(|&gpu| usable(gpu, probed, kernels_built).is_ok()).map_or(Device::Cpu, Device::Cuda)
}

fn usable(
    ordinal: usize,
    probed: &std::result::Result<Vec<GpuInfo>, NoGpu>,
    kernels_built: bool,
) -> std::result::Result<(), String> {
    let gpus = probed.as_ref().map_err(NoGpu::to_string)?;
    let Some(gpu) = gpus.iter().find(|gpu| gpu.ordinal == ordinal) else {
        return Err(format!("GPU {ordinal} was asked for, but the machine has {}, counted from 0", gpus.len()));
    };
    if !kernels_built {
        return Err(NoGpu::BuiltWithoutNvcc.to_string());
    }
    if gpu.compute_capability < OLDEST_GPU {
        let ((major, minor), name) = (gpu.compute_capability, &gpu.name);
        return Err(format!(
            "GPU {ordinal} ({name}) has compute capability {major}.{minor}, but gridgrad's kernels need {}.{}; \
             use another GPU or --device cpu",
            OLDEST_GPU.0, OLDEST_GPU.1
        ));
    }
    Ok(())
}

#[cfg(not(feature = "cuda"))]
fn ask_driver() -> std::result::Result<Vec<GpuInfo>, NoGpu> {
    Err(NoGpu::FeatureOff)
}

/// Asks in an order that never reaches a function that a missing or old driver lacks: `cudarc` panics on those.
#[cfg(feature = "cuda")]
fn ask_driver() -> std::result::Result<Vec<GpuInfo>, NoGpu> {
    use cudarc::driver::{result, sys};

    // SAFETY: opens and closes the driver library, which runs its load-time initialisers and nothing else.
    if !unsafe { sys::is_culib_present() } {
        return Err(NoGpu::NoDriver);
    }
    result::init().map_err(reason)?;
    let mut driver_version = 0;
    // SAFETY: the driver is loaded, and writes one `int` to a place that outlives the call.
    unsafe { sys::cuDriverGetVersion(&mut driver_version) }.result().map_err(reason)?;
    if driver_version < OLDEST_DRIVER {
        return Err(NoGpu::DriverTooOld { have: driver_version, need: OLDEST_DRIVER });
    }
    let count = result::device::get_count().map_err(reason)?;
    if count == 0 {
        return Err(NoGpu::NoDevice);
    }
    (0..count).map(|ordinal| describe(ordinal, driver_version)).collect()
}

#[cfg(feature = "cuda")]
fn describe(ordinal: i32, driver_version: i32) -> std::result::Result<GpuInfo, NoGpu> {
    use cudarc::driver::{result::device, sys::CUdevice_attribute as Attribute};

    let gpu = device::get(ordinal).map_err(reason)?;
    // SAFETY (all three): `gpu` came from `device::get` just above.
    let major = unsafe { device::get_attribute(gpu, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) };
    let minor = unsafe { device::get_attribute(gpu, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR) };
    let total_memory_bytes = unsafe { device::total_mem(gpu) }.map_err(reason)?;
    Ok(GpuInfo {
        ordinal: ordinal as usize,
        name: device::get_name(gpu).map_err(reason)?,
        compute_capability: (major.map_err(reason)?, minor.map_err(reason)?),
        total_memory_bytes,
        driver_version,
    })
}

/// Prints the error's code, never the `DriverError`: printing that asks the driver for words, which may not be able to.
#[cfg(feature = "cuda")]
fn reason(error: cudarc::driver::result::DriverError) -> NoGpu {
    use cudarc::driver::sys::CUresult;
    match error.0 {
        CUresult::CUDA_ERROR_NO_DEVICE => NoGpu::NoDevice,
        CUresult::CUDA_ERROR_STUB_LIBRARY => NoGpu::StubLibrary,
        code => NoGpu::Driver(format!("{code:?}")),
    }
}
