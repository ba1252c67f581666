//! The differentiable functions, one room each: the public function with its backward rule in `mod.rs`, the CPU
//! implementation in `cpu.rs`.

mod dropout;
mod elementwise;
mod layer_norm;
mod layout;
mod linear;
mod loss;
mod matmul;
mod reduce;
mod softmax;

pub use dropout::{drop_path, dropout};
pub use elementwise::{Binary, Unary, select};
pub use layer_norm::layer_norm;
pub use layout::concat;
pub use linear::linear;
pub use loss::{CrossEntropyOptions, Reduction, Targets, binary_cross_entropy_with_logits, cross_entropy, mse_loss};
pub use matmul::Transposed;
pub use softmax::{log_softmax, softmax};

pub(crate) use elementwise::add_in_place;
