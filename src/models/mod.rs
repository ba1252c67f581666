//! Published networks, with their parameter names.

pub mod crossformer;

pub use crossformer::{CrossFormer, CrossFormerConfig};
