//! Answers without gradients.

use std::time::Instant;

use clap::{Args, value_parser};
use gridgrad::autograd::no_grad;
use gridgrad::nn::Context;
use gridgrad::train::Precision;
use gridgrad::{DType, Result};
use serde::Serialize;

use super::measure::{median, milliseconds};
use super::network::{Network, Subject};

#[derive(Args)]
pub struct InferenceArgs {
    #[command(flatten)]
    pub subject: Subject,
    /// Images of a batch.
    #[arg(long, default_value_t = 1, value_parser = value_parser!(u16).range(1..))]
    batch: u16,
    /// Measured batches.
    #[arg(long, default_value_t = 20, value_parser = value_parser!(u32).range(1..))]
    steps: u32,
    /// Batches before the first measured one.
    #[arg(long, default_value_t = 3)]
    warmup: u32,
}

/// Times are in milliseconds.
#[derive(Serialize)]
pub struct Report {
    model: String,
    batch: usize,
    image: [usize; 2],
    threads: usize,
    device: String,
    precision: Precision,
    /// The median of all batches.
    wall_ms: f64,
    images_per_second: f64,
    /// Two operations per multiply-add of convolutions and matrix products.
    gflops: f64,
    /// Every batch, in order.
    steps_ms: Vec<f64>,
}

pub fn measure(args: &InferenceArgs) -> Result<Report> {
    let network = Network::new(&args.subject.model, args.subject.image)?;
    let (device, batch) = (args.subject.device.get()?, usize::from(args.batch));
    network.model.parameters().to_device(device)?;
    let images = network.images(batch, args.subject.precision.compute_dtype(), device)?;
    let answer = || -> Result<f64> {
        let start = Instant::now();
        let logits = no_grad(|| network.model.forward(&images, &Context::eval()))?.cast(DType::F32)?;
        device.synchronize()?;
        drop(logits);
        Ok(milliseconds(start.elapsed()))
    };
    for _ in 0..args.warmup {
        answer()?;
    }
    let steps_ms: Vec<f64> = (0..args.steps).map(|_| answer()).collect::<Result<_>>()?;
    let wall_ms = median(steps_ms.clone());
    Ok(Report {
        model: args.subject.model.clone(),
        batch,
        image: network.image,
        threads: rayon::current_num_threads(),
        device: device.to_string(),
        precision: args.subject.precision,
        wall_ms,
        images_per_second: batch as f64 / wall_ms * 1e3,
        gflops: (2 * network.products * batch as u64) as f64 / (wall_ms * 1e6),
        steps_ms,
    })
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [height, width] = self.image;
        let Report { model, batch, threads, .. } = self;
        writeln!(
            f,
            "{model}, {batch} images of {height}×{width}; threads: {threads}, batches: {}",
            self.steps_ms.len()
        )?;
        writeln!(f, "batch      {:>9.1} ms median, {:.1} GFLOP/s", self.wall_ms, self.gflops)?;
        writeln!(f, "images     {:>9.1} a second", self.images_per_second)
    }
}
