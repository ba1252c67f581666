//! How a step is taken: on the host, where its measures are there when it ends, or on a device, where the host goes on
//! without waiting and reads the measures of several steps at once.

mod device;
mod host;

use super::checkpoint::Progress;
use super::config::TrainConfig;
use super::evaluate::Classifier;
use super::metrics::RunningMeans;
use super::optimizer::Optimizer;
use super::precision::{LossScale, Precision};
use crate::data::Batch;
use crate::random::Philox;
use crate::{Error, Result};

/// Takes steps where the model's parameters are.
pub(super) enum Engine {
    Host(host::HostEngine),
    Device(device::DeviceEngine),
}

impl Engine {
    /// The engine for an optimizer's parameters.
    pub fn new(optimizer: &mut Optimizer, precision: Precision) -> Result<Self> {
        if optimizer.device().is_none() {
            return Ok(Engine::Host(host::HostEngine::new(precision)));
        }
        optimizer.set_loss_scaling(precision.loss_scaling())?;
        Ok(Engine::Device(device::DeviceEngine::new(precision)))
    }

    /// Steps that may be taken before they are reported.
    pub fn patience(&self) -> usize {
        match self {
            Engine::Host(_) => 1,
            Engine::Device(_) => device::REPORT_EVERY,
        }
    }

    /// Where the scaling of the loss is, if it is scaled. On a device this waits.
    pub fn loss_scale(&self, optimizer: &Optimizer) -> Result<Option<LossScale>> {
        match self {
            Engine::Host(engine) => Ok(engine.loss_scale()),
            Engine::Device(engine) => engine.loss_scale(optimizer),
        }
    }

    /// Goes on from a checkpoint; the optimizer has taken over its state already.
    pub fn resume(&mut self, optimizer: &Optimizer, loss_scale: Option<LossScale>) -> Result<()> {
        match self {
            Engine::Host(engine) => engine.resume(loss_scale),
            Engine::Device(engine) => engine.resume(optimizer, loss_scale)?,
        }
        Ok(())
    }
}

/// What a step needs to know.
pub(super) struct StepPlan<'a> {
    pub model: &'a dyn Classifier,
    pub config: &'a TrainConfig,
    /// The step's random numbers.
    pub stream: Philox,
    pub lr: f64,
}

/// The batches of one step.
pub(super) struct StepBatches<'a> {
    pub trainer_batches: &'a mut dyn Iterator<Item = Result<Batch>>,
    pub progress: &'a Progress,
    /// Batches of the step.
    pub count: usize,
    /// Batches read so far.
    pub read: usize,
}

impl StepBatches<'_> {
    /// The next batch, `None` after the last.
    pub fn next(&mut self) -> Result<Option<Batch>> {
        if self.read == self.count {
            return Ok(None);
        }
        let Progress { epoch, batch: first, batches_per_epoch, .. } = self.progress;
        let batch = self.trainer_batches.next().transpose()?.filter(|batch| !batch.is_empty()).ok_or_else(|| {
            let got = first + self.read;
            Error::Training(format!("epoch {epoch} ended after {got} batches, expected {batches_per_epoch}"))
        })?;
        self.read += 1;
        Ok(Some(batch))
    }

    /// Why the step was not taken, for its samples.
    pub fn refused(&self, reason: &str, samples: &[usize]) -> Error {
        let Progress { step, epoch, batch, .. } = self.progress;
        refused(reason, step + 1, (*epoch, *batch), samples)
    }
}

/// What a step measured.
#[derive(Clone, Copy, Debug)]
pub(super) struct StepResult {
    pub sums: RunningMeans,
    /// Of the mean gradient; `None` where scaled gradients overflowed and the step was skipped.
    pub gradient_norm: Option<f64>,
    /// Why the step was not taken, and none will be after it.
    pub refused: Option<Refusal>,
}

/// What was not finite.
#[derive(Clone, Copy, Debug)]
pub(super) enum Refusal {
    Loss(f64),
    Gradient,
}

/// A step that was taken, until its report is there.
pub(super) struct PendingStep {
    /// Counted from 1.
    pub step: usize,
    /// Epochs done after it, with a fraction.
    pub epoch: f64,
    /// Epoch and batch of its first batch.
    pub began: (usize, usize),
    /// Batches of the epoch done after it.
    pub batches_done: usize,
    pub lr: f64,
    /// Numbers of its samples.
    pub samples: Vec<usize>,
    /// What it measured, where that is known.
    pub result: Option<StepResult>,
}

impl PendingStep {
    /// The error that ends training.
    pub fn refused(&self, reason: Refusal) -> Error {
        let reason = match reason {
            Refusal::Loss(loss) => format!("the loss is {loss}"),
            Refusal::Gradient => "the gradient is not finite".into(),
        };
        refused(&reason, self.step, self.began, &self.samples)
    }
}

fn refused(reason: &str, step: usize, (epoch, batch): (usize, usize), samples: &[usize]) -> Error {
    const SHOWN: usize = 32;
    let shown: Vec<String> = samples.iter().take(SHOWN).map(usize::to_string).collect();
    let more = if samples.len() > SHOWN { format!(" and {} more", samples.len() - SHOWN) } else { String::new() };
    Error::Training(format!(
        "{reason} in step {step}, epoch {}, from batch {batch} on, with samples {}{more}; training stopped before the step",
        epoch + 1,
        shown.join(", ")
    ))
}
