//! `gridgrad predict`: what images show.

use std::path::PathBuf;

use clap::Args;
use gridgrad::Result;
use gridgrad::data::Image;
use serde_json::json;

use crate::checkpoint::Trained;
use crate::device::DeviceFlag;
use crate::output::{print, print_json, table};

/// Tells what images show.
#[derive(Args)]
pub struct Predict {
    /// A checkpoint, or the folder of a run
    checkpoint: PathBuf,
    /// JPEG, PNG or PNM files
    #[arg(required = true)]
    images: Vec<PathBuf>,
    /// Number of classes to name for each image
    #[arg(long, default_value_t = 3)]
    top: usize,
    /// Prints a JSON list
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceFlag,
}

pub fn run(predict: Predict) -> Result<()> {
    let device = predict.device.get()?;
    let trained = Trained::read(&predict.checkpoint, device)?;
    let mut rows = vec![vec!["image".to_owned(), "class".to_owned(), "probability".to_owned()]];
    let mut list = Vec::new();
    for path in &predict.images {
        let ranked = trained.classify(Image::open(path)?)?;
        let best = &ranked[..predict.top.clamp(1, ranked.len())];
        for (rank, &(class, probability)) in best.iter().enumerate() {
            let name = if rank == 0 { path.display().to_string() } else { String::new() };
            rows.push(vec![name, trained.class(class).to_owned(), format!("{:.2} %", 100.0 * probability)]);
        }
        let classes = best.iter().map(|&(class, p)| json!({ "class": trained.class(class), "probability": p }));
        list.push(json!({ "image": path.display().to_string(), "classes": classes.collect::<Vec<_>>() }));
    }
    if predict.json { print_json(&list) } else { print(&table(&rows)) }
}
