//! Published networks, with their parameter names.

pub mod crossformer;
pub mod network_in_network;
pub mod resnet;

pub use crossformer::{CrossFormer, CrossFormerConfig};
pub use network_in_network::NetworkInNetwork;
pub use resnet::{ResNet, ResNetConfig};
