//! From a set to batches, in worker threads.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use super::augment::{Augment, AugmentConfig, write_target};
use super::{Dataset, Pixels};
use crate::random::Philox;
use crate::{Error, Result};

/// How a set becomes batches.
///
/// ```
/// use gridgrad::data::{AugmentConfig, LoaderConfig};
/// let training = LoaderConfig { batch_size: 64, workers: 2, augment: AugmentConfig::small(), ..Default::default() };
/// let held_out = LoaderConfig { shuffle: false, drop_last: false, training: false, ..training.clone() };
/// # let _ = (training, held_out);
/// ```
#[derive(Clone, Debug)]
pub struct LoaderConfig {
    /// Samples in a batch.
    pub batch_size: usize,
    /// Draw a new order for every epoch; otherwise that of the set.
    pub shuffle: bool,
    /// Decides order and augmentation.
    pub seed: u64,
    /// Leave out the last batch where it is not full.
    pub drop_last: bool,
    /// Threads that decode and augment; 0 does it in the thread that asks for a batch.
    pub workers: usize,
    /// Batches kept ready by all workers together, at least one each; every worker prepares one more.
    pub prefetch: usize,
    /// What is done to images.
    pub augment: AugmentConfig,
    /// Augment, smooth and mix. Otherwise images are prepared for a test and targets are one-hot.
    pub training: bool,
}

impl Default for LoaderConfig {
    fn default() -> Self {
        LoaderConfig {
            batch_size: 128,
            shuffle: true,
            seed: 0,
            drop_last: true,
            workers: 0,
            prefetch: 4,
            augment: AugmentConfig::none(),
            training: true,
        }
    }
}

/// Images and targets of some samples.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// Samples and their normalisation: (batch, height, width, channels). Bytes where the set is prepared for a test and
    /// where [`Augment::leaves_bytes`], else floats: all batches of a loader are alike.
    pub images: Pixels,
    /// Rows of every image.
    pub height: usize,
    /// Columns of every image.
    pub width: usize,
    /// Channels of every image: 1 or 3.
    pub channels: usize,
    /// Class probabilities to aim for: (batch, classes). Each row sums to 1.
    pub targets: Vec<f32>,
    /// The label of every sample, before any mixing.
    pub labels: Vec<usize>,
    /// The index of every sample in the set.
    pub indices: Vec<usize>,
}

impl Batch {
    /// Number of samples.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// True where there is no sample.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// The normalised samples: (batch, height, width, channels).
    pub fn floats(&self) -> Cow<'_, [f32]> {
        self.images.floats()
    }
}

/// Largest `batch_size` and `prefetch`.
const MAX_BATCH: usize = 1 << 20;
/// Largest `workers`.
const MAX_WORKERS: usize = 1024;
/// Largest number of values in the images, or the targets, of a batch: 16 GiB of floats.
const MAX_BATCH_LEN: usize = 1 << 32;

/// What workers share.
struct Job {
    dataset: Arc<dyn Dataset>,
    config: LoaderConfig,
    augment: Augment,
}

/// Hands out the batches of a set.
pub struct Loader {
    job: Arc<Job>,
}

impl Loader {
    /// A loader of `dataset`.
    ///
    /// # Errors
    /// `Config` where the set is empty, a number is out of its range, or `augment` does not validate.
    pub fn new(dataset: Arc<dyn Dataset>, config: LoaderConfig) -> Result<Self> {
        let wrong = |what: String| Err(Error::Config(format!("loader of {}: {what}", dataset.name())));
        if dataset.is_empty() || dataset.class_names().is_empty() {
            return wrong("the set has no samples or no classes".to_string());
        }
        if !(1..=MAX_BATCH).contains(&config.batch_size) {
            return wrong(format!("batch_size is {}, expected 1 to {MAX_BATCH}", config.batch_size));
        }
        if config.workers > MAX_WORKERS || config.prefetch > MAX_BATCH {
            return wrong(format!(
                "{} workers and prefetch of {}, expected at most {MAX_WORKERS} and {MAX_BATCH}",
                config.workers, config.prefetch
            ));
        }
        let augment = Augment::new(config.augment.clone(), dataset.channels())?;
        let images = config.batch_size.min(dataset.len()).saturating_mul(augment.sample_len());
        let targets = config.batch_size.min(dataset.len()).saturating_mul(dataset.class_names().len());
        if images.max(targets) > MAX_BATCH_LEN {
            return wrong(format!(
                "a batch would hold {} numbers, expected at most {MAX_BATCH_LEN}",
                images.max(targets)
            ));
        }
        Ok(Loader { job: Arc::new(Job { dataset, config, augment }) })
    }

    /// The set.
    pub fn dataset(&self) -> &Arc<dyn Dataset> {
        &self.job.dataset
    }

    /// The configuration.
    pub fn config(&self) -> &LoaderConfig {
        &self.job.config
    }

    /// Number of batches in an epoch.
    pub fn batches(&self) -> usize {
        let (samples, size) = (self.job.dataset.len(), self.job.config.batch_size);
        if self.job.config.drop_last { samples / size } else { samples.div_ceil(size) }
    }

    /// The batches of `epoch` from number `start_batch` on; none where there are not so many. Each is the same whatever
    /// batch the epoch was started at and however many workers there are.
    ///
    /// After an error the epoch ends. Dropping it early stops its workers and waits for them.
    pub fn epoch(&self, epoch: u64, start_batch: usize) -> Epoch {
        let order = self.job.order(epoch);
        let plan = Arc::new(Plan { job: self.job.clone(), epoch, order, stop: AtomicBool::new(false) });
        Epoch::start(plan, start_batch, self.batches())
    }
}

impl Job {
    /// Where `count` images go.
    fn room_for(&self, count: usize) -> Pixels {
        let len = count * self.augment.sample_len();
        if !self.config.training || self.augment.leaves_bytes() {
            Pixels::Bytes { values: Vec::with_capacity(len), table: self.augment.table().clone() }
        } else {
            Pixels::Floats(Vec::with_capacity(len))
        }
    }

    fn order(&self, epoch: u64) -> Vec<usize> {
        if self.config.shuffle {
            Philox::new(self.config.seed).stream("shuffle").fork(epoch).permutation(self.dataset.len())
        } else {
            (0..self.dataset.len()).collect()
        }
    }
}

/// One epoch, as workers see it.
struct Plan {
    job: Arc<Job>,
    epoch: u64,
    order: Vec<usize>,
    stop: AtomicBool,
}

impl Plan {
    /// Batch `number`; `None` where the epoch was dropped meanwhile.
    fn batch(&self, number: usize) -> Option<Result<Batch>> {
        let Job { dataset, config, augment } = &*self.job;
        let classes = dataset.class_names().len();
        let start = number * config.batch_size;
        let indices = &self.order[start..(start + config.batch_size).min(self.order.len())];
        let mut images = self.job.room_for(indices.len());
        let mut targets = vec![0.0; indices.len() * classes];
        let mut labels = Vec::with_capacity(indices.len());
        for (&index, target) in indices.iter().zip(targets.chunks_exact_mut(classes)) {
            if self.stop.load(Ordering::Relaxed) {
                return None;
            }
            match self.sample(index, &mut images, target) {
                Ok(label) => labels.push(label),
                Err(error) => return Some(Err(name_sample(error, &**dataset, index))),
            }
        }
        let size = augment.config().image_size;
        let channels = dataset.channels();
        if let (true, Some(mixing)) = (config.training, &augment.config().mixing) {
            let mut draws = self.stream("mix").fork(number as u64).draws();
            let mix = mixing.draw(size, size, &mut draws);
            mix.apply(&mut images, [indices.len(), size, size, channels], &mut targets);
        }
        let indices = indices.to_vec();
        Some(Ok(Batch { images, height: size, width: size, channels, targets, labels, indices }))
    }

    /// Appends one sample to `images`, writes its `target` and returns its label.
    fn sample(&self, index: usize, images: &mut Pixels, target: &mut [f32]) -> Result<usize> {
        let Job { dataset, config, augment } = &*self.job;
        let (picture, label) = dataset.sample(index)?;
        if label >= target.len() {
            return Err(Error::argument("Loader", format!("label {label}, expected one below {}", target.len())));
        }
        let mut draws = self.stream("augment").fork(index as u64).draws();
        match images {
            Pixels::Bytes { values, .. } if config.training => {
                values.extend(augment.training_image(&picture, &mut draws)?.pixels());
            }
            Pixels::Bytes { values, .. } => values.extend(augment.test_image(&picture)?.pixels()),
            Pixels::Floats(values) => {
                let start = values.len();
                values.resize(start + augment.sample_len(), 0.0);
                augment.training_sample(&picture, &mut draws, &mut values[start..])?;
            }
        }
        write_target(label, if config.training { augment.config().label_smoothing } else { 0.0 }, target);
        Ok(label)
    }

    fn stream(&self, name: &str) -> Philox {
        Philox::new(self.job.config.seed).stream(name).fork(self.epoch)
    }
}

/// Adds which sample it was to `error`.
fn name_sample(error: Error, dataset: &dyn Dataset, index: usize) -> Error {
    let sample = format!("sample {index} of {}", dataset.name());
    match error {
        Error::Format { path, offset, reason } => Error::Format { path, offset, reason: format!("{sample}: {reason}") },
        Error::Io { path, source } => {
            Error::Io { path, source: std::io::Error::new(source.kind(), format!("{sample}: {source}")) }
        }
        other => Error::argument("Loader", format!("{sample}: {other}")),
    }
}

/// The batches of one epoch, in order.
pub struct Epoch {
    plan: Arc<Plan>,
    next: usize,
    end: usize,
    workers: VecDeque<Worker>,
    /// Where a thread could not be started, what the epoch yields instead of batches.
    failure: Option<Error>,
}

/// A thread that prepares every n-th batch, n being the number of workers: batches need no sorting, and what is held
/// ready is bounded.
struct Worker {
    thread: JoinHandle<()>,
    batches: Receiver<Result<Batch>>,
}

impl Epoch {
    fn start(plan: Arc<Plan>, next: usize, end: usize) -> Self {
        let count = plan.job.config.workers.min(end.saturating_sub(next));
        let mut epoch = Epoch { plan, next, end, workers: VecDeque::with_capacity(count), failure: None };
        for offset in 0..count {
            let (plan, numbers) = (epoch.plan.clone(), (next + offset..end).step_by(count));
            let (sender, batches) = sync_channel(plan.job.config.prefetch.div_ceil(count).max(1));
            let builder = std::thread::Builder::new().name(format!("loader-{offset}"));
            match builder.spawn(move || prepare(&plan, numbers, &sender)) {
                Ok(thread) => epoch.workers.push_back(Worker { thread, batches }),
                Err(error) => {
                    epoch.failure = Some(Error::Training(format!("loader: no thread for worker {offset}: {error}")));
                    break;
                }
            }
        }
        epoch
    }

    /// Ends the epoch and its workers.
    fn stop(&mut self) {
        self.next = self.end;
        self.plan.stop.store(true, Ordering::Relaxed);
        for Worker { thread, batches } in self.workers.drain(..) {
            // Without a receiver, a worker that waits to send gives up.
            drop(batches);
            // A panic in a worker was reported where its batch was missing.
            let _ = thread.join();
        }
    }
}

fn prepare(plan: &Plan, numbers: impl Iterator<Item = usize>, sender: &SyncSender<Result<Batch>>) {
    for number in numbers {
        let Some(batch) = plan.batch(number) else { return };
        let failed = batch.is_err();
        if sender.send(batch).is_err() || failed {
            return;
        }
    }
}

impl Iterator for Epoch {
    type Item = Result<Batch>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.next >= self.end {
            self.stop();
            return None;
        }
        let batch = match (self.failure.take(), self.workers.front()) {
            (Some(error), _) => Err(error),
            (None, None) => self.plan.batch(self.next)?,
            (None, Some(worker)) => worker.batches.recv().unwrap_or_else(|_| {
                Err(Error::Training(format!("loader: a worker ended without batch {}: it panicked", self.next)))
            }),
        };
        self.next += 1;
        if !self.workers.is_empty() {
            self.workers.rotate_left(1);
        }
        if batch.is_err() {
            self.stop();
        }
        Some(batch)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = self.end.saturating_sub(self.next);
        (left.min(1), Some(left))
    }
}

impl std::iter::FusedIterator for Epoch {}

impl Drop for Epoch {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Image, InMemory};

    fn set(len: usize) -> Arc<dyn Dataset> {
        let pixels = (0..len * 16).map(|i| (i * 13 % 256) as u8).collect();
        let names = vec!["even".to_string(), "odd".to_string()];
        Arc::new(InMemory::new("sixteen", names, [4, 4, 1], pixels, (0..len).map(|i| i % 2).collect()).unwrap())
    }

    fn config(batch_size: usize, workers: usize) -> LoaderConfig {
        let augment = AugmentConfig { mixing: Some(Default::default()), ..AugmentConfig::digits() };
        LoaderConfig { batch_size, workers, augment: augment.with_image_size(8), ..LoaderConfig::default() }
    }

    /// A set whose sample 5 fails, by an error or a panic.
    struct Faulty {
        names: Vec<String>,
        panics: bool,
    }

    impl Dataset for Faulty {
        fn name(&self) -> &str {
            "faulty"
        }
        fn len(&self) -> usize {
            12
        }
        fn class_names(&self) -> &[String] {
            &self.names
        }
        fn channels(&self) -> usize {
            1
        }
        fn sample(&self, index: usize) -> Result<(Image, usize)> {
            assert!(index != 5 || !self.panics, "meant to happen");
            if index == 5 { Err(Error::format("five.png", "torn")) } else { Ok((Image::filled(4, 4, 1, 7), 0)) }
        }
    }

    fn faulty(panics: bool, workers: usize) -> Loader {
        let dataset = Arc::new(Faulty { names: vec!["only".to_string()], panics });
        Loader::new(dataset, LoaderConfig { shuffle: false, ..config(2, workers) }).unwrap()
    }

    #[test]
    fn an_error_names_its_sample_and_ends_the_epoch() {
        for workers in [0, 1, 3] {
            let batches: Vec<_> = faulty(false, workers).epoch(0, 0).collect();
            assert_eq!(batches.len(), 3, "{workers} workers");
            let message = batches[2].as_ref().unwrap_err().to_string();
            assert!(message.contains("five.png") && message.contains("sample 5 of faulty"), "{message}");
        }
    }

    #[test]
    fn a_panic_in_a_worker_becomes_an_error() {
        let batches: Vec<_> = faulty(true, 2).epoch(0, 0).collect();
        assert_eq!(batches.len(), 3);
        assert!(batches[2].as_ref().unwrap_err().to_string().contains("batch 2"));
    }

    #[test]
    fn the_last_batch_is_kept_or_dropped_and_every_sample_comes_once() {
        let keep = LoaderConfig { drop_last: false, ..config(4, 2) };
        let loader = Loader::new(set(10), keep.clone()).unwrap();
        let batches: Vec<Batch> = loader.epoch(3, 0).map(|batch| batch.unwrap()).collect();
        assert_eq!(batches.iter().map(Batch::len).collect::<Vec<_>>(), [4, 4, 2]);
        let mut indices: Vec<usize> = batches.iter().flat_map(|batch| batch.indices.clone()).collect();
        assert_ne!(indices, (0..10).collect::<Vec<_>>());
        indices.sort_unstable();
        assert_eq!(indices, (0..10).collect::<Vec<_>>());
        let dropped = Loader::new(set(10), LoaderConfig { drop_last: true, ..keep }).unwrap();
        assert_eq!((dropped.batches(), dropped.epoch(3, 0).count()), (2, 2));
        assert_eq!(dropped.epoch(3, 7).count(), 0);
    }

    #[test]
    fn dropping_an_epoch_early_ends_its_threads() {
        let loader = Loader::new(set(400), config(4, 3)).unwrap();
        let job = Arc::downgrade(&loader.job);
        let mut epoch = loader.epoch(0, 0);
        assert!(epoch.next().unwrap().is_ok());
        drop(epoch);
        drop(loader);
        // Threads hold the job, so none is left.
        assert_eq!(job.strong_count(), 0);
    }

    #[test]
    fn testing_gives_one_hot_targets_without_randomness() {
        let plain = LoaderConfig { training: false, shuffle: false, drop_last: false, ..config(4, 0) };
        let loader = Loader::new(set(6), plain).unwrap();
        let first: Vec<Batch> = loader.epoch(0, 0).map(|batch| batch.unwrap()).collect();
        let again: Vec<Batch> = loader.epoch(9, 0).map(|batch| batch.unwrap()).collect();
        assert_eq!(first, again);
        assert_eq!(first[0].targets, [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0]);
    }

    #[test]
    fn configurations_that_cannot_work_are_refused() {
        let refused = |len, change: fn(&mut LoaderConfig)| {
            let mut config = config(4, 0);
            change(&mut config);
            assert!(matches!(Loader::new(set(len), config), Err(Error::Config(_))));
        };
        refused(0, |_| {});
        refused(4, |c| c.batch_size = 0);
        refused(4, |c| c.batch_size = usize::MAX);
        refused(4, |c| c.workers = usize::MAX);
        refused(4, |c| c.augment.image_size = 0);
        refused(1000, |c| (c.batch_size, c.augment.image_size) = (1000, 4096));
    }
}
