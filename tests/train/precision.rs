//! Mixed precision: half the bits for activations, the same accuracy.

use std::sync::atomic::AtomicBool;

use gridgrad::Result;
use gridgrad::data::Split;
use gridgrad::train::{
    Classifier, Evaluation, Observer, Precision, ScheduleConfig, StepMetrics, StepReport, TrainConfig, Trainer,
};

use super::support::{Mlp, crossformer, digits, run};

#[derive(Default)]
struct Recorder(Vec<StepMetrics>);

impl Observer for Recorder {
    fn on_step(&mut self, report: &StepReport) -> Result<()> {
        self.0.push(report.metrics);
        Ok(())
    }
}

/// What a model reaches on held-out digits, and what every step measured.
fn trained(model: &dyn Classifier, precision: Precision, epochs: usize) -> (Evaluation, Vec<StepMetrics>) {
    let (train, test) = (digits(Split::Train, 32, true), digits(Split::Test, 100, false));
    let schedule = ScheduleConfig { lr: 0.005, ..ScheduleConfig::default() };
    let config = TrainConfig { epochs, precision, schedule, ..TrainConfig::default() };
    let mut trainer = Trainer::new(run(model, &train, Some(&test), config, None)).unwrap();
    let mut recorder = Recorder::default();
    trainer.run(&mut recorder, &AtomicBool::new(false)).unwrap();
    (trainer.progress().history.last().unwrap().held_out.unwrap(), recorder.0)
}

#[test]
fn bf16_reaches_the_accuracy_of_f32() {
    let (single, _) = trained(&crossformer(32, 0.0), Precision::F32, 8);
    let (half, steps) = trained(&crossformer(32, 0.0), Precision::Bf16, 8);
    assert!(single.top1 > 0.9, "{single:?}");
    assert!(half.top1 > single.top1 - 0.02, "f32 {single:?}, bf16 {half:?}");
    assert!(steps.iter().all(|step| !step.skipped));
}

#[test]
fn f16_skips_what_overflows_and_reaches_the_accuracy_of_f32() {
    let (single, _) = trained(&Mlp::new(1), Precision::F32, 8);
    let (half, steps) = trained(&Mlp::new(1), Precision::F16, 8);
    assert!(half.top1 > single.top1 - 0.02, "f32 {single:?}, f16 {half:?}");
    // The scale begins at 2¹⁶, too large for sums over a batch: the first steps find a smaller one.
    let skipped = steps.iter().filter(|step| step.skipped).count();
    assert!(steps[0].skipped && skipped < 20, "{skipped}");
    assert!(steps.iter().all(|step| step.skipped == (step.gradient_norm == 0.0)));
}
