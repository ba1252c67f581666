//! What is measured, and how: implementations that run a problem on the next copy of its inputs, and the clock.

use std::time::Duration;

use gridgrad::autograd::{Backward, Function, GradOptions, grad, record};
use gridgrad::random::Philox;
use gridgrad::{DType, Device, Result, Tensor};

use crate::model::Direction;
use crate::shapes::Case;

/// A problem on a device.
#[derive(Clone, Copy)]
pub struct Bench<'a> {
    pub case: &'a Case,
    pub direction: Direction,
    pub device: Device,
    pub dtype: DType,
}

/// Runs the problem once, on the copy of this number.
pub type Run = Box<dyn FnMut(usize) -> Result<()>>;

/// More than twice the second-level cache of an H200, 50 MB.
const ROTATED_BYTES: usize = 128 << 20;
const MOST_COPIES: usize = 128;
/// Random values that are made on the host; larger tensors repeat them.
const DRAWN: usize = 1 << 16;

impl Bench<'_> {
    /// How many copies of inputs of so many elements outlast the cache.
    pub fn copies(&self, elements: usize) -> usize {
        match self.device {
            Device::Cuda(_) => ROTATED_BYTES.div_ceil((elements * self.dtype.size()).max(1)).clamp(1, MOST_COPIES),
            _ => 2,
        }
    }

    /// Random values on the device.
    pub fn random(&self, shape: &[usize], number: u64) -> Result<Tensor> {
        self.random_as(shape, number, self.dtype)
    }

    /// The same in another dtype.
    pub fn random_as(&self, shape: &[usize], number: u64, dtype: DType) -> Result<Tensor> {
        let elements: usize = shape.iter().product();
        let drawn = Tensor::randn([elements.min(DRAWN)], DType::F32, Philox::new(11).fork(number))?;
        let drawn = drawn.cast(dtype)?.to_device(self.device)?;
        let repeats = elements.div_ceil(DRAWN).max(1);
        let values = drawn.reshape([1, elements.min(DRAWN)])?.broadcast_to([repeats, elements.min(DRAWN)])?;
        values.reshape([repeats * elements.min(DRAWN)])?.narrow(0, 0, elements)?.reshape(shape)
    }

    /// [`of_outputs`](Self::of_outputs) of an op that has one.
    pub fn of_op(
        &self,
        shapes: &[Vec<usize>],
        constants: usize,
        op: impl Fn(&[Tensor]) -> Result<Tensor> + 'static,
    ) -> Result<Run> {
        self.of_outputs(shapes, constants, move |inputs| Ok(vec![op(inputs)?]))
    }

    /// Runs an op of the crate: forward without a tape, backward on one that is kept, from random gradients of all
    /// outputs. Gradients are wanted of all inputs but the first `constants`.
    pub fn of_outputs(
        &self,
        shapes: &[Vec<usize>],
        constants: usize,
        op: impl Fn(&[Tensor]) -> Result<Vec<Tensor>> + 'static,
    ) -> Result<Run> {
        let elements = shapes.iter().map(|shape| shape.iter().product::<usize>()).sum();
        let inputs = |copy: usize| -> Result<Vec<Tensor>> {
            let number = |input: usize| (copy * shapes.len() + input) as u64;
            shapes.iter().enumerate().map(|(input, shape)| self.random(shape, number(input))).collect()
        };
        let copies: Vec<Vec<Tensor>> = (0..self.copies(elements)).map(inputs).collect::<Result<_>>()?;
        if self.direction == Direction::Forward {
            // What does not run says so before it is measured.
            op(&copies[0])?;
            return Ok(Box::new(move |copy| op(&copies[copy % copies.len()]).map(drop)));
        }
        let mut recorded = Vec::with_capacity(copies.len());
        for (copy, inputs) in copies.into_iter().enumerate() {
            let variable =
                |(number, input): (usize, Tensor)| if number < constants { Ok(input) } else { input.variable() };
            let inputs: Vec<Tensor> = inputs.into_iter().enumerate().map(variable).collect::<Result<_>>()?;
            let end = self.end(&op(&inputs)?, (1 << 32) + copy as u64)?;
            let options = GradOptions { retain_graph: true, grad_output: Some(end.detach()), ..GradOptions::default() };
            recorded.push((inputs, end, options));
        }
        let backward = move |copy: usize| {
            let (inputs, end, options) = &recorded[copy % recorded.len()];
            let wanted: Vec<&Tensor> = inputs.iter().skip(constants).collect();
            grad(end, &wanted, options.clone()).map(drop)
        };
        backward(0)?;
        Ok(Box::new(backward))
    }

    /// A tensor whose backward pass gives each of the outputs a random gradient.
    fn end(&self, outputs: &[Tensor], number: u64) -> Result<Tensor> {
        let gradient = |(at, output): (usize, &Tensor)| {
            self.random_as(output.shape(), number + ((at as u64) << 32), output.dtype())
        };
        let gradients = outputs.iter().enumerate().map(gradient).collect::<Result<_>>()?;
        let end = Tensor::zeros([], DType::F32)?.to_device(self.device)?;
        Ok(record(end, &outputs.iter().collect::<Vec<_>>(), |_| End(gradients)))
    }
}

/// Where the backward pass of several outputs begins. It hands out their gradients as they are, at no cost.
struct End(Vec<Tensor>);

impl Function for End {
    fn name(&self) -> &'static str {
        "end"
    }

    fn backward(&self, _: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        Ok(self.0.iter().cloned().map(Some).collect())
    }
}

/// Seconds of each call, as often as they were taken, and the first failure.
#[derive(Default)]
pub struct Stopwatch {
    samples: Vec<f64>,
    calls: usize,
    failure: Option<gridgrad::Error>,
}

/// Samples that count at most: the last ones, since those before were the warm-up's.
const MOST_SAMPLES: usize = 30;

impl Stopwatch {
    /// How long so many calls take. After a failure nothing more is run.
    pub fn time(&mut self, device: Device, calls: u64, run: &mut dyn FnMut(usize) -> Result<()>) -> Duration {
        if self.failure.is_some() {
            return Duration::from_nanos(calls);
        }
        let first = self.calls;
        self.calls += calls as usize;
        let time = device.time(|| (first..first + calls as usize).try_for_each(&mut *run));
        match time {
            Ok(time) => {
                self.samples.push(time.as_secs_f64() / calls as f64);
                time.max(Duration::from_nanos(1))
            }
            Err(error) => {
                self.failure = Some(error);
                Duration::from_nanos(calls)
            }
        }
    }

    /// Seconds of a call, sorted.
    pub fn finish(self) -> Result<Vec<f64>> {
        if let Some(failure) = self.failure {
            return Err(failure);
        }
        let mut samples = self.samples;
        samples.drain(..samples.len().saturating_sub(MOST_SAMPLES));
        samples.sort_by(f64::total_cmp);
        Ok(samples)
    }
}
