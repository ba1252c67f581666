//! `gridgrad eval`: how good a trained network is.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use clap::Args;
use gridgrad::data::{self, Dataset, Loader, LoaderConfig, Split};
use gridgrad::train::{Precision, evaluate};
use gridgrad::{Error, Result};
use serde_json::json;

use crate::checkpoint::Trained;
use crate::device::DeviceFlag;
use crate::output::{print, print_json};
use crate::progress::bar;

/// Measures a trained network on a data set.
#[derive(Args)]
pub struct Eval {
    /// A checkpoint, or the folder of a run
    checkpoint: PathBuf,
    /// builtin, mnist, cifar10, cifar100, gtsrb, imagenette (under GRIDGRAD_DATA), or a folder; that of the training
    /// where absent
    #[arg(long)]
    data: Option<String>,
    /// Measures on the training images instead of the held-out ones
    #[arg(long)]
    on_training_set: bool,
    /// Images in a batch
    #[arg(long, default_value_t = 64)]
    batch_size: usize,
    /// Prints one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceFlag,
    /// f32, bf16 or f16: in what the network computes
    #[arg(long, default_value = "f32")]
    precision: Precision,
}

pub fn run(eval: Eval) -> Result<()> {
    let device = eval.device.get()?;
    let trained = Trained::read(&eval.checkpoint, device)?;
    let spec = eval.data.as_deref().unwrap_or(&trained.description.data);
    let split = if eval.on_training_set { Split::Train } else { Split::Test };
    let dataset: Arc<dyn Dataset> = Arc::from(data::open(spec, split, None)?);
    let expected = &trained.description;
    if dataset.class_names() != expected.classes || dataset.channels() != expected.model.in_chans {
        return Err(Error::Config(format!(
            "{spec} has {} classes and {} channels; the network was trained for the {} classes of {} with {} channels",
            dataset.class_names().len(),
            dataset.channels(),
            expected.classes.len(),
            expected.data,
            expected.model.in_chans
        )));
    }
    let config = LoaderConfig {
        batch_size: eval.batch_size,
        shuffle: false,
        drop_last: false,
        augment: expected.augment.clone(),
        training: false,
        ..LoaderConfig::default()
    };
    let loader = Loader::new(dataset, config)?;
    let progress = bar(loader.batches() as u64, "{bar:30} {pos}/{len} batches, {eta} left");
    let start = Instant::now();
    let done = |batches: usize| {
        progress.set_position(batches as u64);
        Ok(())
    };
    let result = evaluate(&trained.model, &loader, eval.precision, &AtomicBool::new(false), done)?;
    progress.finish_and_clear();
    let result = result.ok_or_else(|| Error::Training("the evaluation was stopped".into()))?;
    let rate = result.samples as f64 / start.elapsed().as_secs_f64();
    if eval.json {
        let rate = json!({ "images_per_second": rate });
        return print_json(&json!({ "data": spec, "samples": result.samples, "loss": result.loss,
            "top1": result.top1, "top5": result.top5, "speed": rate }));
    }
    print(&format!(
        "{spec}: {} images, loss {:.4}, accuracy {:.2} % (right class among the best five: {:.2} %), {rate:.0} images/s\n",
        result.samples,
        result.loss,
        100.0 * result.top1,
        100.0 * result.top5,
    ))
}
