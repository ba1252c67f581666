//! AdamW and SGD over a model's parameters.

pub(in crate::train) mod gpu;
mod kernels;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::device::DeviceStep;
use super::state_problems;
use crate::autograd::Gradients;
use crate::cpu::Float;
use crate::nn::{Parameter, Parameters, StateDict};
use crate::tensor::{Place, place};
use crate::{DType, Error, Result, Tensor};

/// Which optimizer, with its settings. The learning rate comes with every step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum OptimizerConfig {
    /// Adam with decoupled weight decay.
    AdamW(AdamW),
    /// Stochastic gradient descent.
    Sgd(Sgd),
}

/// Adam with decoupled weight decay (Loshchilov and Hutter 2019), as PyTorch's `AdamW`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdamW {
    /// How much of the mean and of the mean square of the gradient a step keeps, in \[0, 1).
    pub betas: (f64, f64),
    /// Added to the root of the mean square.
    pub eps: f64,
    /// Share of a value, times the learning rate, that a step takes off it.
    pub weight_decay: f64,
}

impl Default for AdamW {
    /// The CrossFormer recipe (section 12).
    fn default() -> Self {
        AdamW { betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.05 }
    }
}

/// Stochastic gradient descent, as PyTorch's `SGD` with dampening 0.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sgd {
    /// How much of the last update a step keeps, in \[0, 1).
    pub momentum: f64,
    /// Take the gradient's step ahead of the momentum's (Nesterov).
    pub nesterov: bool,
    /// Share of a value that is added to its gradient.
    pub weight_decay: f64,
}

impl Default for Sgd {
    fn default() -> Self {
        Sgd { momentum: 0.9, nesterov: false, weight_decay: 1e-4 }
    }
}

impl OptimizerConfig {
    /// The weight decay of parameters that are not excluded from it.
    pub fn weight_decay(&self) -> f64 {
        match self {
            OptimizerConfig::AdamW(config) => config.weight_decay,
            OptimizerConfig::Sgd(config) => config.weight_decay,
        }
    }

    fn validate(&self) -> Result<()> {
        let share = |name: &str, value: f64| {
            if (0.0..1.0).contains(&value) {
                Ok(())
            } else {
                Err(Error::Config(format!("optimizer: {name} is {value}, expected a number from 0 to below 1")))
            }
        };
        match self {
            OptimizerConfig::AdamW(AdamW { betas, eps, .. }) => {
                share("the first beta", betas.0)?;
                share("the second beta", betas.1)?;
                not_negative("eps", *eps)
            }
            OptimizerConfig::Sgd(Sgd { momentum, nesterov, .. }) => {
                share("momentum", *momentum)?;
                if *nesterov && *momentum == 0.0 {
                    return Err(Error::Config("optimizer: nesterov needs a momentum above 0".into()));
                }
                Ok(())
            }
        }
    }
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        OptimizerConfig::AdamW(AdamW::default())
    }
}

fn not_negative(name: &str, value: f64) -> Result<()> {
    if value.is_finite() && value >= 0.0 {
        Ok(())
    } else {
        Err(Error::Config(format!("optimizer: {name} is {value}, expected a number of at least 0")))
    }
}

/// What is particular to one parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Group {
    /// In place of the configuration's.
    pub weight_decay: f64,
    /// Multiplies the learning rate; 0 leaves the parameter as it is.
    pub lr_scale: f64,
}

/// Whether the CrossFormer recipe decays `parameter`: it has at least two axes and its name does not end in `.bias`
/// (section 12).
pub fn decays(parameter: &Parameter) -> bool {
    parameter.shape().len() >= 2 && !parameter.name().ends_with(".bias")
}

/// Updates a model's weights from their gradients, all of them in one parallel pass.
///
/// ```
/// use gridgrad::nn::{Linear, Scope};
/// use gridgrad::train::{Optimizer, OptimizerConfig};
/// use gridgrad::{DType, Tensor};
/// let scope = Scope::new(0, DType::F32);
/// let layer = Linear::new(&scope, 2, 1, true)?;
/// let mut optimizer = Optimizer::new(scope.parameters(), OptimizerConfig::default())?;
/// let loss = || layer.forward(&Tensor::ones([1, 2], DType::F32)?)?.square()?.sum_all();
/// let before = loss()?;
/// optimizer.step(&before.backward()?, 1e-3)?;
/// assert!(loss()?.item()? < before.item()?);
/// # Ok::<(), gridgrad::Error>(())
/// ```
pub struct Optimizer {
    config: OptimizerConfig,
    entries: Vec<Entry>,
    /// Where the weights are on a GPU.
    device: Option<DeviceStep>,
}

/// A parameter with what the optimizer remembers of it.
struct Entry {
    parameter: Parameter,
    group: Group,
    state: State,
}

enum State {
    AdamW { config: AdamW, step: i64, exp_avg: Tensor, exp_avg_sq: Tensor },
    Sgd { config: Sgd, momentum_buffer: Option<Tensor> },
}

impl Optimizer {
    /// An optimizer of all weights in `parameters` that decays those that [`decays`] names.
    ///
    /// # Errors
    /// `Config` where a setting is out of its range, `DType` where a weight is neither `f32` nor `f64`,
    /// `DeviceMismatch` where weights are on several devices.
    pub fn new(parameters: &Parameters, config: OptimizerConfig) -> Result<Self> {
        Self::with_groups(parameters, config, |parameter| Group {
            weight_decay: if decays(parameter) { config.weight_decay() } else { 0.0 },
            lr_scale: 1.0,
        })
    }

    /// An optimizer with weight decay and learning rate decided by `group` for each weight.
    ///
    /// # Errors
    /// As [`Optimizer::new`].
    pub fn with_groups(
        parameters: &Parameters,
        config: OptimizerConfig,
        group: impl Fn(&Parameter) -> Group,
    ) -> Result<Self> {
        config.validate()?;
        let entry = |parameter: Parameter| {
            let group = group(&parameter);
            not_negative("weight decay", group.weight_decay)?;
            not_negative("a group's lr_scale", group.lr_scale)?;
            let state = State::new(config, &parameter.tensor())?;
            Ok(Entry { parameter, group, state })
        };
        let entries: Vec<Entry> = parameters.weights().map(entry).collect::<Result<_>>()?;
        let values: Vec<Tensor> = entries.iter().map(|entry| entry.parameter.tensor()).collect();
        let device = match place("Optimizer", &values.iter().collect::<Vec<_>>())? {
            Place::Host => None,
            Place::Gpu(gpu) => Some(DeviceStep::new(gpu, None)?),
        };
        Ok(Optimizer { config, entries, device })
    }

    /// The settings.
    pub fn config(&self) -> &OptimizerConfig {
        &self.config
    }

    /// One step at learning rate `lr`. A weight without a gradient stays as it is.
    ///
    /// # Errors
    /// Where a gradient is not of its weight's shape and dtype; nothing has changed then.
    pub fn step(&mut self, gradients: &Gradients, lr: f64) -> Result<()> {
        self.step_scaled(gradients, lr, 1.0)
    }

    /// [`Optimizer::step`] with all gradients multiplied by `gradient_scale` as they are read, which saves clipping and
    /// averaging a pass of their own.
    ///
    /// # Errors
    /// As [`Optimizer::step`].
    pub fn step_scaled(&mut self, gradients: &Gradients, lr: f64, gradient_scale: f64) -> Result<()> {
        self.check(gradients)?;
        if self.device.is_some() {
            return self.step_on_device(gradients, lr, gradient_scale);
        }
        self.entries.par_iter_mut().try_for_each(|entry| {
            let Some(gradient) = gradients.get(&entry.parameter.tensor()) else { return Ok(()) };
            match gradient.dtype() {
                DType::F64 => entry.update::<f64>(gradient, lr, gradient_scale),
                _ => entry.update::<f32>(gradient, lr, gradient_scale),
            }
        })
    }

    /// Whether every gradient fits its weight.
    fn check(&self, gradients: &Gradients) -> Result<()> {
        for Entry { parameter, .. } in &self.entries {
            let value = parameter.tensor();
            if let Some(gradient) = gradients.get(&value) {
                gradient.expect_dtype("Optimizer::step", value.dtype())?;
                place("Optimizer::step", &[&value, gradient])?;
                if gradient.shape() != value.shape() {
                    let message = format!("gradient {} for {} {}", gradient.shape(), parameter.name(), value.shape());
                    return Err(Error::shape("Optimizer::step", message));
                }
            }
        }
        Ok(())
    }

    /// What the optimizer remembers, by parameter and PyTorch's names: `<parameter>.exp_avg` and so on.
    ///
    /// # Errors
    /// Where a device that counts the steps refuses to tell.
    pub fn state_dict(&self) -> Result<StateDict> {
        let counted = self.device.as_ref().map(|device| device.progress()).transpose()?.map(|(applied, _)| applied);
        let named = |entry: &Entry| {
            let name = entry.parameter.name().to_owned();
            entry.state.tensors(counted).into_iter().map(move |(part, tensor)| (format!("{name}.{part}"), tensor))
        };
        Ok(self.entries.iter().flat_map(named).collect())
    }

    /// Goes on from `state`. Nothing changes unless everything fits.
    ///
    /// # Errors
    /// [`Error::StateDict`], listing every tensor that is missing, surplus, or of another shape or dtype.
    pub fn load_state_dict(&mut self, state: &StateDict) -> Result<()> {
        let problems = state_problems(&self.state_dict()?, state);
        if !problems.is_empty() {
            return Err(Error::StateDict(problems));
        }
        self.entries.iter_mut().try_for_each(|Entry { parameter, state: remembered, .. }| {
            remembered.load(|part| state.get(&format!("{}.{part}", parameter.name())))
        })?;
        let steps = self.entries.iter().map(|entry| entry.state.step()).max().unwrap_or(0);
        self.device.iter().try_for_each(|device| device.resume(steps as u64, device.progress()?.1))
    }
}

impl State {
    fn new(config: OptimizerConfig, value: &Tensor) -> Result<Self> {
        if !matches!(value.dtype(), DType::F32 | DType::F64) {
            return Err(Error::DType { op: "Optimizer", got: value.dtype(), expected: "f32 or f64".into() });
        }
        let zeros = || value.full_like(0.0);
        Ok(match config {
            OptimizerConfig::AdamW(config) => State::AdamW { config, step: 0, exp_avg: zeros()?, exp_avg_sq: zeros()? },
            OptimizerConfig::Sgd(config) => {
                State::Sgd { config, momentum_buffer: if config.momentum > 0.0 { Some(zeros()?) } else { None } }
            }
        })
    }

    /// Steps of AdamW.
    fn step(&self) -> i64 {
        match self {
            State::AdamW { step, .. } => *step,
            State::Sgd { .. } => 0,
        }
    }

    /// `counted` is the number of steps where a device counts them.
    fn tensors(&self, counted: Option<u64>) -> Vec<(&'static str, Tensor)> {
        match self {
            State::AdamW { step, exp_avg, exp_avg_sq, .. } => {
                let step = counted.map_or(*step, |counted| counted as i64);
                vec![("step", Tensor::scalar(step)), ("exp_avg", exp_avg.clone()), ("exp_avg_sq", exp_avg_sq.clone())]
            }
            State::Sgd { momentum_buffer, .. } => {
                momentum_buffer.iter().map(|buffer| ("momentum_buffer", buffer.clone())).collect()
            }
        }
    }

    /// Takes over the tensors that `get` finds; the caller has compared shapes and dtypes.
    fn load<'a>(&mut self, get: impl Fn(&str) -> Option<&'a Tensor>) -> Result<()> {
        let replace =
            |slot: &mut Tensor, part: &str| -> Result<()> { get(part).map_or(Ok(()), |tensor| slot.overwrite(tensor)) };
        match self {
            State::AdamW { step, exp_avg, exp_avg_sq, .. } => {
                replace(exp_avg, "exp_avg")?;
                replace(exp_avg_sq, "exp_avg_sq")?;
                if let Some([loaded]) = get("step").map(Tensor::data::<i64>).transpose()? {
                    *step = *loaded;
                }
            }
            State::Sgd { momentum_buffer, .. } => {
                momentum_buffer.iter_mut().try_for_each(|buffer| replace(buffer, "momentum_buffer"))?;
            }
        }
        Ok(())
    }
}

impl Entry {
    fn update<T: Float>(&mut self, gradient: &Tensor, lr: f64, gradient_scale: f64) -> Result<()> {
        let gradient = gradient.data::<T>()?;
        let (lr, decay) = (lr * self.group.lr_scale, self.group.weight_decay);
        match &mut self.state {
            State::AdamW { config, step, exp_avg, exp_avg_sq } => {
                *step += 1;
                let factors = kernels::AdamWFactors::new(config, *step, lr, decay, gradient_scale);
                let (mean, square) = (exp_avg.data_mut::<T>()?, exp_avg_sq.data_mut::<T>()?);
                self.parameter.update::<T>(|value| kernels::adamw(value, mean, square, gradient, factors))
            }
            State::Sgd { config, momentum_buffer } => {
                let factors = kernels::SgdFactors::new(config, lr, decay, gradient_scale);
                match momentum_buffer {
                    Some(buffer) => {
                        let buffer = buffer.data_mut::<T>()?;
                        self.parameter.update::<T>(|value| kernels::sgd_momentum(value, buffer, gradient, factors))
                    }
                    None => self.parameter.update::<T>(|value| kernels::sgd(value, gradient, factors)),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
