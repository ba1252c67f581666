//! A run that was stopped and resumed leaves the same bytes as one that was not.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use gridgrad::data::{Loader, Split};
use gridgrad::train::{
    AdamW, BEST_CHECKPOINT, Checkpoint, LAST_CHECKPOINT, METRICS_FILE, MetricsFile, OptimizerConfig, Outcome, Record,
    Span, TrainConfig, Trainer, read_weights,
};

use super::support::{Interrupter, Mlp, Moment, crossformer, digits, run};

/// Six steps an epoch, the last of one batch; checkpoints at steps 4, 8, 12, 16 and at the end.
fn config() -> TrainConfig {
    TrainConfig {
        epochs: 3,
        accumulation: 2,
        seed: 9,
        optimizer: OptimizerConfig::AdamW(AdamW::default()),
        clip_norm: Some(0.5),
        ema_decay: Some(0.9),
        evaluate_every: 2,
        checkpoint_every: Span::Steps(4),
        ..TrainConfig::default()
    }
}

fn data() -> (Loader, Loader) {
    (digits(Split::Train, 128, true), digits(Split::Test, 100, false))
}

fn files(folder: &Path) -> [Vec<u8>; 3] {
    [LAST_CHECKPOINT, BEST_CHECKPOINT, METRICS_FILE].map(|name| std::fs::read(folder.join(name)).unwrap())
}

/// What an uninterrupted run leaves in its folder.
fn uninterrupted() -> [Vec<u8>; 3] {
    let folder = tempfile::tempdir().unwrap();
    let (train, test) = data();
    let model = Mlp::new(1);
    let mut trainer = Trainer::new(run(&model, &train, Some(&test), config(), Some(folder.path()))).unwrap();
    trainer.run(&mut (), &AtomicBool::new(false)).unwrap();
    files(folder.path())
}

/// Goes on in `folder` with a model of other first values.
fn finish(folder: &Path) -> [Vec<u8>; 3] {
    let (train, test) = data();
    let model = Mlp::new(77);
    let mut trainer = Trainer::new(run(&model, &train, Some(&test), config(), Some(folder))).unwrap();
    trainer.resume(folder.join(LAST_CHECKPOINT)).unwrap();
    let outcome = trainer.run(&mut (), &AtomicBool::new(false)).unwrap();
    assert_eq!(outcome, Outcome::Finished { step: 18 });
    files(folder)
}

#[test]
fn a_run_that_is_stopped_anywhere_and_resumed_leaves_the_same_bytes() {
    let expected = uninterrupted();
    // In an epoch, at a checkpoint, at the end of an epoch, in an evaluation, at the end.
    for moment in [1, 4, 5, 6, 12, 13, 18].map(Moment::Step).into_iter().chain([2, 3].map(Moment::Evaluation)) {
        let folder = tempfile::tempdir().unwrap();
        let (train, test) = data();
        let model = Mlp::new(1);
        let mut trainer = Trainer::new(run(&model, &train, Some(&test), config(), Some(folder.path()))).unwrap();
        let stop = AtomicBool::new(false);
        let mut interrupter = Interrupter::new(moment, Some(&stop));
        let outcome = trainer.run(&mut interrupter, &stop).unwrap();
        let step = match moment {
            Moment::Step(step) => step,
            Moment::Evaluation(epoch) => epoch * 6,
        };
        assert_eq!(outcome, Outcome::Interrupted { step }, "{moment:?}");
        assert_eq!(interrupter.checkpoints.last().unwrap(), &folder.path().join(LAST_CHECKPOINT));
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1 + step % 3).build().unwrap();
        assert!(pool.install(|| finish(folder.path())) == expected, "{moment:?}");
    }
}

#[test]
fn dropped_probabilities_and_branches_are_the_same_after_resuming() {
    let (train, _) = data();
    let go = |folder: &Path, resume: bool, stop_at: Option<usize>| {
        let model = crossformer(16, 0.4);
        let mut trainer = Trainer::new(run(&model, &train, None, config(), Some(folder))).unwrap();
        if resume {
            trainer.resume(folder.join(LAST_CHECKPOINT)).unwrap();
        }
        let stop = AtomicBool::new(false);
        match stop_at {
            Some(step) => trainer.run(&mut Interrupter::new(Moment::Step(step), Some(&stop)), &stop),
            None => trainer.run(&mut (), &stop),
        }
        .unwrap();
        std::fs::read(folder.join(LAST_CHECKPOINT)).unwrap()
    };
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let expected = go(whole.path(), false, None);
    go(parts.path(), false, Some(7));
    assert!(go(parts.path(), true, None) == expected);
}

#[test]
fn a_run_that_crashed_goes_on_from_its_last_checkpoint_and_leaves_the_same_bytes() {
    let expected = uninterrupted();
    for (moment, saved) in [(Moment::Step(11), 8), (Moment::Evaluation(2), 8), (Moment::Step(14), 12)] {
        let folder = tempfile::tempdir().unwrap();
        let (train, test) = data();
        let model = Mlp::new(1);
        let mut trainer = Trainer::new(run(&model, &train, Some(&test), config(), Some(folder.path()))).unwrap();
        let crash = trainer.run(&mut Interrupter::new(moment, None), &AtomicBool::new(false));
        assert_eq!(crash.unwrap_err().to_string(), "training: crash");
        let saved_step = Checkpoint::read(folder.path().join(LAST_CHECKPOINT)).unwrap().progress.step;
        assert_eq!(saved_step, saved, "{moment:?}");
        assert!(finish(folder.path()) == expected, "{moment:?}");
    }
}

#[test]
fn a_trainer_that_was_stopped_goes_on_without_its_files() {
    let expected = uninterrupted();
    let folder = tempfile::tempdir().unwrap();
    let (train, test) = data();
    let model = Mlp::new(1);
    let mut trainer = Trainer::new(run(&model, &train, Some(&test), config(), Some(folder.path()))).unwrap();
    let mut steps = Vec::new();
    // The flag stays set, so every call makes one step or one evaluation.
    loop {
        match trainer.run(&mut (), &AtomicBool::new(true)).unwrap() {
            Outcome::Interrupted { step: 6 } => break,
            Outcome::Interrupted { step } => steps.push(step),
            Outcome::Finished { .. } => panic!("finished early"),
        }
    }
    assert_eq!(steps, [1, 2, 3, 4, 5]);
    trainer.run(&mut (), &AtomicBool::new(false)).unwrap();
    assert!(files(folder.path()) == expected);
}

#[test]
fn the_folder_holds_what_training_measured() {
    let folder = tempfile::tempdir().unwrap();
    let (train, test) = data();
    let model = Mlp::new(1);
    let mut trainer = Trainer::new(run(&model, &train, Some(&test), config(), Some(folder.path()))).unwrap();
    trainer.run(&mut (), &AtomicBool::new(false)).unwrap();
    let records = MetricsFile::read(folder.path().join(METRICS_FILE)).unwrap();
    let steps = records.iter().filter(|record| matches!(record, Record::Step(_))).count();
    let epochs: Vec<_> = records
        .iter()
        .filter_map(|record| if let Record::Epoch(metrics) = record { Some(*metrics) } else { None })
        .collect();
    assert_eq!((steps, epochs.len()), (18, 3));
    assert_eq!(epochs, trainer.progress().history);
    assert!(epochs[0].held_out.is_none() && epochs[1].held_out.is_some() && epochs[2].held_out.is_some());

    // A checkpoint is a file of weights too: plain names for the model, averages where they are kept.
    let path = folder.path().join(LAST_CHECKPOINT);
    let checkpoint = Checkpoint::read(&path).unwrap();
    let other = Mlp::new(5);
    other.parameters.load_state_dict(&checkpoint.model).unwrap();
    assert_eq!(other.bytes(), model.bytes());
    other.parameters.load_state_dict(&read_weights(&path).unwrap()).unwrap();
    let averages = trainer.ema().unwrap().state_dict();
    assert_eq!(other.fc1.weight.tensor().raw_bytes().unwrap(), averages["fc1.weight"].raw_bytes().unwrap());
    assert_ne!(other.bytes(), model.bytes());
    assert_eq!(checkpoint.optimizer["fc2.bias.step"].to_vec::<i64>().unwrap(), [18]);
}
