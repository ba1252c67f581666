//! The emulated card: its memory, and the commands of its stream.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::abi::Kernel;
use super::fault::Fault;
use super::memory::Memory;
use super::state::Launch;
use super::{grid, refusal, schedule};
use crate::driver::seam::{Address, Arguments, Function, Geometry, Properties};
use crate::tensor::Device;
use crate::{Error, Result};

/// As on Hopper.
const SHARED_MEMORY_PER_BLOCK: u32 = 227 << 10;
const MEMORY: usize = 16 << 30;
const THREADS_PER_BLOCK: u64 = 1024;

/// Something for the stream to do.
pub(super) enum Command {
    Launch { function: Function, geometry: Geometry, arguments: Box<Arguments> },
    Copy { from: Address, to: Address, bytes: usize },
    Fill { to: Address, byte: u8, bytes: usize },
}

pub(super) struct Machine {
    pub properties: Properties,
    /// Not held while a kernel runs: a thread that waits for one may run another in the meantime.
    memory: Mutex<Memory>,
}

impl Machine {
    pub fn new() -> Self {
        let properties = Properties {
            name: "emulated GPU".into(),
            compute_capability: (9, 0),
            // A constant, so that launch geometry, and with it every bit, is the same on all machines.
            multiprocessors: 4,
            shared_memory_per_block: SHARED_MEMORY_PER_BLOCK,
        };
        Machine { properties, memory: Mutex::new(Memory::new(MEMORY)) }
    }

    pub fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What an earlier call found and could not return.
    fn pending(&self, call: &'static str) -> Result<()> {
        self.memory().pending.take().map_or(Ok(()), |reason| Err(refusal(call, reason)))
    }

    pub fn upload(&self, from: &[u8], to: Address) -> Result<()> {
        self.pending("upload")?;
        let mut memory = self.memory();
        memory.check_range("upload", to, from.len())?;
        memory.counters.transfers += 1;
        // SAFETY: the range lies within a live buffer, which cannot be freed while the lock is held, and which no host
        // slice overlaps.
        unsafe { (to.0 as *mut u8).copy_from_nonoverlapping(from.as_ptr(), from.len()) };
        Ok(())
    }

    pub fn download(&self, from: Address, to: &mut [u8]) -> Result<()> {
        self.pending("download")?;
        let mut memory = self.memory();
        memory.check_range("download", from, to.len())?;
        memory.counters.transfers += 1;
        // SAFETY: as in `upload`.
        unsafe { (from.0 as *const u8).copy_to_nonoverlapping(to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    pub fn synchronize(&self) -> Result<()> {
        self.pending("synchronize")?;
        let found = self.memory().check(false);
        found.map_or(Ok(()), |reason| Err(refusal("synchronize", reason)))
    }

    pub fn execute(&self, command: &Command) -> Result<()> {
        match command {
            Command::Launch { function, geometry, arguments } => self.launch(function, *geometry, arguments),
            &Command::Copy { from, to, bytes } => {
                self.pending("copy")?;
                let mut memory = self.memory();
                memory.check_range("copy", from, bytes)?;
                memory.check_range("copy", to, bytes)?;
                // SAFETY: both ranges lie within live buffers, as in `upload`; `copy` allows them to overlap.
                unsafe { std::ptr::copy(from.0 as *const u8, to.0 as *mut u8, bytes) };
                Ok(())
            }
            &Command::Fill { to, byte, bytes } => {
                self.pending("fill")?;
                let mut memory = self.memory();
                memory.check_range("fill", to, bytes)?;
                // SAFETY: as in `upload`.
                unsafe { (to.0 as *mut u8).write_bytes(byte, bytes) };
                Ok(())
            }
        }
    }

    /// Checks geometry and arguments, as a GPU's driver does.
    pub fn check_launch(&self, function: &Function, geometry: Geometry, arguments: &Arguments) -> Result<()> {
        let refuse = |reason| Err(kernel_error(function, reason));
        let Geometry { grid, block, shared } = geometry;
        if !arguments.sizes().eq(function.parameters.iter().copied()) {
            let (got, expected) = (arguments.sizes().collect::<Vec<_>>(), &function.parameters);
            return refuse(format!("got arguments of {got:?} bytes, expected {expected:?}"));
        }
        let threads: u64 = block.iter().map(|&n| u64::from(n)).product();
        if !(1..=THREADS_PER_BLOCK).contains(&threads) || block[2] > 64 {
            return refuse(format!(
                "a block of {block:?} threads; it has 1 to {THREADS_PER_BLOCK}, at most 64 along z"
            ));
        }
        if grid.contains(&0) || grid[0] > i32::MAX as u32 || grid[1].max(grid[2]) > u32::from(u16::MAX) {
            return refuse(format!(
                "a grid of {grid:?} blocks; it has at least 1 and at most [2^31 - 1, 65535, 65535]"
            ));
        }
        if shared > SHARED_MEMORY_PER_BLOCK {
            return refuse(format!("{shared} bytes of shared memory, but a block can have {SHARED_MEMORY_PER_BLOCK}"));
        }
        Ok(())
    }

    /// Runs a kernel that `check_launch` has let pass.
    pub fn launch(&self, function: &Function, geometry: Geometry, arguments: &Arguments) -> Result<()> {
        self.pending("launch")?;
        // SAFETY: `load` made the handle from a static kernel.
        let kernel = unsafe { &*(function.handle as *const Kernel) };
        let pointers = arguments.pointers();
        let launch = Launch {
            invoke: kernel.invoke,
            arguments: pointers.as_ptr(),
            grid: geometry.grid,
            block: geometry.block,
            shared: geometry.shared as usize,
            schedule: schedule(),
        };
        let result = grid::run(&launch, SHARED_MEMORY_PER_BLOCK as usize);
        let mut memory = self.memory();
        memory.counters.launches += 1;
        let around = memory.check(true);
        match (result, around) {
            (Err(fault), _) => Err(kernel_error(function, describe(&fault, &memory))),
            (Ok(()), Some(reason)) => Err(kernel_error(function, reason)),
            (Ok(()), None) => Ok(()),
        }
    }
}

fn kernel_error(function: &Function, reason: String) -> Error {
    Error::Kernel { device: Device::Emulated, kernel: function.name.clone(), reason }
}

fn describe(fault: &Fault, memory: &Memory) -> String {
    match fault.address {
        Some(address) => format!("{fault}, {}", memory.describe(address)),
        None => fault.to_string(),
    }
}
