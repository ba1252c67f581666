//! The GPU backend: memory, kernels and recorded graphs, written once over the [seam](crate::driver::seam), so that
//! NVIDIA's driver and the emulator run the same code.
//!
//! A [`Gpu`] is opened on first use and kept for the life of the process. Its work runs in order on one stream: memory
//! that is freed can be handed out again at once, since whatever still reads it was launched before.

mod capture;
mod kernel;
mod pool;
#[cfg(all(test, feature = "emulator"))]
mod tests;
mod turns;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::driver::seam::{Address, Driver, Properties};
use crate::tensor::{Device, MemoryStats};
use crate::{Error, Result};

pub(crate) use capture::{Captured, replays};
use kernel::Functions;
pub(crate) use kernel::{FLOATS, Geometry, Kernel, Signature};
use pool::Pool;
use turns::{Turn, Turns};

/// One device with all that the crate keeps for it.
pub(crate) struct Gpu {
    driver: Box<dyn Driver>,
    turns: Turns,
    pool: Mutex<Pool>,
    functions: Mutex<Functions>,
    waits: AtomicU64,
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Gpu({})", self.device())
    }
}

impl Gpu {
    /// The backend of `device`, opened on the first call.
    ///
    /// # Errors
    /// [`Error::DeviceUnavailable`] with the reason where this machine or this build does not offer the device.
    pub fn open(device: Device) -> Result<&'static Gpu> {
        static OPENED: Mutex<Vec<(Device, &'static Gpu)>> = Mutex::new(Vec::new());
        let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, gpu)) = opened.iter().find(|(known, _)| *known == device) {
            return Ok(gpu);
        }
        crate::driver::require(device)?;
        let gpu: &'static Gpu = Box::leak(Box::new(Gpu::new(crate::driver::open(device)?)));
        opened.push((device, gpu));
        Ok(gpu)
    }

    fn new(driver: Box<dyn Driver>) -> Self {
        let exact = driver.device() == Device::Emulated;
        Gpu {
            driver,
            turns: Turns::default(),
            pool: Mutex::new(Pool::new(exact)),
            functions: Mutex::default(),
            waits: AtomicU64::new(0),
        }
    }

    /// The pool and the driver behind it, after the recording of any other thread.
    fn pool(&self) -> (Turn<'_>, MutexGuard<'_, Pool>) {
        let turn = self.driver();
        // The pool's invariants hold between its statements, so a panic elsewhere does not spoil it.
        (turn, self.pool.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The device's name in the crate's interface.
    pub fn device(&self) -> Device {
        self.driver.device()
    }

    /// What launch geometry depends on.
    pub fn properties(&self) -> &Properties {
        self.driver.properties()
    }

    /// The driver, for what is not memory; after the recording of any other thread, which would take up its work. Locks
    /// that a recording may need are taken with the driver in hand, not before.
    pub fn driver(&self) -> Turn<'_> {
        self.turns.take(&*self.driver)
    }

    /// Memory with unspecified content.
    ///
    /// # Errors
    /// [`Error::OutOfDeviceMemory`], after all cached memory has been given back in vain.
    pub fn allocate(&'static self, bytes: usize) -> Result<Memory> {
        let (driver, mut pool) = self.pool();
        let address = pool.take(&*driver, bytes)?;
        drop(pool);
        Ok(Memory { gpu: self, address, bytes })
    }

    /// Memory with a copy of `values`.
    ///
    /// # Errors
    /// As [`Gpu::allocate`], and where the device refuses.
    pub fn upload(&'static self, values: &[u8]) -> Result<Memory> {
        let memory = self.allocate(values.len())?;
        if !values.is_empty() {
            self.driver().upload(values, memory.address)?;
        }
        Ok(memory)
    }

    /// Waits for all work.
    ///
    /// # Errors
    /// Where any of it failed.
    pub fn synchronize(&self) -> Result<()> {
        self.waits.fetch_add(1, Ordering::Relaxed);
        self.driver().synchronize()
    }

    /// How long the work of `body` takes: by the device's clock, or where it has none by the host's, with waits before
    /// and behind.
    ///
    /// # Errors
    /// Those of `body`, and where work failed.
    pub fn time(&self, body: impl FnOnce() -> Result<()>) -> Result<Duration> {
        self.synchronize()?;
        let timer = self.driver().start_timer()?;
        if let Some(timer) = timer {
            body()?;
            self.waits.fetch_add(1, Ordering::Relaxed);
            let _turn = self.driver();
            return timer.stop();
        }
        let start = Instant::now();
        body()?;
        self.synchronize()?;
        Ok(start.elapsed())
    }

    /// How often the host has waited for the device: synchronisations and copies to the host.
    pub fn waits(&self) -> u64 {
        self.waits.load(Ordering::Relaxed)
    }

    /// Memory in use.
    pub fn memory_stats(&self) -> MemoryStats {
        self.pool().1.stats()
    }

    /// Starts a new measurement of the peak.
    pub fn reset_peak(&self) {
        self.pool().1.reset_peak();
    }

    /// Gives all cached memory back to the driver.
    pub fn release_cached(&self) {
        let (driver, mut pool) = self.pool();
        pool.release_cached(&*driver);
    }
}

/// Device memory, given back to the pool when dropped.
#[derive(Debug)]
pub(crate) struct Memory {
    gpu: &'static Gpu,
    address: Address,
    bytes: usize,
}

impl Memory {
    /// Its device.
    pub fn gpu(&self) -> &'static Gpu {
        self.gpu
    }

    /// Where it begins.
    pub fn address(&self) -> Address {
        self.address
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// A copy of it.
    ///
    /// # Errors
    /// As [`Gpu::allocate`], and where the device refuses.
    pub fn copy(&self) -> Result<Memory> {
        let copy = self.gpu.allocate(self.bytes)?;
        copy.copy_from(self)?;
        Ok(copy)
    }

    /// Takes over the content of `source`, which is as large.
    ///
    /// # Errors
    /// Where the sizes differ or the device refuses.
    pub fn copy_from(&self, source: &Memory) -> Result<()> {
        if source.bytes != self.bytes {
            let message = format!("{} bytes into {}", source.bytes, self.bytes);
            return Err(Error::shape("device copy", message));
        }
        if self.bytes > 0 {
            self.gpu.driver().copy(source.address, self.address, self.bytes)?;
        }
        Ok(())
    }

    /// Overwrites it with `values`, which are as many bytes. The address stays.
    ///
    /// # Errors
    /// Where the sizes differ or the device refuses.
    pub fn write(&self, values: &[u8]) -> Result<()> {
        if values.len() != self.bytes {
            return Err(Error::shape("upload", format!("{} bytes into {}", values.len(), self.bytes)));
        }
        if self.bytes > 0 {
            self.gpu.driver().upload(values, self.address)?;
        }
        Ok(())
    }

    /// Waits for all work and copies the content to the host.
    ///
    /// # Errors
    /// Where the device refuses, or earlier work failed.
    pub fn read(&self, into: &mut [u8]) -> Result<()> {
        if into.len() != self.bytes {
            return Err(Error::shape("download", format!("{} bytes into {}", self.bytes, into.len())));
        }
        self.gpu.waits.fetch_add(1, Ordering::Relaxed);
        if self.bytes > 0 {
            self.gpu.driver().download(self.address, into)?;
        }
        Ok(())
    }

    /// Sets every byte.
    ///
    /// # Errors
    /// Where the device refuses.
    pub fn fill(&self, byte: u8) -> Result<()> {
        if self.bytes > 0 {
            self.gpu.driver().fill(self.address, byte, self.bytes)?;
        }
        Ok(())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.gpu.pool().1.put(self.address, self.bytes);
    }
}
