//! A classifier, the batches it sees, and how well it does on them.

use std::sync::atomic::{AtomicBool, Ordering};

use super::inputs::Inputs;
use super::metrics::{Evaluation, RunningMeans, top_hits};
use super::precision::Precision;
use crate::autograd::no_grad;
use crate::data::{Batch, Loader};
use crate::models::{CrossFormer, NetworkInNetwork, ResNet};
use crate::nn::{Context, Parameters};
use crate::ops::{CrossEntropyOptions, Reduction, Targets, cross_entropy};
use crate::{Device, Error, Result, Tensor};

/// A model that tells classes of images apart.
pub trait Classifier {
    /// Logits (batch, classes) for `images` (batch, height, width, channels) in the dtype of the parameters.
    ///
    /// # Errors
    /// Where the images do not fit the model.
    fn forward(&self, images: &Tensor, context: &Context) -> Result<Tensor>;

    /// All of its parameters.
    fn parameters(&self) -> &Parameters;
}

macro_rules! classify_by_logits {
    ($($network:ty),*) => {$(
        impl Classifier for $network {
            fn forward(&self, images: &Tensor, context: &Context) -> Result<Tensor> {
                self.logits(images, context)
            }

            fn parameters(&self) -> &Parameters {
                <$network>::parameters(self)
            }
        }
    )*};
}

classify_by_logits!(CrossFormer, NetworkInNetwork, ResNet);

/// A source of batches, the same every time it is asked.
pub trait Batches {
    /// Number of batches in an epoch.
    fn batches_per_epoch(&self) -> usize;

    /// The batches of `epoch` from number `start_batch` on.
    fn epoch(&self, epoch: u64, start_batch: usize) -> Box<dyn Iterator<Item = Result<Batch>> + '_>;
}

impl Batches for Loader {
    fn batches_per_epoch(&self) -> usize {
        self.batches()
    }

    fn epoch(&self, epoch: u64, start_batch: usize) -> Box<dyn Iterator<Item = Result<Batch>> + '_> {
        Box::new(Loader::epoch(self, epoch, start_batch))
    }
}

/// Measures `model`, computing in `precision`, on all of `batches`, without gradients. `None` where `stop` was set before
/// the end.
///
/// `progress` is called with the number of batches done, after each of them.
///
/// # Errors
/// Those of the batches and the model, and `Training` where there is no sample or the loss is not finite.
pub fn evaluate(
    model: &dyn Classifier,
    batches: &dyn Batches,
    precision: Precision,
    stop: &AtomicBool,
    mut progress: impl FnMut(usize) -> Result<()>,
) -> Result<Option<Evaluation>> {
    let (device, compute) = (device_of(model.parameters()), precision.of_model(model.parameters()));
    let mut sums = RunningMeans::default();
    for (number, batch) in batches.epoch(0, 0).enumerate() {
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let batch = batch?;
        let inputs = Inputs::new(&batch, device, compute)?;
        let scored = no_grad(|| Scored::new(model, &inputs, &Context::eval()))?;
        sums.add(&scored.sums(&batch.labels)?);
        progress(number + 1)?;
    }
    if sums.samples == 0 {
        return Err(Error::Training("there is no held-out sample to evaluate on".into()));
    }
    let evaluation = sums.means();
    if !evaluation.loss.is_finite() {
        return Err(Error::Training(format!("the loss on held-out samples is {}", evaluation.loss)));
    }
    Ok(Some(evaluation))
}

/// What a model made of a batch.
pub(super) struct Scored {
    /// (batch, classes), in the parameters' dtype whatever the model computes in.
    pub logits: Tensor,
    /// Sum of the losses of all samples: sums of unequal batches add up, means do not.
    pub loss: Tensor,
}

impl Scored {
    /// Of the batch that `inputs` are.
    pub fn new(model: &dyn Classifier, inputs: &Inputs, context: &Context) -> Result<Self> {
        let own = Precision::F32.of_model(model.parameters());
        let logits = model.forward(&inputs.images()?, context)?.cast(own)?;
        let options = CrossEntropyOptions { reduction: Reduction::Sum, ..CrossEntropyOptions::default() };
        let loss = cross_entropy(&logits, Targets::Soft(&inputs.targets().cast(own)?), options)?;
        Ok(Scored { logits, loss })
    }

    /// The loss, and how many of `labels` are among the best.
    pub fn sums(&self, labels: &[usize]) -> Result<RunningMeans> {
        let (correct, among_five) = top_hits(&self.logits, labels)?;
        Ok(RunningMeans { samples: labels.len(), loss: self.loss.item()?, correct, among_five })
    }
}

/// The device of a model's parameters.
pub(super) fn device_of(parameters: &Parameters) -> Device {
    parameters.weights().next().map_or(Device::Cpu, |weight| weight.tensor().device())
}
