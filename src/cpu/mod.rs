//! What the CPU implementations of the ops share: compute types with vectorised mathematics, run-time SIMD dispatch,
//! parallel loops with a fixed order of summation, and matrix products.
//!
//! For those who write ops of their own:
//!
//! ```
//! use gridgrad::cpu::{Float, parallel};
//! let input: Vec<f32> = (0..10_000).map(|i| i as f32 / 1000.0).collect();
//! let mut output = vec![0.0f32; input.len()];
//! parallel::map(&input, &mut output, |x| x.tanh()); // vectorised and parallel
//! assert!((output[500] - 0.5f32.tanh()).abs() < 1e-6);
//!
//! // Sums of the even and the odd elements: the same bits for any number of threads.
//! let sums = parallel::accumulate::<f32>(input.len(), 256, 2, |range, sums| {
//!     for i in range {
//!         sums[i % 2] += input[i];
//!     }
//! });
//! assert!(sums[0] < sums[1]);
//! ```

pub(crate) mod ahead;
pub mod bf16;
pub mod block_gemm;
pub(crate) mod dots;
mod factor;
mod float;
pub mod gemm;
pub mod lanes;
pub(crate) mod packed;
pub mod parallel;
mod peak;
pub mod simd;
pub mod small_gemm;
mod stored;
pub(crate) mod vector_math;

pub(crate) use factor::Factor;
pub use float::Float;
pub use peak::peak_flops;
pub(crate) use stored::Stored;
