//! Steps on the processor.

use super::{StepBatches, StepPlan, StepResult};
use crate::autograd::Gradients;
use crate::nn::Context;
use crate::train::clip::{clip_factor, global_norm, not_finite};
use crate::train::ema::Ema;
use crate::train::evaluate::Scored;
use crate::train::inputs::{Inputs, strongest_targets};
use crate::train::metrics::RunningMeans;
use crate::train::optimizer::Optimizer;
use crate::train::precision::{LossScale, LossScaling, Precision};
use crate::{Device, Result};

pub(in crate::train) struct HostEngine {
    precision: Precision,
    scaling: Option<LossScaling>,
    loss_scale: LossScale,
}

impl HostEngine {
    pub fn new(precision: Precision) -> Self {
        let scaling = precision.loss_scaling();
        HostEngine { precision, scaling, loss_scale: LossScale::new(scaling) }
    }

    pub fn loss_scale(&self) -> Option<LossScale> {
        self.scaling.map(|_| self.loss_scale)
    }

    pub fn resume(&mut self, loss_scale: Option<LossScale>) {
        self.loss_scale = loss_scale.unwrap_or(LossScale::new(self.scaling));
    }

    /// Takes a step, unless loss or gradient is not finite: then the weights stay as they were. Returns the numbers of
    /// its samples.
    pub fn step(
        &mut self,
        plan: &StepPlan<'_>,
        optimizer: &mut Optimizer,
        ema: Option<&mut Ema>,
        batches: &mut StepBatches<'_>,
    ) -> Result<(Vec<usize>, StepResult)> {
        let (gradients, sums, samples) = self.gradients(plan, batches)?;
        let divisor = sums.samples as f64 * self.loss_scale.scale;
        let norm = global_norm(plan.model.parameters(), &gradients)? / divisor;
        let overflow = !norm.is_finite();
        if overflow && self.scaling.is_none() {
            let names = not_finite(plan.model.parameters(), &gradients)?.join(", ");
            return Err(batches.refused(&format!("the gradient is not finite for {names}"), &samples));
        }
        if !overflow {
            let clip = plan.config.clip_norm.map_or(1.0, |max_norm| clip_factor(norm, max_norm));
            optimizer.step_scaled(&gradients, plan.lr, clip / divisor)?;
            ema.map_or(Ok(()), Ema::update)?;
        }
        if let Some(scaling) = self.scaling {
            self.loss_scale.update(scaling, overflow);
        }
        Ok((samples, StepResult { sums, gradient_norm: (!overflow).then_some(norm), refused: None }))
    }

    /// Sums of the scaled gradients, and of the measures, of all batches of a step.
    fn gradients(
        &self,
        plan: &StepPlan<'_>,
        batches: &mut StepBatches<'_>,
    ) -> Result<(Gradients, RunningMeans, Vec<usize>)> {
        let compute = self.precision.of_model(plan.model.parameters());
        let (mut gradients, mut sums, mut samples) = (Gradients::default(), RunningMeans::default(), Vec::new());
        while let Some(batch) = batches.next()? {
            let context = Context::train(plan.stream.fork(batches.read as u64 - 1));
            let scored = Scored::new(plan.model, &Inputs::new(&batch, Device::Cpu, compute)?, &context)?;
            let measured = scored.sums(&strongest_targets(&batch))?;
            if !measured.loss.is_finite() {
                return Err(batches.refused(&format!("the loss is {}", measured.loss), &batch.indices));
            }
            gradients.accumulate(scored.loss.backward_from(&scored.loss.full_like(self.loss_scale.scale)?)?)?;
            sums.add(&measured);
            samples.extend(batch.indices);
        }
        Ok((gradients, sums, samples))
    }
}
