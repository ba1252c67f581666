//! How a model is trained.

use serde::{Deserialize, Serialize};

use super::optimizer::OptimizerConfig;
use super::precision::Precision;
use super::schedule::{Decay, ScheduleConfig, Span, Warmup};
use crate::{Error, Result};

/// How a classifier is trained. Batch size, augmentation and label smoothing are the loader's.
///
/// ```
/// use gridgrad::train::{Decay, OptimizerConfig, ScheduleConfig, Sgd, TrainConfig};
/// let config = TrainConfig {
///     epochs: 90,
///     optimizer: OptimizerConfig::Sgd(Sgd { nesterov: true, ..Sgd::default() }),
///     schedule: ScheduleConfig { lr: 0.1, warmup: None, decay: Decay::Cosine { floor: 0.0 } },
///     ema_decay: Some(0.999),
///     ..TrainConfig::default()
/// };
/// assert_eq!(config.accumulation, 1);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Passes over the training set, at least 1.
    pub epochs: usize,
    /// Batches whose gradients make one step, at least 1.
    pub accumulation: usize,
    /// Decides what layers drop.
    pub seed: u64,
    /// In what the model computes; the weights stay as they are.
    #[serde(skip_serializing_if = "Precision::is_f32")]
    pub precision: Precision,
    /// Which optimizer.
    pub optimizer: OptimizerConfig,
    /// The learning rate.
    pub schedule: ScheduleConfig,
    /// The largest global norm that a gradient keeps; any where absent.
    pub clip_norm: Option<f64>,
    /// What an average of the weights keeps of itself at every step; no average where absent.
    pub ema_decay: Option<f64>,
    /// Epochs from one evaluation to the next, at least 1. The last epoch always ends with one.
    pub evaluate_every: usize,
    /// From one checkpoint to the next. Training always ends with one.
    pub checkpoint_every: Span,
}

impl Default for TrainConfig {
    /// AdamW with a short warm-up, for small sets.
    fn default() -> Self {
        TrainConfig {
            epochs: 30,
            accumulation: 1,
            seed: 0,
            precision: Precision::F32,
            optimizer: OptimizerConfig::default(),
            schedule: ScheduleConfig {
                lr: 1e-3,
                warmup: Some(Warmup { length: Span::Epochs(1.0), start_lr: 1e-6 }),
                decay: Decay::Cosine { floor: 1e-5 },
            },
            clip_norm: Some(5.0),
            ema_decay: None,
            evaluate_every: 1,
            checkpoint_every: Span::Epochs(1.0),
        }
    }
}

impl TrainConfig {
    /// The ImageNet recipe of CrossFormer (section 12) for steps of `samples` images.
    pub fn crossformer(samples: usize) -> Self {
        TrainConfig { epochs: 300, schedule: ScheduleConfig::crossformer(samples), ..TrainConfig::default() }
    }

    pub(super) fn validate(&self) -> Result<()> {
        let wrong = |what: String| Err(Error::Config(format!("training: {what}")));
        if self.epochs == 0 {
            return wrong("epochs is 0, expected at least 1".into());
        }
        if self.accumulation == 0 || self.evaluate_every == 0 {
            return wrong("accumulation and evaluate_every are at least 1".into());
        }
        match self.clip_norm {
            Some(norm) if !(norm.is_finite() && norm > 0.0) => {
                wrong(format!("clip_norm is {norm}, expected a number above 0"))
            }
            _ => Ok(()),
        }
    }
}
