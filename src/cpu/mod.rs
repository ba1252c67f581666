//! What the CPU implementations of the ops share: compute types with vectorised mathematics, run-time SIMD dispatch,
//! parallel loops with a fixed order of summation, and matrix products.

mod float;
pub mod gemm;
pub mod lanes;
pub mod parallel;
pub mod simd;
pub mod small_gemm;

pub use float::Float;
