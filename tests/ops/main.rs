//! Every op, one room each: cases that drive the comparison with a naive reference, the gradient check, the check that
//! threads do not change bits, and the benchmarks (`benches/ops.rs` includes this file).

mod harness;

mod dropout;
mod elementwise;
mod layer_norm;
mod layout;
mod loss;
mod matmul;
mod reduce;
mod softmax;

/// Cases at the sizes that models use, for the benchmarks.
#[allow(dead_code, reason = "used by the benchmarks, which include this file")]
pub fn benchmarks() -> Vec<Box<dyn harness::OpCase>> {
    [
        dropout::benchmarks(),
        elementwise::benchmarks(),
        layer_norm::benchmarks(),
        layout::benchmarks(),
        loss::benchmarks(),
        matmul::benchmarks(),
        reduce::benchmarks(),
        softmax::benchmarks(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
