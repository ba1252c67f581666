//! The differentiable functions, one room each: the public function with its backward rule in `mod.rs`, the CPU
//! implementation in `cpu.rs`.

mod conv2d;
mod elementwise;
mod layout;
mod linear;
mod matmul;
mod reduce;

pub use conv2d::{Conv2dOptions, conv_transpose2d, conv2d};
pub use elementwise::{Binary, Unary, select};
pub use layout::concat;
pub use linear::linear;
pub use matmul::Transposed;

pub(crate) use elementwise::add_in_place;
