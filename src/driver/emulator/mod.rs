//! A GPU on the processor: the kernels of `kernels/*.cu`, compiled by a C++20 compiler, with every CUDA thread a fiber.
//!
//! A block runs on one OS thread from start to end; blocks spread over the current rayon pool. Where threads wait for
//! each other (`__syncthreads`, warp collectives), a scheduler switches to the next fiber. The order in which it takes
//! them is free on a GPU, and is here what [`set_schedule`] says: results must not depend on it.
//!
//! What a GPU would do in silence comes back as an [`Error::Kernel`] that names block, thread and, where known, the line:
//!
//! - memory accesses outside buffers: each ends at a guard page and lies between canaries;
//! - shared memory: indices out of range, misaligned vectors, accesses outside, more than a block can have;
//! - threads that wait for each other in vain, with the list of who waits where;
//! - overflowing `int` arithmetic, shifts and divisions.
//!
//! Memory that was never written holds 0xFF bytes: a NaN, or an index far out of range. On systems other than Linux on
//! x86-64 and aarch64, a guard page ends the process instead.
//!
//! Static shared arrays exist when the first thread of a block comes to them, so the limit of a block counts those that
//! it uses. Collectives are strict: every lane in the mask has to come, and one that has exited never does.
//!
//! Measured on one core of a shared x86-64 server, optimised, blocks of 256 threads: 6 ns for a thread that never waits,
//! 50 ns for a thread's `__syncthreads`, 43 to 50 ns for its warp shuffle.

#[cfg(not(unix))]
compile_error!("the feature `emulator` needs a Unix system: it rests on memory mappings and guard pages");

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

mod abi;
mod fault;
mod grid;
mod machine;
mod memory;
mod pages;
mod runner;
mod shared;
mod signals;
mod state;

#[cfg(test)]
mod primitives_tests;
#[cfg(test)]
mod tests;

#[cfg(test)]
pub(crate) use abi::kernel_names;
use machine::{Command, Machine};
#[cfg(test)]
pub(crate) use memory::Counters;

use crate::driver::seam::{Address, Arguments, Driver, Function, Geometry, Graph, MatrixProduct, Properties};
use crate::tensor::Device;
use crate::{Error, Result};

static SCHEDULE: LazyLock<AtomicU64> = LazyLock::new(|| {
    AtomicU64::new(std::env::var("GRIDGRAD_SCHEDULE").ok().and_then(|seed| seed.trim().parse().ok()).unwrap_or(0))
});

/// Chooses the order in which the emulator runs the blocks of every later launch, and in which it resumes the threads of
/// a block each time it has a choice. 0 is the natural order; every other number is the seed of a random one. The
/// environment variable `GRIDGRAD_SCHEDULE` sets the first value.
///
/// A correct kernel gives the same bits under every schedule; one that lacks a barrier does not.
///
/// ```
/// gridgrad::driver::emulator::set_schedule(7);
/// // ... the same computation, compared bit by bit ...
/// gridgrad::driver::emulator::set_schedule(0);
/// ```
pub fn set_schedule(seed: u64) {
    SCHEDULE.store(seed, Ordering::Relaxed);
}

fn schedule() -> u64 {
    SCHEDULE.load(Ordering::Relaxed)
}

/// What was recorded, and the first thing that cannot be.
#[derive(Default)]
struct Recording {
    commands: Vec<Command>,
    refused: Option<&'static str>,
}

/// The driver of [`Device::Emulated`].
pub(crate) struct Emulator {
    machine: Arc<Machine>,
    recording: Mutex<Option<Recording>>,
}

impl Emulator {
    /// An emulated GPU of 16 GiB, which takes memory as it is asked for.
    ///
    /// # Errors
    /// `DeviceUnavailable` on an x86-64 processor without AVX2 and FMA, which the kernels are compiled for.
    pub(crate) fn new() -> Result<Self> {
        #[cfg(target_arch = "x86_64")]
        if !(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")) {
            let reason = "emulated kernels need a processor with AVX2 and FMA; use --device cpu".into();
            return Err(Error::DeviceUnavailable { device: Device::Emulated, reason });
        }
        signals::install();
        Ok(Emulator { machine: Arc::new(Machine::new()), recording: Mutex::new(None) })
    }

    /// Sets how many bytes can be allocated in all, to test what happens when there are no more.
    #[cfg(test)]
    pub(crate) fn set_memory_limit(&self, bytes: usize) {
        self.machine.memory().limit = bytes;
    }

    /// What was asked for so far.
    #[cfg(test)]
    pub(crate) fn counters(&self) -> Counters {
        self.machine.memory().counters
    }

    fn recording(&self) -> MutexGuard<'_, Option<Recording>> {
        self.recording.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails, now and at the recording's end, where a recording is under way.
    fn refuse_in_recording(&self, call: &'static str) -> Result<()> {
        match self.recording().as_mut() {
            None => Ok(()),
            Some(recording) => {
                recording.refused.get_or_insert(call);
                Err(refusal(call, "cannot be recorded"))
            }
        }
    }

    /// Runs a command, or records it.
    fn submit(&self, command: Command) -> Result<()> {
        if let Some(recording) = self.recording().as_mut() {
            recording.commands.push(command);
            return Ok(());
        }
        self.machine.execute(&command)
    }
}

fn refusal(call: &'static str, reason: impl Into<String>) -> Error {
    Error::Gpu { device: Device::Emulated, call, reason: reason.into() }
}

/// A recording's commands, to run again.
struct Recorded {
    machine: Arc<Machine>,
    commands: Vec<Command>,
}

impl Graph for Recorded {
    fn launch(&self) -> Result<()> {
        self.commands.iter().try_for_each(|command| self.machine.execute(command))
    }
}

impl Driver for Emulator {
    fn device(&self) -> Device {
        Device::Emulated
    }

    fn properties(&self) -> &Properties {
        &self.machine.properties
    }

    fn allocate(&self, bytes: usize) -> Result<Address> {
        self.refuse_in_recording("allocate")?;
        self.machine.memory().allocate(bytes)
    }

    fn free(&self, address: Address, bytes: usize) {
        self.machine.memory().free(address, bytes);
    }

    fn recycle(&self, address: Address, bytes: usize) {
        self.machine.memory().recycle(address, bytes);
    }

    fn upload(&self, from: &[u8], to: Address) -> Result<()> {
        self.refuse_in_recording("upload")?;
        self.machine.upload(from, to)
    }

    fn download(&self, from: Address, to: &mut [u8]) -> Result<()> {
        self.refuse_in_recording("download")?;
        self.machine.download(from, to)
    }

    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<()> {
        self.submit(Command::Copy { from, to, bytes })
    }

    fn fill(&self, to: Address, byte: u8, bytes: usize) -> Result<()> {
        self.submit(Command::Fill { to, byte, bytes })
    }

    fn load(&self, module: &'static str, kernel: &str) -> Result<Function> {
        let missing = |reason: String| Error::Kernel { device: Device::Emulated, kernel: kernel.into(), reason };
        let kernels = abi::kernels(module).ok_or_else(|| missing(format!("there is no file kernels/{module}.cu")))?;
        let found = kernels.iter().find(|found| found.name().to_bytes() == kernel.as_bytes());
        let found = found.ok_or_else(|| missing(format!("KERNELS in kernels/{module}.cu does not list it")))?;
        let handle = std::ptr::from_ref(found) as u64;
        let parameters = found.parameters().iter().map(|&bytes| bytes as usize).collect();
        Ok(Function { handle, name: kernel.into(), parameters })
    }

    unsafe fn launch(&self, function: &Function, geometry: Geometry, arguments: &Arguments) -> Result<()> {
        self.machine.check_launch(function, geometry, arguments)?;
        if let Some(recording) = self.recording().as_mut() {
            let (function, arguments) = (function.clone(), Box::new(arguments.clone()));
            recording.commands.push(Command::Launch { function, geometry, arguments });
            return Ok(());
        }
        self.machine.launch(function, geometry, arguments)
    }

    unsafe fn matrix_product(&self, _: &MatrixProduct) -> Result<bool> {
        Ok(false)
    }

    fn synchronize(&self) -> Result<()> {
        self.refuse_in_recording("synchronize")?;
        self.machine.synchronize()
    }

    fn begin_capture(&self) -> Result<()> {
        let mut recording = self.recording();
        if recording.is_some() {
            return Err(refusal("begin_capture", "a recording is under way"));
        }
        *recording = Some(Recording::default());
        Ok(())
    }

    fn end_capture(&self) -> Result<Box<dyn Graph>> {
        let recording = self.recording().take().ok_or_else(|| refusal("end_capture", "no recording is under way"))?;
        match recording.refused {
            Some(call) => Err(refusal("end_capture", format!("{call} was called, which cannot be recorded"))),
            None => Ok(Box::new(Recorded { machine: self.machine.clone(), commands: recording.commands })),
        }
    }
}
