//! Modules, the kernels in them, and their launches.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::CString;

use cudarc::driver::sys::{self, CUresult};

use super::stream::{Turn, lock};
use super::{Gpu, errors};
use crate::driver::seam::{Arguments, Function, Geometry};
use crate::{Error, Result};

/// Dynamic shared memory that a kernel may have without asking, in bytes.
const SHARED_WITHOUT_OPT_IN: u32 = 48 << 10;

/// Modules are loaded once and kept, with the kernels found in them so far.
pub(super) type Modules = HashMap<&'static str, Module>;

pub(super) struct Module {
    handle: sys::CUmodule,
    functions: HashMap<String, Function>,
}

// SAFETY: a module belongs to its context, not to a thread; it is used only under the stream's turn.
unsafe impl Send for Module {}

impl Module {
    /// Takes the module out of the context. No kernel of it may be running.
    pub(super) fn unload(self, turn: &mut Turn<'_>) -> Result<()> {
        // SAFETY: `load_module` made the handle, and nothing uses its functions after this.
        turn.check("cuModuleUnload", unsafe { sys::cuModuleUnload(self.handle) })
    }
}

/// A compiled module begins at a multiple of this, as in the files that hold them.
#[repr(C, align(64))]
#[derive(Clone, Copy, bytemuck::Zeroable)]
struct Block([u8; 64]);

// SAFETY: 64 bytes at an alignment of 64, without padding, and every content is valid.
unsafe impl bytemuck::Pod for Block {}

impl Gpu {
    pub(super) fn find(&self, module: &'static str, kernel: &str) -> Result<Function> {
        let mut modules = lock(&self.modules);
        if let Some(function) = modules.get(module).and_then(|module| module.functions.get(kernel)) {
            return Ok(function.clone());
        }
        let mut turn = self.stream.unrecorded_turn("load")?;
        let Module { handle, functions } = match modules.entry(module) {
            Entry::Occupied(loaded) => loaded.into_mut(),
            Entry::Vacant(place) => {
                let handle = self.load_module(&mut turn, module)?;
                place.insert(Module { handle, functions: HashMap::new() })
            }
        };
        let function = self.look_up(&mut turn, *handle, module, kernel)?;
        functions.insert(kernel.to_owned(), function.clone());
        Ok(function)
    }

    fn load_module(&self, turn: &mut Turn<'_>, module: &'static str) -> Result<sys::CUmodule> {
        let image = (self.images.find)(module).ok_or_else(|| {
            self.unfit(module, "not among the GPU code of this build; build it again where nvcc is found".into())
        })?;
        let mut blocks = vec![Block([0; 64]); image.len().div_ceil(64)];
        bytemuck::cast_slice_mut(&mut blocks)[..image.len()].copy_from_slice(image);
        let mut handle = std::ptr::null_mut();
        // SAFETY: writes one pointer to a place that outlives the call; `blocks` is a whole image, as nvcc wrote it,
        // of which the driver makes its own copy.
        let code = unsafe { sys::cuModuleLoadData(&mut handle, blocks.as_ptr().cast()) };
        if errors::is_unfit_image(code) {
            let (major, minor) = self.properties.compute_capability;
            let reason = format!(
                "{code:?}: the GPU is a {} of compute capability {major}.{minor}, and this build has code for {}; \
                 install a newer driver, or build with GRIDGRAD_CUDA_TARGETS naming this GPU",
                self.properties.name, self.images.targets
            );
            return Err(self.unfit(module, reason));
        }
        turn.check_memory("cuModuleLoadData", code, image.len())?;
        Ok(handle)
    }

    fn look_up(&self, turn: &mut Turn<'_>, module: sys::CUmodule, file: &str, kernel: &str) -> Result<Function> {
        let absent = || self.unfit(kernel, format!("no such kernel in module {file}; build the crate again"));
        let name = CString::new(kernel).map_err(|_| absent())?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: writes one pointer to a place that outlives the call; the module is loaded, and `name` ends in 0.
        match unsafe { sys::cuModuleGetFunction(&mut handle, module, name.as_ptr()) } {
            CUresult::CUDA_ERROR_NOT_FOUND => return Err(absent()),
            code => turn.check("cuModuleGetFunction", code)?,
        }
        let mut parameters = Vec::new();
        loop {
            let (mut offset, mut size) = (0, 0);
            // SAFETY: writes two integers to places that outlive the call; `handle` is a function of a loaded module.
            match unsafe { sys::cuFuncGetParamInfo(handle, parameters.len(), &mut offset, &mut size) } {
                CUresult::CUDA_ERROR_INVALID_VALUE => break,
                code => turn.check("cuFuncGetParamInfo", code)?,
            }
            parameters.push(size);
        }
        Ok(Function { handle: handle as u64, name: kernel.to_owned(), parameters })
    }

    /// # Safety
    /// As [`crate::driver::seam::Driver::launch`].
    pub(super) unsafe fn run(&self, function: &Function, geometry: Geometry, arguments: &Arguments) -> Result<()> {
        let Geometry { grid, block, shared } = geometry;
        if grid.contains(&0) {
            return Ok(());
        }
        let mut turn = self.stream.turn()?;
        let handle = function.handle as sys::CUfunction;
        self.promise_shared(&mut turn, function, shared)?;
        let mut pointers = arguments.pointers();
        // SAFETY: `load` made the handle, and its module is kept. The driver copies each parameter before it returns,
        // from memory that `arguments` owns; that they are those of the kernel is the caller's promise.
        let code = unsafe {
            let ([x, y, z], [threads_x, threads_y, threads_z]) = (grid, block);
            let (parameters, extra) = (pointers.as_mut_ptr().cast(), std::ptr::null_mut());
            let stream = turn.raw();
            sys::cuLaunchKernel(handle, x, y, z, threads_x, threads_y, threads_z, shared, stream, parameters, extra)
        };
        turn.check("cuLaunchKernel", code).map_err(|error| match error {
            Error::Gpu { device, call, reason } => {
                let reason = format!("{reason}: {} with grid {grid:?}, block {block:?}, {shared} B", function.name);
                Error::Gpu { device, call, reason }
            }
            other => other,
        })?;
        turn.launched(|name| name.push_str(&function.name))
    }

    /// Opts in to more shared memory than every kernel may have. What was promised once stays promised.
    fn promise_shared(&self, turn: &mut Turn<'_>, function: &Function, shared: u32) -> Result<()> {
        if shared <= SHARED_WITHOUT_OPT_IN {
            return Ok(());
        }
        let most = self.properties.shared_memory_per_block;
        if shared > most {
            let reason = format!("wants {shared} bytes of shared memory per block, the GPU has {most}");
            return Err(self.unfit(&function.name, reason));
        }
        let mut promised = lock(&self.promised);
        let promised = promised.entry(function.handle).or_default();
        if *promised < shared {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: `load` made the handle, and its module is kept.
            let code = unsafe { sys::cuFuncSetAttribute(function.handle as sys::CUfunction, attribute, shared as i32) };
            turn.check("cuFuncSetAttribute", code)?;
            *promised = shared;
        }
        Ok(())
    }

    fn unfit(&self, kernel: &str, reason: String) -> Error {
        Error::Kernel { device: self.stream.device(), kernel: kernel.into(), reason }
    }
}
