//! Training steps.

use std::time::{Duration, Instant};

use clap::{Args, value_parser};
use gridgrad::nn::Context;
use gridgrad::ops::{CrossEntropyOptions, Targets, cross_entropy};
use gridgrad::random::Philox;
use gridgrad::train::{Optimizer, Precision};
use gridgrad::{DType, Device, Result, Tensor};
use serde::Serialize;

use super::measure::{median, milliseconds};
use super::network::{Network, Subject};
use crate::process::{cpu_time, peak_bytes};

#[derive(Args)]
pub struct StepArgs {
    #[command(flatten)]
    pub subject: Subject,
    /// Images of a step.
    #[arg(long, default_value_t = 8, value_parser = value_parser!(u16).range(1..))]
    batch: u16,
    /// Measured steps.
    #[arg(long, default_value_t = 5, value_parser = value_parser!(u32).range(1..))]
    steps: u32,
    /// Steps before the first measured one.
    #[arg(long, default_value_t = 2)]
    warmup: u32,
}

/// Times are medians over the steps, in milliseconds.
#[derive(Serialize)]
pub struct Report {
    model: String,
    batch: usize,
    image: [usize; 2],
    threads: usize,
    device: String,
    precision: Precision,
    wall_ms: f64,
    forward_ms: f64,
    backward_ms: f64,
    optimizer_ms: f64,
    /// Of all threads, mean over the steps; absent where the system does not tell.
    cpu_ms: Option<f64>,
    /// Two operations per multiply-add of convolutions and matrix products; backward counts as two forward passes.
    gflops: f64,
    /// Largest resident memory of the process, on a GPU the most memory of tensors there; absent where the system does
    /// not tell.
    peak_bytes: Option<u64>,
    /// Every step, in order.
    steps_ms: Vec<f64>,
}

/// How long the parts of a step took.
#[derive(Clone, Copy)]
struct Step {
    forward: Duration,
    backward: Duration,
    optimizer: Duration,
}

impl Step {
    fn wall(self) -> Duration {
        self.forward + self.backward + self.optimizer
    }
}

pub fn measure(args: &StepArgs) -> Result<Report> {
    let network = Network::new(&args.subject.model, args.subject.image)?;
    let (image, products, batch) = (network.image, network.products, usize::from(args.batch));
    let (device, compute) = (args.subject.device.get()?, args.subject.precision.compute_dtype());
    let mut trainer = Trainer::new(network, batch, device, compute)?;
    for number in 0..args.warmup {
        trainer.step(number)?;
    }
    let before = cpu_time();
    let steps: Vec<Step> = (0..args.steps).map(|number| trainer.step(args.warmup + number)).collect::<Result<_>>()?;
    let cpu = cpu_time().zip(before).map(|(after, before)| (after - before) / args.steps);
    let part = |part: fn(Step) -> Duration| median(steps.iter().map(|&step| milliseconds(part(step))).collect());
    let wall_ms = part(Step::wall);
    Ok(Report {
        model: args.subject.model.clone(),
        batch,
        image,
        threads: rayon::current_num_threads(),
        device: device.to_string(),
        precision: args.subject.precision,
        wall_ms,
        forward_ms: part(|step| step.forward),
        backward_ms: part(|step| step.backward),
        optimizer_ms: part(|step| step.optimizer),
        cpu_ms: cpu.map(milliseconds),
        gflops: (3 * 2 * products * batch as u64) as f64 / (wall_ms * 1e6),
        peak_bytes: match device {
            Device::Cpu => peak_bytes(),
            device => Some(device.memory_stats()?.peak as u64),
        },
        steps_ms: steps.iter().map(|step| milliseconds(step.wall())).collect(),
    })
}

/// A network with one batch of random images and labels.
struct Trainer {
    network: Network,
    optimizer: Optimizer,
    images: Tensor,
    labels: Tensor,
    stream: Philox,
    device: Device,
}

impl Trainer {
    fn new(network: Network, batch: usize, device: Device, compute: DType) -> Result<Self> {
        let stream = Philox::new(0);
        let label = |image: usize| stream.stream("labels").below(image as u64, network.classes) as i64;
        let labels: Vec<i64> = (0..batch).map(label).collect();
        let parameters = network.model.parameters();
        parameters.to_device(device)?;
        Ok(Trainer {
            optimizer: Optimizer::new(parameters, network.optimizer)?,
            images: network.images(batch, compute, device)?,
            labels: Tensor::new(&labels, [batch])?.to_device(device)?,
            device,
            stream: stream.stream("steps"),
            network,
        })
    }

    fn step(&mut self, number: u32) -> Result<Step> {
        let start = Instant::now();
        let context = Context::train(self.stream.fork(number.into()));
        let logits = self.network.model.forward(&self.images, &context)?.cast(DType::F32)?;
        let loss = cross_entropy(&logits, Targets::Labels(&self.labels), CrossEntropyOptions::default())?;
        drop(logits);
        self.device.synchronize()?;
        let forward = start.elapsed();
        let gradients = loss.backward()?;
        drop(loss);
        self.device.synchronize()?;
        let backward = start.elapsed() - forward;
        self.optimizer.step(&gradients, 1e-4)?;
        drop(gradients);
        self.device.synchronize()?;
        Ok(Step { forward, backward, optimizer: start.elapsed() - forward - backward })
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [height, width] = self.image;
        let Report { model, batch, threads, .. } = self;
        writeln!(f, "{model}, {batch} images of {height}×{width}; threads: {threads}, steps: {}", self.steps_ms.len())?;
        writeln!(f, "step       {:>9.1} ms median, {:.1} GFLOP/s", self.wall_ms, self.gflops)?;
        writeln!(f, "forward    {:>9.1} ms", self.forward_ms)?;
        writeln!(f, "backward   {:>9.1} ms", self.backward_ms)?;
        writeln!(f, "optimizer  {:>9.1} ms", self.optimizer_ms)?;
        if let Some(cpu_ms) = self.cpu_ms {
            writeln!(f, "processor  {cpu_ms:>9.1} ms of all threads, mean")?;
        }
        if let Some(bytes) = self.peak_bytes {
            writeln!(f, "memory     {:>9.2} GB at most", bytes as f64 / 1e9)?;
        }
        Ok(())
    }
}
