//! What training measures, and the file that keeps it.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::report::EpochRecord;
use crate::{Error, Result, Tensor};

/// How a model does on a set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Number of samples.
    pub samples: usize,
    /// Mean loss.
    pub loss: f64,
    /// Share of samples whose class has the largest logit, 0 to 1.
    pub top1: f64,
    /// Share of samples whose class is among the five largest logits.
    pub top5: f64,
}

/// One step of the optimizer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Steps done, counted from 1.
    pub step: usize,
    /// Epochs done, with a fraction.
    pub epoch: f64,
    /// Mean loss over the samples of the step, before it.
    pub loss: f64,
    /// The learning rate.
    pub lr: f64,
    /// Global norm of the gradient, before clipping; 0 where it overflowed.
    pub gradient_norm: f64,
    /// Whether scaled gradients overflowed, so that the weights stayed as they were.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub skipped: bool,
}

/// One epoch.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct EpochMetrics {
    /// Epochs done, counted from 1.
    pub epoch: usize,
    /// Steps done.
    pub step: usize,
    /// Mean loss over the training samples of the epoch, each measured before the step it took part in.
    pub train_loss: f64,
    /// Share of training samples whose largest logit is the largest target, measured like the loss.
    pub train_accuracy: f64,
    /// On held-out samples, where they were measured after this epoch.
    pub held_out: Option<Evaluation>,
}

impl From<&EpochMetrics> for EpochRecord {
    fn from(metrics: &EpochMetrics) -> Self {
        EpochRecord {
            epoch: metrics.epoch,
            train_loss: metrics.train_loss,
            held_out_loss: metrics.held_out.map(|held_out| held_out.loss),
            train_accuracy: Some(metrics.train_accuracy),
            held_out_accuracy: metrics.held_out.map(|held_out| held_out.top1),
        }
    }
}

/// One line of a metrics file.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Record {
    /// A step.
    Step(StepMetrics),
    /// The end of an epoch.
    Epoch(EpochMetrics),
}

/// Number of rows of `logits` (batch, classes) whose label is the largest logit, and among the five largest. Of equal
/// logits the first counts as larger; a logit that is not a number is never right.
///
/// # Errors
/// Where there is not one row for each label, or a label is not a class.
pub fn top_hits(logits: &Tensor, labels: &[usize]) -> Result<(usize, usize)> {
    let [rows, classes] = logits.dims::<2>("top_hits", "logits (batch, classes)")?;
    if rows != labels.len() {
        return Err(Error::shape("top_hits", format!("logits {} for {} labels", logits.shape(), labels.len())));
    }
    let values = logits.to_f64_vec()?;
    let (mut first, mut among_five) = (0, 0);
    for (row, &label) in values.chunks_exact(classes.max(1)).zip(labels) {
        let Some(&own) = row.get(label) else {
            return Err(Error::argument("top_hits", format!("label {label}, expected one below {classes}")));
        };
        if own.is_nan() {
            continue;
        }
        let beats = |(class, &value): (usize, &f64)| value.is_nan() || value > own || (value == own && class < label);
        let rank = row.iter().enumerate().filter(|&entry| beats(entry)).count();
        first += usize::from(rank == 0);
        among_five += usize::from(rank < 5);
    }
    Ok((first, among_five))
}

/// Sums over samples, and the means they make.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunningMeans {
    /// Number of samples.
    pub samples: usize,
    /// Sum of their losses.
    pub loss: f64,
    /// How many were classified right.
    pub correct: usize,
    /// For how many the right class was among the first five.
    pub among_five: usize,
}

impl RunningMeans {
    /// Adds the sums of more samples.
    pub fn add(&mut self, other: &RunningMeans) {
        self.samples += other.samples;
        self.loss += other.loss;
        self.correct += other.correct;
        self.among_five += other.among_five;
    }

    /// The means; zero where there is no sample.
    pub fn means(&self) -> Evaluation {
        let mean = |sum: f64| if self.samples == 0 { 0.0 } else { sum / self.samples as f64 };
        Evaluation {
            samples: self.samples,
            loss: mean(self.loss),
            top1: mean(self.correct as f64),
            top5: mean(self.among_five as f64),
        }
    }
}

/// Images per second over the last steps.
#[derive(Clone, Debug, Default)]
pub struct Throughput(VecDeque<(usize, Duration)>);

impl Throughput {
    /// Enough steps to smooth the jitter of single ones, few enough to show a change.
    const WINDOW: usize = 32;

    /// Adds a step.
    pub fn add(&mut self, images: usize, time: Duration) {
        if self.0.len() == Self::WINDOW {
            self.0.pop_front();
        }
        self.0.push_back((images, time));
    }

    /// Images per second; 0 before the first step.
    pub fn images_per_second(&self) -> f64 {
        let images: usize = self.0.iter().map(|(images, _)| images).sum();
        let seconds = self.time().as_secs_f64();
        if seconds > 0.0 { images as f64 / seconds } else { 0.0 }
    }

    /// How long `steps` more will take.
    pub fn time_for(&self, steps: usize) -> Duration {
        let seconds = self.time().as_secs_f64() / self.0.len().max(1) as f64 * steps as f64;
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }

    fn time(&self) -> Duration {
        self.0.iter().map(|(_, time)| time).sum()
    }
}

/// Records as lines of JSON. Each line is handed to the system whole, as soon as it is known.
///
/// The file holds no times, so that a training run that is interrupted and resumed leaves the same bytes as one that is
/// not.
#[derive(Debug)]
pub struct MetricsFile {
    path: PathBuf,
    file: File,
}

impl MetricsFile {
    /// A new file.
    ///
    /// # Errors
    /// `Io` where the system refuses, and where there is such a file.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = File::options().write(true).create_new(true).open(path).map_err(|error| Error::io(path, error))?;
        Ok(MetricsFile { path: path.to_path_buf(), file })
    }

    /// Goes on with a file after `steps` steps and `epochs` finished epochs: cuts off lines of later ones, and what a
    /// crash left of a line. Where there is no file, starts one.
    ///
    /// # Errors
    /// `Io` where the system refuses, `Format` where the file holds something else.
    pub fn resume(path: impl AsRef<Path>, steps: usize, epochs: usize) -> Result<Self> {
        let path = path.as_ref();
        let io = |error| Error::io(path, error);
        let mut file = File::options().read(true).write(true).create(true).truncate(false).open(path).map_err(io)?;
        let bytes = std::fs::read(path).map_err(io)?;
        let is_later = |record: &Record| match record {
            Record::Step(metrics) => metrics.step > steps,
            Record::Epoch(metrics) => metrics.epoch > epochs,
        };
        let mut end = 0;
        for (record, len) in records(&bytes, path)? {
            if is_later(&record) {
                break;
            }
            end += len as u64;
        }
        file.set_len(end).map_err(io)?;
        file.seek(SeekFrom::Start(end)).map_err(io)?;
        Ok(MetricsFile { path: path.to_path_buf(), file })
    }

    /// Appends a record.
    ///
    /// # Errors
    /// `Io` where the system refuses.
    pub fn append(&mut self, record: &Record) -> Result<()> {
        let mut line = serde_json::to_vec(record).map_err(|error| Error::format(&self.path, error.to_string()))?;
        line.push(b'\n');
        self.file.write_all(&line).map_err(|error| Error::io(&self.path, error))
    }

    /// Waits until all lines are on the disk.
    ///
    /// # Errors
    /// `Io` where the system refuses.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(|error| Error::io(&self.path, error))
    }

    /// All records of a file. What a crash left of a last line is left out.
    ///
    /// # Errors
    /// `Io` where the file cannot be read, `Format` where it holds something else.
    pub fn read(path: impl AsRef<Path>) -> Result<Vec<Record>> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(|error| Error::io(path, error))?;
        Ok(records(&bytes, path)?.into_iter().map(|(record, _)| record).collect())
    }
}

/// Records with the lengths of their lines.
fn records(bytes: &[u8], path: &Path) -> Result<Vec<(Record, usize)>> {
    let mut at = 0;
    let mut records = Vec::new();
    for line in bytes.split_inclusive(|&byte| byte == b'\n').filter(|line| line.ends_with(b"\n")) {
        let record = serde_json::from_slice(line)
            .map_err(|error| Error::format_at(path, at, format!("not a line of metrics: {error}")))?;
        records.push((record, line.len()));
        at += line.len() as u64;
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: usize) -> Record {
        Record::Step(StepMetrics {
            step,
            epoch: step as f64 / 3.0,
            loss: 0.1,
            lr: 1e-3,
            gradient_norm: 2.5,
            skipped: false,
        })
    }

    fn epoch(epoch: usize, step: usize) -> Record {
        Record::Epoch(EpochMetrics { epoch, step, train_loss: 0.5, train_accuracy: 0.25, held_out: None })
    }

    #[test]
    fn hits_count_ties_and_numbers_that_are_none_as_misses() {
        let nan = f32::NAN;
        #[rustfmt::skip]
        let logits = [
            0.1, 0.9, 0.2, 0.3, 0.4, 0.5, 0.0,
            0.9, 0.9, 0.2, 0.3, 0.4, 0.5, 0.0,
            0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3,
            0.9, nan, 0.7, 0.6, 0.5, 0.4, 0.3,
            nan, 0.9, 0.7, 0.6, 0.5, 0.4, 0.3,
        ];
        let logits = Tensor::new(&logits, [5, 7]).unwrap();
        assert_eq!(top_hits(&logits, &[1, 1, 5, 1, 1]).unwrap(), (1, 3));
        assert_eq!(top_hits(&logits, &[1, 0, 4, 0, 5]).unwrap(), (2, 4));
        assert!(top_hits(&logits, &[1, 1]).is_err());
        assert!(top_hits(&logits, &[1, 1, 7, 1, 1]).unwrap_err().to_string().contains("label 7"));
    }

    #[test]
    fn means_weigh_samples_and_rates_span_the_window() {
        let mut running = RunningMeans::default();
        assert_eq!(running.means(), Evaluation::default());
        running.add(&RunningMeans { samples: 1, loss: 4.0, correct: 1, among_five: 1 });
        running.add(&RunningMeans { samples: 3, loss: 2.0, correct: 0, among_five: 2 });
        assert_eq!(running.means(), Evaluation { samples: 4, loss: 1.5, top1: 0.25, top5: 0.75 });

        let mut throughput = Throughput::default();
        assert_eq!((throughput.images_per_second(), throughput.time_for(9)), (0.0, Duration::ZERO));
        throughput.add(1000, Duration::from_secs(1000));
        (0..32).for_each(|_| throughput.add(64, Duration::from_millis(500)));
        assert_eq!((throughput.images_per_second(), throughput.time_for(9)), (128.0, Duration::from_millis(4500)));
    }

    #[test]
    fn a_resumed_file_is_that_of_an_uninterrupted_run() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let all = [step(1), step(2), step(3), epoch(1, 3), step(4), step(5)];
        let mut file = MetricsFile::create(&path).unwrap();
        assert!(MetricsFile::create(&path).unwrap_err().to_string().contains("metrics.jsonl"));
        all.iter().for_each(|record| file.append(record).unwrap());
        assert_eq!(MetricsFile::read(&path).unwrap(), all);
        let whole = std::fs::read(&path).unwrap();
        // Stopped before the third step, after it but before the end of its epoch, and after both.
        for (steps, epochs, kept) in [(2, 0, 2), (3, 0, 3), (3, 1, 4), (5, 1, 6)] {
            for torn in ["", "{\"kind\":\"st", "{"] {
                std::fs::write(&path, [&whole, torn.as_bytes()].concat()).unwrap();
                assert_eq!(MetricsFile::read(&path).unwrap(), all);
                let mut file = MetricsFile::resume(&path, steps, epochs).unwrap();
                all[kept..].iter().for_each(|record| file.append(record).unwrap());
                assert_eq!(std::fs::read(&path).unwrap(), whole);
            }
        }
        std::fs::write(&path, [b"{\"kind\":1}\n", &whole[..]].concat()).unwrap();
        assert!(MetricsFile::resume(&path, 1, 0).unwrap_err().to_string().contains("at byte 0"));
    }
}
