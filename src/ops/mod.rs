//! The differentiable functions, one room each: the public function with its backward rule in `mod.rs`, the CPU
//! implementation in `cpu.rs`.

mod elementwise;
mod layout;
mod linear;
pub mod lsda;
mod matmul;
mod reduce;

pub use elementwise::{Binary, Unary, select};
pub use layout::concat;
pub use linear::linear;
pub use lsda::lsda;
pub use matmul::Transposed;

pub(crate) use elementwise::add_in_place;
