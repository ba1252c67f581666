//! The NVIDIA driver behind the seam, through the raw bindings of `cudarc`, which load it when first asked for.
//!
//! - `stream`: the context and its one stream; every call takes its turn there.
//! - `memory`: allocation in stream order, copies, fills.
//! - `launch`: modules, kernels, launches.
//! - `graph`: recording and replay.
//! - `timer`: how long work takes, by the device's clock.
//! - `cublaslt`: matrix products, where NVIDIA's library is found (`libraries`).
//! - `cudnn`: NVIDIA's convolutions and norms, as a baseline of benchmarks (feature `cudnn`).
//! - `errors`: the driver's codes as the crate's errors.
//!
//! Three variables of the environment are read when a [`Cuda`] is made: `GRIDGRAD_SYNC=1` waits after every launch, so
//! that a failure names its kernel; `GRIDGRAD_TF32=1` lets `f32` matrix products round their factors to TF32;
//! `GRIDGRAD_CUDA_LIBS` is a folder to look for NVIDIA's libraries in first.

mod cublaslt;
#[cfg(feature = "cudnn")]
pub mod cudnn;
mod errors;
mod graph;
mod launch;
mod libraries;
mod memory;
mod stream;
#[cfg(all(test, target_os = "linux"))]
mod tests;
mod timer;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};

use self::cublaslt::Products;
use self::launch::Modules;
use self::memory::Staging;
use self::stream::{Stream, lock, unavailable};
use super::seam::{Address, Arguments, Driver, Function, Geometry, Graph, MatrixProduct, Properties, Timer};
use crate::tensor::Device;
use crate::{Error, Result};

/// One NVIDIA GPU.
pub(crate) struct Cuda(Arc<Gpu>);

/// What a GPU's driver and the recordings made with it share.
struct Gpu {
    properties: Properties,
    images: Images,
    // Fields are dropped in this order: what lives in the context goes before the context.
    products: Option<Mutex<Products>>,
    staging: Mutex<Staging>,
    modules: Mutex<Modules>,
    /// The most dynamic shared memory that each function has been promised, by handle.
    promised: Mutex<HashMap<u64, u32>>,
    pool: Pool,
    stream: Arc<Stream>,
}

/// Where compiled modules come from.
#[derive(Clone, Copy)]
struct Images {
    find: fn(&str) -> Option<&'static [u8]>,
    /// The GPUs that they were compiled for, in words.
    targets: &'static str,
}

/// The device's default pool of memory.
struct Pool(sys::CUmemoryPool);

// SAFETY: a pool belongs to its device, not to a thread, and the driver locks it.
unsafe impl Send for Pool {}
// SAFETY: as above.
unsafe impl Sync for Pool {}

/// What this module calls. A driver that lacks one of these would make `cudarc` panic when it is called.
const CALLS: &[&str] = &[
    "cuInit",
    "cuDeviceGet",
    "cuDeviceGetName",
    "cuDeviceGetAttribute",
    "cuDeviceGetDefaultMemPool",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxSetCurrent",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuStreamBeginCapture_v2",
    "cuStreamEndCapture",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuEventElapsedTime_v2",
    "cuEventDestroy_v2",
    "cuMemPoolSetAttribute",
    "cuMemPoolTrimTo",
    "cuMemAllocAsync",
    "cuMemFreeAsync",
    "cuMemAllocHost_v2",
    "cuMemFreeHost",
    "cuMemGetInfo_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuMemsetD8Async",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuModuleGetFunction",
    "cuFuncGetParamInfo",
    "cuFuncSetAttribute",
    "cuLaunchKernel",
];

impl Cuda {
    /// The GPU of this ordinal, with the modules that were compiled into the crate.
    ///
    /// # Errors
    /// `DeviceUnavailable` where there is no driver, it is too old, or it refuses the GPU; `OutOfDeviceMemory` where
    /// other programs have left no room for the workspace of matrix products.
    pub(crate) fn new(ordinal: usize) -> Result<Self> {
        Self::with_images(
            ordinal,
            Images { find: crate::driver::image::image, targets: "the targets it was compiled for" },
        )
    }

    fn with_images(ordinal: usize, images: Images) -> Result<Self> {
        let device = Device::Cuda(ordinal);
        check_calls(device)?;
        result::init().map_err(|error| refused(device, "cuInit", error))?;
        let handle = result::device::get(i32::try_from(ordinal).unwrap_or(i32::MAX));
        let handle = handle.map_err(|error| refused(device, "cuDeviceGet", error))?;
        let properties = describe(device, handle)?;
        let pool = default_pool(device, handle)?;
        let stream = Arc::new(Stream::new(device, handle, is_set("GRIDGRAD_SYNC"))?);
        let staging = Mutex::new(Staging::new(stream.clone())?);
        let products = Products::new(stream.clone(), pool.0, properties.compute_capability)?.map(Mutex::new);
        let (modules, promised) = (Mutex::default(), Mutex::default());
        Ok(Cuda(Arc::new(Gpu { properties, images, products, staging, modules, promised, pool, stream })))
    }
}

/// Whether matrix products go to cuBLASLt.
pub(crate) fn has_cublaslt() -> bool {
    libraries::load_cublaslt()
}

fn is_set(variable: &str) -> bool {
    std::env::var_os(variable).is_some_and(|value| !value.is_empty() && value != "0")
}

fn check_calls(device: Device) -> Result<()> {
    // SAFETY: opens and closes the driver library, which runs its load-time initialisers and nothing else.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::DeviceUnavailable { device, reason: "no NVIDIA driver was found".into() });
    }
    let absent = CALLS.iter().find(|call| {
        // SAFETY: the library is there, as was just asked; the symbol is looked up and neither called nor read.
        unsafe { sys::culib().get::<*const std::ffi::c_void>(**call) }.is_err()
    });
    match absent {
        None => Ok(()),
        Some(call) => {
            let reason = format!("the NVIDIA driver has no {call}; install a newer one");
            Err(Error::DeviceUnavailable { device, reason })
        }
    }
}

fn refused(device: Device, call: &str, error: DriverError) -> Error {
    Error::DeviceUnavailable { device, reason: format!("{call}: {:?}", error.0) }
}

fn describe(device: Device, handle: sys::CUdevice) -> Result<Properties> {
    let attribute = |attribute| {
        // SAFETY: `handle` came from `cuDeviceGet`.
        let value = unsafe { result::device::get_attribute(handle, attribute) };
        value.map(i32::unsigned_abs).map_err(|error| refused(device, "cuDeviceGetAttribute", error))
    };
    if attribute(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED)? == 0 {
        let reason = "the GPU or its virtual machine has no stream-ordered memory (memory pools)".into();
        return Err(Error::DeviceUnavailable { device, reason });
    }
    Ok(Properties {
        name: result::device::get_name(handle).map_err(|error| refused(device, "cuDeviceGetName", error))?,
        compute_capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_memory_per_block: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
    })
}

/// The device's default pool, which keeps what is freed: left to itself it gives memory back at every wait.
fn default_pool(device: Device, handle: sys::CUdevice) -> Result<Pool> {
    let mut pool = std::ptr::null_mut();
    // SAFETY: writes one pointer to a place that outlives the call; `handle` came from `cuDeviceGet`.
    unavailable(device, "cuDeviceGetDefaultMemPool", unsafe { sys::cuDeviceGetDefaultMemPool(&mut pool, handle) })?;
    let mut threshold = u64::MAX;
    let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: this attribute is read from a 64-bit integer, which outlives the call.
    let code = unsafe { sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut threshold).cast()) };
    unavailable(device, "cuMemPoolSetAttribute", code)?;
    Ok(Pool(pool))
}

impl Driver for Cuda {
    fn device(&self) -> Device {
        self.0.stream.device()
    }

    fn properties(&self) -> &Properties {
        &self.0.properties
    }

    fn allocate(&self, bytes: usize) -> Result<Address> {
        memory::allocate(&mut self.0.stream.unrecorded_turn("allocate")?, self.0.pool.0, bytes)
    }

    fn free(&self, address: Address, _bytes: usize) {
        self.0.free_now_or_with_the_graph(address);
    }

    fn upload(&self, from: &[u8], to: Address) -> Result<()> {
        self.0.copy_to_device(from, to)
    }

    fn download(&self, from: Address, to: &mut [u8]) -> Result<()> {
        self.0.copy_to_host(from, to)
    }

    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<()> {
        self.0.copy_within(from, to, bytes)
    }

    fn fill(&self, to: Address, byte: u8, bytes: usize) -> Result<()> {
        self.0.set_bytes(to, byte, bytes)
    }

    fn load(&self, module: &'static str, kernel: &str) -> Result<Function> {
        self.0.find(module, kernel)
    }

    unsafe fn launch(&self, function: &Function, geometry: Geometry, arguments: &Arguments) -> Result<()> {
        // SAFETY: the caller's promise is the same.
        unsafe { self.0.run(function, geometry, arguments) }
    }

    unsafe fn matrix_product(&self, product: &MatrixProduct) -> Result<bool> {
        match &self.0.products {
            // SAFETY: the caller's promise is the same.
            Some(products) => unsafe { Products::run(products, &self.0.stream, product) },
            None => Ok(false),
        }
    }

    fn synchronize(&self) -> Result<()> {
        self.0.stream.unrecorded_turn("synchronize")?.synchronize()
    }

    fn start_timer(&self) -> Result<Option<Box<dyn Timer>>> {
        Ok(Some(Box::new(timer::Stretch::start(&self.0.stream)?)))
    }

    fn lend_stream(&self, body: &mut dyn FnMut(*mut std::ffi::c_void) -> Result<()>) -> Result<()> {
        let turn = self.0.stream.turn()?;
        body(turn.raw().cast())
    }

    fn begin_capture(&self) -> Result<()> {
        self.0.start_recording()
    }

    fn end_capture(&self) -> Result<Box<dyn Graph>> {
        self.0.finish_recording()
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        self.stream.quiet_turn(|turn| {
            turn.synchronize()?;
            lock(&self.modules).drain().try_for_each(|(_, module)| module.unload(turn))
        });
    }
}
