//! The one error type of the crate.

use std::path::{Path, PathBuf};

use crate::tensor::{DType, Device};

/// What went wrong, in words that say which op or file, what arrived and what was expected.
///
/// ```
/// use gridgrad::{DType, Error, Tensor};
/// let (a, b) = (Tensor::zeros([2, 3], DType::F32)?, Tensor::zeros([2, 3], DType::F32)?);
/// let error = a.matmul(&b).unwrap_err();
/// assert!(matches!(error, Error::Shape { op: "matmul", .. }));
/// println!("{error}");
/// # Ok::<(), Error>(())
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Shapes that an op cannot combine.
    #[error("{op}: {message}")]
    Shape {
        /// The op that refused.
        op: &'static str,
        /// What arrived and what was expected.
        message: String,
    },
    /// A parameter of an op or layer outside its range.
    #[error("{op}: {message}")]
    Argument {
        /// The op or layer that refused.
        op: &'static str,
        /// What arrived and what was expected.
        message: String,
    },
    /// A tensor of a type that the op does not take.
    #[error("{op}: got dtype {got}, expected {expected}")]
    DType {
        /// The op that refused.
        op: &'static str,
        /// The dtype that arrived.
        got: DType,
        /// The dtypes that the op takes.
        expected: String,
    },
    /// Tensors that live on different devices.
    #[error("{op}: tensors are on {left} and {right}; move one with `to_device`")]
    DeviceMismatch {
        /// The op that refused.
        op: &'static str,
        /// Device of the first tensor.
        left: Device,
        /// Device of the other tensor.
        right: Device,
    },
    /// Values that were to be read in place, but are not in the host's memory.
    #[error("{op}: the tensor is on {device}; copy its values with `to_vec`, or move it with `to_device`")]
    NotOnHost {
        /// Who wanted to read.
        op: &'static str,
        /// Where the tensor is.
        device: Device,
    },
    /// A device that this machine or this build does not offer.
    #[error("{device}: {reason}")]
    DeviceUnavailable {
        /// The device asked for.
        device: Device,
        /// Why it cannot be used, and what to do.
        reason: String,
    },
    /// The device has no room for a tensor.
    #[error(
        "{device}: no room for {requested} bytes ({free} of {total} are free); use a smaller batch, or close other programs on the device"
    )]
    OutOfDeviceMemory {
        /// The device.
        device: Device,
        /// Bytes asked for.
        requested: usize,
        /// Bytes that the device had free.
        free: usize,
        /// Bytes of the device.
        total: usize,
    },
    /// A kernel that the device cannot run: no code for it, or another signature than the caller's.
    #[error("{device}: kernel {kernel}: {reason}")]
    Kernel {
        /// The device.
        device: Device,
        /// The kernel, or its module.
        kernel: String,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// The device failed, and with it all that it holds: the process must start again from its last checkpoint.
    #[error("{device}: {reason}; its memory is lost: start again from the last checkpoint")]
    DeviceLost {
        /// The device.
        device: Device,
        /// The driver's reason, and the kernel if known.
        reason: String,
    },
    /// A call to the device that it refused.
    #[error("{device}: {call}: {reason}")]
    Gpu {
        /// The device.
        device: Device,
        /// What was asked of it.
        call: &'static str,
        /// The driver's reason.
        reason: String,
    },
    /// A question to the tape that it cannot answer.
    #[error("autograd: {0}")]
    Autograd(String),
    /// A fused op has first derivatives only.
    #[error("{op}: has no second derivative; build it from primitive ops where gradients of gradients are needed")]
    NoSecondDerivative {
        /// The fused op.
        op: &'static str,
    },
    /// A configuration that cannot be built.
    #[error("configuration: {0}")]
    Config(String),
    /// Names or shapes of a state dict that do not fit the model. Lists every one of them.
    #[error("state dict does not fit the model:{}", .0.iter().map(|p| format!("\n  {p}")).collect::<String>())]
    StateDict(Vec<String>),
    /// Training cannot go on: the loss is no longer a number, say.
    #[error("training: {0}")]
    Training(String),
    /// The operating system refused a file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file whose content is damaged, truncated or of another kind.
    #[error("{}{}: {reason}", path.display(), offset.map(|o| format!(" at byte {o}")).unwrap_or_default())]
    Format {
        /// The file.
        path: PathBuf,
        /// Where in the file, if known.
        offset: Option<u64>,
        /// What is wrong with it.
        reason: String,
    },
}

/// `std::result::Result` with the crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A shape error of `op`.
    pub fn shape(op: &'static str, message: impl Into<String>) -> Self {
        Error::Shape { op, message: message.into() }
    }

    /// An argument error of `op`.
    pub fn argument(op: &'static str, message: impl Into<String>) -> Self {
        Error::Argument { op, message: message.into() }
    }

    /// An operating system error on `path`.
    pub fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Error::Io { path: path.as_ref().to_path_buf(), source }
    }

    /// A damaged file, without a known position.
    pub fn format(path: impl AsRef<Path>, reason: impl Into<String>) -> Self {
        Error::Format { path: path.as_ref().to_path_buf(), offset: None, reason: reason.into() }
    }

    /// A damaged file, at byte `offset`.
    pub fn format_at(path: impl AsRef<Path>, offset: u64, reason: impl Into<String>) -> Self {
        Error::Format { path: path.as_ref().to_path_buf(), offset: Some(offset), reason: reason.into() }
    }
}
