//! All kernels of the crate, for checks over all of them.

use crate::gpu::{Gpu, Signature};
use crate::{Device, Result};

fn signatures() -> impl Iterator<Item = Signature> {
    crate::ops::gpu::kernels().chain(crate::train::gpu_kernels())
}

/// Loads every kernel on `device` and compares the parameters that it was compiled with to those that it is called with.
/// Returns the number of kernels, each dtype counted; none on the processor, which has no kernels.
///
/// # Errors
/// Where this machine or this build does not offer the device, has no code for it, or a kernel is not as it is called.
///
/// ```
/// use gridgrad::{Device, check_kernels};
/// assert_eq!(check_kernels(Device::Cpu)?, 0);
/// # Ok::<(), gridgrad::Error>(())
/// ```
pub fn check_kernels(device: Device) -> Result<usize> {
    if device == Device::Cpu {
        return Ok(0);
    }
    let gpu = Gpu::open(device)?;
    signatures().try_fold(0, |count, signature| {
        gpu.check(signature)?;
        Ok(count + signature.instances.len().max(1))
    })
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_kernel_has_the_parameters_that_it_is_called_with() {
        assert_eq!(check_kernels(Device::Emulated).unwrap(), crate::driver::emulator::kernel_names().len());
    }

    #[test]
    fn no_kernel_is_without_a_caller() {
        let names = |signature: Signature| -> Vec<String> {
            let name = |instance: &&str| format!("{}_{instance}", signature.name);
            if signature.instances.is_empty() {
                vec![signature.name.to_owned()]
            } else {
                signature.instances.iter().map(name).collect()
            }
        };
        let called: BTreeSet<String> = signatures().flat_map(names).collect();
        let compiled: BTreeSet<String> = crate::driver::emulator::kernel_names().into_iter().collect();
        assert_eq!(compiled.difference(&called).collect::<Vec<_>>(), Vec::<&String>::new());
    }
}
