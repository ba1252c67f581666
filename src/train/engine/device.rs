//! Steps on a GPU: launched one after another without waiting, or recorded once and repeated.

use super::{PendingStep, Refusal, StepBatches, StepPlan, StepResult};
use crate::autograd::Gradients;
use crate::data::Batch;
use crate::gpu::Captured;
use crate::nn::Context;
use crate::random::Philox;
use crate::train::device::{DeviceStep, REPORTS, Report, Status};
use crate::train::ema::Ema;
use crate::train::evaluate::Scored;
use crate::train::inputs::Inputs;
use crate::train::metrics::RunningMeans;
use crate::train::optimizer::Optimizer;
use crate::train::precision::{LossScale, Precision};
use crate::{Error, Result};

/// Steps from one reading of the reports to the next: rare enough that waiting costs little.
pub(in crate::train) const REPORT_EVERY: usize = 16;
const _: () = assert!(REPORT_EVERY <= REPORTS);

/// A step runs so often before it is recorded: then the pool holds all the memory that it needs.
const WARM_UP: usize = 2;

/// Of each batch of a step the number of samples, and whether their images are bytes: steps of equal batches launch the
/// same work.
type BatchKinds = Vec<(usize, bool)>;

/// A step that can be repeated.
struct Recorded {
    kinds: BatchKinds,
    /// What the recorded work reads, overwritten before every repetition.
    inputs: Vec<Inputs>,
    /// What it reads and writes besides: it is of no use once one of these has moved.
    addresses: Vec<u64>,
    captured: Captured,
}

pub(in crate::train) struct DeviceEngine {
    precision: Precision,
    repeat: bool,
    /// The kinds of the last steps' batches, and how many steps there were of the same.
    warm: (BatchKinds, usize),
    recorded: Option<Recorded>,
}

impl DeviceEngine {
    pub fn new(precision: Precision) -> Self {
        DeviceEngine { precision, repeat: false, warm: (Vec::new(), 0), recorded: None }
    }

    pub fn repeat_recorded(&mut self, on: bool) {
        self.repeat = on;
        self.recorded = None;
    }

    pub fn loss_scale(&self, optimizer: &Optimizer) -> Result<Option<LossScale>> {
        match self.precision.loss_scaling() {
            None => Ok(None),
            Some(_) => Ok(Some(device(optimizer)?.progress()?.1)),
        }
    }

    pub fn resume(&mut self, optimizer: &Optimizer, loss_scale: Option<LossScale>) -> Result<()> {
        let device = device(optimizer)?;
        let applied = device.progress()?.0;
        device.resume(applied, loss_scale.unwrap_or(LossScale::new(self.precision.loss_scaling())))
    }

    /// Launches a step and returns the numbers of its samples.
    pub fn step(
        &mut self,
        plan: &StepPlan<'_>,
        optimizer: &mut Optimizer,
        ema: Option<&mut Ema>,
        batches: &mut StepBatches<'_>,
    ) -> Result<Vec<usize>> {
        let mut read = Vec::new();
        while let Some(batch) = batches.next()? {
            read.push(batch);
        }
        device(optimizer)?.begin(plan.stream, plan.lr)?;
        if self.repeat {
            self.record_or_repeat(plan, optimizer, ema, &read)?;
        } else {
            self.launch_eagerly(plan, optimizer, ema, &read)?;
        }
        Ok(read.into_iter().flat_map(|batch| batch.indices).collect())
    }

    fn launch_eagerly(
        &self,
        plan: &StepPlan<'_>,
        optimizer: &mut Optimizer,
        ema: Option<&mut Ema>,
        batches: &[Batch],
    ) -> Result<()> {
        let inputs = self.inputs(plan, optimizer, batches)?;
        launch(plan, optimizer, ema, &inputs)
    }

    /// The batches on the device.
    fn inputs(&self, plan: &StepPlan<'_>, optimizer: &Optimizer, batches: &[Batch]) -> Result<Vec<Inputs>> {
        let device = device(optimizer)?.gpu().device();
        let compute = self.precision.of_model(plan.model.parameters());
        batches.iter().map(|batch| Inputs::new(batch, device, compute)).collect()
    }

    fn record_or_repeat(
        &mut self,
        plan: &StepPlan<'_>,
        optimizer: &mut Optimizer,
        ema: Option<&mut Ema>,
        batches: &[Batch],
    ) -> Result<()> {
        let kinds: BatchKinds = batches.iter().map(|batch| (batch.len(), batch.images.is_bytes())).collect();
        let addresses = addresses(plan, optimizer, ema.as_deref());
        self.recorded.take_if(|recorded| recorded.addresses != addresses);
        if let Some(recorded) = self.recorded.as_mut().filter(|recorded| recorded.kinds == kinds) {
            let inputs = recorded.inputs.iter_mut().zip(batches);
            inputs.into_iter().try_for_each(|(inputs, batch)| inputs.overwrite(batch))?;
            return recorded.captured.launch();
        }
        if self.warm.0 != kinds {
            self.warm = (kinds.clone(), 0);
        }
        if self.recorded.is_some() || self.warm.1 < WARM_UP {
            self.warm.1 += 1;
            return self.launch_eagerly(plan, optimizer, ema, batches);
        }
        let gpu = device(optimizer)?.gpu();
        let inputs = self.inputs(plan, optimizer, batches)?;
        let mut ema = ema;
        let Some((captured, ())) = gpu.capture(|| launch(plan, optimizer, ema.as_deref_mut(), &inputs))? else {
            // Another thread has taken of the pool's memory: this step fills it again.
            return launch(plan, optimizer, ema, &inputs);
        };
        captured.launch()?;
        self.recorded = Some(Recorded { kinds, inputs, addresses, captured });
        Ok(())
    }

    /// What `pending` steps measured. Waits for them.
    pub fn results(&self, optimizer: &Optimizer, pending: &[PendingStep]) -> Result<Vec<StepResult>> {
        if pending.is_empty() {
            return Ok(Vec::new());
        }
        let reports = device(optimizer)?.reports(pending.len())?;
        Ok(reports.iter().zip(pending).map(|(report, pending)| result(report, pending.samples.len())).collect())
    }
}

fn device(optimizer: &Optimizer) -> Result<&DeviceStep> {
    optimizer.device().ok_or_else(|| Error::Training("the optimizer's weights are not on a device".into()))
}

/// Where a step finds all that outlives it.
fn addresses(plan: &StepPlan<'_>, optimizer: &Optimizer, ema: Option<&Ema>) -> Vec<u64> {
    let parameters = plan.model.parameters().iter();
    let parameters = parameters.filter_map(|parameter| parameter.tensor().address().ok()).map(|address| address.0);
    parameters.chain(optimizer.addresses()).chain(ema.into_iter().flat_map(Ema::addresses)).collect()
}

/// Forward, backward, optimizer and averages. Nothing here waits for the device or depends on its results.
fn launch(plan: &StepPlan<'_>, optimizer: &mut Optimizer, ema: Option<&mut Ema>, inputs: &[Inputs]) -> Result<()> {
    let mut gradients = Gradients::default();
    let mut samples = 0;
    for (number, inputs) in inputs.iter().enumerate() {
        let step = device(optimizer)?;
        let stream: Philox = step.stream(plan.stream).fork(number as u64);
        let scored = Scored::new(plan.model, inputs, &Context::train(stream))?;
        step.add_measures(&scored.loss.detach(), &scored.logits.detach(), &inputs.labels)?;
        gradients.accumulate(scored.loss.backward_from(&step.loss_gradient(&scored.loss)?)?)?;
        samples += inputs.labels.elements();
    }
    optimizer.finish_on_device(&gradients, samples, plan.config.clip_norm)?;
    match (ema, optimizer.device()) {
        (Some(ema), step) => ema.update_on_device(step),
        (None, _) => Ok(()),
    }
}

fn result(report: &Report, samples: usize) -> StepResult {
    let refused = match report.status {
        Status::Refused if report.loss.is_finite() => Some(Refusal::Gradient),
        Status::Refused => Some(Refusal::Loss(report.loss)),
        Status::Applied | Status::Skipped => None,
    };
    let sums = RunningMeans { samples, loss: report.loss, correct: report.correct, among_five: report.among_five };
    let gradient_norm = (report.status != Status::Skipped).then_some(report.gradient_norm);
    StepResult { sums, gradient_norm, refused }
}
