//! Training: optimizers, schedules, averages, metrics, checkpoints, and the loop that puts them together.
//!
//! A [`Trainer`] takes a [`Classifier`] through its epochs. Everything random is a function of seed and step, and a
//! checkpoint holds all that later steps depend on, so a run that is stopped anywhere and resumed ends with the same
//! bits as one that is not: weights, checkpoints and metrics file.
//!
//! ```
//! use std::sync::{Arc, atomic::AtomicBool};
//! use gridgrad::data::{self, AugmentConfig, Loader, LoaderConfig, Split};
//! use gridgrad::nn::{Context, Linear, Parameters, Scope};
//! use gridgrad::train::{Classifier, Outcome, TrainConfig, Trainer, TrainingRun};
//! use gridgrad::{DType, Result, Tensor};
//!
//! struct LinearClassifier(Linear, Parameters);
//!
//! impl Classifier for LinearClassifier {
//!     fn forward(&self, images: &Tensor, _: &Context) -> Result<Tensor> {
//!         self.0.forward(&images.reshape([images.shape()[0], 64])?)
//!     }
//!     fn parameters(&self) -> &Parameters {
//!         &self.1
//!     }
//! }
//!
//! let scope = Scope::new(0, DType::F32);
//! let model = LinearClassifier(Linear::new(&scope, 64, 10, true)?, scope.parameters().clone());
//! let digits: Arc<dyn data::Dataset> = Arc::from(data::open("builtin", Split::Train, None)?);
//! let augment = AugmentConfig::none().with_image_size(8);
//! let loader = Loader::new(digits, LoaderConfig { augment, ..LoaderConfig::default() })?;
//! let mut trainer = Trainer::new(TrainingRun {
//!     model: &model,
//!     batches: &loader,
//!     held_out: None,
//!     config: TrainConfig { epochs: 2, ..TrainConfig::default() },
//!     description: serde_json::json!({ "model": "linear" }),
//!     folder: None,
//! })?;
//! assert_eq!(trainer.run(&mut (), &AtomicBool::new(false))?, Outcome::Finished { step: 22 });
//! # Ok::<(), gridgrad::Error>(())
//! ```

mod checkpoint;
mod clip;
mod config;
mod device;
mod ema;
mod engine;
mod evaluate;
mod inputs;
pub mod many;
mod metrics;
mod observer;
mod optimizer;
mod precision;
mod schedule;
mod trainer;

pub use checkpoint::{Checkpoint, Progress, config_differences, read_weights};
pub use clip::{clip_factor, clip_global_norm, global_norm, not_finite};
pub use config::TrainConfig;
pub use ema::Ema;
pub use evaluate::{Batches, Classifier, evaluate};
pub use metrics::{EpochMetrics, Evaluation, MetricsFile, Record, RunningMeans, StepMetrics, Throughput, top_hits};
pub use observer::{Observer, StepReport};
pub use optimizer::{AdamW, Group, Optimizer, OptimizerConfig, Sgd, decays};
pub use precision::{LossScale, Precision};
pub use schedule::{Decay, Schedule, ScheduleConfig, Span, Warmup};
pub use trainer::{BEST_CHECKPOINT, LAST_CHECKPOINT, METRICS_FILE, Outcome, Trainer, TrainingRun};

use crate::nn::StateDict;

/// The kernels of this module.
pub(crate) fn gpu_kernels() -> impl Iterator<Item = crate::gpu::Signature> {
    [device::KERNELS, optimizer::gpu::KERNELS, ema::KERNELS].into_iter().flatten().copied()
}

pub(crate) use device::cost::COSTS as GPU_COSTS;

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
