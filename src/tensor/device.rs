//! Where tensors live.

use std::time::{Duration, Instant};

use super::buffer::{MemoryStats, memory_stats, release_cached, reset_peak};
use crate::gpu::Gpu;
use crate::{Error, Result};

/// A place that holds tensors and computes with them.
///
/// ```
/// use gridgrad::Device;
/// assert_eq!("cuda:1".parse::<Device>()?, Device::Cuda(1));
/// assert_eq!(Device::Cpu.to_string(), "cpu");
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Device {
    /// The processor, all threads of the current rayon pool.
    Cpu,
    /// The NVIDIA GPU of this ordinal.
    Cuda(usize),
    /// The GPU kernels run on the processor, for tests (feature `emulator`).
    Emulated,
}

impl Device {
    /// The first GPU that can be used, else the processor.
    pub fn best() -> Device {
        crate::driver::best()
    }

    /// Bytes of tensor memory in use on this device.
    ///
    /// # Errors
    /// Where this machine or this build does not offer the device.
    pub fn memory_stats(self) -> Result<MemoryStats> {
        match self {
            Device::Cpu => Ok(memory_stats()),
            device => Ok(Gpu::open(device)?.memory_stats()),
        }
    }

    /// Starts a new measurement of the peak.
    ///
    /// # Errors
    /// As [`Device::memory_stats`].
    pub fn reset_peak(self) -> Result<()> {
        match self {
            Device::Cpu => reset_peak(),
            device => Gpu::open(device)?.reset_peak(),
        }
        Ok(())
    }

    /// Gives memory that is kept for later back to the system or the driver.
    ///
    /// # Errors
    /// As [`Device::memory_stats`].
    pub fn release_cached(self) -> Result<()> {
        match self {
            Device::Cpu => release_cached(),
            device => Gpu::open(device)?.release_cached(),
        }
        Ok(())
    }

    /// Waits for all work on this device.
    ///
    /// # Errors
    /// Where any of it failed.
    pub fn synchronize(self) -> Result<()> {
        match self {
            Device::Cpu => Ok(()),
            device => Gpu::open(device)?.synchronize(),
        }
    }

    /// How long the work that `body` gives this device takes: on a GPU by its own clock, from the first launch to the
    /// end of the last, so that what the host does meanwhile counts only where the GPU waits for it.
    ///
    /// # Errors
    /// Those of `body`, where work failed, and as [`Device::memory_stats`].
    ///
    /// ```
    /// use gridgrad::{DType, Device, Tensor};
    /// let x = Tensor::ones([64, 64], DType::F32)?;
    /// let time = Device::Cpu.time(|| x.matmul(&x).map(drop))?;
    /// assert!(time.as_nanos() > 0);
    /// # Ok::<(), gridgrad::Error>(())
    /// ```
    pub fn time(self, body: impl FnOnce() -> Result<()>) -> Result<Duration> {
        match self {
            Device::Cpu => {
                let start = Instant::now();
                body()?;
                Ok(start.elapsed())
            }
            device => Gpu::open(device)?.time(body),
        }
    }

    /// How often the host has waited for this device: synchronisations, and copies of values to the host.
    ///
    /// # Errors
    /// As [`Device::memory_stats`].
    pub fn waits(self) -> Result<u64> {
        match self {
            Device::Cpu => Ok(0),
            device => Ok(Gpu::open(device)?.waits()),
        }
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
            Device::Emulated => f.write_str("emulated"),
        }
    }
}

impl std::str::FromStr for Device {
    type Err = Error;

    /// Reads `cpu`, `cuda`, `cuda:N` or `emulated`.
    fn from_str(name: &str) -> Result<Self> {
        let unknown = || Error::Config(format!("device '{name}' is not one of cpu, cuda, cuda:N, emulated"));
        match name {
            "cpu" => Ok(Device::Cpu),
            "cuda" => Ok(Device::Cuda(0)),
            "emulated" => Ok(Device::Emulated),
            _ => name.strip_prefix("cuda:").and_then(|n| n.parse().ok()).map(Device::Cuda).ok_or_else(unknown),
        }
    }
}
