//! Mixed precision: in what the model computes, and the scaling of the loss that half precision needs.

use serde::{Deserialize, Serialize};

use crate::nn::Parameters;
use crate::{DType, Error, Result};

/// The type in which activations and their gradients are computed and kept. Weights, the optimizer's state, statistics,
/// sums and the loss stay in the parameters' own type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// The parameters' own: `f32`, or `f64` where a model was made so.
    #[default]
    F32,
    /// bfloat16, with the range of `f32`.
    Bf16,
    /// IEEE half precision; the loss is scaled so that small gradients do not vanish.
    F16,
}

impl Precision {
    /// The dtype of the activations of a model with parameters in `f32`.
    pub fn compute_dtype(self) -> DType {
        match self {
            Precision::F32 => DType::F32,
            Precision::Bf16 => DType::Bf16,
            Precision::F16 => DType::F16,
        }
    }

    /// The dtype of a model's activations.
    pub(super) fn of_model(self, parameters: &Parameters) -> DType {
        match self {
            Precision::F32 => parameters.weights().next().map_or(DType::F32, |weight| weight.tensor().dtype()),
            half => half.compute_dtype(),
        }
    }

    /// Left out of descriptions, as before there was a choice.
    pub(super) fn is_f32(&self) -> bool {
        *self == Precision::F32
    }

    /// How the loss is scaled, where it is.
    pub(super) fn loss_scaling(self) -> Option<LossScaling> {
        (self == Precision::F16).then_some(LossScaling::DEFAULT)
    }
}

impl std::str::FromStr for Precision {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "f32" => Ok(Precision::F32),
            "bf16" => Ok(Precision::Bf16),
            "f16" => Ok(Precision::F16),
            _ => Err(Error::Config(format!("precision '{name}' is not one of f32, bf16, f16"))),
        }
    }
}

/// Scaling of the loss: doubled after `interval` steps without overflow, halved, with the step skipped, after one
/// (Micikevicius et al., ICLR 2018, section 3.2).
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct LossScaling {
    /// The scale at the beginning.
    pub first: f64,
    /// Applied steps from one doubling to the next, at least 1.
    pub interval: u32,
}

impl LossScaling {
    /// 2¹⁶ and 2000 steps, as in PyTorch's `GradScaler`.
    pub const DEFAULT: LossScaling = LossScaling { first: 65536.0, interval: 2000 };
    const LARGEST: f64 = 16_777_216.0;
}

/// Where the scaling of a run is.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossScale {
    /// What the loss is multiplied by.
    pub scale: f64,
    /// Applied steps since it last changed.
    pub good_steps: u32,
}

impl LossScale {
    /// The beginning.
    pub(super) fn new(scaling: Option<LossScaling>) -> Self {
        LossScale { scale: scaling.map_or(1.0, |scaling| scaling.first), good_steps: 0 }
    }

    /// After a step. `finish_step` in `kernels/training.cu` does the same on a device.
    pub(super) fn update(&mut self, scaling: LossScaling, overflow: bool) {
        if overflow {
            *self = LossScale { scale: (self.scale / 2.0).max(1.0), good_steps: 0 };
            return;
        }
        self.good_steps += 1;
        if self.good_steps == scaling.interval {
            *self = LossScale { scale: (self.scale * 2.0).min(LossScaling::LARGEST), good_steps: 0 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_halves_on_overflow_and_doubles_after_good_steps() {
        let scaling = LossScaling { first: 4.0, interval: 3 };
        let mut state = LossScale::new(Some(scaling));
        let mut seen = Vec::new();
        for overflow in [true, true, true, false, false, false, false, true] {
            state.update(scaling, overflow);
            seen.push(state.scale);
        }
        assert_eq!(seen, [2.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 1.0]);
        let mut large = LossScale { scale: LossScaling::LARGEST, good_steps: 2 };
        large.update(scaling, false);
        assert_eq!(large, LossScale { scale: LossScaling::LARGEST, good_steps: 0 });
    }
}
