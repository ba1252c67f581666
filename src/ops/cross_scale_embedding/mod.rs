//! Cross-scale embedding: several convolutions of one stride with concentric windows, side by side in the channels
//! (CrossFormer, section 3.1).

pub(crate) mod cost;
mod cpu;
pub(crate) mod gpu;
mod patches;
mod rows;

use crate::autograd::{Backward, Function, record};
use crate::gpu::Gpu;
use crate::tensor::{Place, place};
use crate::{Error, Result, Tensor, dispatch_float};

/// Convolves `input` with every kernel and joins the results.
///
/// - `input`: (B, H, W, C).
/// - `weights`: one (O_i, C, k_i, k_i) per kernel, `biases`: one (O_i) per kernel.
/// - Kernel i is padded by (k_i − stride) / 2 on all sides, so that all windows have one centre.
/// - Result: (B, ⌊H / stride⌋, ⌊W / stride⌋, Σ O_i), the kernels' channels in the order given.
///
/// First derivatives only. The same bits for any number of threads. On a GPU at most 16 kernels.
///
/// # Errors
/// Where shapes or dtypes do not match, a kernel is smaller than the stride or differs from it by an odd number, or the
/// map is smaller than the stride.
///
/// ```
/// use gridgrad::{DType, Tensor, ops};
/// let images = Tensor::ones([1, 32, 32, 3], DType::F32)?;
/// let kernels = [Tensor::ones([16, 3, 4, 4], DType::F32)?, Tensor::ones([8, 3, 8, 8], DType::F32)?];
/// let biases = [Tensor::zeros([16], DType::F32)?, Tensor::zeros([8], DType::F32)?];
/// let tokens = ops::cross_scale_embedding(&images, &kernels, &biases, 4)?;
/// assert_eq!(tokens.shape().to_vec(), [1, 8, 8, 24]);
/// # Ok::<(), gridgrad::Error>(())
/// ```
pub fn cross_scale_embedding(input: &Tensor, weights: &[Tensor], biases: &[Tensor], stride: usize) -> Result<Tensor> {
    const OP: &str = "cross_scale_embedding";
    let dtype = input.dtype();
    let [batch, height, width, channels] = input.dims::<4>(OP, "input (batch, height, width, channels)")?;
    if weights.is_empty() || weights.len() != biases.len() {
        return Err(Error::argument(OP, format!("{} weights and {} biases", weights.len(), biases.len())));
    }
    if stride == 0 || height < stride || width < stride {
        return Err(Error::shape(OP, format!("a map of {height}×{width} has no window of stride {stride}")));
    }
    let mut kernels = Vec::with_capacity(weights.len());
    for (weight, bias) in weights.iter().zip(biases) {
        weight.expect_dtype(OP, dtype)?;
        bias.expect_dtype(OP, dtype)?;
        let [out, fan_in, side, across] = weight.dims::<4>(OP, "weight (out, channels, kernel, kernel)")?;
        if fan_in != channels || side != across || **bias.shape() != [out] {
            let message = format!("weight {} and bias {} for {channels} channels", weight.shape(), bias.shape());
            return Err(Error::shape(OP, message));
        }
        if side < stride || !(side - stride).is_multiple_of(2) {
            let message = format!("kernel {side} for stride {stride}; expected stride plus an even number");
            return Err(Error::argument(OP, message));
        }
        kernels.push(cpu::Kernel { side, out });
    }
    let problem = cpu::Problem { extents: [batch, height, width, channels], stride, kernels };
    let inputs: Vec<&Tensor> = std::iter::once(input).chain(weights).chain(biases).collect();
    let output = match place(OP, &inputs)? {
        Place::Gpu(gpu) => gpu::forward(gpu, &problem, input, weights, biases)?,
        Place::Host => dispatch_float!(OP, dtype, T => {
            let weights = floats::<T>(weights)?;
            let biases = floats::<T>(biases)?;
            let output = cpu::forward(&problem, &input.floats::<T>(OP)?, &slices(&weights), &slices(&biases));
            Tensor::from_floats(output, problem.output_shape(), dtype)
        })?,
    };
    Ok(record(output, &inputs, |_| EmbeddingRule { input: input.clone(), weights: weights.to_vec(), problem }))
}

fn floats<T: crate::cpu::Float>(tensors: &[Tensor]) -> Result<Vec<crate::tensor::Floats<'_, T>>> {
    tensors.iter().map(|tensor| tensor.floats::<T>("cross_scale_embedding")).collect()
}

fn slices<'a, T: crate::cpu::Float>(tensors: &'a [crate::tensor::Floats<'_, T>]) -> Vec<&'a [T]> {
    tensors.iter().map(|tensor| &**tensor).collect()
}

struct EmbeddingRule {
    input: Tensor,
    weights: Vec<Tensor>,
    problem: cpu::Problem,
}

impl Function for EmbeddingRule {
    fn name(&self) -> &'static str {
        "cross_scale_embedding"
    }

    fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        const OP: &str = "cross_scale_embedding";
        backward.first_order_only(OP)?;
        let grad = backward.grad();
        match place(OP, &[&self.input, grad])? {
            Place::Gpu(gpu) => self.backward_on_gpu(gpu, backward),
            Place::Host => self.backward_on_host(grad, backward.needs(0)),
        }
    }
}

impl EmbeddingRule {
    fn backward_on_gpu(&self, gpu: &'static Gpu, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let (problem, grad) = (&self.problem, backward.grad());
        let input = backward.needs(0).then(|| gpu::input_gradient(gpu, problem, &self.weights, grad)).transpose()?;
        let parameters = 2 * self.weights.len();
        let mut results = vec![input];
        if (1..=parameters).any(|number| backward.needs(number)) {
            let gradients = gpu::parameter_gradients(gpu, problem, &self.input, &self.weights, grad)?;
            results.extend(gradients.into_iter().map(Some));
        } else {
            results.resize(1 + parameters, None);
        }
        Ok(results)
    }

    fn backward_on_host(&self, grad: &Tensor, needs_input: bool) -> Result<Vec<Option<Tensor>>> {
        const OP: &str = "cross_scale_embedding";
        let dtype = grad.dtype();
        dispatch_float!(OP, dtype, T => {
            let weights = floats::<T>(&self.weights)?;
            let (input, grads) = (self.input.floats::<T>(OP)?, grad.floats::<T>(OP)?);
            let gradients = cpu::backward(&self.problem, &input, &slices(&weights), &grads, needs_input);
            let tensor = |gradient, like: &Tensor| Tensor::from_floats(gradient, like.shape(), dtype);
            let mut results = vec![gradients.input.map(|gradient| tensor(gradient, &self.input)).transpose()?];
            for (gradient, weight) in gradients.weights.into_iter().zip(&self.weights) {
                results.push(Some(tensor(gradient, weight)?));
            }
            let per_channel = grad.sum(&[0, 1, 2], false)?;
            let mut first = 0;
            for kernel in &self.problem.kernels {
                results.push(Some(per_channel.narrow(0, first, kernel.out)?));
                first += kernel.out;
            }
            Ok(results)
        })
    }
}
