//! The differentiable functions, one room each: the public function with its backward rule in `mod.rs`, the CPU
//! implementation in `cpu.rs`.

mod batch_norm;
mod conv2d;
mod elementwise;
mod gather;
mod interpolate;
mod layout;
mod linear;
mod matmul;
mod pool;
mod reduce;
mod resample;

pub use batch_norm::{BatchNorm, BatchNormMode, BatchStatistics, batch_norm};
pub use conv2d::{Conv2dOptions, conv_transpose2d, conv2d};
pub use elementwise::{Binary, Unary, select};
pub use gather::embedding;
pub use interpolate::{Interpolation, interpolate};
pub use layout::concat;
pub use linear::linear;
pub use matmul::Transposed;
pub use pool::{Pool2dOptions, adaptive_avg_pool2d, avg_pool2d, global_avg_pool2d, max_pool2d};

pub(crate) use elementwise::add_in_place;
