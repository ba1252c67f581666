//! The differentiable functions, one room each: the public function with its backward rule in `mod.rs`, the CPU
//! implementation in `cpu.rs`.

pub mod cross_scale_embedding;
mod elementwise;
mod layout;
mod linear;
pub mod lsda;
mod matmul;
pub mod position_bias;
mod reduce;

pub use cross_scale_embedding::cross_scale_embedding;
pub use elementwise::{Binary, Unary, select};
pub use layout::concat;
pub use linear::linear;
pub use lsda::lsda;
pub use matmul::Transposed;
pub use position_bias::dynamic_position_bias;

pub(crate) use elementwise::add_in_place;
