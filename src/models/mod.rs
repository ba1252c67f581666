//! Published networks, with their parameter names.

pub mod crossformer;
pub mod resnet;

pub use crossformer::{CrossFormer, CrossFormerConfig};
pub use resnet::{ResNet, ResNetConfig};
