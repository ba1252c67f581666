//! What Rust and the host's kernels share. Layouts: kernels/emulator/shim.h.

use std::ffi::{CStr, c_char, c_void};

/// Three unsigned integers: `uint3`, `dim3`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Index {
    pub x: u32,
    pub y: u32,
    pub z: u32,
}

impl Index {
    /// The `linear`-th of a box of `extent`, x fastest.
    pub fn of(linear: u64, extent: [u32; 3]) -> Self {
        let (width, height) = (u64::from(extent[0]), u64::from(extent[1]));
        Index { x: (linear % width) as u32, y: (linear / width % height) as u32, z: (linear / (width * height)) as u32 }
    }
}

impl From<[u32; 3]> for Index {
    fn from([x, y, z]: [u32; 3]) -> Self {
        Index { x, y, z }
    }
}

impl std::fmt::Display for Index {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "({}, {}, {})", self.x, self.y, self.z)
    }
}

/// `gridgrad_block`
#[repr(C)]
pub(super) struct Block {
    pub index: Index,
    pub threads: Index,
    pub blocks: Index,
    pub dynamic_shared: *mut u8,
    pub runner: *mut c_void,
    /// A number of its own for every block of every launch.
    pub run: u64,
}

/// `gridgrad_thread`
#[repr(C)]
#[derive(Clone)]
pub(super) struct Thread {
    pub index: Index,
    pub lane: u32,
    pub phase: u32,
    pub exchange: *mut u8,
    pub block: *mut Block,
    pub file: *const c_char,
    pub line: u32,
}

/// Bytes of a warp's three exchange buffers.
pub(super) const EXCHANGE_BYTES: usize = 3 * 32 * 256;

/// `gridgrad_kernel`
#[repr(C)]
pub(super) struct Kernel {
    pub name: *const c_char,
    pub invoke: Invoke,
    pub parameter_count: u32,
    pub parameter_bytes: *const u32,
}

/// Calls a kernel as the running thread, with the addresses of its arguments.
pub(super) type Invoke = unsafe extern "C-unwind" fn(*const *const u8);

/// Gives a module's kernels and their count.
pub(super) type ModuleTable = unsafe extern "C" fn(count: *mut u32) -> *const Kernel;

include!(concat!(env!("OUT_DIR"), "/emulated.rs"));

unsafe extern "C" {
    /// Where this OS thread keeps which CUDA thread runs; null where none does.
    pub(super) safe fn gridgrad_current_slot() -> *mut *mut Thread;
}

/// `file:line`, or nothing for a null file.
///
/// # Safety
/// `file` is null or a C string that lives while the process does.
pub(super) unsafe fn place(file: *const c_char, line: u32) -> String {
    if file.is_null() {
        return String::new();
    }
    // SAFETY: the caller promises a C string.
    format!("{}:{line}", unsafe { CStr::from_ptr(file) }.to_string_lossy())
}

/// The kernels of `module`.
pub(super) fn kernels(module: &str) -> Option<&'static [Kernel]> {
    let (_, table) = MODULES.iter().find(|(name, _)| *name == module)?;
    let mut count = 0;
    // SAFETY: `KERNELS` in kernels/common/kernel.cuh defines the function: it gives a static array and its length.
    Some(unsafe {
        let first = table(&mut count);
        std::slice::from_raw_parts(first, count as usize)
    })
}

/// The kernels of the crate's modules, without those that test the emulator.
#[cfg(test)]
pub(crate) fn kernel_names() -> Vec<String> {
    let modules = MODULES.iter().map(|(name, _)| *name).filter(|name| !["faults", "primitives"].contains(name));
    let kernels = modules.filter_map(kernels).flatten();
    kernels.map(|kernel| kernel.name().to_string_lossy().into_owned()).collect()
}

impl Kernel {
    pub fn name(&self) -> &'static CStr {
        // SAFETY: the name is a string literal.
        unsafe { CStr::from_ptr(self.name) }
    }

    /// Bytes of each parameter.
    pub fn parameters(&self) -> &'static [u32] {
        // SAFETY: a static array of at least that many values.
        unsafe { std::slice::from_raw_parts(self.parameter_bytes, self.parameter_count as usize) }
    }
}
