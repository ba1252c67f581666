//! gridgrad
pub mod data;
mod error;
pub mod random;
pub mod tensor;
pub use error::{Error, Result};
