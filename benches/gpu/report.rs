//! The one table that comes out, as Markdown and JSON.

use std::fmt::Write as _;
use std::path::Path;

use gridgrad::{DType, Device, Error, Result};
use serde::{Deserialize, Serialize};

use crate::baseline::Bench;
use crate::describe;
use crate::model::{Direction, H200, Roofs, launches, total};
use crate::shapes::Case;

/// The implementation that the others are compared with.
pub const OURS: &str = "gridgrad";

/// One measurement.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    pub problem: String,
    pub models: String,
    pub batch: usize,
    pub direction: String,
    pub implementation: String,
    /// Seconds: the median of the samples, and the quarters around it.
    pub median: Option<f64>,
    pub quartiles: Option<[f64; 2]>,
    /// Why there is no measurement.
    pub skipped: Option<String>,
    /// What the crate's kernels move and compute, by their formulas.
    #[serde(default)]
    pub bytes: f64,
    #[serde(default)]
    pub flops: f64,
    /// Of what the card does at most in the time that was taken; where its roofs are known.
    #[serde(default)]
    pub share_of_bytes: Option<f64>,
    #[serde(default)]
    pub share_of_flops: Option<f64>,
    /// This time over the crate's.
    #[serde(default)]
    pub ratio: Option<f64>,
}

impl Row {
    fn of(case: &Case, direction: Direction, implementation: &str) -> Self {
        Row {
            problem: format!("{}: {}", case.op.room(), case.op),
            models: case.models.clone(),
            batch: case.batch,
            direction: direction.name().into(),
            implementation: implementation.into(),
            median: None,
            quartiles: None,
            skipped: None,
            bytes: 0.0,
            flops: 0.0,
            share_of_bytes: None,
            share_of_flops: None,
            ratio: None,
        }
    }

    fn with_work(mut self, bench: &Bench<'_>) -> Self {
        // The formulas are tested: what they cannot tell is left out.
        if let Ok(launches) = launches(bench.case, bench.direction, bench.dtype) {
            let (work, _) = total(&launches, H200, bench.dtype);
            (self.bytes, self.flops) = (work.bytes, work.flops);
        }
        self
    }

    /// From sorted samples, in seconds.
    pub fn measured(bench: &Bench<'_>, implementation: &str, samples: &[f64]) -> Self {
        let at = |share: f64| samples.get(((samples.len().max(1) - 1) as f64 * share).round() as usize).copied();
        let quartiles = at(0.25).zip(at(0.75)).map(|(low, high)| [low, high]);
        let row = Row::of(bench.case, bench.direction, implementation).with_work(bench);
        Row { median: at(0.5), quartiles, ..row }
    }

    pub fn skipped(bench: &Bench<'_>, implementation: &str, error: &Error) -> Self {
        let reason = match error {
            Error::DeviceUnavailable { reason, .. } => reason.clone(),
            error => format!("{}: {error}", describe(bench.case, bench.direction)),
        };
        Row { skipped: Some(reason), ..Row::of(bench.case, bench.direction, implementation).with_work(bench) }
    }

    fn is_of_the_same_problem(&self, other: &Row) -> bool {
        (&self.problem, self.batch, &self.direction) == (&other.problem, other.batch, &other.direction)
    }
}

/// All measurements with where they were made.
#[derive(Serialize)]
pub struct Report {
    pub device: String,
    pub card: String,
    pub dtype: String,
    #[serde(skip)]
    roofs: Option<(Roofs, DType)>,
    pub rows: Vec<Row>,
}

impl Report {
    pub fn new(device: Device, dtype: DType) -> Result<Self> {
        let card = match device {
            Device::Cuda(ordinal) => {
                let gpus = gridgrad::driver::probe().map_err(|error| Error::Config(error.to_string()))?;
                gpus.get(ordinal).map_or_else(|| "unknown".into(), |gpu| gpu.name.clone())
            }
            device => device.to_string(),
        };
        let roofs = card.contains("H200").then_some((H200, dtype));
        Ok(Report { device: device.to_string(), card, dtype: dtype.name().into(), roofs, rows: Vec::new() })
    }

    /// Shares and ratios, once all rows are there; rows of one problem come together.
    pub fn finish(&mut self) {
        let ours: Vec<Row> = self.rows.iter().filter(|row| row.implementation == OURS).cloned().collect();
        for row in &mut self.rows {
            let Some(own) = ours.iter().find(|own| own.is_of_the_same_problem(row)) else { continue };
            (row.bytes, row.flops) = (own.bytes, own.flops);
            row.models.clone_from(&own.models);
            row.ratio = row.median.zip(own.median).map(|(theirs, ours)| theirs / ours);
            if let Some(((roofs, dtype), median)) = self.roofs.zip(row.median) {
                let peak = if dtype == DType::F32 { roofs.flops } else { roofs.products };
                row.share_of_bytes = Some(row.bytes / median / roofs.bytes);
                row.share_of_flops = Some(row.flops / median / peak);
            }
        }
        let place = |row: &Row| ours.iter().position(|own| own.is_of_the_same_problem(row)).unwrap_or(ours.len());
        self.rows.sort_by_key(place);
    }

    pub fn markdown(&self) -> String {
        let mut text =
            format!("Kernels on {} ({}), {}. Ratio: time over gridgrad's.\n\n", self.card, self.device, self.dtype);
        text +=
            "| problem | models | batch | pass | implementation | median µs | spread | of bytes | of FLOPs | ratio |\n";
        text += "|---|---|---:|---|---|---:|---:|---:|---:|---:|\n";
        for row in &self.rows {
            let share = |share: Option<f64>| share.map_or("-".into(), |share| format!("{:.0} %", 100.0 * share));
            let Row { problem, models, batch, direction, implementation, .. } = row;
            let _ = write!(text, "| {problem} | {models} | {batch} | {direction} | {implementation} | ");
            let _ = match (row.median, row.quartiles, &row.skipped) {
                (Some(median), quartiles, _) => {
                    let spread =
                        quartiles.map_or("-".into(), |[low, high]| format!("{:.0} %", 100.0 * (high - low) / median));
                    let ratio = row.ratio.map_or("-".into(), |ratio| format!("{ratio:.2}"));
                    let (bytes, flops) = (share(row.share_of_bytes), share(row.share_of_flops));
                    writeln!(text, "{:.2} | {spread} | {bytes} | {flops} | {ratio} |", 1e6 * median)
                }
                (None, _, reason) => {
                    let reason = reason.as_deref().unwrap_or("not measured").replace('|', "/").replace('\n', " ");
                    writeln!(text, "skipped: {reason} | | | | |")
                }
            };
        }
        text
    }

    /// Writes NAME.md and NAME.json.
    pub fn write(&self, name: &Path) -> Result<()> {
        let json = serde_json::to_string_pretty(self).map_err(|error| Error::Config(error.to_string()))?;
        for (extension, content) in [("md", self.markdown()), ("json", json + "\n")] {
            let path = name.with_extension(extension);
            std::fs::write(&path, content).map_err(|error| Error::io(&path, error))?;
            println!("wrote {}", path.display());
        }
        Ok(())
    }
}
