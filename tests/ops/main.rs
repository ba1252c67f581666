//! Every op, one room each: cases that drive the comparison with a naive reference, the gradient check, the check that
//! threads do not change bits, and the benchmarks (`benches/ops.rs` includes this file).

mod harness;

mod cross_scale_embedding;
mod elementwise;
mod layout;
mod lsda;
mod matmul;
mod position_bias;
mod reduce;

/// Cases at the sizes that models use, for the benchmarks.
#[allow(dead_code, reason = "used by the benchmarks, which include this file")]
pub fn benchmarks() -> Vec<Box<dyn harness::OpCase>> {
    [
        elementwise::benchmarks(),
        layout::benchmarks(),
        lsda::benchmarks(),
        matmul::benchmarks(),
        position_bias::benchmarks(),
        reduce::benchmarks(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
