//! An op of one's own: RMS normalisation (Zhang and Sennrich 2019), y = x / √(mean(x²) + ε) · w over the last axis.
//!
//! Run it with `cargo run --example custom_op`. It has the parts of every op of the crate: a public function that checks
//! what it is given and computes the output, a struct that holds what the backward pass needs, and the rule itself.

use gridgrad::autograd::{Backward, Function, GradientCheck, check_gradients, record};
use gridgrad::cpu::{Float, parallel};
use gridgrad::random::Philox;
use gridgrad::tensor::Buffer;
use gridgrad::{DType, Device, Error, Result, Tensor, dispatch_float};

const OP: &str = "rms_norm";

/// Normalises the last axis of `input` (…, channels) to a mean square of 1, then scales it by `weight` (channels).
fn rms_norm(input: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if weight.rank() != 1 || input.shape().last() != weight.shape().first() || weight.elements() == 0 {
        let message = format!("input {}, weight {}; expected (…, channels), (channels)", input.shape(), weight.shape());
        return Err(Error::shape(OP, message));
    }
    let output = match input.device() {
        // One body for all floating-point types: T is f64 for f64, and f32 for f32, bf16 and f16.
        Device::Cpu => dispatch_float!(OP, input.dtype(), T => {
            let output = forward::<T>(&input.floats(OP)?, &weight.floats(OP)?, eps);
            Tensor::from_floats(output, input.shape(), input.dtype())
        })?,
        // A kernel for another device would be launched by an arm of its own. The rule below stays as it is.
        device => return Err(Error::DeviceUnavailable { device, reason: format!("{OP} runs on the CPU alone") }),
    };
    Ok(record(output, &[input, weight], |_| RmsNormRule { input: input.clone(), weight: weight.clone(), eps }))
}

/// Rows are independent, so they may run on any thread; the sum within a row has a fixed order.
fn forward<T: Float>(input: &[T], weight: &[T], eps: f64) -> Buffer<T> {
    let channels = weight.len();
    let mut output = Buffer::recycled(input.len());
    parallel::pieces_mut(&mut output, channels, |row, output| {
        let input = &input[row * channels..][..channels];
        let mean_square = input.iter().map(|&x| x * x).sum::<T>() / T::from_f64(channels as f64);
        let scale = T::ONE / (mean_square + T::from_f64(eps)).sqrt();
        for ((output, &x), &w) in output.iter_mut().zip(input).zip(weight) {
            *output = x * scale * w;
        }
    });
    output
}

/// What the backward pass needs of the forward.
struct RmsNormRule {
    input: Tensor,
    weight: Tensor,
    eps: f64,
}

impl Function for RmsNormRule {
    fn name(&self) -> &'static str {
        OP
    }

    /// With r = 1 / √(mean(x²) + ε) and g = dy · w: dx = r (g − x r² mean(g x)), dw = Σ dy x r.
    ///
    /// Every step is an op on the tape, so the gradients have gradients. A rule that computes in slices, as `forward`
    /// does, starts with `backward.first_order_only(OP)?` instead.
    fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let (x, dy) = (&self.input, backward.grad());
        let r = x.square()?.mean(&[-1], true)?.shift(self.eps)?.powf(-0.5)?;
        let dx = if backward.needs(0) {
            let g = dy.mul(&self.weight)?;
            let along_x = x.mul(&r.square()?)?.mul(&g.mul(x)?.mean(&[-1], true)?)?;
            Some(g.sub(&along_x)?.mul(&r)?)
        } else {
            None
        };
        let dw = if backward.needs(1) { Some(dy.mul(x)?.mul(&r)?.sum_to(self.weight.shape())?) } else { None };
        Ok(vec![dx, dw])
    }
}

fn main() -> Result<()> {
    let random = Philox::new(1);
    let x = Tensor::randn([2, 3, 8], DType::F64, random.stream("x"))?;
    let w = Tensor::uniform([8], 0.5, 1.5, DType::F64, random.stream("w"))?;

    let y = rms_norm(&x, &Tensor::ones([8], DType::F64)?, 0.0)?;
    println!("mean squares of the rows: {:?}", y.square()?.mean(&[-1], false)?.to_vec::<f64>()?);

    let check = GradientCheck { second_order: true, ..GradientCheck::default() };
    check_gradients(|inputs| rms_norm(&inputs[0], &inputs[1], 1e-6), &[x, w], check)?;
    println!("first and second derivatives agree with finite differences");

    let error = rms_norm(&Tensor::ones([2, 4], DType::F32)?, &Tensor::ones([3], DType::F32)?, 1e-6);
    println!("a misuse: {}", error.expect_err("four channels, three weights"));
    Ok(())
}
