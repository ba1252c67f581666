//! Training on a device: the emulator, or what `GRIDGRAD_TEST_DEVICE` names.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use gridgrad::autograd::no_grad;
use gridgrad::data::Split;
use gridgrad::models::CrossFormer;
use gridgrad::nn::{BatchNorm, Context, Conv2d, Linear, Parameters, Scope};
use gridgrad::ops::{self, Conv2dOptions, Pool2dOptions};
use gridgrad::random::Philox;
use gridgrad::train::{
    Batches, Classifier, Decay, Observer, OptimizerConfig, Precision, ScheduleConfig, Sgd, StepMetrics, StepReport,
    TrainConfig, Trainer,
};
use gridgrad::{DType, Device, Result, Tensor};

use super::support::{Interrupter, Mlp, Moment, crossformer, digits, run, spoiled};

pub fn test_device() -> Option<Device> {
    match std::env::var("GRIDGRAD_TEST_DEVICE") {
        Ok(name) => Some(name.parse().unwrap()),
        Err(_) => cfg!(feature = "emulator").then_some(Device::Emulated),
    }
}

fn set_schedule(_seed: u64) {
    #[cfg(feature = "emulator")]
    gridgrad::driver::emulator::set_schedule(_seed);
}

/// Two convolutions with batch norm, pooling and a linear head, for images of 8×8.
struct ConvNet {
    conv1: Conv2d,
    norm1: BatchNorm,
    conv2: Conv2d,
    norm2: BatchNorm,
    head: Linear,
    parameters: Parameters,
}

impl ConvNet {
    fn new(seed: u64) -> Self {
        let scope = Scope::new(seed, DType::F32);
        let options = Conv2dOptions { padding: [1, 1], ..Conv2dOptions::default() };
        ConvNet {
            conv1: Conv2d::new(&scope.child("conv1"), [1, 8], 3, false, options).unwrap(),
            norm1: BatchNorm::new(&scope.child("norm1"), 8).unwrap(),
            conv2: Conv2d::new(&scope.child("conv2"), [8, 16], 3, true, options).unwrap(),
            norm2: BatchNorm::new(&scope.child("norm2"), 16).unwrap(),
            head: Linear::new(&scope.child("head"), 16, 10, true).unwrap(),
            parameters: scope.parameters().clone(),
        }
    }
}

impl Classifier for ConvNet {
    fn forward(&self, images: &Tensor, context: &Context) -> Result<Tensor> {
        let x = self.norm1.forward(&self.conv1.forward(images)?, context)?.relu()?;
        let x = ops::max_pool2d(&x, Pool2dOptions::tiling([2, 2]))?;
        let x = self.norm2.forward(&self.conv2.forward(&x)?, context)?.relu()?;
        self.head.forward(&ops::global_avg_pool2d(&x)?)
    }

    fn parameters(&self) -> &Parameters {
        &self.parameters
    }
}

/// Keeps what every step measured; stops after some.
struct Steps<'a> {
    last: usize,
    stop: &'a AtomicBool,
    metrics: Vec<StepMetrics>,
}

impl Observer for Steps<'_> {
    fn on_step(&mut self, report: &StepReport) -> Result<()> {
        self.metrics.push(report.metrics);
        if report.metrics.step >= self.last {
            self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        }
        Ok(())
    }
}

fn config(optimizer: OptimizerConfig, precision: Precision) -> TrainConfig {
    let schedule = ScheduleConfig { lr: 0.01, ..ScheduleConfig::default() };
    TrainConfig { epochs: 3, optimizer, precision, schedule, ema_decay: Some(0.9), ..TrainConfig::default() }
}

/// The measures and the final weights of training `model` on `device` for at least `steps` steps.
fn train(
    model: &dyn Classifier,
    device: Device,
    config: TrainConfig,
    steps: usize,
    graph: bool,
) -> (Vec<StepMetrics>, Vec<Vec<u8>>) {
    model.parameters().to_device(device).unwrap();
    let batches = digits(Split::Train, 32, true);
    let mut trainer = Trainer::new(run(model, &batches, None, config, None)).unwrap();
    trainer.repeat_recorded_steps(graph);
    let stop = AtomicBool::new(false);
    let mut observer = Steps { last: steps, stop: &stop, metrics: Vec::new() };
    trainer.run(&mut observer, &stop).unwrap();
    (observer.metrics, bytes(model.parameters()))
}

pub fn bytes(parameters: &Parameters) -> Vec<Vec<u8>> {
    let value = |tensor: Tensor| tensor.to_device(Device::Cpu).unwrap().raw_bytes().unwrap().to_vec();
    parameters.iter().map(|parameter| value(parameter.tensor())).collect()
}

/// Losses and norms on the device are the processor's within rounding, which training amplifies slowly.
fn follows_the_processor(make: impl Fn() -> Box<dyn Classifier>, optimizer: OptimizerConfig) {
    let Some(device) = test_device() else { return };
    let config = config(optimizer, Precision::F32);
    let (host, _) = train(&*make(), Device::Cpu, config.clone(), 16, false);
    let (device, _) = train(&*make(), device, config, 16, false);
    assert_eq!((host.len(), device.len()), (16, 16));
    for (a, b) in host.iter().zip(&device) {
        assert_eq!((a.step, a.epoch, a.lr), (b.step, b.epoch, b.lr));
        assert!((a.loss - b.loss).abs() <= 1e-4 * a.loss, "step {}: {} and {}", a.step, a.loss, b.loss);
        let norms = (a.gradient_norm, b.gradient_norm);
        assert!((norms.0 - norms.1).abs() <= 1e-3 * norms.0, "step {}: {norms:?}", a.step);
    }
}

#[test]
fn a_perceptron_with_dropout_follows_the_processors_losses() {
    follows_the_processor(|| Box::new(Mlp::new(1)), OptimizerConfig::default());
}

#[test]
fn a_convolutional_network_follows_the_processors_losses() {
    follows_the_processor(|| Box::new(ConvNet::new(1)), OptimizerConfig::Sgd(Sgd { nesterov: true, ..Sgd::default() }));
}

#[test]
fn a_crossformer_follows_the_processors_losses() {
    follows_the_processor(|| Box::new(crossformer(16, 0.2)), OptimizerConfig::default());
}

#[test]
fn recorded_steps_and_other_orders_of_threads_leave_the_same_bits() {
    let Some(device) = test_device() else { return };
    for precision in [Precision::F32, Precision::Bf16] {
        let config = || config(OptimizerConfig::default(), precision);
        let first = train(&crossformer(16, 0.2), device, config(), 16, false);
        assert!(
            first == train(&crossformer(16, 0.2), device, config(), 16, true),
            "{precision:?}: a recorded step differs"
        );
        set_schedule(5);
        let other = train(&crossformer(16, 0.2), device, config(), 16, true);
        set_schedule(0);
        assert!(first == other, "{precision:?}: the order of threads matters");
    }
    let config = || config(OptimizerConfig::Sgd(Sgd::default()), Precision::F32);
    assert!(
        train(&ConvNet::new(2), device, config(), 16, false) == train(&ConvNet::new(2), device, config(), 16, true)
    );
}

/// Looks at the model after every step: with what it keeps of earlier looks, and with all computed anew.
struct Looking<'a> {
    model: &'a CrossFormer,
    images: &'a Tensor,
    looks: usize,
}

impl Observer for Looking<'_> {
    fn on_step(&mut self, _report: &StepReport) -> Result<()> {
        let look = || self.model.logits(self.images, &Context::eval())?.to_device(Device::Cpu)?.to_vec::<f32>();
        assert_eq!(no_grad(look)?, look()?, "look {}", self.looks);
        self.looks += 1;
        Ok(())
    }
}

#[test]
fn position_biases_that_are_kept_are_never_those_of_earlier_weights() {
    for device in [Some(Device::Cpu), test_device()].into_iter().flatten() {
        for graph in [false, true] {
            let model = crossformer(16, 0.0);
            model.parameters().to_device(device).unwrap();
            let images = Tensor::randn([2, 8, 8, 1], DType::F32, Philox::new(1)).unwrap().to_device(device).unwrap();
            let batches = digits(Split::Train, 240, true);
            let config = config(OptimizerConfig::default(), Precision::F32);
            let mut trainer = Trainer::new(run(&model, &batches, None, config, None)).unwrap();
            trainer.repeat_recorded_steps(graph && device != Device::Cpu);
            let mut looking = Looking { model: &model, images: &images, looks: 0 };
            trainer.run(&mut looking, &AtomicBool::new(false)).unwrap();
            assert!(looking.looks > 8, "{} looks", looking.looks);
        }
    }
}

#[test]
fn a_run_on_a_device_that_is_stopped_and_resumed_leaves_the_same_bytes() {
    let Some(device) = test_device() else { return };
    let files =
        |folder: &Path| ["last.safetensors", "metrics.jsonl"].map(|file| std::fs::read(folder.join(file)).unwrap());
    let batches = digits(Split::Train, 480, true);
    let go = |folder: &Path, resume: bool, stop_at: Option<usize>| {
        let model = Mlp::new(4);
        model.parameters.to_device(device).unwrap();
        let config = config(OptimizerConfig::default(), Precision::F16);
        let mut trainer = Trainer::new(run(&model, &batches, None, config, Some(folder))).unwrap();
        if resume {
            trainer.resume(folder.join("last.safetensors")).unwrap();
        }
        let stop = AtomicBool::new(false);
        match stop_at {
            Some(step) => trainer.run(&mut Interrupter::new(Moment::Step(step), Some(&stop)), &stop),
            None => trainer.run(&mut (), &stop),
        }
        .unwrap();
    };
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    go(whole.path(), false, None);
    go(parts.path(), false, Some(2));
    go(parts.path(), true, None);
    assert!(files(whole.path()) == files(parts.path()));
}

/// Counts what the device was asked for between reports.
struct Counting<'a> {
    device: Device,
    stop: &'a AtomicBool,
    /// Step, allocations and waits at the first report after each wait.
    seen: Vec<(usize, u64, u64)>,
}

impl Observer for Counting<'_> {
    fn on_step(&mut self, report: &StepReport) -> Result<()> {
        let waits = self.device.waits()?;
        if self.seen.last().is_none_or(|last| last.2 != waits) {
            self.seen.push((report.metrics.step, self.device.memory_stats()?.allocations, waits));
        }
        if self.seen.len() == 4 {
            self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        }
        Ok(())
    }
}

/// In a process of its own: other tests allocate and wait too.
#[test]
fn the_steady_state_neither_waits_nor_allocates() {
    let Some(device) = test_device() else { return };
    if std::env::var_os("GRIDGRAD_TEST_STEADY").is_none() {
        let program = std::env::current_exe().unwrap();
        let child = std::process::Command::new(program)
            .args(["--exact", "devices::the_steady_state_neither_waits_nor_allocates", "--nocapture"])
            .env("GRIDGRAD_TEST_STEADY", "1")
            .output()
            .unwrap();
        assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stderr));
        assert!(String::from_utf8_lossy(&child.stdout).contains("1 passed"));
        return;
    }
    let model = ConvNet::new(1);
    model.parameters.to_device(device).unwrap();
    let batches = digits(Split::Train, 16, true);
    let config = config(OptimizerConfig::default(), Precision::F32);
    let mut trainer = Trainer::new(run(&model, &batches, None, config, None)).unwrap();
    let stop = AtomicBool::new(false);
    let mut observer = Counting { device, stop: &stop, seen: Vec::new() };
    trainer.run(&mut observer, &stop).unwrap();
    for pair in observer.seen[1..].windows(2) {
        let ((first, allocations, waits), (second, more_allocations, more_waits)) = (pair[0], pair[1]);
        assert_eq!(second - first, 16);
        assert_eq!((more_allocations, more_waits), (allocations, waits + 1), "from step {first} to {second}");
    }
}

/// Spoils one pixel of one batch.
struct Spoiled<'a> {
    batches: &'a dyn Batches,
    number: usize,
}

impl Batches for Spoiled<'_> {
    fn batches_per_epoch(&self) -> usize {
        self.batches.batches_per_epoch()
    }

    fn epoch(&self, epoch: u64, start: usize) -> Box<dyn Iterator<Item = Result<gridgrad::data::Batch>> + '_> {
        Box::new(self.batches.epoch(epoch, start).enumerate().map(move |(number, batch)| {
            let mut batch = batch?;
            if number + start == self.number {
                batch.images = spoiled(batch.images, 5, f32::INFINITY);
            }
            Ok(batch)
        }))
    }
}

#[test]
fn a_loss_that_is_no_number_leaves_the_weights_of_the_step_before() {
    let Some(device) = test_device() else { return };
    let sound = digits(Split::Train, 96, true);
    let schedule = ScheduleConfig { lr: 0.01, warmup: None, decay: Decay::Constant };
    let config = |epochs| TrainConfig {
        epochs,
        schedule: schedule.clone(),
        ..config(OptimizerConfig::default(), Precision::F32)
    };
    let trained = |batches: &dyn Batches, epochs: usize| {
        let model = Mlp::new(6);
        model.parameters.to_device(device).unwrap();
        let result = Trainer::new(run(&model, batches, None, config(epochs), None))
            .unwrap()
            .run(&mut (), &AtomicBool::new(false));
        (bytes(&model.parameters), result)
    };
    let (weights, result) = trained(&Spoiled { batches: &sound, number: 3 }, 2);
    let message = result.unwrap_err().to_string();
    assert!(message.contains("the loss is") && message.contains("in step 4, epoch 1, from batch 3 on"), "{message}");
    // The host had launched more steps before it heard of this one.
    let (first_three, result) = trained(&First { batches: &sound, count: 3 }, 1);
    result.unwrap();
    assert!(weights == first_three);
}

/// The first batches of an epoch.
struct First<'a> {
    batches: &'a dyn Batches,
    count: usize,
}

impl Batches for First<'_> {
    fn batches_per_epoch(&self) -> usize {
        self.count
    }

    fn epoch(&self, epoch: u64, start: usize) -> Box<dyn Iterator<Item = Result<gridgrad::data::Batch>> + '_> {
        Box::new(self.batches.epoch(epoch, start).take(self.count - start))
    }
}
