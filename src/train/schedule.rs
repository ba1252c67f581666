//! Learning rates as pure functions of the step.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// A stretch of training.
///
/// ```
/// use gridgrad::train::Span;
/// assert_eq!((Span::Epochs(2.5).steps(100)?, Span::Steps(7).steps(100)?), (250, 7));
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Span {
    /// So many passes over the training set.
    Epochs(f64),
    /// So many steps of the optimizer.
    Steps(usize),
}

impl Span {
    /// The number of steps, rounded.
    ///
    /// # Errors
    /// `Config` where the number of epochs is negative or not a number.
    pub fn steps(self, steps_per_epoch: usize) -> Result<usize> {
        match self {
            Span::Steps(steps) => Ok(steps),
            Span::Epochs(epochs) if epochs.is_finite() && epochs >= 0.0 => {
                Ok((epochs * steps_per_epoch as f64).round() as usize)
            }
            Span::Epochs(epochs) => Err(Error::Config(format!("got {epochs} epochs, expected a number of at least 0"))),
        }
    }
}

/// How the learning rate changes in the course of training.
///
/// ```
/// use gridgrad::train::ScheduleConfig;
/// let schedule = ScheduleConfig::crossformer(1024).build(300, 1251)?;
/// assert_eq!(schedule.total_steps(), 300 * 1251);
/// assert!((schedule.lr(0) - 1e-6).abs() < 1e-9);
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScheduleConfig {
    /// The highest learning rate.
    pub lr: f64,
    /// A linear rise at the beginning.
    #[serde(default)]
    pub warmup: Option<Warmup>,
    /// What follows.
    #[serde(default)]
    pub decay: Decay,
}

/// A linear rise of the learning rate.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Warmup {
    /// How long it takes.
    pub length: Span,
    /// The learning rate of the first step.
    pub start_lr: f64,
}

/// The learning rate after the warm-up. Every form counts its steps from the very start of training, warm-up included.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Decay {
    /// Stays at the highest.
    #[default]
    Constant,
    /// floor + ½ (lr − floor) (1 + cos(π t / T)) at step t of T (CrossFormer, section 12). The warm-up ends at `lr`,
    /// above the curve, which the next step joins.
    Cosine {
        /// The learning rate at the end.
        floor: f64,
    },
    /// Times `gamma` at every milestone.
    Milestones {
        /// When, from the start.
        at: Vec<Span>,
        /// Factor of the learning rate.
        gamma: f64,
    },
    /// floor + (lr − floor) (1 − t / T)ᵖ at step t of T. The warm-up multiplies it.
    Poly {
        /// p.
        power: f64,
        /// The learning rate at the end.
        floor: f64,
    },
}

impl Default for ScheduleConfig {
    fn default() -> Self {
        ScheduleConfig { lr: 1e-3, warmup: None, decay: Decay::Cosine { floor: 0.0 } }
    }
}

impl ScheduleConfig {
    /// The ImageNet recipe of CrossFormer for steps of `samples` images: rates in proportion to them, 1e-3 falling to
    /// 1e-5 at 1024, after 20 epochs of warm-up from 1e-6 (section 12).
    pub fn crossformer(samples: usize) -> Self {
        let scale = samples as f64 / 512.0;
        ScheduleConfig {
            lr: 5e-4 * scale,
            warmup: Some(Warmup { length: Span::Epochs(20.0), start_lr: 5e-7 * scale }),
            decay: Decay::Cosine { floor: 5e-6 * scale },
        }
    }

    /// The schedule of a training run of this length.
    ///
    /// # Errors
    /// `Config` where a rate, factor or power is out of its range, or the warm-up is longer than the run.
    pub fn build(&self, epochs: usize, steps_per_epoch: usize) -> Result<Schedule> {
        let wrong = |what: String| Err(Error::Config(format!("schedule: {what}")));
        let total = epochs.saturating_mul(steps_per_epoch);
        let is_rate = |rate: f64| rate.is_finite() && rate >= 0.0;
        if !is_rate(self.lr) {
            return wrong(format!("lr is {}, expected a number of at least 0", self.lr));
        }
        let (warmup_steps, start_lr) = match &self.warmup {
            Some(Warmup { length, start_lr }) => (length.steps(steps_per_epoch)?, *start_lr),
            None => (0, self.lr),
        };
        if !is_rate(start_lr) || start_lr > self.lr {
            return wrong(format!("start_lr is {start_lr}, expected a number from 0 to {}", self.lr));
        }
        if warmup_steps > total {
            return wrong(format!("a warm-up of {warmup_steps} steps in a run of {total}; shorten the warm-up"));
        }
        let mut milestones = Vec::new();
        match &self.decay {
            Decay::Constant => {}
            Decay::Cosine { floor } | Decay::Poly { floor, .. } if !(0.0..=self.lr).contains(floor) => {
                return wrong(format!("floor is {floor}, expected a number from 0 to {}", self.lr));
            }
            Decay::Poly { power, .. } if !(power.is_finite() && *power > 0.0) => {
                return wrong(format!("power is {power}, expected a number above 0"));
            }
            Decay::Cosine { .. } | Decay::Poly { .. } => {}
            Decay::Milestones { gamma, .. } if !is_rate(*gamma) => {
                return wrong(format!("gamma is {gamma}, expected a number of at least 0"));
            }
            Decay::Milestones { at, .. } => {
                milestones = at.iter().map(|at| at.steps(steps_per_epoch)).collect::<Result<_>>()?;
            }
        }
        Ok(Schedule { lr: self.lr, start_lr, decay: self.decay.clone(), warmup_steps, milestones, total })
    }
}

/// The learning rate of every step of a training run.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    lr: f64,
    start_lr: f64,
    decay: Decay,
    warmup_steps: usize,
    milestones: Vec<usize>,
    total: usize,
}

impl Schedule {
    /// Number of steps in the run.
    pub fn total_steps(&self) -> usize {
        self.total
    }

    /// The learning rate of `step`, counted from 0. Beyond the run's end it stays at the last value.
    pub fn lr(&self, step: usize) -> f64 {
        let done = if self.total == 0 { 1.0 } else { step.min(self.total) as f64 / self.total as f64 };
        let ramp = || self.start_lr + (self.lr - self.start_lr) * step as f64 / self.warmup_steps as f64;
        let is_warmup = step < self.warmup_steps;
        match &self.decay {
            Decay::Poly { power, floor } => {
                let base = floor + (self.lr - floor) * (1.0 - done).powf(*power);
                if is_warmup && self.lr > 0.0 { base * (ramp() / self.lr) } else { base }
            }
            _ if is_warmup => ramp(),
            Decay::Constant => self.lr,
            Decay::Cosine { floor } => floor + 0.5 * (self.lr - floor) * (1.0 + (std::f64::consts::PI * done).cos()),
            Decay::Milestones { gamma, .. } => {
                let passed = self.milestones.iter().filter(|&&milestone| milestone <= step).count();
                self.lr * gamma.powf(passed as f64)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(got: f64, expected: f64) {
        assert!((got - expected).abs() <= 1e-12 * expected.abs() + 1e-18, "{got}, expected {expected}");
    }

    #[test]
    fn the_paper_s_schedule_counts_the_cosine_from_the_very_start() {
        let schedule = ScheduleConfig::crossformer(1024).build(300, 100).unwrap();
        close(schedule.lr(0), 1e-6);
        close(schedule.lr(1000), 1e-6 + (1e-3 - 1e-6) / 2.0);
        close(schedule.lr(1999), 1e-6 + (1e-3 - 1e-6) * 0.9995);
        let cosine = |t: f64| 1e-5 + 0.5 * (1e-3 - 1e-5) * (1.0 + (std::f64::consts::PI * t / 30_000.0).cos());
        close(schedule.lr(2000), cosine(2000.0));
        assert!(schedule.lr(2000) < 1e-3);
        close(schedule.lr(15_000), (1e-3 + 1e-5) / 2.0);
        close(schedule.lr(30_000), 1e-5);
        close(schedule.lr(90_000), 1e-5);
        close(ScheduleConfig::crossformer(128).build(30, 10).unwrap().lr(0), 1.25e-7);
    }

    #[test]
    fn milestones_take_effect_at_their_step() {
        // COCO: 12 epochs, a tenth at 8 and 11, 500 steps of warm-up from a thousandth (section 12).
        let config = ScheduleConfig {
            lr: 1e-4,
            warmup: Some(Warmup { length: Span::Steps(500), start_lr: 1e-7 }),
            decay: Decay::Milestones { at: vec![Span::Epochs(8.0), Span::Epochs(11.0)], gamma: 0.1 },
        };
        let schedule = config.build(12, 1000).unwrap();
        close(schedule.lr(0), 1e-7);
        close(schedule.lr(250), (1e-7 + 1e-4) / 2.0);
        close(schedule.lr(500), 1e-4);
        close(schedule.lr(7999), 1e-4);
        close(schedule.lr(8000), 1e-5);
        close(schedule.lr(11_000), 1e-6);
    }

    #[test]
    fn poly_ends_at_its_floor_and_its_warm_up_multiplies() {
        let poly = |power, floor| Decay::Poly { power, floor };
        let plain = ScheduleConfig { lr: 1e-4, warmup: None, decay: poly(0.9, 0.0) }.build(80, 1000).unwrap();
        close(plain.lr(0), 1e-4);
        close(plain.lr(40_000), 1e-4 * 0.5f64.powf(0.9));
        assert_eq!(plain.lr(80_000), 0.0);
        let warmup = Some(Warmup { length: Span::Steps(1500), start_lr: 6e-11 });
        let schedule = ScheduleConfig { lr: 6e-5, warmup, decay: poly(1.0, 0.0) }.build(160, 1000).unwrap();
        close(schedule.lr(0), 6e-11);
        close(schedule.lr(750), 6e-5 * (1.0 - 750.0 / 160_000.0) * (1e-6 + (1.0 - 1e-6) * 0.5));
        close(schedule.lr(1500), 6e-5 * (1.0 - 1500.0 / 160_000.0));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let with = |lr, decay| ScheduleConfig { lr, warmup: None, decay };
        let late = Some(Warmup { length: Span::Epochs(3.0), start_lr: 0.0 });
        let high = Some(Warmup { length: Span::Epochs(1.0), start_lr: 2.0 });
        let negative = Some(Warmup { length: Span::Epochs(-1.0), start_lr: 0.0 });
        for config in [
            with(f64::NAN, Decay::Constant),
            with(1.0, Decay::Cosine { floor: 2.0 }),
            with(1.0, Decay::Poly { power: 0.0, floor: 0.0 }),
            with(1.0, Decay::Milestones { at: vec![], gamma: -1.0 }),
            ScheduleConfig { warmup: late, ..with(1.0, Decay::Constant) },
            ScheduleConfig { warmup: high, ..with(1.0, Decay::Constant) },
            ScheduleConfig { warmup: negative, ..with(1.0, Decay::Constant) },
        ] {
            assert!(matches!(config.build(2, 10), Err(Error::Config(_))), "{config:?}");
        }
        assert_eq!(with(1.0, Decay::Constant).build(0, 10).unwrap().lr(7), 1.0);
    }

    #[test]
    fn configurations_are_short_to_write() {
        let text = "lr = 1e-3\nwarmup = { length = { epochs = 20 }, start_lr = 1e-6 }\n\
                    decay = { kind = 'cosine', floor = 1e-5 }";
        assert_eq!(toml::from_str::<ScheduleConfig>(text).unwrap(), ScheduleConfig::crossformer(1024));
        let at = toml::from_str::<ScheduleConfig>(
            "lr = 1\ndecay = { kind = 'milestones', at = [{ steps = 3 }], gamma = 1 }",
        );
        assert_eq!(at.unwrap().decay, Decay::Milestones { at: vec![Span::Steps(3)], gamma: 1.0 });
        assert!(toml::from_str::<ScheduleConfig>("lr = 1\ndecay = { kind = 'cosine', flor = 0 }").is_err());
    }
}
