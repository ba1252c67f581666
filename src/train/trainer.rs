//! The loop that trains a classifier.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde_json::{Value, json};

use super::checkpoint::{Checkpoint, Progress, config_differences};
use super::clip::{clip_factor, global_norm, not_finite};
use super::config::TrainConfig;
use super::ema::Ema;
use super::evaluate::{Batches, Classifier, Scored, evaluate, strongest_targets};
use super::metrics::{EpochMetrics, Evaluation, MetricsFile, Record, RunningMeans, StepMetrics, Throughput};
use super::observer::{Observer, StepReport};
use super::optimizer::Optimizer;
use super::schedule::Schedule;
use super::state_problems;
use crate::autograd::Gradients;
use crate::data::Batch;
use crate::nn::Context;
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
        Ok(Trainer {
            schedule: config.schedule.build(config.epochs, steps_per_epoch)?,
            checkpoint_every: config.checkpoint_every.steps(steps_per_epoch)?.max(1),
            optimizer: Optimizer::new(parameters, config.optimizer)?,
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
        self.progress = progress;
        self.metrics = None;
        Ok(())
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
            let report = self.step(&mut *batches)?;
            if let Some(file) = &mut self.metrics {
                file.append(&Record::Step(report.metrics))?;
            }
            observer.on_step(&report)?;
            if stop.load(Ordering::Relaxed) {
                return Ok(false);
            }
            // At the end of an epoch the checkpoint comes after the evaluation.
            if self.progress.batch > 0 && self.progress.step.is_multiple_of(self.checkpoint_every) {
                self.write_checkpoint(LAST_CHECKPOINT, observer)?;
            }
        }
        Ok(true)
    }

    /// One step of the optimizer.
    fn step(&mut self, batches: &mut dyn Iterator<Item = Result<Batch>>) -> Result<StepReport> {
        let start = Instant::now();
        let count = self.run.config.accumulation.min(self.progress.batches_per_epoch - self.progress.batch);
        let (gradients, sums, gradient_norm) = self.gradients(batches, count)?;
        let lr = self.schedule.lr(self.progress.step);
        let clip = self.run.config.clip_norm.map_or(1.0, |max_norm| clip_factor(gradient_norm, max_norm));
        self.optimizer.step_scaled(&gradients, lr, clip / sums.samples as f64)?;
        if let Some(ema) = &mut self.ema {
            ema.update()?;
        }
        self.throughput.add(sums.samples, start.elapsed());
        let progress = &mut self.progress;
        progress.running.add(&sums);
        progress.step += 1;
        progress.batch += count;
        let batches_done = progress.batch;
        let epoch = progress.epoch as f64 + batches_done as f64 / progress.batches_per_epoch as f64;
        if batches_done == progress.batches_per_epoch {
            progress.epoch += 1;
            progress.batch = 0;
        }
        let step = progress.step;
        Ok(StepReport {
            metrics: StepMetrics { step, epoch, loss: sums.means().loss, lr, gradient_norm },
            total_steps: self.schedule.total_steps(),
            batches: (batches_done, progress.batches_per_epoch),
            images_per_second: self.throughput.images_per_second(),
            time_left: self.throughput.time_for(self.schedule.total_steps().saturating_sub(step)),
        })
    }

    /// Sums of the gradients and measures of `count` batches, and the norm of the mean gradient.
    fn gradients(
        &self,
        batches: &mut dyn Iterator<Item = Result<Batch>>,
        count: usize,
    ) -> Result<(Gradients, RunningMeans, f64)> {
        let Progress { step, epoch, batch: first, batches_per_epoch, seed, .. } = self.progress;
        let (parameters, stream) = (self.run.model.parameters(), Philox::new(seed).stream("train").fork(step as u64));
        let mut gradients = Gradients::default();
        let mut sums = RunningMeans::default();
        let mut samples = Vec::new();
        for number in 0..count {
            let batch = batches.next().transpose()?.filter(|batch| !batch.is_empty()).ok_or_else(|| {
                let got = first + number;
                Error::Training(format!("epoch {epoch} ended after {got} batches, expected {batches_per_epoch}"))
            })?;
            let scored = Scored::new(self.run.model, &batch, &Context::train(stream.fork(number as u64)))?;
            let measured = scored.sums(&strongest_targets(&batch))?;
            if !measured.loss.is_finite() {
                return Err(self.stopped(&format!("the loss is {}", measured.loss), &batch.indices));
            }
            gradients.accumulate(scored.loss.backward()?)?;
            sums.add(&measured);
            samples.extend(batch.indices);
        }
        let norm = global_norm(parameters, &gradients)? / sums.samples as f64;
        if !norm.is_finite() {
            let names = not_finite(parameters, &gradients)?.join(", ");
            return Err(self.stopped(&format!("the gradient is not finite for {names}"), &samples));
        }
        Ok((gradients, sums, norm))
    }

    fn stopped(&self, reason: &str, samples: &[usize]) -> Error {
        const SHOWN: usize = 32;
        let shown: Vec<String> = samples.iter().take(SHOWN).map(usize::to_string).collect();
        let more = if samples.len() > SHOWN { format!(" and {} more", samples.len() - SHOWN) } else { String::new() };
        let Progress { step, epoch, batch, .. } = &self.progress;
        Error::Training(format!(
            "{reason} in step {}, epoch {}, from batch {batch} on, with samples {}{more}; training stopped before the step",
            step + 1,
            epoch + 1,
            shown.join(", ")
        ))
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
        let mut measure = || evaluate(model, batches, stop, |done| observer.on_evaluation(done, count));
        match &mut self.ema {
            Some(ema) => ema.with_averages(&mut measure)?,
            None => measure(),
        }
    }

    fn write_checkpoint(&mut self, name: &str, observer: &mut dyn Observer) -> Result<()> {
        let Some(folder) = &self.run.folder else { return Ok(()) };
        if let Some(file) = &self.metrics {
            file.sync()?;
        }
        let path = folder.join(name);
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
