//! What must stop training, and what must not be lost when it does.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use gridgrad::data::{Batch, Loader, Split};
use gridgrad::nn::{Context, Initializer, Parameter, Parameters, Scope};
use gridgrad::train::{
    Batches, Checkpoint, Classifier, LAST_CHECKPOINT, METRICS_FILE, Span, TrainConfig, Trainer, read_weights,
};
use gridgrad::{DType, Error, Result, Tensor};

use super::support::{Interrupter, Mlp, Moment, digits, run, spoiled};

fn config() -> TrainConfig {
    TrainConfig { epochs: 2, checkpoint_every: Span::Steps(3), ..TrainConfig::default() }
}

/// Eleven steps an epoch.
fn train() -> Loader {
    digits(Split::Train, 128, true)
}

/// Digits with a pixel that is no number, or too few batches.
struct Spoiled {
    loader: Loader,
    /// The first batch that is not sound, in the second epoch.
    number: usize,
    is_short: bool,
}

impl Batches for Spoiled {
    fn batches_per_epoch(&self) -> usize {
        self.loader.batches()
    }

    fn epoch(&self, epoch: u64, start: usize) -> Box<dyn Iterator<Item = Result<Batch>> + '_> {
        let spoil = move |(number, batch): (usize, Result<Batch>)| {
            let mut batch = batch?;
            if epoch == 1 && number + start == self.number {
                batch.images = spoiled(batch.images, 70, f32::NAN);
            }
            Ok(batch)
        };
        let count = if self.is_short && epoch == 1 { self.number - start } else { usize::MAX };
        Box::new(self.loader.epoch(epoch, start).enumerate().map(spoil).take(count))
    }
}

#[test]
fn a_loss_that_is_no_number_stops_training_and_keeps_the_checkpoint_of_before() {
    let folder = tempfile::tempdir().unwrap();
    let spoiled = Spoiled { loader: train(), number: 3, is_short: false };
    let model = Mlp::new(1);
    let mut trainer = Trainer::new(run(&model, &spoiled, None, config(), Some(folder.path()))).unwrap();
    let message = trainer.run(&mut (), &AtomicBool::new(false)).unwrap_err().to_string();
    let indices = spoiled.loader.epoch(1, 3).next().unwrap().unwrap().indices;
    assert!(message.contains("the loss is NaN in step 15, epoch 2, from batch 3 on"), "{message}");
    assert!(message.contains(&format!("{}, {}", indices[0], indices[1])) && message.contains("96 more"), "{message}");

    let saved = Checkpoint::read(folder.path().join(LAST_CHECKPOINT)).unwrap();
    assert_eq!(saved.progress.step, 12);
    // The model is as it was before the step: that of a sound run's 14 steps.
    let (sound, loader, stop) = (Mlp::new(1), train(), AtomicBool::new(false));
    let mut trainer = Trainer::new(run(&sound, &loader, None, config(), None)).unwrap();
    trainer.run(&mut Interrupter::new(Moment::Step(14), Some(&stop)), &stop).unwrap();
    assert_eq!(model.bytes(), sound.bytes());
}

#[test]
fn an_epoch_that_ends_early_stops_training() {
    let spoiled = Spoiled { loader: train(), number: 4, is_short: true };
    let model = Mlp::new(1);
    let mut trainer = Trainer::new(run(&model, &spoiled, None, config(), None)).unwrap();
    let message = trainer.run(&mut (), &AtomicBool::new(false)).unwrap_err().to_string();
    assert!(message.contains("ended after 4 batches, expected 11"), "{message}");
}

/// Logits that are finite and whose derivative by `root` is not: √x at 0.
struct Steep(Mlp, Parameter);

impl Steep {
    fn new() -> Self {
        let scope = Scope::new(1, DType::F32);
        let root = scope.parameter("root", [10], Initializer::Constant(0.0)).unwrap();
        Steep(Mlp { parameters: scope.parameters().clone(), ..Mlp::new(1) }, root)
    }
}

impl Classifier for Steep {
    fn forward(&self, images: &Tensor, context: &Context) -> Result<Tensor> {
        self.0.forward(images, context)?.add(&self.1.tensor().sqrt()?)
    }

    fn parameters(&self) -> &Parameters {
        &self.0.parameters
    }
}

#[test]
fn a_gradient_that_is_not_finite_stops_training_and_is_named() {
    let (train, steep) = (train(), Steep::new());
    let mut trainer = Trainer::new(run(&steep, &train, None, config(), None)).unwrap();
    let message = trainer.run(&mut (), &AtomicBool::new(false)).unwrap_err().to_string();
    assert!(message.contains("gradient is not finite for root in step 1, epoch 1"), "{message}");
    assert_eq!(steep.1.tensor().to_f64_vec().unwrap(), [0.0; 10]);
}

/// A folder with a run that was stopped after four steps.
fn stopped_run() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let (train, model, stop) = (train(), Mlp::new(1), AtomicBool::new(false));
    let mut trainer = Trainer::new(run(&model, &train, None, config(), Some(folder.path()))).unwrap();
    trainer.run(&mut Interrupter::new(Moment::Step(4), Some(&stop)), &stop).unwrap();
    folder
}

#[test]
fn checkpoints_of_other_runs_and_damaged_ones_change_nothing() {
    let folder = stopped_run();
    let path = folder.path().join(LAST_CHECKPOINT);
    let refusal = |model: &Mlp, batches: &Loader, config: TrainConfig| {
        let before = model.bytes();
        let mut trainer = Trainer::new(run(model, batches, None, config, None)).unwrap();
        let error = trainer.resume(&path).unwrap_err();
        assert_eq!((model.bytes(), trainer.progress().step), (before, 0));
        assert!(error.to_string().contains(LAST_CHECKPOINT), "{error}");
        error
    };
    let other = TrainConfig { epochs: 3, ema_decay: Some(0.9), ..config() };
    let error = refusal(&Mlp::new(1), &train(), other);
    assert!(matches!(error, Error::Config(_)));
    let message = error.to_string();
    assert!(message.contains("train.epochs: 2, now 3"), "{message}");
    assert!(message.contains("train.ema_decay: null, now 0.9"), "{message}");
    let message = refusal(&Mlp::new(1), &digits(Split::Train, 64, true), config()).to_string();
    assert!(message.contains("batches in an epoch: 11, now 22"), "{message}");
    let message = refusal(&Mlp::with_hidden(1, 40), &train(), config()).to_string();
    assert!(message.contains("misshapen: fc1.weight is (48, 64), expected (40, 64)"), "{message}");
    assert!(message.contains("misshapen: fc2.weight.exp_avg is (10, 48), expected (10, 40)"), "{message}");

    let sound = std::fs::read(&path).unwrap();
    for len in [0, 7, 8, 100, sound.len() / 2, sound.len() - 1] {
        std::fs::write(&path, &sound[..len]).unwrap();
        refusal(&Mlp::new(1), &train(), config());
    }
    for byte in (0..2000).step_by(37).chain([sound.len() - 5]) {
        let mut bytes = sound.clone();
        bytes[byte] ^= 4;
        std::fs::write(&path, &bytes).unwrap();
        refusal(&Mlp::new(1), &train(), config());
    }
    std::fs::write(&path, &sound).unwrap();
    let weights = Checkpoint::read(&path).unwrap().model;
    gridgrad::nn::state_dict::write(&path, &weights, Default::default()).unwrap();
    assert!(refusal(&Mlp::new(1), &train(), config()).to_string().contains("not a checkpoint"));
    assert!(read_weights(&path).is_ok());
    std::fs::remove_file(&path).unwrap();
    refusal(&Mlp::new(1), &train(), config());
}

#[test]
fn a_folder_with_a_run_is_not_overwritten() {
    let folder = stopped_run();
    let read = || [LAST_CHECKPOINT, METRICS_FILE].map(|name| std::fs::read(folder.path().join(name)).unwrap());
    let before = read();
    let (train, model) = (train(), Mlp::new(1));
    let mut trainer = Trainer::new(run(&model, &train, None, config(), Some(folder.path()))).unwrap();
    let message = trainer.run(&mut (), &AtomicBool::new(false)).unwrap_err().to_string();
    assert!(message.contains("holds a training run"), "{message}");
    assert_eq!(read(), before);
}

#[test]
fn a_folder_that_cannot_be_written_is_an_error_before_training() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, b"").unwrap();
    let (train, model) = (train(), Mlp::new(1));
    let before = model.bytes();
    let mut trainer = Trainer::new(run(&model, &train, None, config(), Some(&file))).unwrap();
    let error = trainer.run(&mut (), &AtomicBool::new(false)).unwrap_err();
    assert!(matches!(error, Error::Io { .. }) && error.to_string().contains("file"), "{error}");
    assert_eq!(model.bytes(), before);
}

/// Runs another test of this file in a process whose files cannot grow beyond a few kilobytes, as on a full disk.
#[cfg(unix)]
#[test]
fn a_full_disk_is_an_error_that_leaves_the_old_checkpoint() {
    let folder = stopped_run();
    let path = folder.path().join(LAST_CHECKPOINT);
    let before = std::fs::read(&path).unwrap();
    assert!(before.len() > 20_000);
    let output = std::process::Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 8; exec \"$0\" \"$@\""])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "failures::goes_on_in_the_folder_that_it_is_given", "--nocapture"])
        .env("GRIDGRAD_TEST_FOLDER", folder.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("refused: "), "{text}");
    assert!(text.contains("last.safetensors: File too large"), "{text}");
    assert!(std::fs::read(&path).unwrap() == before);
    // Nothing is left of the file that could not be written.
    let mut names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, [LAST_CHECKPOINT, METRICS_FILE]);
}

/// Does its work for the test above; on its own there is nothing to go on with.
#[cfg(unix)]
#[test]
fn goes_on_in_the_folder_that_it_is_given() {
    let Some(folder) = std::env::var_os("GRIDGRAD_TEST_FOLDER") else { return };
    let folder = Path::new(&folder);
    let (train, model) = (train(), Mlp::new(1));
    let mut trainer = Trainer::new(run(&model, &train, None, config(), Some(folder))).unwrap();
    trainer.resume(folder.join(LAST_CHECKPOINT)).unwrap();
    let error = trainer.run(&mut (), &AtomicBool::new(false)).unwrap_err();
    assert!(matches!(error, Error::Io { .. }));
    println!("refused: {error}");
}
