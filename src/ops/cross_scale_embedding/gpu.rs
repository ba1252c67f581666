//! One launch over all kernels for the forward pass, with the layer norm that follows where a block has all channels of
//! its positions, and one each for the gradients.

use super::EmbeddingNorm;
use super::cpu::{Kernel as Window, Problem};
use super::images::{ImageLayout, Images, Scale};
use super::tiling::{self, MOST_KERNELS, Split, Tiling, WeightTiling};
use crate::driver::seam::Address;
use crate::gpu::{FLOATS, Geometry, Gpu, Kernel, Signature};
use crate::{DType, Error, Result, Tensor};

/// As `MOST_SCALED_CHANNELS` in the kernel files.
const MOST_SCALED_CHANNELS: usize = 16;
/// As `Pixels` in the kernel files.
type Pixels = [u32; 3 + 2 * MOST_SCALED_CHANNELS];
/// As `Embedding` in the kernel files.
type Description = [u32; 7 + 3 * MOST_KERNELS];
/// As `PerKernel` in the kernel files.
type PerKernel = [Address; MOST_KERNELS];

const FORWARD_MODULE: &str = "cross_scale_embedding";
const BACKWARD_MODULE: &str = "cross_scale_embedding_backward";
const WEIGHT_MODULE: &str = "cross_scale_embedding_weight";
const RUNS: &[&str] = &["f32", "bf16_vector", "bf16_scalar", "f16_vector", "f16_scalar"];

/// packed weights, elements, weights, embedding, tiling
const PACK: Kernel<(Address, u64, PerKernel, Description, tiling::Description)> =
    Kernel::new(FORWARD_MODULE, "cross_scale_embedding_pack", FLOATS);
/// embedded, input, packed weights, biases, embedding, tiling, pixels; of the layer norm: output, statistics, weight,
/// bias, eps
type ForwardArguments = (
    Address,
    Address,
    Address,
    PerKernel,
    Description,
    tiling::Description,
    Pixels,
    Address,
    Address,
    Address,
    Address,
    f32,
);
const FORWARD: Kernel<ForwardArguments> = Kernel::new(FORWARD_MODULE, "cross_scale_embedding_forward", FLOATS);
/// weights as (out, row, column, channel), weights, embedding
const TURN_WEIGHTS: Kernel<(Address, PerKernel, Description)> =
    Kernel::new(BACKWARD_MODULE, "cross_scale_embedding_turn_weights", FLOATS);
/// input gradient, output gradient, turned weights, embedding, pixels
const INPUT_GRADIENT: Kernel<(Address, Address, Address, Description, Pixels)> =
    Kernel::new(BACKWARD_MODULE, "cross_scale_embedding_input_gradient", RUNS);
/// channels-last pixels, input, embedding, pixels
const NORMALISE: Kernel<(Address, Address, Description, Pixels)> =
    Kernel::new(BACKWARD_MODULE, "cross_scale_embedding_normalise", FLOATS);
/// partial sums, those of a part's weights, input, output gradient, embedding, tiling, split
type WeightArguments = (Address, u64, Address, Address, Description, tiling::Description, Split);
const WEIGHT_GRADIENT: Kernel<WeightArguments> =
    Kernel::new(WEIGHT_MODULE, "cross_scale_embedding_weight_gradient", FLOATS);
/// weight gradients, bias gradients, partial sums, those of a part's weights, parts, embedding, tiling
const ADD_PARTS: Kernel<(PerKernel, PerKernel, Address, u64, u32, Description, tiling::Description)> =
    Kernel::new(WEIGHT_MODULE, "cross_scale_embedding_add_parts", FLOATS);

pub(crate) static KERNELS: &[Signature] = &[
    PACK.signature(),
    FORWARD.signature(),
    TURN_WEIGHTS.signature(),
    INPUT_GRADIENT.signature(),
    NORMALISE.signature(),
    WEIGHT_GRADIENT.signature(),
    ADD_PARTS.signature(),
];

/// As in the kernel files.
const TILE_THREADS: u32 = 256;
/// Threads of a block of the input gradient, and rows of its tile.
const THREADS: u32 = 128;
const TILE_ROWS: usize = 128;

/// An embedding as the kernels see it.
struct Plan<'a> {
    gpu: &'static Gpu,
    dtype: DType,
    problem: &'a Problem,
    description: Description,
    /// Numbers of the kernels from the largest to the smallest, so that long work starts first.
    order: Vec<usize>,
}

impl<'a> Plan<'a> {
    fn new(gpu: &'static Gpu, dtype: DType, problem: &'a Problem) -> Result<Self> {
        let [batch, height, width, channels] = problem.extents;
        check_limits(problem)?;
        let mut order: Vec<usize> = (0..problem.kernels.len()).collect();
        order.sort_by_key(|&number| std::cmp::Reverse(problem.kernels[number].side));
        let mut description = [0; 7 + 3 * MOST_KERNELS];
        let extents = [batch, height, width, channels, problem.stride, problem.out_channels(), problem.kernels.len()];
        let (head, lists) = description.split_at_mut(extents.len());
        head.copy_from_slice(&extents.map(|extent| extent as u32));
        let firsts = problem.first_channels();
        for (place, &number) in order.iter().enumerate() {
            let Window { side, out } = problem.kernels[number];
            for (list, value) in [side, out, firsts[number]].into_iter().enumerate() {
                lists[list * MOST_KERNELS + place] = value as u32;
            }
        }
        Ok(Plan { gpu, dtype, problem, description, order })
    }

    fn per_kernel(&self, tensors: &[Tensor]) -> Result<PerKernel> {
        let mut addresses = [Address::NULL; MOST_KERNELS];
        for (address, &number) in addresses.iter_mut().zip(&self.order) {
            *address = tensors[number].address()?;
        }
        Ok(addresses)
    }

    fn windows(&self) -> impl Iterator<Item = Window> {
        self.problem.kernels.iter().copied()
    }

    /// Terms of each sum of the forward pass.
    fn depth(&self, window: Window) -> usize {
        window.side * window.side * self.problem.extents[3]
    }

    /// Elements of all turned weights, each row from a multiple of 16 bytes.
    fn turned_elements(&self) -> usize {
        self.windows().map(|window| window.out * self.depth(window).next_multiple_of(8)).sum()
    }

    /// All weights as (out, row, column, channel).
    fn turn(&self, weights: &[Tensor]) -> Result<Tensor> {
        let turned = Tensor::empty_on(self.gpu, [self.turned_elements()], self.dtype)?;
        let arguments = (turned.address()?, self.per_kernel(weights)?, self.description);
        TURN_WEIGHTS.launch(self.gpu, self.dtype.name(), self.elementwise(0), arguments)?;
        Ok(turned)
    }

    /// As the kernels order them.
    fn ordered_windows(&self) -> Vec<Window> {
        self.order.iter().map(|&number| self.problem.kernels[number]).collect()
    }

    fn tiling(&self) -> Result<Tiling<'a>> {
        Tiling::new(self.problem, self.ordered_windows(), self.dtype.size())
    }

    /// All weights as the products of the forward pass take them.
    fn pack(&self, weights: &[Tensor], tiling: &Tiling<'_>) -> Result<Tensor> {
        let elements = tiling.packed_elements();
        let packed = Tensor::empty_on(self.gpu, [elements], self.dtype)?;
        let weights = self.per_kernel(weights)?;
        let arguments = (packed.address()?, elements as u64, weights, self.description, tiling.description(0));
        PACK.launch(self.gpu, self.dtype.name(), Geometry::for_items(elements, 256), arguments)?;
        Ok(packed)
    }

    /// A row of blocks for each kernel, with a few elements for each thread of the largest.
    fn elementwise(&self, more: usize) -> Geometry {
        let most = self.windows().map(|window| window.out * (self.depth(window) + more)).max().unwrap_or(0);
        let blocks = Geometry::for_items(most.div_ceil(4), 256);
        Geometry { grid: [blocks.grid[0], self.problem.kernels.len() as u32, 1], ..blocks }
    }
}

/// Numbers of rows, columns and terms must leave room in 32 bits for a tile more.
fn check_limits(problem: &Problem) -> Result<()> {
    const OP: &str = "cross_scale_embedding";
    const MOST: usize = 1 << 30;
    let [batch, height, width, channels] = problem.extents;
    if problem.kernels.len() > MOST_KERNELS {
        let message = format!("{} kernels; expected at most {MOST_KERNELS} on a GPU", problem.kernels.len());
        return Err(Error::argument(OP, message));
    }
    let product = |factors: &[usize]| factors.iter().try_fold(1usize, |product, &factor| product.checked_mul(factor));
    let fits = |factors: &[usize]| product(factors).is_some_and(|product| product <= MOST);
    let [rows, columns] = [height.div_ceil(problem.stride), width.div_ceil(problem.stride)];
    let kernel_fits = |&Window { side, out }: &Window| fits(&[side, side, channels]) && fits(&[side, side, out]);
    if fits(&[batch, rows, columns]) && fits(&[width, channels]) && problem.kernels.iter().all(kernel_fits) {
        return Ok(());
    }
    let message =
        format!("an input of {:?} with stride {}: more than 2³⁰ rows or terms", problem.extents, problem.stride);
    Err(Error::shape(OP, message))
}

/// An embedding with the layer norm that follows.
pub(super) struct Normalised {
    pub embedded: Tensor,
    pub output: Tensor,
    /// As [`layer_norm::gpu`](crate::ops::layer_norm) gives them.
    pub statistics: Tensor,
}

/// The result, (batch, rows, columns, channels).
pub(super) fn forward(
    gpu: &'static Gpu,
    problem: &Problem,
    images: &Images,
    input: &Tensor,
    weights: &[Tensor],
    biases: &[Tensor],
) -> Result<Tensor> {
    let plan = Plan::new(gpu, weights[0].dtype(), problem)?;
    let output = Tensor::empty_on(gpu, problem.output_shape(), plan.dtype)?;
    let norm = (Address::NULL, Address::NULL, Address::NULL, Address::NULL, 0.0);
    plan.embed(&plan.tiling()?, images, input, weights, biases, output.address()?, norm)?;
    Ok(output)
}

/// The same with the layer norm in the same kernel; none where a block does not have all channels of a position. The
/// embedding itself is only kept where `keep` says so, and shares its memory with the output otherwise.
#[allow(clippy::too_many_arguments, reason = "the op's own and where it runs")]
pub(super) fn forward_normalised(
    gpu: &'static Gpu,
    problem: &Problem,
    images: &Images,
    input: &Tensor,
    weights: &[Tensor],
    biases: &[Tensor],
    norm: &EmbeddingNorm,
    keep: bool,
) -> Result<Option<Normalised>> {
    let plan = Plan::new(gpu, weights[0].dtype(), problem)?;
    let tiling = plan.tiling()?;
    if !tiling.is_complete() {
        return Ok(None);
    }
    let output = Tensor::empty_on(gpu, problem.output_shape(), plan.dtype)?;
    let rows = if keep { positions(problem) } else { 0 };
    let statistics = Tensor::empty_on(gpu, [rows * 3], DType::F32)?;
    let saved = if keep { statistics.address()? } else { Address::NULL };
    let embedded = if keep { Tensor::empty_on(gpu, problem.output_shape(), plan.dtype)? } else { output.clone() };
    let parameters = (output.address()?, saved, norm.weight.address()?, norm.bias.address()?, norm.eps as f32);
    plan.embed(&tiling, images, input, weights, biases, embedded.address()?, parameters)?;
    Ok(Some(Normalised { embedded, output, statistics }))
}

impl Plan<'_> {
    #[allow(clippy::too_many_arguments, reason = "the op's own, and what it is made of")]
    fn embed(
        &self,
        tiling: &Tiling<'_>,
        images: &Images,
        input: &Tensor,
        weights: &[Tensor],
        biases: &[Tensor],
        embedded: Address,
        (output, statistics, weight, bias, eps): (Address, Address, Address, Address, f32),
    ) -> Result<()> {
        let packed = self.pack(weights, tiling)?;
        let run = if images.is_plain(self.dtype) { tiling.run() } else { 0 };
        let ([blocks, rounds], shared) = tiling.launch();
        let geometry =
            Geometry { grid: [blocks as u32, rounds as u32, 1], block: [TILE_THREADS, 1, 1], shared: shared as u32 };
        let arguments = (
            embedded,
            input.address()?,
            packed.address()?,
            self.per_kernel(biases)?,
            self.description,
            tiling.description(run),
            pixels(images, self.dtype)?,
            output,
            statistics,
            weight,
            bias,
            eps,
        );
        FORWARD.launch(self.gpu, self.dtype.name(), geometry, arguments)
    }
}

impl Plan<'_> {
    /// The pixels' values, channels last.
    fn plain(&self, images: &Images, input: &Tensor) -> Result<Tensor> {
        if images.is_plain(self.dtype) {
            return Ok(input.clone());
        }
        let values = Tensor::empty_on(self.gpu, self.problem.extents, self.dtype)?;
        let arguments = (values.address()?, input.address()?, self.description, pixels(images, self.dtype)?);
        NORMALISE.launch(self.gpu, self.dtype.name(), Geometry::for_items(values.elements(), 256), arguments)?;
        Ok(values)
    }
}

/// How the kernels read and write pixels of an embedding in `dtype`.
fn pixels(images: &Images, dtype: DType) -> Result<Pixels> {
    let scales = &images.scales;
    if scales.len() > MOST_SCALED_CHANNELS {
        let message = format!(
            "{} channels of normalised or u8 images; expected at most {MOST_SCALED_CHANNELS} on a GPU",
            scales.len()
        );
        return Err(Error::argument("cross_scale_embedding", message));
    }
    let mut pixels = [0; 3 + 2 * MOST_SCALED_CHANNELS];
    pixels[0] = match images.dtype {
        own if own == dtype => 0,
        DType::U8 => 2,
        _ => 1,
    };
    pixels[1] = u32::from(images.layout == ImageLayout::ChannelsFirst);
    pixels[2] = u32::from(!scales.is_empty());
    for (channel, &Scale { factor, shift }) in scales.iter().enumerate() {
        pixels[3 + channel] = (factor as f32).to_bits();
        pixels[3 + MOST_SCALED_CHANNELS + channel] = (shift as f32).to_bits();
    }
    Ok(pixels)
}

fn positions(problem: &Problem) -> usize {
    problem.extents[0] * problem.output_map().iter().product::<usize>()
}

/// The gradient of the input, in its layout and the weights' dtype.
pub(super) fn input_gradient(
    gpu: &'static Gpu,
    problem: &Problem,
    images: &Images,
    weights: &[Tensor],
    grad: &Tensor,
) -> Result<Tensor> {
    let plan = Plan::new(gpu, grad.dtype(), problem)?;
    let [batch, height, width, channels] = problem.extents;
    let shape = match images.layout {
        ImageLayout::ChannelsLast => problem.extents,
        ImageLayout::ChannelsFirst => [batch, channels, height, width],
    };
    let gradient = Tensor::empty_on(gpu, shape, plan.dtype)?;
    let turned = plan.turn(weights)?;
    let vectors = plan.dtype != DType::F32 && channels % 8 == 0 && plan.windows().all(|window| window.out % 8 == 0);
    let (instance, tile_columns) = match plan.dtype {
        DType::F32 => ("f32".into(), 32),
        dtype if vectors => (format!("{dtype}_vector"), 64),
        dtype => (format!("{dtype}_scalar"), 32),
    };
    let of_phase = batch * height.div_ceil(problem.stride) * width.div_ceil(problem.stride);
    let tiles = of_phase.div_ceil(TILE_ROWS) * channels.div_ceil(tile_columns);
    let geometry = Geometry::blocks(tiles * problem.stride * problem.stride, THREADS);
    let pixels = pixels(images, plan.dtype)?;
    let arguments = (gradient.address()?, grad.address()?, turned.address()?, plan.description, pixels);
    INPUT_GRADIENT.launch(gpu, &instance, geometry, arguments)?;
    Ok(gradient)
}

/// The gradients of the weights, then those of the biases.
pub(super) fn parameter_gradients(
    gpu: &'static Gpu,
    problem: &Problem,
    images: &Images,
    input: &Tensor,
    weights: &[Tensor],
    grad: &Tensor,
) -> Result<Vec<Tensor>> {
    let plan = Plan::new(gpu, grad.dtype(), problem)?;
    let input = &plan.plain(images, input)?;
    let tiling = WeightTiling::new(problem, plan.ordered_windows(), plan.dtype.size())?;
    let [of_weights, of_biases] = tiling.sums();
    let (parts, description) = (tiling.part_count(), tiling.description());
    let partials = Tensor::empty_on(gpu, [parts, of_weights + of_biases], DType::F32)?;
    let (sums, size) = (partials.address()?, of_weights as u64);
    let arguments = (sums, size, input.address()?, grad.address()?, plan.description, description, tiling.split());
    WEIGHT_GRADIENT.launch(gpu, plan.dtype.name(), tiling.geometry(), arguments)?;

    let empty = |shape: crate::tensor::Shape| Tensor::empty_on(gpu, shape, plan.dtype);
    let mut gradients = weights.iter().map(|weight| empty(weight.shape().clone())).collect::<Result<Vec<_>>>()?;
    let biases = plan.windows().map(|window| empty([window.out].into())).collect::<Result<Vec<_>>>()?;
    let (weights, of_biases) = (plan.per_kernel(&gradients)?, plan.per_kernel(&biases)?);
    let arguments = (weights, of_biases, sums, size, parts as u32, plan.description, description);
    ADD_PARTS.launch(gpu, plan.dtype.name(), plan.elementwise(1), arguments)?;
    gradients.extend(biases);
    Ok(gradients)
}
