//! All weights of a model in one launch.

use super::{Entry, Optimizer, OptimizerConfig, State};
use crate::Result;
use crate::autograd::Gradients;
use crate::driver::seam::Address;
use crate::gpu::{Gpu, Kernel, Signature};
use crate::random::Philox;
use crate::train::device::{Column, DeviceStep, Table};
use crate::train::precision::LossScaling;

/// state, beta1, 1 − beta1, beta2, 1 − beta2, eps, then the table: count, first block, value, gradient, mean, square,
/// elements, decay, learning rate's factor
type AdamWArguments = (
    Address,
    f32,
    f32,
    f32,
    f32,
    f32,
    u32,
    Column<u32>,
    Column<u64>,
    Column<u64>,
    Column<u64>,
    Column<u64>,
    Column<u64>,
    Column<f32>,
    Column<f32>,
);
const ADAMW: Kernel<AdamWArguments> = Kernel::new("training", "adamw", &[]);
/// state, momentum, Nesterov, then the table: count, first block, value, gradient, momentum buffer, elements, decay,
/// learning rate's factor
type SgdArguments =
    (Address, f32, u32, u32, Column<u32>, Column<u64>, Column<u64>, Column<u64>, Column<u64>, Column<f32>, Column<f32>);
const SGD: Kernel<SgdArguments> = Kernel::new("training", "sgd", &[]);

pub(crate) static KERNELS: &[Signature] = &[ADAMW.signature(), SGD.signature()];

/// What belongs to the weights that have a gradient, row by row.
#[derive(Default)]
struct Rows {
    value: Vec<u64>,
    /// AdamW's mean, or the momentum buffer.
    first: Vec<u64>,
    /// AdamW's mean square.
    second: Vec<u64>,
    decay: Vec<f32>,
    lr_scale: Vec<f32>,
}

impl Rows {
    fn push(&mut self, entry: &mut Entry) -> Result<()> {
        let (first, second) = match &mut entry.state {
            State::AdamW { exp_avg, exp_avg_sq, .. } => (exp_avg.address_mut()?, exp_avg_sq.address_mut()?),
            State::Sgd { momentum_buffer, .. } => match momentum_buffer {
                Some(buffer) => (buffer.address_mut()?, Address::NULL),
                None => (Address::NULL, Address::NULL),
            },
        };
        self.value.push(entry.parameter.address_mut()?.0);
        self.first.push(first.0);
        self.second.push(second.0);
        self.decay.push(entry.group.weight_decay as f32);
        self.lr_scale.push(entry.group.lr_scale as f32);
        Ok(())
    }
}

impl Optimizer {
    /// The state of steps on a GPU, where the weights are on one.
    pub(in crate::train) fn device(&self) -> Option<&DeviceStep> {
        self.device.as_ref()
    }

    /// Has gradients on a GPU scaled like this.
    pub(in crate::train) fn set_loss_scaling(&mut self, scaling: Option<LossScaling>) -> Result<()> {
        if let Some(device) = &mut self.device {
            *device = DeviceStep::new(device.gpu(), scaling)?;
        }
        Ok(())
    }

    /// Addresses that a step reads and writes: as long as they stay, a recorded step can be repeated.
    pub(in crate::train) fn addresses(&self) -> Vec<u64> {
        let tensors = self.entries.iter().flat_map(|entry| {
            let state = entry.state.tensors(Some(0)).into_iter().map(|(_, tensor)| tensor);
            std::iter::once(entry.parameter.tensor()).chain(state)
        });
        tensors.filter_map(|tensor| tensor.address().ok()).map(|address| address.0).collect()
    }

    pub(super) fn step_on_device(&mut self, gradients: &Gradients, lr: f64, gradient_scale: f64) -> Result<()> {
        let betas = self.betas();
        if let Some(device) = &self.device {
            device.begin(Philox::new(0), lr)?;
            device.apply(gradient_scale, betas)?;
        }
        self.launch(gradients)
    }

    /// One step with the learning rate that the device was told, if the device finds loss and gradients finite.
    /// `gradients` are sums over `samples` samples. Does not wait.
    ///
    /// # Errors
    /// Where a gradient is not of its weight's shape and dtype, or the device refuses.
    pub(in crate::train) fn finish_on_device(
        &mut self,
        gradients: &Gradients,
        samples: usize,
        clip_norm: Option<f64>,
    ) -> Result<()> {
        self.check(gradients)?;
        if let Some(device) = &self.device {
            let tensors: Vec<_> =
                self.entries.iter().filter_map(|entry| gradients.get(&entry.parameter.tensor())).collect();
            device.finish(&Table::new(tensors.into_iter())?, samples, clip_norm, self.betas())?;
        }
        self.launch(gradients)
    }

    fn betas(&self) -> (f64, f64) {
        match self.config {
            OptimizerConfig::AdamW(config) => config.betas,
            OptimizerConfig::Sgd(_) => (0.0, 0.0),
        }
    }

    fn launch(&mut self, gradients: &Gradients) -> Result<()> {
        let Optimizer { config, entries, device } = self;
        let Some(device) = device else { return Ok(()) };
        let (mut rows, mut tensors) = (Rows::default(), Vec::new());
        for entry in entries {
            // A statement of its own: were the parameter's tensor still held, its value would be copied to be changed.
            let gradient = gradients.get(&entry.parameter.tensor());
            if let Some(gradient) = gradient {
                rows.push(entry)?;
                tensors.push(gradient);
            }
        }
        launch_tables(config, device.gpu(), device.state(), &rows, &Table::new(tensors.into_iter())?)
    }
}

fn launch_tables(
    config: &OptimizerConfig,
    gpu: &'static Gpu,
    state: Address,
    rows: &Rows,
    gradients: &Table,
) -> Result<()> {
    for part in gradients.parts() {
        let (value, first) = (part.column(&rows.value), part.column(&rows.first));
        let (decay, lr_scale) = (part.column(&rows.decay), part.column(&rows.lr_scale));
        let (count, blocks, gradient, elements) = (part.count, part.first_block, part.addresses, part.elements);
        match config {
            OptimizerConfig::AdamW(config) => {
                let (beta1, beta2) = config.betas;
                let factors = [beta1, 1.0 - beta1, beta2, 1.0 - beta2, config.eps].map(|factor| factor as f32);
                let [beta1, beta1_rest, beta2, beta2_rest, eps] = factors;
                let square = part.column(&rows.second);
                let arguments = (
                    state, beta1, beta1_rest, beta2, beta2_rest, eps, count, blocks, value, gradient, first, square,
                    elements, decay, lr_scale,
                );
                ADAMW.launch(gpu, "", part.geometry(), arguments)?;
            }
            OptimizerConfig::Sgd(config) => {
                let (momentum, nesterov) = (config.momentum as f32, u32::from(config.nesterov));
                let arguments =
                    (state, momentum, nesterov, count, blocks, value, gradient, first, elements, decay, lr_scale);
                SGD.launch(gpu, "", part.geometry(), arguments)?;
            }
        }
    }
    Ok(())
}
