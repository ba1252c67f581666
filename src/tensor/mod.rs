//! Tensors.
mod device;
mod dtype;
pub use device::Device;
pub use dtype::{DType, Element};
