//! One group of models with a leading model axis.

use super::plan::{Epoch, IGNORED, Step, statistics};
use super::{Outcome, Recipe, Task};
use crate::autograd::no_grad;
use crate::data::InMemory;
use crate::models::NetworkInNetwork;
use crate::nn::{Context, StateDict};
use crate::ops::{Counts, CrossEntropyOptions, Reduction, Targets, crops_each, cross_entropy};
use crate::random::Philox;
use crate::train::{Group, Optimizer, OptimizerConfig};
use crate::{DType, Device, Result, Tensor};

/// Test images that all models of a group score at once.
const TEST_BATCH: usize = 64;

/// Both sets, their images where they are computed with.
pub(super) struct Resident<'a> {
    device: Device,
    train: &'a InMemory,
    test: &'a InMemory,
    train_images: Tensor,
    test_images: Tensor,
}

impl<'a> Resident<'a> {
    pub fn new(train: &'a InMemory, test: &'a InMemory, device: Device) -> Result<Self> {
        let images = |set: &InMemory| {
            let [height, width, channels] = set.shape();
            Tensor::new(set.pixels(), [set.labels().len(), height, width, channels])?.to_device(device)
        };
        Ok(Resident { device, train, test, train_images: images(train)?, test_images: images(test)? })
    }
}

/// The models of a group and what normalises their images.
struct Models<'a> {
    resident: &'a Resident<'a>,
    network: NetworkInNetwork,
    /// (models, channels)
    mean: Tensor,
    deviation: Tensor,
    count: usize,
}

/// Trains models that all have samples, and equally many steps in an epoch.
pub(super) fn train(
    tasks: &[Task<'_>],
    resident: &Resident<'_>,
    recipe: &Recipe,
    keep_weights: bool,
) -> Result<Vec<Outcome>> {
    let (set, device) = (resident.train, resident.device);
    let [.., channels] = set.shape();
    let moments: Vec<(Vec<f32>, Vec<f32>)> = tasks.iter().map(|task| statistics(set, task.samples)).collect();
    let vectors = |of: fn(&(Vec<f32>, Vec<f32>)) -> &Vec<f32>| {
        let all: Vec<f32> = moments.iter().flat_map(|own| of(own).iter().copied()).collect();
        Tensor::new(&all, [tasks.len(), channels])?.to_device(device)
    };
    let seeds: Vec<u64> = tasks.iter().map(|task| task.seed).collect();
    let network = NetworkInNetwork::each(channels, set.classes(), &seeds, DType::F32)?;
    network.parameters().to_device(device)?;
    let models = Models {
        resident,
        network,
        mean: vectors(|own| &own.0)?,
        deviation: vectors(|own| &own.1)?,
        count: tasks.len(),
    };
    let losses = models.fit(tasks, recipe)?;
    let scores = models.scores()?;
    let mut outcomes = Vec::with_capacity(tasks.len());
    for (model, (((mean, deviation), loss), scores)) in moments.into_iter().zip(losses).zip(scores).enumerate() {
        let weights = if keep_weights { Some(models.weights_of(model)?) } else { None };
        outcomes.push(Outcome { scores, weights, mean, deviation, loss });
    }
    Ok(outcomes)
}

impl Models<'_> {
    /// All epochs; the mean loss of each model in the last.
    fn fit(&self, tasks: &[Task<'_>], recipe: &Recipe) -> Result<Vec<f32>> {
        let decay = |_: &_| Group { weight_decay: recipe.sgd.weight_decay, lr_scale: 1.0 };
        let config = OptimizerConfig::Sgd(recipe.sgd);
        let mut optimizer = Optimizer::with_groups(self.network.parameters(), config, decay)?;
        let steps = tasks.iter().map(|task| task.samples.len().div_ceil(recipe.batch_size)).max().unwrap_or(0);
        let mut totals = vec![0f64; tasks.len()];
        for epoch in 0..recipe.epochs {
            let drawn: Vec<Epoch> =
                tasks.iter().map(|task| Epoch::draw(task, self.resident.train, recipe, epoch)).collect();
            for step in 0..steps {
                let step = Step::new(&drawn, recipe, step);
                let losses = self.step(&step, &mut optimizer, recipe.learning_rate_of(epoch))?;
                if epoch + 1 == recipe.epochs {
                    let losses = losses.to_vec::<f32>()?;
                    for ((total, losses), &count) in totals.iter_mut().zip(losses.chunks(step.batch)).zip(&step.counts)
                    {
                        losses[..count].iter().for_each(|&loss| *total += f64::from(loss));
                    }
                }
            }
        }
        Ok(totals.iter().zip(tasks).map(|(total, task)| (total / task.samples.len() as f64) as f32).collect())
    }

    /// One step of all models; the losses of all samples, (models, batch).
    fn step(&self, step: &Step, optimizer: &mut Optimizer, lr: f64) -> Result<Tensor> {
        let (models, batch, device) = (self.count, step.batch, self.resident.device);
        let crops =
            Tensor::new(&step.crops, [models, batch, step.crops.len() / (models * batch)])?.to_device(device)?;
        let labels = Tensor::new(&step.labels, [models, batch])?.to_device(device)?;
        // The mean over a model's own samples is in these weights, so no sum has to cross the models.
        let shares = Tensor::new(&step.shares, [models, batch])?.to_device(device)?;
        let counts = if step.counts.iter().all(|&count| count == batch) {
            Counts::full(models, batch)
        } else {
            Counts::new(&step.counts, device)?
        };
        let images = crops_each(&self.resident.train_images, &crops, &self.mean, &self.deviation)?;
        let logits = self.network.logits_each(&images, &counts, &Context::train(Philox::new(0)))?;
        let options = CrossEntropyOptions {
            reduction: Reduction::None,
            ignore_index: Some(IGNORED),
            ..CrossEntropyOptions::default()
        };
        let losses = cross_entropy(&logits, Targets::Labels(&labels), options)?;
        drop((images, logits));
        optimizer.step(&losses.backward_from(&shares)?, lr)?;
        Ok(losses.detach())
    }

    /// The logits of each model, (samples, classes).
    fn scores(&self) -> Result<Vec<Vec<f32>>> {
        let (test, models, classes) = (self.resident.test, self.count, self.resident.test.classes());
        let mut scores = vec![Vec::with_capacity(test.labels().len() * classes); models];
        let samples: Vec<usize> = (0..test.labels().len()).collect();
        for chunk in samples.chunks(TEST_BATCH) {
            let plan: Vec<i64> =
                (0..models).flat_map(|_| chunk.iter().flat_map(|&sample| [sample as i64, 0, 0, 0])).collect();
            let plan = Tensor::new(&plan, [models, chunk.len(), 4])?.to_device(self.resident.device)?;
            let counts = Counts::full(models, chunk.len());
            let logits = no_grad(|| {
                let images = crops_each(&self.resident.test_images, &plan, &self.mean, &self.deviation)?;
                self.network.logits_each(&images, &counts, &Context::eval())
            })?;
            let logits = logits.to_vec::<f32>()?;
            scores.iter_mut().zip(logits.chunks(chunk.len() * classes)).for_each(|(own, part)| own.extend(part));
        }
        Ok(scores)
    }

    /// The weights of one model, on the host.
    fn weights_of(&self, model: usize) -> Result<StateDict> {
        let state = self.network.state_of(model)?;
        state.into_iter().map(|(name, value)| Ok((name, value.to_device(Device::Cpu)?))).collect()
    }
}
