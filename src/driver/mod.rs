//! temp
/// temp
pub fn require(device: crate::Device) -> crate::Result<()> {
    if device == crate::Device::Cpu {
        Ok(())
    } else {
        Err(crate::Error::DeviceUnavailable { device, reason: "none".into() })
    }
}
