//! The differentiable functions, one room each: the public function with its backward rule in `mod.rs`, the CPU
//! implementation in `cpu.rs`.

pub mod cross_scale_embedding;
mod dropout;
mod elementwise;
mod layer_norm;
mod layout;
mod linear;
mod loss;
pub mod lsda;
mod matmul;
pub mod position_bias;
mod reduce;
mod softmax;

pub use cross_scale_embedding::cross_scale_embedding;
pub use dropout::{drop_path, dropout};
pub use elementwise::{Binary, Unary, select};
pub use layer_norm::layer_norm;
pub use layout::concat;
pub use linear::linear;
pub use loss::{CrossEntropyOptions, Reduction, Targets, binary_cross_entropy_with_logits, cross_entropy, mse_loss};
pub use lsda::lsda;
pub use matmul::Transposed;
pub use position_bias::dynamic_position_bias;
pub use softmax::{log_softmax, softmax};

pub(crate) use elementwise::add_in_place;
