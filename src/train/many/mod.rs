//! Many small models trained at once, each on its own subset of one data set.
//!
//! On a GPU a group of models is one network with a leading model axis, so that a launch works for all of them. On the
//! processor every model is computed by itself, and threads train different models: none waits for another. The data
//! set stays where it is computed, and batches are gathered from it by index.
//!
//! A model's numbers are a function of its seed, the contents of its subset in their order, and the recipe, on one
//! device: not of the models that it shares a group with, of the size of the group, of indices in the data set, or of
//! the number of threads. A model whose loss is no longer a number stays alone with that.
//!
//! ```
//! use gridgrad::data::InMemory;
//! use gridgrad::train::many::{Recipe, Task, Trainer};
//! let classes = || vec!["dark".to_owned(), "light".to_owned()];
//! let shades = |count: u8| (0..count).flat_map(|shade| [(shade % 2) * 200 + shade; 64]).collect();
//! let train = InMemory::new("shades", classes(), [8, 8, 1], shades(4), vec![0, 1, 0, 1])?;
//! let test = InMemory::new("shades", classes(), [8, 8, 1], shades(2), vec![0, 1])?;
//! let tasks = [Task { seed: 0, samples: &[0, 1] }, Task { seed: 1, samples: &[2, 3] }];
//! let outcomes = Trainer::new(Recipe { epochs: 1, ..Recipe::default() }).train(&tasks, &train, &test)?;
//! assert_eq!(outcomes[1].scores.len(), test.labels().len() * test.classes());
//! # Ok::<(), gridgrad::Error>(())
//! ```

mod group;
mod plan;
mod recipe;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

pub use recipe::Recipe;

use crate::data::InMemory;
use crate::nn::StateDict;
use crate::{Device, Error, Result};
use group::Resident;

const OP: &str = "train::many";

/// A model to be trained.
#[derive(Clone, Copy, Debug)]
pub struct Task<'a> {
    /// Decides first weights, order and augmentation.
    pub seed: u64,
    /// Indices of its subset. May be empty, and an index may occur twice.
    pub samples: &'a [usize],
}

/// A trained model.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Logits of all test images, (samples, classes). Without training samples 1 for class 0 and 0 for the others.
    pub scores: Vec<f32>,
    /// The weights with the names of a single network, on the host, where asked for; `None` without training samples.
    pub weights: Option<StateDict>,
    /// Mean of each channel over the subset, of values from 0 to 1; empty without samples.
    pub mean: Vec<f32>,
    /// Unbiased standard deviation of each channel, likewise.
    pub deviation: Vec<f32>,
    /// Mean loss of the last epoch; NaN where training diverged, 0 without samples.
    pub loss: f32,
}

/// Trains Network-in-Networks.
#[derive(Clone, Debug)]
pub struct Trainer {
    recipe: Recipe,
    device: Device,
    group: usize,
    keep_weights: bool,
}

impl Trainer {
    /// Models of a group on a GPU.
    const GPU_GROUP: usize = 16;

    /// A trainer on the processor.
    pub fn new(recipe: Recipe) -> Self {
        Trainer { recipe, device: Device::Cpu, group: 1, keep_weights: false }
    }

    /// Trains on `device`, in groups of a size that suits it.
    #[must_use]
    pub fn on(self, device: Device) -> Self {
        let group = if device == Device::Cpu { 1 } else { Self::GPU_GROUP };
        Trainer { device, group, ..self }
    }

    /// Computes up to `group` models by one op: memory grows with it, and no number changes.
    #[must_use]
    pub fn group(self, group: usize) -> Self {
        Trainer { group: group.max(1), ..self }
    }

    /// Whether outcomes hold the weights.
    #[must_use]
    pub fn keep_weights(self, keep_weights: bool) -> Self {
        Trainer { keep_weights, ..self }
    }

    /// Hyperparameters.
    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// Where it trains.
    pub fn device(&self) -> Device {
        self.device
    }

    /// How many models are computed at the same time: on the processor a few for each thread, so that none is idle long.
    pub fn models_at_once(&self) -> usize {
        match self.device {
            Device::Cpu => self.group.saturating_mul(rayon::current_num_threads()).saturating_mul(4),
            _ => self.group,
        }
    }

    /// Trains a model for each task on its samples of `train`, and scores `test`. Outcomes are in the order of `tasks`.
    ///
    /// # Errors
    /// Where the recipe is out of range, an index is not one of `train`, images of the two sets differ in shape or
    /// classes or are too small, or the device has no room.
    pub fn train(&self, tasks: &[Task<'_>], train: &InMemory, test: &InMemory) -> Result<Vec<Outcome>> {
        let mut outcomes: Vec<Outcome> = tasks.iter().map(|_| constant(test)).collect();
        self.open(train, test)?.train(tasks, |task, outcome| {
            outcomes[task] = outcome;
            Ok(())
        })?;
        Ok(outcomes)
    }

    /// Puts both sets on the device, once for any number of calls of [`Session::train`].
    ///
    /// # Errors
    /// Where the recipe is out of range, images of the two sets differ in shape or classes, or the device has no room.
    pub fn open<'a>(&'a self, train: &'a InMemory, test: &'a InMemory) -> Result<Session<'a>> {
        self.recipe.check()?;
        if train.shape() != test.shape() || train.classes() != test.classes() {
            let of = |set: &InMemory| format!("images of {:?} in {} classes", set.shape(), set.classes());
            return Err(Error::argument(OP, format!("trained on {}, tested on {}", of(train), of(test))));
        }
        Ok(Session { trainer: self, train, test, resident: Resident::new(train, test, self.device)? })
    }

    /// Tasks with samples, in groups of the same number of steps, whose sizes are near each other.
    fn groups(&self, tasks: &[Task<'_>]) -> Vec<Vec<usize>> {
        let steps = |index: usize| tasks[index].samples.len().div_ceil(self.recipe.batch_size);
        let mut order: Vec<usize> = (0..tasks.len()).filter(|&index| !tasks[index].samples.is_empty()).collect();
        // The longest first, so that threads end at about the same time.
        order.sort_by_key(|&index| (std::cmp::Reverse(tasks[index].samples.len()), index));
        let same_steps = order.chunk_by(|&a, &b| steps(a) == steps(b));
        same_steps.flat_map(|same| same.chunks(self.group).map(<[usize]>::to_vec)).collect()
    }
}

/// A trainer with both sets on its device.
pub struct Session<'a> {
    trainer: &'a Trainer,
    train: &'a InMemory,
    test: &'a InMemory,
    resident: Resident<'a>,
}

impl Session<'_> {
    /// Trains a model for each task. Calls `done` with the number of a task as soon as its model is trained, in any order.
    ///
    /// # Errors
    /// Where an index is not one of the training set, images are too small, the device has no room, or `done` fails.
    /// Models that are trained by then were given to `done`.
    pub fn train(&self, tasks: &[Task<'_>], mut done: impl FnMut(usize, Outcome) -> Result<()>) -> Result<()> {
        let Trainer { recipe, device, keep_weights, .. } = self.trainer;
        let len = self.train.labels().len();
        if let Some(index) = tasks.iter().flat_map(|task| task.samples).find(|&&index| index >= len) {
            return Err(Error::argument(OP, format!("sample {index} of {len}")));
        }
        for (index, _) in tasks.iter().enumerate().filter(|(_, task)| task.samples.is_empty()) {
            done(index, constant(self.test))?;
        }
        let groups = self.trainer.groups(tasks);
        let run = |group: &Vec<usize>| {
            let members: Vec<Task<'_>> = group.iter().map(|&index| tasks[index]).collect();
            group::train(&members, &self.resident, recipe, *keep_weights)
        };
        let mut finish = |group: usize, outcomes: Vec<Outcome>| {
            groups[group].iter().zip(outcomes).try_for_each(|(&index, outcome)| done(index, outcome))
        };
        match device {
            Device::Cpu => side_by_side(&groups, run, finish),
            _ => groups.iter().enumerate().try_for_each(|(number, group)| finish(number, run(group)?)),
        }
    }
}

/// The outcome of a model without samples: the class of the smallest index.
fn constant(test: &InMemory) -> Outcome {
    let classes = test.classes();
    let scores = (0..test.labels().len() * classes).map(|at| if at % classes == 0 { 1.0 } else { 0.0 }).collect();
    Outcome { scores, weights: None, mean: Vec::new(), deviation: Vec::new(), loss: 0.0 }
}

/// Runs `work` for all items on threads of their own, which share the current pool's number between them, and calls
/// `done` with each result on this thread as it comes. After a failure nobody takes up more, and what is in work ends.
fn side_by_side<T: Sync, R: Send>(
    items: &[T],
    work: impl Fn(&T) -> Result<R> + Sync,
    mut done: impl FnMut(usize, R) -> Result<()>,
) -> Result<()> {
    let threads = rayon::current_num_threads();
    let workers = threads.min(items.len()).max(1);
    let pool = |number: usize| {
        let threads = threads / workers + usize::from(number < threads % workers);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        pool.map_err(|error| Error::Training(format!("threads to train with: {error}")))
    };
    let pools = (0..workers).map(pool).collect::<Result<Vec<_>>>()?;
    let next = AtomicUsize::new(0);
    let stop = || next.store(items.len(), Ordering::Relaxed);
    let worker = |results: mpsc::Sender<(usize, Result<R>)>| {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(index) else { return };
            // The other end stays until all workers have ended.
            let _ = results.send((index, work(item).inspect_err(|_| stop())));
        }
    };
    let (sender, results) = mpsc::channel();
    std::thread::scope(|scope| {
        for pool in &pools {
            let (sender, worker) = (sender.clone(), &worker);
            scope.spawn(move || pool.install(|| worker(sender)));
        }
        drop(sender);
        let (mut outcome, mut refused) = (Ok(()), false);
        for (index, result) in results {
            let result = match result {
                Ok(_) if refused => Ok(()),
                Ok(result) => done(index, result).inspect_err(|_| refused = true),
                Err(error) => Err(error),
            };
            if let Err(error) = result {
                stop();
                outcome = outcome.and(Err(error));
            }
        }
        outcome
    })
}
