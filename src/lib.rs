//! Cross-scale vision transformers: fused kernels, a small safe autograd, and published systems trained end to end.

#![warn(missing_docs)]

pub mod autograd;
pub mod cpu;
pub mod data;
pub mod driver;
mod error;
pub mod file;
pub mod models;
pub mod nn;
pub mod ops;
pub mod random;
pub mod report;
pub mod tensor;
pub mod train;

pub use error::{Error, Result};
pub use tensor::{DType, Device, Shape, Tensor};
