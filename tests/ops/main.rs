//! Every op, one room each: cases that drive the comparison with a naive reference, the gradient check, the check that
//! threads do not change bits, and the benchmarks (`benches/ops.rs` includes this file).

pub mod harness;

mod batch_norm;
mod class_moments;
mod conv2d;
mod cross_scale_embedding;
mod denfi;
mod dropout;
mod elementwise;
mod gather;
mod interpolate;
mod layer_norm;
mod layout;
mod linear;
mod linear_probe;
mod look_up_bytes;
mod loss;
mod lsda;
mod matmul;
mod models;
mod pool;
mod pooled_features;
mod position_bias;
mod reduce;
mod softmax;

/// Cases at the sizes that models use, for the benchmarks, by the name of their room.
#[allow(dead_code, reason = "used by the benchmarks, which include this file")]
pub fn benchmarks() -> Vec<(&'static str, Vec<Box<dyn harness::OpCase>>)> {
    vec![
        ("batch_norm", batch_norm::benchmarks()),
        ("class_moments", class_moments::benchmarks()),
        ("conv2d", conv2d::benchmarks()),
        ("cross_scale_embedding", cross_scale_embedding::benchmarks()),
        ("denfi", denfi::benchmarks()),
        ("dropout", dropout::benchmarks()),
        ("elementwise", elementwise::benchmarks()),
        ("gather", gather::benchmarks()),
        ("interpolate", interpolate::benchmarks()),
        ("layer_norm", layer_norm::benchmarks()),
        ("layout", layout::benchmarks()),
        ("linear", linear::benchmarks()),
        ("linear_probe", linear_probe::benchmarks()),
        ("look_up_bytes", look_up_bytes::benchmarks()),
        ("loss", loss::benchmarks()),
        ("lsda", lsda::benchmarks()),
        ("matmul", matmul::benchmarks()),
        ("models", models::benchmarks()),
        ("pool", pool::benchmarks()),
        ("pooled_features", pooled_features::benchmarks()),
        ("position_bias", position_bias::benchmarks()),
        ("reduce", reduce::benchmarks()),
        ("softmax", softmax::benchmarks()),
    ]
}
