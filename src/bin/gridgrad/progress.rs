//! What a person sees while a network trains.

use std::path::{Path, PathBuf};
use std::time::Duration;

use gridgrad::report::{EpochRecord, StepRecord, training_curves};
use gridgrad::train::{EpochMetrics, METRICS_FILE, MetricsFile, Observer, Record, StepReport};
use gridgrad::{Device, Result};
use indicatif::{ProgressBar, ProgressStyle};

use crate::output::print;
use crate::process;

/// A progress bar on standard error; hidden where that is not a terminal.
pub fn bar(len: u64, template: &str) -> ProgressBar {
    let bar = ProgressBar::new(len);
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("█▉▊▋▌▍▎▏ "));
    }
    bar
}

/// The picture of loss and accuracy in a run's folder.
pub const CURVES: &str = "curves.svg";

/// Shows a bar during an epoch, a line after it, and keeps the picture of the curves up to date.
pub struct Display {
    bar: ProgressBar,
    epochs: usize,
    title: String,
    folder: PathBuf,
    steps: Vec<StepRecord>,
    rate: f64,
    time_left: Duration,
}

impl Display {
    pub fn new(epochs: usize, title: String, folder: PathBuf) -> Self {
        let bar = bar(1, "epoch {prefix} {bar:24} {pos}/{len} {msg}");
        Display { bar, epochs, title, folder, steps: Vec::new(), rate: 0.0, time_left: Duration::ZERO }
    }

    /// Takes the first `steps` steps of a run that goes on from its metrics, so that the curves begin where it began.
    pub fn recall(&mut self, steps: usize) -> Result<()> {
        let path = self.folder.join(METRICS_FILE);
        let records = if path.exists() { MetricsFile::read(path)? } else { Vec::new() };
        self.steps.extend(records.into_iter().filter_map(|record| match record {
            Record::Step(step) if step.step <= steps => Some(StepRecord { epoch: step.epoch, loss: step.loss }),
            _ => None,
        }));
        Ok(())
    }

    /// Takes the bar off the screen.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// 3m 20s, with hours where there are some.
pub fn human(time: Duration) -> String {
    let seconds = time.as_secs();
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds}s"),
        (0, minutes, seconds) => format!("{minutes}m {seconds:02}s"),
        (hours, minutes, _) => format!("{hours}h {minutes:02}m"),
    }
}

/// 41 MB, or 1.73 GB from a gigabyte on.
fn amount(bytes: u64) -> String {
    match bytes as f64 {
        bytes if bytes < 1e9 => format!("{:.0} MB", bytes / 1e6),
        bytes => format!("{:.2} GB", bytes / 1e9),
    }
}

/// The most memory so far: of the process, where the system tells, and of tensors on `device`.
pub fn peak_memory(device: Device) -> Result<String> {
    let place = if device == Device::Cpu { String::new() } else { format!(" on {device}") };
    let tensors = format!("{} of tensors{place}", amount(device.memory_stats()?.peak as u64));
    let process = process::peak_bytes().map_or(String::new(), |bytes| format!("{} of the process, ", amount(bytes)));
    Ok(format!("Peak memory: {process}{tensors}"))
}

impl Observer for Display {
    fn on_step(&mut self, report: &StepReport) -> Result<()> {
        let (done, batches) = report.batches;
        self.bar.set_length(batches as u64);
        self.bar.set_position(done as u64);
        self.bar.set_prefix(format!("{}/{}", (report.metrics.epoch.ceil() as usize).max(1), self.epochs));
        (self.rate, self.time_left) = (report.images_per_second, report.time_left);
        self.bar.set_message(format!(
            "loss {:.4}  {:.0} images/s  {} left",
            report.metrics.loss,
            self.rate,
            human(self.time_left)
        ));
        self.steps.push(StepRecord { epoch: report.metrics.epoch, loss: report.metrics.loss });
        Ok(())
    }

    fn on_evaluation(&mut self, done: usize, batches: usize) -> Result<()> {
        self.bar.set_message(format!("held-out images: batch {done} of {batches}"));
        Ok(())
    }

    fn on_epoch(&mut self, history: &[EpochMetrics], is_best: bool) -> Result<()> {
        let Some(last) = history.last() else { return Ok(()) };
        let held_out = last.held_out.map_or(String::new(), |held_out| {
            let mark = if is_best { "  best so far" } else { "" };
            format!("   held out: loss {:.4}, accuracy {:.2} %{mark}", held_out.loss, 100.0 * held_out.top1)
        });
        let line = format!(
            "epoch {:>3}/{}   training: loss {:.4}, accuracy {:.2} %{held_out}   {:.0} images/s, {} left\n",
            last.epoch,
            self.epochs,
            last.train_loss,
            100.0 * last.train_accuracy,
            self.rate,
            human(self.time_left)
        );
        self.bar.suspend(|| print(&line))?;
        let epochs: Vec<EpochRecord> = history.iter().map(EpochRecord::from).collect();
        training_curves(self.folder.join(CURVES), &self.title, &epochs, &self.steps)
    }

    fn on_checkpoint(&mut self, _path: &Path) -> Result<()> {
        self.bar.tick();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_read_well() {
        let seconds = |seconds| human(Duration::from_secs(seconds));
        assert_eq!([seconds(7), seconds(200), seconds(7260)], ["7s", "3m 20s", "2h 01m"]);
    }

    #[test]
    fn amounts_of_memory_read_well() {
        assert_eq!([amount(0), amount(41_300_000), amount(1_734_000_000)], ["0 MB", "41 MB", "1.73 GB"]);
    }
}
