//! Where a command computes.

use clap::Args;
use gridgrad::{Device, Result, driver};

/// The flag `--device`.
#[derive(Args)]
pub struct DeviceFlag {
    /// cpu, cuda, cuda:N or emulated (GPU kernels run on the processor, where built with that feature); where absent the
    /// first GPU, or the processor if there is none
    #[arg(long, value_name = "DEVICE")]
    device: Option<Device>,
}

impl DeviceFlag {
    /// The device, which this machine and this build offer.
    pub fn get(&self) -> Result<Device> {
        let device = self.device.unwrap_or_else(Device::best);
        driver::require(device)?;
        Ok(device)
    }
}
