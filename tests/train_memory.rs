//! Training needs no more memory the longer it runs. Alone in its process, because the counter is the process's.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use gridgrad::data::{self, AugmentConfig, Loader, LoaderConfig, Split};
use gridgrad::nn::{Context, Linear, Parameters, Scope};
use gridgrad::tensor::memory_stats;
use gridgrad::train::{Classifier, Observer, StepReport, TrainConfig, Trainer, TrainingRun};
use gridgrad::{DType, Result, Tensor};

struct Mlp(Linear, Linear, Parameters);

impl Classifier for Mlp {
    fn forward(&self, images: &Tensor, _: &Context) -> Result<Tensor> {
        let pixels = images.reshape([images.shape()[0], 64])?;
        self.1.forward(&self.0.forward(&pixels)?.gelu()?)
    }

    fn parameters(&self) -> &Parameters {
        &self.2
    }
}

#[derive(Default)]
struct Bytes(Vec<usize>);

impl Observer for Bytes {
    fn on_step(&mut self, _: &StepReport) -> Result<()> {
        self.0.push(memory_stats().live);
        Ok(())
    }
}

#[test]
fn live_memory_is_the_same_after_every_step() {
    let scope = Scope::new(0, DType::F32);
    let hidden = 256;
    let fc1 = Linear::new(&scope.child("fc1"), 64, hidden, true).unwrap();
    let fc2 = Linear::new(&scope.child("fc2"), hidden, 10, true).unwrap();
    let model = Mlp(fc1, fc2, scope.parameters().clone());
    let dataset: Arc<dyn data::Dataset> = Arc::from(data::open("builtin", Split::Train, None).unwrap());
    let augment = AugmentConfig::none().with_image_size(8);
    let loader = Loader::new(dataset, LoaderConfig { augment, batch_size: 64, ..LoaderConfig::default() }).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut trainer = Trainer::new(TrainingRun {
        model: &model,
        batches: &loader,
        held_out: Some(&loader),
        config: TrainConfig { epochs: 5, accumulation: 1, ema_decay: Some(0.9), ..TrainConfig::default() },
        description: serde_json::Value::Null,
        folder: Some(folder.path().join("run")),
    })
    .unwrap();
    let mut bytes = Bytes::default();
    trainer.run(&mut bytes, &AtomicBool::new(false)).unwrap();
    assert_eq!(bytes.0.len(), 110);
    // Weights, two moments and the average of one matrix are 64 KiB each.
    assert!(bytes.0[9] >= 4 * 65_536, "{}", bytes.0[9]);
    assert!(bytes.0[9..].iter().all(|&live| live == bytes.0[9]), "{:?}", bytes.0);
}
