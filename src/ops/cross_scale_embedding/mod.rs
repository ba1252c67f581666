//! Cross-scale embedding: several convolutions of one stride with concentric windows, side by side in the channels
//! (CrossFormer, section 3.1).

mod bf16;
pub(crate) mod cost;
mod cpu;
pub(crate) mod gpu;
mod images;
mod lines;
mod patches;
mod rows;
mod tiling;

use crate::autograd::{Backward, Function, record, records};
use crate::gpu::Gpu;
use crate::tensor::{Place, Weight, place};
use crate::{Error, Result, Tensor, dispatch_float};
use images::Images;
pub use images::{ImageLayout, PixelNormalisation};

/// A layer norm over the channels of an embedding: see [`layer_norm`](super::layer_norm).
#[derive(Clone, Debug)]
pub struct EmbeddingNorm {
    /// (Σ O_i)
    pub weight: Tensor,
    /// (Σ O_i)
    pub bias: Tensor,
    /// Added to the variance.
    pub eps: f64,
}

/// How [`cross_scale_embedding_with`] reads its input and what follows.
#[derive(Clone, Debug)]
pub struct EmbeddingOptions {
    /// Pixels from a window to the next.
    pub stride: usize,
    /// Of the input.
    pub layout: ImageLayout,
    /// Applied to every pixel; what lies beyond the map is zero after it.
    pub normalise: Option<PixelNormalisation>,
    /// Applied to the result.
    pub layer_norm: Option<EmbeddingNorm>,
}

impl EmbeddingOptions {
    /// Channels-last pixels as they are, and nothing after.
    pub fn new(stride: usize) -> Self {
        EmbeddingOptions { stride, layout: ImageLayout::default(), normalise: None, layer_norm: None }
    }
}

const OP: &str = "cross_scale_embedding";

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
/// Where shapes or dtypes do not match, there are no channels, a kernel is smaller than the stride or differs from it by an
/// odd number, or the map is smaller than the stride.
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
    if let Some(weight) = weights.first() {
        input.expect_dtype(OP, weight.dtype())?;
    }
    cross_scale_embedding_with(input, weights, biases, &EmbeddingOptions::new(stride))
}

/// [`cross_scale_embedding`] of images as they are stored, with the layer norm that follows.
///
/// - `input`: in the dtype of the weights, `f32`, or `u8`, which count as 0 to 1 and have no gradient; axes as
///   `options.layout` says. Its values are normalised in the arithmetic of the weights' dtype.
/// - `weights`, `biases` and the result: as [`cross_scale_embedding`].
///
/// The same as normalising the images, casting them and embedding them, without the passes over memory. On a GPU
/// normalised or `u8` images have at most 16 channels. The layer norm is part of the same kernel where the input has at
/// most 16 channels and the largest window is not huge, as in a stem, and costs nothing then but a second result where
/// gradients are recorded; else it is an op of its own.
///
/// # Errors
/// As [`cross_scale_embedding`] and [`layer_norm`](super::layer_norm), and where the normalisation does not have a
/// finite mean and a positive deviation for each channel.
///
/// ```
/// use gridgrad::ops::{EmbeddingOptions, ImageLayout, PixelNormalisation, cross_scale_embedding_with};
/// use gridgrad::{DType, Tensor};
/// let images = Tensor::new(&[128_u8; 3 * 32 * 32], [1, 3, 32, 32])?;
/// let normalise = PixelNormalisation { mean: vec![0.485, 0.456, 0.406], deviation: vec![0.229, 0.224, 0.225] };
/// let (layout, normalise) = (ImageLayout::ChannelsFirst, Some(normalise));
/// let options = EmbeddingOptions { layout, normalise, ..EmbeddingOptions::new(4) };
/// let (weight, bias) = (Tensor::ones([16, 3, 8, 8], DType::F32)?, Tensor::zeros([16], DType::F32)?);
/// let tokens = cross_scale_embedding_with(&images, &[weight], &[bias], &options)?;
/// assert_eq!(tokens.shape().to_vec(), [1, 8, 8, 16]);
/// # Ok::<(), gridgrad::Error>(())
/// ```
pub fn cross_scale_embedding_with(
    input: &Tensor,
    weights: &[Tensor],
    biases: &[Tensor],
    options: &EmbeddingOptions,
) -> Result<Tensor> {
    let dtype = weights.first().map_or(input.dtype(), Tensor::dtype);
    let images = Images::new(input, options.layout, options.normalise.as_ref(), dtype)?;
    let problem = problem(&images, weights, biases, options.stride)?;
    let inputs: Vec<&Tensor> = std::iter::once(input).chain(weights).chain(biases).collect();
    let rule =
        |images| EmbeddingRule { input: input.clone(), weights: weights.to_vec(), problem: problem.clone(), images };
    match place(OP, &inputs)? {
        Place::Gpu(gpu) => {
            if let Some(norm) = &options.layer_norm {
                super::layer_norm::check(&problem.output_shape(), dtype, &norm.weight, &norm.bias, norm.eps)?;
                place(OP, &[input, &norm.weight, &norm.bias])?;
                let keep = records(&inputs) || records(&[&norm.weight, &norm.bias]);
                let fused = gpu::forward_normalised(gpu, &problem, &images, input, weights, biases, norm, keep)?;
                if let Some(gpu::Normalised { embedded, output, statistics }) = fused {
                    let embedded = record(embedded, &inputs, |_| rule(images));
                    return Ok(super::layer_norm::on_tape(
                        output,
                        &embedded,
                        &norm.weight,
                        &norm.bias,
                        statistics,
                        norm.eps,
                    ));
                }
            }
            let output = gpu::forward(gpu, &problem, &images, input, weights, biases)?;
            followed(record(output, &inputs, |_| rule(images)), options)
        }
        Place::Host if images.is_plain(dtype) && bf16::takes(&problem, dtype) => {
            let (values, biases) = (data(weights)?, data(biases)?);
            let weights: Vec<_> = weights.iter().zip(values).map(|(w, values)| Weight::of(w, values)).collect();
            let output = bf16::forward(&problem, input.data()?, &weights, &biases);
            let output = Tensor::from_buffer(output, problem.output_shape())?;
            followed(record(output, &inputs, |_| rule(images)), options)
        }
        Place::Host => {
            let output = dispatch_float!(OP, dtype, T => {
                let (values, biases) = (floats::<T>(weights)?, floats::<T>(biases)?);
                let weights: Vec<_> = weights.iter().zip(&values).map(|(w, values)| Weight::of(w, values)).collect();
                let output = match images.is_plain(dtype) {
                    true => cpu::forward(&problem, &input.floats::<T>(OP)?, &weights, &slices(&biases)),
                    false => cpu::forward(&problem, &images.rounded::<T>(input, dtype)?, &weights, &slices(&biases)),
                };
                Tensor::from_floats(output, problem.output_shape(), dtype)
            })?;
            followed(record(output, &inputs, |_| rule(images)), options)
        }
    }
}

/// With the layer norm as an op of its own.
fn followed(output: Tensor, options: &EmbeddingOptions) -> Result<Tensor> {
    match &options.layer_norm {
        None => Ok(output),
        Some(norm) => super::layer_norm(&output, &norm.weight, &norm.bias, norm.eps),
    }
}

fn problem(images: &Images, weights: &[Tensor], biases: &[Tensor], stride: usize) -> Result<cpu::Problem> {
    let [_, height, width, channels] = images.extents;
    if weights.is_empty() || weights.len() != biases.len() {
        return Err(Error::argument(OP, format!("{} weights and {} biases", weights.len(), biases.len())));
    }
    if stride == 0 || height < stride || width < stride {
        return Err(Error::shape(OP, format!("a map of {height}×{width} has no window of stride {stride}")));
    }
    let mut kernels = Vec::with_capacity(weights.len());
    for (weight, bias) in weights.iter().zip(biases) {
        weight.expect_float(OP)?;
        weight.expect_dtype(OP, weights[0].dtype())?;
        bias.expect_dtype(OP, weights[0].dtype())?;
        let [out, fan_in, side, across] = weight.dims::<4>(OP, "weight (out, channels, kernel, kernel)")?;
        if fan_in != channels || side != across || **bias.shape() != [out] {
            let message = format!("weight {} and bias {} for {channels} channels", weight.shape(), bias.shape());
            return Err(Error::shape(OP, message));
        }
        if out == 0 || channels == 0 {
            return Err(Error::shape(OP, format!("weight {} without outputs or channels", weight.shape())));
        }
        if side < stride || !(side - stride).is_multiple_of(2) {
            let message = format!("kernel {side} for stride {stride}; expected stride plus an even number");
            return Err(Error::argument(OP, message));
        }
        kernels.push(cpu::Kernel { side, out });
    }
    Ok(cpu::Problem { extents: images.extents, stride, kernels })
}

fn data(tensors: &[Tensor]) -> Result<Vec<&[half::bf16]>> {
    tensors.iter().map(Tensor::data).collect()
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
    images: Images,
}

impl Function for EmbeddingRule {
    fn name(&self) -> &'static str {
        "cross_scale_embedding"
    }

    fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        backward.first_order_only(OP)?;
        let grad = backward.grad();
        match place(OP, &[&self.input, grad])? {
            Place::Gpu(gpu) => self.backward_on_gpu(gpu, backward),
            Place::Host => self.backward_on_host(grad, self.wants_input(backward)),
        }
    }
}

impl EmbeddingRule {
    fn wants_input(&self, backward: &Backward<'_>) -> bool {
        self.images.dtype.is_float() && backward.needs(0)
    }

    fn backward_on_gpu(&self, gpu: &'static Gpu, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let (problem, images, grad) = (&self.problem, &self.images, backward.grad());
        let gradient = || gpu::input_gradient(gpu, problem, images, &self.weights, grad)?.cast(images.dtype);
        let input = self.wants_input(backward).then(gradient).transpose()?;
        let parameters = 2 * self.weights.len();
        let mut results = vec![input];
        if (1..=parameters).any(|number| backward.needs(number)) {
            let gradients = gpu::parameter_gradients(gpu, problem, images, &self.input, &self.weights, grad)?;
            results.extend(gradients.into_iter().map(Some));
        } else {
            results.resize(1 + parameters, None);
        }
        Ok(results)
    }

    fn backward_on_host(&self, grad: &Tensor, needs_input: bool) -> Result<Vec<Option<Tensor>>> {
        let dtype = grad.dtype();
        let mut results = if self.images.is_plain(dtype) && bf16::takes(&self.problem, dtype) {
            let (input, weights) = (self.input.data()?, data(&self.weights)?);
            let gradients = bf16::backward(&self.problem, input, &weights, grad.data()?, needs_input);
            let input = gradients.input.map(|values| Tensor::from_buffer(values, self.input.shape())).transpose()?;
            let weights = gradients.weights.into_iter().zip(&self.weights);
            let weights = weights.map(|(values, weight)| Tensor::from_buffer(values, weight.shape()).map(Some));
            std::iter::once(Ok(input)).chain(weights).collect::<Result<Vec<_>>>()?
        } else {
            self.gradients_on_host(grad, needs_input)?
        };
        let per_channel = grad.sum(&[0, 1, 2], false)?;
        let mut first = 0;
        for kernel in &self.problem.kernels {
            results.push(Some(per_channel.narrow(0, first, kernel.out)?));
            first += kernel.out;
        }
        Ok(results)
    }

    /// Of the input and the weights, in the compute type.
    fn gradients_on_host(&self, grad: &Tensor, needs_input: bool) -> Result<Vec<Option<Tensor>>> {
        let dtype = grad.dtype();
        dispatch_float!(OP, dtype, T => {
            let weights = floats::<T>(&self.weights)?;
            let grads = grad.floats::<T>(OP)?;
            let gradients = match self.images.is_plain(dtype) {
                true => {
                    let input = self.input.floats::<T>(OP)?;
                    cpu::backward(&self.problem, &input, &slices(&weights), &grads, needs_input)
                }
                false => {
                    let input = self.images.rounded::<T>(&self.input, dtype)?;
                    cpu::backward(&self.problem, &input, &slices(&weights), &grads, needs_input)
                }
            };
            let tensor = |gradient, like: &Tensor| Tensor::from_floats(gradient, like.shape(), dtype);
            let of_pixels = |values: crate::tensor::Buffer<T>| {
                let plain = self.images.is_plain(dtype);
                tensor(if plain { values } else { self.images.gradient(&values) }, &self.input)?.cast(self.images.dtype)
            };
            let mut results = vec![gradients.input.map(of_pixels).transpose()?];
            for (gradient, weight) in gradients.weights.into_iter().zip(&self.weights) {
                results.push(Some(tensor(gradient, weight)?));
            }
            Ok(results)
        })
    }
}
