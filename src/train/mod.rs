//! Training: optimizers, schedules, averages, metrics, checkpoints, and the loop that puts them together.

mod clip;
mod ema;
mod optimizer;
mod schedule;

pub use clip::{clip_factor, clip_global_norm, global_norm, not_finite};
pub use ema::Ema;
pub use optimizer::{AdamW, Group, Optimizer, OptimizerConfig, Sgd, decays};
pub use schedule::{Decay, Schedule, ScheduleConfig, Span, Warmup};

use crate::nn::StateDict;

/// What keeps `got` from taking the place of `expected`: tensors missing, surplus, or of another shape or dtype.
fn state_problems(expected: &StateDict, got: &StateDict) -> Vec<String> {
    let mut problems = Vec::new();
    for (name, expected) in expected {
        match got.get(name) {
            None => problems.push(format!("missing: {name} {}", expected.shape())),
            Some(got) if got.shape() != expected.shape() => {
                problems.push(format!("misshapen: {name} is {}, expected {}", got.shape(), expected.shape()));
            }
            Some(got) if got.dtype() != expected.dtype() => {
                problems.push(format!("wrong dtype: {name} is {}, expected {}", got.dtype(), expected.dtype()));
            }
            Some(_) => {}
        }
    }
    let surplus = got.iter().filter(|(name, _)| !expected.contains_key(*name));
    problems.extend(surplus.map(|(name, tensor)| format!("surplus: {name} {}", tensor.shape())));
    problems
}
