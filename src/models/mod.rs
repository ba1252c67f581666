//! Published networks, with their parameter names.

pub mod crossformer;
pub mod network_in_network;

pub use crossformer::{CrossFormer, CrossFormerConfig};
pub use network_in_network::NetworkInNetwork;
