//! Training from the outside: it learns, resumes to the bit, and stops when it must.

mod devices;
mod failures;
mod pixels;
mod precision;
mod resuming;
mod support;

use std::sync::atomic::AtomicBool;

use gridgrad::train::{OptimizerConfig, Outcome, ScheduleConfig, Sgd, TrainConfig, Trainer};
use gridgrad::{Error, data::Split};
use support::{Mlp, digits, loader, run};

#[test]
fn a_small_network_learns_to_read_digits() {
    let (train, test) = (digits(Split::Train, 32, true), digits(Split::Test, 100, false));
    let model = Mlp::new(1);
    let schedule = ScheduleConfig { lr: 0.005, ..ScheduleConfig::default() };
    let config = TrainConfig { epochs: 12, schedule, ema_decay: Some(0.98), ..TrainConfig::default() };
    let mut trainer = Trainer::new(run(&model, &train, Some(&test), config, None)).unwrap();
    let outcome = trainer.run(&mut (), &AtomicBool::new(false)).unwrap();
    assert_eq!(outcome, Outcome::Finished { step: 12 * 45 });
    let history = &trainer.progress().history;
    let last = history[11].held_out.unwrap();
    assert_eq!(last.samples, 355);
    assert!(last.top1 > 0.93 && last.top5 > 0.99, "{last:?}");
    assert!(history[11].train_loss < 0.4 * history[0].train_loss, "{history:?}");
    assert!(trainer.progress().best_accuracy.unwrap() >= last.top1);
}

/// The weights after one epoch with batches of `batch_size`, `accumulation` of which make a step.
fn trained(batch_size: usize, accumulation: usize, drop_last: bool, optimizer: OptimizerConfig) -> Vec<Vec<f64>> {
    let train = loader(Split::Train, batch_size, true, drop_last);
    let mut model = Mlp::new(2);
    model.dropout = 0.0;
    let schedule = ScheduleConfig { lr: 0.01, ..ScheduleConfig::default() };
    let config = TrainConfig { epochs: 1, accumulation, optimizer, schedule, ..TrainConfig::default() };
    let mut trainer = Trainer::new(run(&model, &train, None, config, None)).unwrap();
    trainer.run(&mut (), &AtomicBool::new(false)).unwrap();
    model.parameters.iter().map(|parameter| parameter.tensor().to_f64_vec().unwrap()).collect()
}

#[test]
fn accumulated_batches_step_like_one_large_batch() {
    for optimizer in [OptimizerConfig::default(), OptimizerConfig::Sgd(Sgd::default())] {
        // Of 1441 samples one is dropped, or makes a last step of one batch.
        for drop_last in [true, false] {
            let (one, two) = (trained(32, 1, drop_last, optimizer), trained(16, 2, drop_last, optimizer));
            let differences = one.iter().flatten().zip(two.iter().flatten()).map(|(a, b)| (a - b).abs());
            let largest = differences.fold(0.0, f64::max);
            assert!(largest < 1e-6, "{optimizer:?}, drop_last {drop_last}: {largest:e}");
            assert_ne!(one, trained(16, 1, drop_last, optimizer));
        }
    }
}

#[test]
fn settings_that_cannot_be_are_refused_before_anything_happens() {
    let train = digits(Split::Train, 32, true);
    let too_large = digits(Split::Test, 1000, true);
    let model = Mlp::new(1);
    let refuse = |config: TrainConfig, batches| {
        let refused = Trainer::new(run(&model, batches, None, config.clone(), None)).err();
        assert!(matches!(refused, Some(Error::Config(_))), "{config:?}: {refused:?}");
    };
    let sound = TrainConfig::default;
    refuse(TrainConfig { accumulation: 0, ..sound() }, &train);
    refuse(TrainConfig { evaluate_every: 0, ..sound() }, &train);
    refuse(TrainConfig { clip_norm: Some(0.0), ..sound() }, &train);
    refuse(TrainConfig { ema_decay: Some(-0.1), ..sound() }, &train);
    refuse(TrainConfig { epochs: 2, ..TrainConfig::crossformer(1024) }, &train);
    refuse(sound(), &too_large);
}
