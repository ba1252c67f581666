//! A small model, the built-in digits, and observers that do as they are told.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use gridgrad::data::{self, AugmentConfig, Loader, LoaderConfig, Pixels, Split};
use gridgrad::models::{CrossFormer, CrossFormerConfig};
use gridgrad::nn::{Context, Linear, Parameters, Scope};
use gridgrad::train::{Batches, Classifier, Observer, StepReport, TrainConfig, TrainingRun};
use gridgrad::{DType, Error, Result, Tensor, ops};

/// 64 pixels, 48 hidden units with dropout, 10 classes.
pub struct Mlp {
    pub fc1: Linear,
    pub fc2: Linear,
    pub dropout: f64,
    pub parameters: Parameters,
}

impl Mlp {
    pub fn new(seed: u64) -> Self {
        Self::with_hidden(seed, 48)
    }

    pub fn with_hidden(seed: u64, hidden: usize) -> Self {
        let scope = Scope::new(seed, DType::F32);
        Mlp {
            fc1: Linear::new(&scope.child("fc1"), 64, hidden, true).unwrap(),
            fc2: Linear::new(&scope.child("fc2"), hidden, 10, true).unwrap(),
            dropout: 0.1,
            parameters: scope.parameters().clone(),
        }
    }

    pub fn bytes(&self) -> Vec<Vec<u8>> {
        self.parameters.iter().map(|parameter| parameter.tensor().raw_bytes().unwrap().to_vec()).collect()
    }
}

impl Classifier for Mlp {
    fn forward(&self, images: &Tensor, context: &Context) -> Result<Tensor> {
        let pixels = images.reshape([images.shape()[0], 64])?;
        let hidden = self.fc1.forward(&pixels)?.relu()?;
        let hidden = match context.next_stream() {
            Some(stream) => ops::dropout(&hidden, self.dropout, stream)?,
            None => hidden,
        };
        self.fc2.forward(&hidden)
    }

    fn parameters(&self) -> &Parameters {
        &self.parameters
    }
}

/// Two stages of short and long attention on images of 8×8. Probabilities are dropped at half the rate of branches.
pub fn crossformer(embed_dim: usize, drop_path_rate: f64) -> CrossFormer {
    let config = CrossFormerConfig {
        img_size: [8, 8],
        in_chans: 1,
        patch_stride: 2,
        patch_kernels: vec![2, 4],
        embed_dim,
        num_heads: vec![1, 2],
        group_size: vec![2, 2],
        drop_path_rate,
        attn_drop_rate: drop_path_rate / 2.0,
        ..CrossFormerConfig::named("micro", 10).unwrap()
    };
    CrossFormer::new(config, 3, DType::F32).unwrap()
}

pub fn loader(split: Split, batch_size: usize, training: bool, drop_last: bool) -> Loader {
    let dataset: Arc<dyn data::Dataset> = Arc::from(data::open("builtin", split, None).unwrap());
    let augment = AugmentConfig::digits().with_image_size(8);
    let config = LoaderConfig {
        batch_size,
        drop_last,
        augment,
        training,
        shuffle: training,
        workers: usize::from(training),
        ..LoaderConfig::default()
    };
    Loader::new(dataset, config).unwrap()
}

/// The images with another value at one place.
pub fn spoiled(images: Pixels, at: usize, value: f32) -> Pixels {
    let mut floats = images.into_floats();
    floats[at] = value;
    Pixels::Floats(floats)
}

/// Full batches for training, all samples for testing.
pub fn digits(split: Split, batch_size: usize, training: bool) -> Loader {
    loader(split, batch_size, training, training)
}

pub fn run<'a>(
    model: &'a dyn Classifier,
    batches: &'a dyn Batches,
    held_out: Option<&'a dyn Batches>,
    config: TrainConfig,
    folder: Option<&Path>,
) -> TrainingRun<'a> {
    let description = serde_json::json!({ "model": "mlp", "rate": 0.1 });
    TrainingRun { model, batches, held_out, config, description, folder: folder.map(Path::to_path_buf) }
}

/// Where an [`Interrupter`] acts.
#[derive(Clone, Copy, Debug)]
pub enum Moment {
    Step(usize),
    /// The first batch of the evaluation after this epoch.
    Evaluation(usize),
}

/// Sets a flag at a moment, or fails there as if the machine had crashed.
pub struct Interrupter<'a> {
    pub moment: Moment,
    pub flag: Option<&'a AtomicBool>,
    pub epochs: usize,
    pub checkpoints: Vec<PathBuf>,
}

impl<'a> Interrupter<'a> {
    pub fn new(moment: Moment, flag: Option<&'a AtomicBool>) -> Self {
        Interrupter { moment, flag, epochs: 0, checkpoints: Vec::new() }
    }

    fn act(&self) -> Result<()> {
        match self.flag {
            Some(flag) => flag.store(true, Ordering::Relaxed),
            None => return Err(Error::Training("crash".into())),
        }
        Ok(())
    }
}

impl Observer for Interrupter<'_> {
    fn on_step(&mut self, report: &StepReport) -> Result<()> {
        assert!(report.images_per_second > 0.0 && report.metrics.step <= report.total_steps);
        if matches!(self.moment, Moment::Step(step) if step == report.metrics.step) { self.act() } else { Ok(()) }
    }

    fn on_evaluation(&mut self, done: usize, batches: usize) -> Result<()> {
        assert!((1..=batches).contains(&done));
        let is_here = matches!(self.moment, Moment::Evaluation(epoch) if epoch == self.epochs + 1);
        if is_here && done == 1 { self.act() } else { Ok(()) }
    }

    fn on_epoch(&mut self, history: &[gridgrad::train::EpochMetrics], _: bool) -> Result<()> {
        self.epochs = history.len();
        Ok(())
    }

    fn on_checkpoint(&mut self, path: &Path) -> Result<()> {
        self.checkpoints.push(path.to_path_buf());
        Ok(())
    }
}
