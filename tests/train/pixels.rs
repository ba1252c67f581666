//! Images that come as bytes train as those that come as floats, bit for bit.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use gridgrad::data::augment::Normalise;
use gridgrad::data::{self, AugmentConfig, Batch, Loader, LoaderConfig, Pixels, Split};
use gridgrad::models::CrossFormer;
use gridgrad::train::{
    Batches, Classifier, Evaluation, Observer, Precision, StepMetrics, StepReport, TrainConfig, Trainer,
};
use gridgrad::{DType, Device, Result};

use super::devices::{bytes, test_device};
use super::support::{Mlp, crossformer, run};

/// How the batches of a loader are handed on.
#[derive(Clone, Copy, Debug, PartialEq)]
enum As {
    Bytes,
    Floats,
    /// Every fifth as floats, so that steps of bytes are recorded before.
    Both,
}

struct Handed {
    /// They take turns; their normalisations differ.
    loaders: Vec<Loader>,
    how: As,
    /// Batches of an epoch.
    count: usize,
}

impl Handed {
    fn new(split: Split, count: usize, loaders: usize, how: As) -> Self {
        let loader = |number: usize| {
            let dataset: Arc<dyn data::Dataset> = Arc::from(data::open("builtin", split, None).unwrap());
            let normalise = Normalise::new(&[0.3 + 0.1 * number as f32], &[0.37]);
            let augment = AugmentConfig { normalise, ..AugmentConfig::digits().with_image_size(8) };
            let training = split == Split::Train;
            Loader::new(dataset, LoaderConfig { batch_size: 24, augment, training, ..LoaderConfig::default() }).unwrap()
        };
        Handed { loaders: (0..loaders).map(loader).collect(), how, count }
    }

    fn hand(&self, number: usize, batch: Batch) -> Batch {
        assert!(batch.images.is_bytes());
        match self.how {
            As::Floats => Batch { images: Pixels::Floats(batch.images.into_floats()), ..batch },
            As::Both if number % 5 == 4 => Batch { images: Pixels::Floats(batch.images.into_floats()), ..batch },
            As::Bytes | As::Both => batch,
        }
    }
}

impl Batches for Handed {
    fn batches_per_epoch(&self) -> usize {
        self.count
    }

    fn epoch(&self, epoch: u64, start: usize) -> Box<dyn Iterator<Item = Result<Batch>> + '_> {
        let batches = (start..self.batches_per_epoch()).filter_map(move |number| {
            let loader = &self.loaders[number % self.loaders.len()];
            loader.epoch(epoch, number).next().map(|batch| batch.map(|batch| self.hand(number, batch)))
        });
        Box::new(batches)
    }
}

#[derive(Default)]
struct Steps(Vec<StepMetrics>);

impl Observer for Steps {
    fn on_step(&mut self, report: &StepReport) -> Result<()> {
        self.0.push(report.metrics);
        Ok(())
    }
}

/// All that an epoch of training measured and left.
type Trace = (Vec<StepMetrics>, Evaluation, Vec<Vec<u8>>);

fn train(
    model: &dyn Classifier,
    device: Device,
    precision: Precision,
    (steps, loaders, how): (usize, usize, As),
    graph: bool,
) -> Trace {
    model.parameters().to_device(device).unwrap();
    let (batches, held_out) = (Handed::new(Split::Train, steps, loaders, how), Handed::new(Split::Test, 1, 1, how));
    let config = TrainConfig { epochs: 1, precision, ..TrainConfig::default() };
    let mut trainer = Trainer::new(run(model, &batches, Some(&held_out), config, None)).unwrap();
    trainer.repeat_recorded_steps(graph);
    let mut steps = Steps::default();
    trainer.run(&mut steps, &AtomicBool::new(false)).unwrap();
    let evaluation = trainer.progress().history.last().unwrap().held_out.unwrap();
    (steps.0, evaluation, bytes(model.parameters()))
}

#[test]
fn bytes_train_as_floats_do() {
    for device in [Some(Device::Cpu), test_device()].into_iter().flatten() {
        for precision in [Precision::F32, Precision::Bf16, Precision::F16] {
            let train = |how: As| train(&crossformer(16, 0.2), device, precision, (2, 1, how), false);
            let floats = train(As::Floats);
            assert_eq!(floats.0.len(), 2);
            assert!(train(As::Bytes) == floats, "{precision:?} on {device}");
        }
    }
}

#[test]
fn models_in_f64_take_bytes() {
    let train = |how: As| {
        let model = CrossFormer::new(crossformer(16, 0.0).config().clone(), 3, DType::F64).unwrap();
        train(&model, Device::Cpu, Precision::F32, (2, 1, how), false)
    };
    assert!(train(As::Bytes) == train(As::Floats));
}

/// A recorded step reads bytes and table where they were: both are exchanged, and batches of another kind are launched.
#[test]
fn recorded_steps_take_over_bytes_and_tables() {
    let Some(device) = test_device() else { return };
    for precision in [Precision::F32, Precision::F16] {
        for (loaders, how) in [(1, As::Bytes), (3, As::Bytes), (2, As::Both)] {
            let train = |how: As, graph: bool| train(&Mlp::new(2), device, precision, (14, loaders, how), graph);
            let floats = train(As::Floats, false);
            assert!(train(how, true) == floats, "{precision:?}, {loaders} loaders, {how:?}");
        }
    }
}
