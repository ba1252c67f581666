//! Every op, one room each: cases that drive the comparison with a naive reference, the gradient check, the check that
//! threads do not change bits, and the benchmarks (`benches/ops.rs` includes this file).

mod harness;

mod batch_norm;
mod conv2d;
mod elementwise;
mod gather;
mod interpolate;
mod layout;
mod matmul;
mod pool;
mod reduce;

/// Cases at the sizes that models use, for the benchmarks.
#[allow(dead_code, reason = "used by the benchmarks, which include this file")]
pub fn benchmarks() -> Vec<Box<dyn harness::OpCase>> {
    [
        batch_norm::benchmarks(),
        conv2d::benchmarks(),
        elementwise::benchmarks(),
        gather::benchmarks(),
        interpolate::benchmarks(),
        layout::benchmarks(),
        matmul::benchmarks(),
        pool::benchmarks(),
        reduce::benchmarks(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
