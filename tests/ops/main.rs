//! Every op, one room each: cases that drive the comparison with a naive reference, the gradient check, the check that
//! threads do not change bits, and the benchmarks (`benches/ops.rs` includes this file).

mod harness;

mod conv2d;
mod elementwise;
mod layout;
mod matmul;
mod reduce;

/// Cases at the sizes that models use, for the benchmarks.
#[allow(dead_code, reason = "used by the benchmarks, which include this file")]
pub fn benchmarks() -> Vec<Box<dyn harness::OpCase>> {
    [conv2d::benchmarks(), elementwise::benchmarks(), layout::benchmarks(), matmul::benchmarks(), reduce::benchmarks()]
        .into_iter()
        .flatten()
        .collect()
}
