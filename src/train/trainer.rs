//! The loop that trains a classifier.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde_json::{Value, json};

use super::checkpoint::{Checkpoint, Progress, config_differences};
use super::config::TrainConfig;
use super::ema::Ema;
use super::engine::{Engine, PendingStep, StepBatches, StepPlan};
use super::evaluate::{Batches, Classifier, evaluate};
use super::metrics::{EpochMetrics, Evaluation, MetricsFile, Record, RunningMeans, StepMetrics, Throughput};
use super::observer::{Observer, StepReport};
use super::optimizer::Optimizer;
use super::schedule::Schedule;
use super::state_problems;
use crate::data::Batch;
use crate::random::Philox;
use crate::{Error, Result};

/// The checkpoint of a run's folder from which it goes on.
pub const LAST_CHECKPOINT: &str = "last.safetensors";
/// The checkpoint of a run's folder with the highest accuracy on held-out samples.
pub const BEST_CHECKPOINT: &str = "best.safetensors";
/// The file of a run's folder with a line for every step and every epoch.
pub const METRICS_FILE: &str = "metrics.jsonl";

/// What is trained, on what, and how.
pub struct TrainingRun<'a> {
    /// The model.
    pub model: &'a dyn Classifier,
    /// What it learns from.
    pub batches: &'a dyn Batches,
    /// What it is measured on.
    pub held_out: Option<&'a dyn Batches>,
    /// How it is trained.
    pub config: TrainConfig,
    /// All else that decides the result, such as the configurations of model and data. Checkpoints hold it, and only a
    /// run of the same description goes on from them.
    pub description: Value,
    /// Where checkpoints and metrics go; nothing is written where absent.
    pub folder: Option<PathBuf>,
}

/// How training ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All epochs are done.
    Finished {
        /// Steps done.
        step: usize,
    },
    /// It was asked to stop, and goes on from its last checkpoint.
    Interrupted {
        /// Steps done.
        step: usize,
    },
}

/// Trains a classifier. See the [module documentation](super).
pub struct Trainer<'a> {
    run: TrainingRun<'a>,
    schedule: Schedule,
    /// Steps from one checkpoint to the next.
    checkpoint_every: usize,
    optimizer: Optimizer,
    ema: Option<Ema>,
    engine: Engine,
    /// Steps done whose reports are still to come.
    pending: Vec<PendingStep>,
    progress: Progress,
    metrics: Option<MetricsFile>,
    throughput: Throughput,
}

impl<'a> Trainer<'a> {
    /// A run at its beginning.
    ///
    /// # Errors
    /// `Config` where a setting is out of its range or there is no batch to learn from.
    pub fn new(run: TrainingRun<'a>) -> Result<Self> {
        let (config, parameters) = (&run.config, run.model.parameters());
        config.validate()?;
        let batches_per_epoch = run.batches.batches_per_epoch();
        if batches_per_epoch == 0 {
            return Err(Error::Config("training: the training set does not fill a single batch".into()));
        }
        let steps_per_epoch = batches_per_epoch.div_ceil(config.accumulation);
        let progress = Progress {
            batches_per_epoch,
            seed: config.seed,
            config: json!({ "train": config, "run": run.description }),
            ..Progress::default()
        };
        let mut optimizer = Optimizer::new(parameters, config.optimizer)?;
        let engine = Engine::new(&mut optimizer, config.precision)?;
        Ok(Trainer {
            schedule: config.schedule.build(config.epochs, steps_per_epoch)?,
            checkpoint_every: config.checkpoint_every.steps(steps_per_epoch)?.max(1),
            optimizer,
            engine,
            pending: Vec::new(),
            ema: config.ema_decay.map(|decay| Ema::new(parameters, decay)).transpose()?,
            progress,
            metrics: None,
            throughput: Throughput::default(),
            run,
        })
    }

    /// Takes over the state of a checkpoint, so that [`Trainer::run`] goes on from it as if it had never stopped.
    ///
    /// # Errors
    /// Those of [`Checkpoint::read`]; `Config` where it is of another configuration, listing the differences; `Format`
    /// where its tensors do not fit. Nothing has changed then.
    pub fn resume(&mut self, checkpoint: impl AsRef<Path>) -> Result<()> {
        let path = checkpoint.as_ref();
        let Checkpoint { progress, model, optimizer, ema } = Checkpoint::read(path)?;
        let mut differences = config_differences(&progress.config, &self.progress.config);
        let (then, now) = (progress.batches_per_epoch, self.progress.batches_per_epoch);
        if then != now {
            differences.push(format!("batches in an epoch: {then}, now {now}"));
        }
        if !differences.is_empty() {
            let list = differences.join("\n  ");
            return Err(Error::Config(format!("{} is of another run:\n  {list}", path.display())));
        }
        let own_ema = self.ema.as_ref().map(Ema::state_dict).unwrap_or_default();
        let ema = ema.unwrap_or_default();
        let parameters = self.run.model.parameters();
        let problems = [
            state_problems(&parameters.state_dict(), &model),
            state_problems(&self.optimizer.state_dict()?, &optimizer),
            state_problems(&own_ema, &ema),
        ]
        .concat();
        if !problems.is_empty() {
            let message = format!("checkpoint does not fit the model:\n  {}", problems.join("\n  "));
            return Err(Error::format(path, message));
        }
        parameters.load_state_dict(&model)?;
        self.optimizer.load_state_dict(&optimizer)?;
        self.ema.iter_mut().try_for_each(|own| own.load_state_dict(&ema))?;
        self.engine.resume(&self.optimizer, progress.loss_scale)?;
        self.pending.clear();
        self.progress = progress;
        self.metrics = None;
        Ok(())
    }

    /// Whether to record a step once it has run twice, and to repeat the recording: a CUDA graph. The bits are the same.
    /// Without effect where the model is on the host.
    pub fn repeat_recorded_steps(&mut self, on: bool) {
        if let Engine::Device(engine) = &mut self.engine {
            engine.repeat_recorded(on);
        }
    }

    /// How far training is.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Averages of the weights, where they are kept.
    pub fn ema(&self) -> Option<&Ema> {
        self.ema.as_ref()
    }

    /// Trains to the last epoch, or until `stop` is set. Set during a step, it takes effect after it.
    ///
    /// # Errors
    /// `Training` where a loss or gradient is not finite, which names step and samples: training never goes on from
    /// there, and the weights stay as they were before the step. `Config` where the folder holds a run that this one
    /// does not go on from. Those of the batches, the model, the observer, and of files that cannot be written. After
    /// any error the last checkpoint is as it was.
    pub fn run(&mut self, observer: &mut dyn Observer, stop: &AtomicBool) -> Result<Outcome> {
        self.open_folder()?;
        loop {
            let is_measured = self.progress.history.len() == self.progress.epoch;
            if is_measured && self.progress.epoch >= self.run.config.epochs {
                return Ok(Outcome::Finished { step: self.progress.step });
            }
            let goes_on =
                if is_measured { self.train_epoch(observer, stop)? } else { self.finish_epoch(observer, stop)? };
            if !goes_on {
                self.write_checkpoint(LAST_CHECKPOINT, observer)?;
                return Ok(Outcome::Interrupted { step: self.progress.step });
            }
        }
    }

    fn open_folder(&mut self) -> Result<()> {
        let Some(folder) = self.run.folder.as_ref().filter(|_| self.metrics.is_none()) else { return Ok(()) };
        std::fs::create_dir_all(folder).map_err(|error| Error::io(folder, error))?;
        let path = folder.join(METRICS_FILE);
        if self.progress.step > 0 {
            self.metrics = Some(MetricsFile::resume(path, self.progress.step, self.progress.history.len())?);
            return Ok(());
        }
        if path.exists() || folder.join(LAST_CHECKPOINT).exists() {
            let message = format!("{} holds a training run: resume it, or choose another folder", folder.display());
            return Err(Error::Config(message));
        }
        self.metrics = Some(MetricsFile::create(path)?);
        Ok(())
    }

    /// Trains to the end of the epoch. False where `stop` was set.
    fn train_epoch(&mut self, observer: &mut dyn Observer, stop: &AtomicBool) -> Result<bool> {
        let source = self.run.batches;
        let mut batches = source.epoch(self.progress.epoch as u64, self.progress.batch);
        let epoch = self.progress.epoch;
        while self.progress.epoch == epoch {
            self.step(&mut *batches)?;
            // At the end of an epoch the checkpoint comes after the evaluation.
            let is_due = self.progress.batch > 0 && self.progress.step.is_multiple_of(self.checkpoint_every);
            let is_over = self.progress.epoch != epoch || stop.load(Ordering::Relaxed);
            if is_over || is_due || self.pending.len() == self.engine.patience() {
                self.report(observer)?;
            }
            // The observer may have asked for it.
            if stop.load(Ordering::Relaxed) {
                self.report(observer)?;
                return Ok(false);
            }
            if is_due {
                self.write_checkpoint(LAST_CHECKPOINT, observer)?;
            }
        }
        Ok(true)
    }

    /// One step of the optimizer. On a device its report comes later.
    fn step(&mut self, batches: &mut dyn Iterator<Item = Result<Batch>>) -> Result<()> {
        let start = Instant::now();
        let count = self.run.config.accumulation.min(self.progress.batches_per_epoch - self.progress.batch);
        let lr = self.schedule.lr(self.progress.step);
        let mut batches = StepBatches { trainer_batches: batches, progress: &self.progress, count, read: 0 };
        let plan = StepPlan {
            model: self.run.model,
            config: &self.run.config,
            stream: Philox::new(self.progress.seed).stream("train").fork(self.progress.step as u64),
            lr,
        };
        let (ema, optimizer) = (self.ema.as_mut(), &mut self.optimizer);
        let (samples, result) = match &mut self.engine {
            Engine::Host(engine) => {
                let (samples, result) = engine.step(&plan, optimizer, ema, &mut batches)?;
                (samples, Some(result))
            }
            Engine::Device(engine) => (engine.step(&plan, optimizer, ema, &mut batches)?, None),
        };
        self.throughput.add(samples.len(), start.elapsed());
        let began = (self.progress.epoch, self.progress.batch);
        let progress = &mut self.progress;
        progress.step += 1;
        progress.batch += count;
        let batches_done = progress.batch;
        let epoch = progress.epoch as f64 + batches_done as f64 / progress.batches_per_epoch as f64;
        if batches_done == progress.batches_per_epoch {
            progress.epoch += 1;
            progress.batch = 0;
        }
        self.pending.push(PendingStep { step: progress.step, epoch, began, batches_done, lr, samples, result });
        Ok(())
    }

    /// Reports the steps that were not reported yet. On a device this waits for them.
    fn report(&mut self, observer: &mut dyn Observer) -> Result<()> {
        let pending = std::mem::take(&mut self.pending);
        let measured = match &self.engine {
            Engine::Host(_) => pending.iter().filter_map(|pending| pending.result).collect(),
            Engine::Device(engine) => engine.results(&self.optimizer, &pending)?,
        };
        for (pending, result) in pending.into_iter().zip(measured) {
            if let Some(reason) = result.refused {
                return Err(pending.refused(reason));
            }
            self.progress.running.add(&result.sums);
            let metrics = StepMetrics {
                step: pending.step,
                epoch: pending.epoch,
                loss: result.sums.means().loss,
                lr: pending.lr,
                gradient_norm: result.gradient_norm.unwrap_or(0.0),
                skipped: result.gradient_norm.is_none(),
            };
            if let Some(file) = &mut self.metrics {
                file.append(&Record::Step(metrics))?;
            }
            let total_steps = self.schedule.total_steps();
            observer.on_step(&StepReport {
                metrics,
                total_steps,
                batches: (pending.batches_done, self.progress.batches_per_epoch),
                images_per_second: self.throughput.images_per_second(),
                time_left: self.throughput.time_for(total_steps.saturating_sub(pending.step)),
            })?;
        }
        Ok(())
    }

    /// Evaluates where it is time, and records the epoch. False where `stop` was set before the end.
    fn finish_epoch(&mut self, observer: &mut dyn Observer, stop: &AtomicBool) -> Result<bool> {
        let Progress { epoch, step, .. } = self.progress;
        let is_last = epoch == self.run.config.epochs;
        let is_due = is_last || epoch.is_multiple_of(self.run.config.evaluate_every);
        let held_out = match self.run.held_out.filter(|_| is_due) {
            None => None,
            Some(batches) => match self.evaluate(batches, observer, stop)? {
                None => return Ok(false),
                evaluation => evaluation,
            },
        };
        let progress = &mut self.progress;
        let Evaluation { loss: train_loss, top1: train_accuracy, .. } = progress.running.means();
        let metrics = EpochMetrics { epoch, step, train_loss, train_accuracy, held_out };
        let accuracy = held_out.map(|held_out| held_out.top1);
        let is_best = accuracy.is_some_and(|accuracy| progress.best_accuracy.is_none_or(|best| accuracy > best));
        if is_best {
            progress.best_accuracy = accuracy;
        }
        progress.history.push(metrics);
        progress.running = RunningMeans::default();
        if let Some(file) = &mut self.metrics {
            file.append(&Record::Epoch(metrics))?;
        }
        if is_best {
            self.write_checkpoint(BEST_CHECKPOINT, observer)?;
        }
        if is_last || step.is_multiple_of(self.checkpoint_every) {
            self.write_checkpoint(LAST_CHECKPOINT, observer)?;
        }
        observer.on_epoch(&self.progress.history, is_best)?;
        Ok(true)
    }

    /// Measures the averages where they are kept, else the model as it is.
    fn evaluate(
        &mut self,
        batches: &dyn Batches,
        observer: &mut dyn Observer,
        stop: &AtomicBool,
    ) -> Result<Option<Evaluation>> {
        let (model, count) = (self.run.model, batches.batches_per_epoch());
        let precision = self.run.config.precision;
        let mut measure = || evaluate(model, batches, precision, stop, |done| observer.on_evaluation(done, count));
        match &mut self.ema {
            Some(ema) => ema.with_averages(&mut measure),
            None => measure(),
        }
    }

    fn write_checkpoint(&mut self, name: &str, observer: &mut dyn Observer) -> Result<()> {
        let Some(folder) = &self.run.folder else { return Ok(()) };
        if let Some(file) = &self.metrics {
            file.sync()?;
        }
        let path = folder.join(name);
        self.progress.loss_scale = self.engine.loss_scale(&self.optimizer)?;
        let checkpoint = Checkpoint {
            progress: self.progress.clone(),
            model: self.run.model.parameters().state_dict(),
            optimizer: self.optimizer.state_dict()?,
            ema: self.ema.as_ref().map(Ema::state_dict),
        };
        checkpoint.write(&path)?;
        observer.on_checkpoint(&path)
    }
}
