//! Training steps whose decisions are taken on a GPU, so that the host need not wait for each of them.
//!
//! Losses, hits, the norm of the gradient, clipping, loss scaling and the refusal of gradients that are not finite stay
//! in a state on the device (`StepState` in `kernels/training.cu`). The host reads a report of the last steps once in a
//! while. A refused step and all after it leave the weights as they were.

pub(super) mod cost;
mod tables;

use super::precision::{LossScale, LossScaling};
use crate::driver::seam::Address;
use crate::gpu::{Geometry, Gpu, Kernel, Memory, Signature};
use crate::random::Philox;
use crate::{Error, Result, Tensor};

pub(super) use tables::{Column, Table};

/// state, loss, logits (rows, classes), labels (rows), rows, classes
const ADD_MEASURES: Kernel<(Address, Address, Address, Address, u32, u32)> =
    Kernel::new("training", "add_measures", &[]);
/// state, inputs, partials, blocks, samples, largest norm, beta1, beta2, interval
const FINISH_STEP: Kernel<(Address, Address, Address, u32, f64, f64, f64, f64, u32)> =
    Kernel::new("training", "finish_step", &[]);
/// state, inputs, gradient scale, beta1, beta2
const APPLY_STEP: Kernel<(Address, Address, f64, f64, f64)> = Kernel::new("training", "apply_step", &[]);
/// gradient, state
const LOSS_GRADIENT: Kernel<(Address, Address)> = Kernel::new("training", "loss_gradient", &[]);

pub(crate) static KERNELS: &[Signature] = &[
    ADD_MEASURES.signature(),
    FINISH_STEP.signature(),
    APPLY_STEP.signature(),
    LOSS_GRADIENT.signature(),
    tables::GRADIENT_SQUARES.signature(),
];

const THREADS: u32 = 256;

/// As `REPORTS` in the kernel file: the steps that may finish between two readings.
pub(super) const REPORTS: usize = 64;
/// As `sizeof(StepReport)`.
const REPORT_BYTES: usize = 40;
/// As the offset of `StepState::reports`.
const HEADER_BYTES: usize = 88;
const STATE_BYTES: usize = HEADER_BYTES + REPORTS * REPORT_BYTES;
const LOSS_SCALE_OFFSET: usize = 48;
const APPLIED_OFFSET: usize = 56;
const FINISHED_OFFSET: usize = 64;
const GOOD_OFFSET: usize = 80;

/// How a step ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    /// The weights have changed.
    Applied,
    /// Scaled gradients overflowed; the loss scale is halved.
    Skipped,
    /// Loss or gradient is not finite.
    Refused,
}

/// What the device noted of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Report {
    /// Sum of the losses of all samples.
    pub loss: f64,
    /// Of the mean gradient.
    pub gradient_norm: f64,
    /// By which the loss was multiplied.
    pub loss_scale: f64,
    /// Samples whose label has the largest logit.
    pub correct: usize,
    /// Samples whose label is among the five largest logits.
    pub among_five: usize,
    /// How it ended.
    pub status: Status,
}

/// The state of a training step on a GPU.
pub(super) struct DeviceStep {
    gpu: &'static Gpu,
    state: Memory,
    /// `StepInputs`: stream, learning rate.
    inputs: Memory,
    scaling: Option<LossScaling>,
}

impl DeviceStep {
    /// A state before the first step.
    pub fn new(gpu: &'static Gpu, scaling: Option<LossScaling>) -> Result<Self> {
        let step = DeviceStep { gpu, state: gpu.allocate(STATE_BYTES)?, inputs: gpu.allocate(16)?, scaling };
        step.resume(0, LossScale::new(scaling))?;
        step.begin(Philox::new(0), 0.0)?;
        Ok(step)
    }

    /// The device.
    pub fn gpu(&self) -> &'static Gpu {
        self.gpu
    }

    /// Where kernels find the state.
    pub fn state(&self) -> Address {
        self.state.address()
    }

    /// Tells the device what the next step needs of the host. Does not wait.
    pub fn begin(&self, stream: Philox, lr: f64) -> Result<()> {
        let mut inputs = [0; 16];
        inputs[..8].copy_from_slice(&stream.state().1.to_ne_bytes());
        inputs[8..].copy_from_slice(&lr.to_ne_bytes());
        self.inputs.write(&inputs)
    }

    /// `stream`, as kernels read it at every replay from what [`DeviceStep::begin`] was given.
    pub fn stream(&self, stream: Philox) -> Philox {
        stream.in_cell(self.inputs.address())
    }

    /// The gradient of the scaled loss with respect to `loss`, a scalar in `f32`.
    pub fn loss_gradient(&self, loss: &Tensor) -> Result<Tensor> {
        let gradient = Tensor::empty_on(self.gpu, loss.shape(), loss.dtype())?;
        LOSS_GRADIENT.launch(self.gpu, "", Geometry::blocks(1, 32), (gradient.address()?, self.state()))?;
        Ok(gradient)
    }

    /// Adds a batch's measures: `loss` a scalar and `logits` (rows, classes) in `f32`, `labels` (rows) in `i64`, each
    /// below `classes`.
    pub fn add_measures(&self, loss: &Tensor, logits: &Tensor, labels: &Tensor) -> Result<()> {
        let [rows, classes] = logits.dims::<2>("add_measures", "logits (batch, classes)")?;
        let geometry = Geometry::for_items(32 * rows.max(1), THREADS);
        let arguments =
            (self.state(), loss.address()?, logits.address()?, labels.address()?, rows as u32, classes as u32);
        ADD_MEASURES.launch(self.gpu, "", geometry, arguments)
    }

    /// Ends a step of `samples` samples whose gradients, sums over them, are `gradients`: decides whether the optimizer
    /// applies it, and notes a report.
    pub fn finish(&self, gradients: &Table, samples: usize, clip_norm: Option<f64>, betas: (f64, f64)) -> Result<()> {
        let partials = gradients.squares(self.gpu)?;
        let interval = self.scaling.map_or(0, |scaling| scaling.interval);
        let arguments = (
            self.state(),
            self.inputs.address(),
            partials.address(),
            gradients.blocks(),
            samples as f64,
            clip_norm.unwrap_or(0.0),
            betas.0,
            betas.1,
            interval,
        );
        FINISH_STEP.launch(self.gpu, "", Geometry::blocks(1, THREADS), arguments)
    }

    /// Has the optimizer apply the next step whatever its gradients are, multiplied by `gradient_scale`.
    pub fn apply(&self, gradient_scale: f64, betas: (f64, f64)) -> Result<()> {
        let arguments = (self.state(), self.inputs.address(), gradient_scale, betas.0, betas.1);
        APPLY_STEP.launch(self.gpu, "", Geometry::blocks(1, 32), arguments)
    }

    /// Waits for the device and reads the reports of the last `count` steps, oldest first.
    pub fn reports(&self, count: usize) -> Result<Vec<Report>> {
        if count > REPORTS {
            return Err(Error::Training(format!("{count} steps since the last reports, of which {REPORTS} are kept")));
        }
        let bytes = self.read()?;
        let finished = u64_at(&bytes, FINISHED_OFFSET);
        let count = (count as u64).min(finished);
        Ok((finished - count..finished).map(|step| report(&bytes, (step % REPORTS as u64) as usize)).collect())
    }

    /// Waits for the device and reads what a run goes on from: the steps that were applied, and the loss scale.
    pub fn progress(&self) -> Result<(u64, LossScale)> {
        let bytes = self.read()?;
        let scale = f64_at(&bytes, LOSS_SCALE_OFFSET);
        Ok((u64_at(&bytes, APPLIED_OFFSET), LossScale { scale, good_steps: u32_at(&bytes, GOOD_OFFSET) }))
    }

    /// Goes on from there, with no step reported yet.
    pub fn resume(&self, applied: u64, LossScale { scale, good_steps }: LossScale) -> Result<()> {
        let mut bytes = vec![0; STATE_BYTES];
        bytes[LOSS_SCALE_OFFSET..][..8].copy_from_slice(&scale.to_ne_bytes());
        bytes[APPLIED_OFFSET..][..8].copy_from_slice(&applied.to_ne_bytes());
        bytes[GOOD_OFFSET..][..4].copy_from_slice(&good_steps.to_ne_bytes());
        self.state.write(&bytes)
    }

    fn read(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; STATE_BYTES];
        self.state.read(&mut bytes)?;
        Ok(bytes)
    }
}

fn report(bytes: &[u8], row: usize) -> Report {
    let row = &bytes[HEADER_BYTES + row * REPORT_BYTES..][..REPORT_BYTES];
    Report {
        loss: f64_at(row, 0),
        gradient_norm: f64_at(row, 8),
        loss_scale: f64_at(row, 16),
        correct: u32_at(row, 24) as usize,
        among_five: u32_at(row, 28) as usize,
        status: match u32_at(row, 32) {
            0 => Status::Applied,
            1 => Status::Skipped,
            _ => Status::Refused,
        },
    }
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[offset..][..8]);
    u64::from_ne_bytes(word)
}

fn f64_at(bytes: &[u8], offset: usize) -> f64 {
    f64::from_bits(u64_at(bytes, offset))
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[offset..][..4]);
    u32::from_ne_bytes(word)
}
