//! Layers over the ops: parameters with names, PyTorch's initialisers, and state dicts with PyTorch's names.
//!
//! A layer is made in a [`Scope`], which gives its parameters their names and first values, and keeps them in one
//! [`Parameters`] list for optimizers and checkpoints.
//!
//! ```
//! use gridgrad::nn::{Linear, Scope};
//! use gridgrad::{DType, Tensor};
//! let scope = Scope::new(7, DType::F32);
//! let fc1 = Linear::new(&scope.child("fc1"), 4, 2, true)?;
//! assert_eq!(fc1.forward(&Tensor::ones([3, 4], DType::F32)?)?.shape().to_vec(), [3, 2]);
//! let names: Vec<String> = scope.parameters().iter().map(|p| p.name().to_owned()).collect();
//! assert_eq!(names, ["fc1.weight", "fc1.bias"]);
//! # Ok::<(), gridgrad::Error>(())
//! ```

mod context;
mod init;
mod layers;
mod parameter;
pub mod state_dict;

pub use context::Context;
pub use init::{Fan, Initializer};
pub use layers::{BatchNorm, Conv2d, ConvTranspose2d, Dropout, Embedding, LayerNorm, Linear};
pub use parameter::{Parameter, Parameters, Role, Scope};
pub use state_dict::StateDict;
