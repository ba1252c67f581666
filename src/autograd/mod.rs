//! The tape: which function made which tensor, and the walk back from a result to its inputs.
//!
//! A differentiable op computes its output, then [`record`]s a [`Function`] that knows how to turn the gradient of the
//! output into gradients of the inputs. [`Tensor::backward`](crate::Tensor::backward) walks the nodes from the newest to
//! the oldest. Rules of primitive ops are written with ops, so [`grad`] with `create_graph` gives gradients that can be
//! differentiated again.
//!
//! ```
//! use gridgrad::{Tensor, autograd};
//! let x = Tensor::scalar(3.0f64).variable()?;
//! let y = x.mul(&x)?.mul(&x)?; // x³
//! let slope = autograd::grad(&y, &[&x], autograd::GradOptions { create_graph: true, ..Default::default() })?;
//! let slope = slope[0].clone().unwrap(); // 3x²
//! assert_eq!(slope.item()?, 27.0);
//! assert_eq!(slope.backward()?.get(&x).unwrap().item()?, 18.0); // 6x
//! # Ok::<(), gridgrad::Error>(())
//! ```

mod check;
mod node;
mod walk;

pub use check::{GradientCheck, check_gradients};
pub use node::{Backward, Function, SavedOutput, no_grad, record, record_all};
pub use walk::{GradOptions, Gradients, grad};

pub(crate) use node::{Node, answers, records};
