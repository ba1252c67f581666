//! Random removal: of elements ([`dropout`]), or of a residual branch for whole samples ([`drop_path`]).
//!
//! Both multiply by a mask of 0 and 1 / (1 − p) that follows from the [`Philox`] stream alone: decision i keeps where
//! the stream's number i, as 32 bits, is at least p · 2³². So the backward makes the mask again instead of keeping it,
//! and any device makes the same one. A NaN or an infinity that is dropped becomes NaN, not 0.

pub(crate) mod cost;
mod cpu;
pub(crate) mod gpu;
#[cfg(all(test, feature = "emulator"))]
mod tests;

use crate::autograd::{Backward, Function, record};
use crate::random::Philox;
use crate::tensor::{Place, dispatch_stored, place};
use crate::{Error, Result, Tensor};

/// Sets elements to 0 with probability `p` and divides the others by 1 − p (Srivastava et al. 2014). Element i in
/// row-major order goes by number i of `stream`. Derivatives of any order.
///
/// # Errors
/// Where `p` is outside \[0, 1\] or the dtype is not floating point.
pub fn dropout(input: &Tensor, p: f64, stream: Philox) -> Result<Tensor> {
    if !(0.0..=1.0).contains(&p) {
        return Err(Error::argument("dropout", format!("probability {p}, expected a number from 0 to 1")));
    }
    apply(input, Granularity::Element, p, stream)
}

/// Stochastic depth (Huang et al. 2016): sets whole samples of `input` (batch, …) to 0 with probability `p` and divides
/// the others by 1 − p. Sample i goes by number i of `stream`. Derivatives of any order.
///
/// # Errors
/// Where `p` is outside \[0, 1), there is no batch axis, or the dtype is not floating point.
pub fn drop_path(input: &Tensor, p: f64, stream: Philox) -> Result<Tensor> {
    if !(0.0..1.0).contains(&p) {
        return Err(Error::argument("drop_path", format!("probability {p}, expected a number from 0 to below 1")));
    }
    if input.rank() == 0 {
        return Err(Error::shape("drop_path", "got a scalar, expected (batch, …)"));
    }
    apply(input, Granularity::Sample, p, stream)
}

/// What one random decision is about.
#[derive(Clone, Copy)]
enum Granularity {
    Element,
    Sample,
}

impl Granularity {
    fn op(self) -> &'static str {
        match self {
            Granularity::Element => "dropout",
            Granularity::Sample => "drop_path",
        }
    }
}

/// Turns random bits into factors.
#[derive(Clone, Copy)]
struct Mask {
    /// Smallest number that keeps.
    threshold: u32,
    /// Factor of what is kept: 0 where p is 1.
    scale: f64,
}

impl Mask {
    fn new(p: f64) -> Self {
        // The conversion saturates.
        let threshold = (p * (1u64 << 32) as f64).ceil() as u32;
        Mask { threshold, scale: if p < 1.0 { 1.0 / (1.0 - p) } else { 0.0 } }
    }

    #[inline(always)]
    fn keeps(self, bits: u32) -> bool {
        bits >= self.threshold
    }
}

fn apply(input: &Tensor, granularity: Granularity, p: f64, stream: Philox) -> Result<Tensor> {
    let (op, dtype) = (granularity.op(), input.dtype());
    input.expect_float(op)?;
    if p == 0.0 {
        return Ok(input.clone());
    }
    let mask = Mask::new(p);
    let output = match place(op, &[input])? {
        Place::Gpu(gpu) => gpu::apply(gpu, input, granularity, mask, stream)?,
        Place::Host => dispatch_stored!(op, dtype, (S, T) => {
            let values = input.stored::<S>(op)?;
            let output = match granularity {
                Granularity::Element => cpu::elements::<S, T>(&values, mask, stream),
                Granularity::Sample => {
                    let sample_len = input.shape()[1..].iter().product();
                    cpu::samples::<S, T>(&values, sample_len, mask, stream)
                }
            };
            Tensor::from_stored(output, input.shape(), dtype)
        })?,
    };
    Ok(record(output, &[input], |_| DropoutRule { granularity, p, stream }))
}

struct DropoutRule {
    granularity: Granularity,
    p: f64,
    stream: Philox,
}

impl Function for DropoutRule {
    fn name(&self) -> &'static str {
        self.granularity.op()
    }

    /// The op is linear and its matrix diagonal, so it is its own transpose.
    fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(apply(backward.grad(), self.granularity, self.p, self.stream)?)])
    }
}
