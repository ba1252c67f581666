//! One mapping from the driver's codes to the crate's errors.
//!
//! Reasons are made of the code's name only: to print a `DriverError` of `cudarc` asks the driver for words, which a
//! driver that has just failed may not have.

use cudarc::driver::sys::CUresult;

use crate::Error;
use crate::tensor::Device;

/// What the device had when it refused memory, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    pub requested: usize,
    pub free: usize,
    pub total: usize,
}

/// Whether nothing works on the device after this code: the work failed, not the call, and the driver answers every
/// further call of the process with the same code.
pub(super) fn is_sticky(code: CUresult) -> bool {
    use CUresult::*;
    matches!(
        code,
        CUDA_ERROR_DEVICE_UNAVAILABLE
            | CUDA_ERROR_ECC_UNCORRECTABLE
            | CUDA_ERROR_NVLINK_UNCORRECTABLE
            | CUDA_ERROR_CONTAINED
            | CUDA_ERROR_ILLEGAL_ADDRESS
            | CUDA_ERROR_LAUNCH_TIMEOUT
            | CUDA_ERROR_CONTEXT_IS_DESTROYED
            | CUDA_ERROR_ASSERT
            | CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUDA_ERROR_MISALIGNED_ADDRESS
            | CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUDA_ERROR_INVALID_PC
            | CUDA_ERROR_LAUNCH_FAILED
            | CUDA_ERROR_TENSOR_MEMORY_LEAK
            | CUDA_ERROR_MPS_CLIENT_TERMINATED
            | CUDA_ERROR_EXTERNAL_DEVICE
    )
}

/// Why the device is lost: the code, and where to look. `launched` is the last work it accepted, empty where it had
/// none; after it nothing was known to be well unless launches are `synchronous`.
pub(super) fn loss(call: &str, code: CUresult, launched: &str, synchronous: bool) -> String {
    match (launched, synchronous) {
        ("", _) => format!("{code:?} in {call}"),
        (kernel, true) => format!("{code:?} in kernel {kernel}"),
        (kernel, false) => {
            format!("{code:?} in kernel {kernel} or one launched before it (GRIDGRAD_SYNC=1 finds out which)")
        }
    }
}

/// The error for a code that is not success and not sticky.
pub(super) fn refusal(device: Device, call: &'static str, code: CUresult, room: Option<Room>) -> Error {
    match (code, room) {
        (CUresult::CUDA_ERROR_OUT_OF_MEMORY, Some(Room { requested, free, total })) => {
            Error::OutOfDeviceMemory { device, requested, free, total }
        }
        _ => Error::Gpu { device, call, reason: format!("{code:?}") },
    }
}

/// Whether a module was refused for what it holds: no code for this card, or code newer than the driver.
pub(super) fn is_unfit_image(code: CUresult) -> bool {
    use CUresult::*;
    matches!(
        code,
        CUDA_ERROR_NO_BINARY_FOR_GPU
            | CUDA_ERROR_INVALID_IMAGE
            | CUDA_ERROR_INVALID_PTX
            | CUDA_ERROR_UNSUPPORTED_PTX_VERSION
            | CUDA_ERROR_JIT_COMPILER_NOT_FOUND
            | CUDA_ERROR_JIT_COMPILATION_DISABLED
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICE: Device = Device::Cuda(1);

    #[test]
    fn failed_work_is_told_from_refused_calls() {
        use CUresult::*;
        for code in [
            CUDA_ERROR_ILLEGAL_ADDRESS,
            CUDA_ERROR_LAUNCH_FAILED,
            CUDA_ERROR_ASSERT,
            CUDA_ERROR_ECC_UNCORRECTABLE,
            CUDA_ERROR_DEVICE_UNAVAILABLE,
            CUDA_ERROR_HARDWARE_STACK_ERROR,
            CUDA_ERROR_LAUNCH_TIMEOUT,
        ] {
            assert!(is_sticky(code), "{code:?}");
        }
        for code in [
            CUDA_SUCCESS,
            CUDA_ERROR_INVALID_VALUE,
            CUDA_ERROR_OUT_OF_MEMORY,
            CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES,
            CUDA_ERROR_STREAM_CAPTURE_INVALIDATED,
            CUDA_ERROR_NO_BINARY_FOR_GPU,
        ] {
            assert!(!is_sticky(code), "{code:?}");
        }
    }

    #[test]
    fn a_loss_names_the_kernel_and_how_sure_that_is() {
        let code = CUresult::CUDA_ERROR_ILLEGAL_ADDRESS;
        assert_eq!(loss("cuMemFreeAsync", code, "", false), "CUDA_ERROR_ILLEGAL_ADDRESS in cuMemFreeAsync");
        assert_eq!(loss("cuLaunchKernel", code, "gelu_f32", true), "CUDA_ERROR_ILLEGAL_ADDRESS in kernel gelu_f32");
        assert!(loss("cuLaunchKernel", code, "gelu_f32", false).contains("gelu_f32 or one launched before it"));
    }

    #[test]
    fn no_room_says_how_much_there_was() {
        let room = Room { requested: 300, free: 200, total: 1000 };
        let error = refusal(DEVICE, "cuMemAllocAsync", CUresult::CUDA_ERROR_OUT_OF_MEMORY, Some(room));
        assert!(matches!(error, Error::OutOfDeviceMemory { device: DEVICE, requested: 300, free: 200, total: 1000 }));
    }

    #[test]
    fn refusals_name_the_call_and_the_code() {
        let error = refusal(DEVICE, "cuLaunchKernel", CUresult::CUDA_ERROR_INVALID_VALUE, None);
        assert_eq!(error.to_string(), "cuda:1: cuLaunchKernel: CUDA_ERROR_INVALID_VALUE");
    }
}
