//! Who is told what happens in training.

use std::path::Path;
use std::time::Duration;

use super::metrics::{EpochMetrics, StepMetrics};
use crate::Result;

/// Where training stands after a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// What the step measured.
    pub metrics: StepMetrics,
    /// Steps in the whole run.
    pub total_steps: usize,
    /// Batches of this epoch done, and batches in an epoch.
    pub batches: (usize, usize),
    /// Training samples per second over the last steps, waiting for data included.
    pub images_per_second: f64,
    /// Time that the remaining steps will take, without evaluation.
    pub time_left: Duration,
}

/// Is told what happens in training, to show it. An error from any of these ends training.
pub trait Observer {
    /// After every step.
    ///
    /// # Errors
    /// The observer's own.
    fn on_step(&mut self, _report: &StepReport) -> Result<()> {
        Ok(())
    }

    /// After every batch of an evaluation: batches done, and batches there are.
    ///
    /// # Errors
    /// The observer's own.
    fn on_evaluation(&mut self, _done: usize, _batches: usize) -> Result<()> {
        Ok(())
    }

    /// At the end of every epoch: what all finished epochs measured, at least one of them, and whether the last is the
    /// best so far.
    ///
    /// # Errors
    /// The observer's own.
    fn on_epoch(&mut self, _history: &[EpochMetrics], _is_best: bool) -> Result<()> {
        Ok(())
    }

    /// After a checkpoint was written.
    ///
    /// # Errors
    /// The observer's own.
    fn on_checkpoint(&mut self, _path: &Path) -> Result<()> {
        Ok(())
    }
}

/// Shows nothing.
impl Observer for () {}
