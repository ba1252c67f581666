//! Line by line in `f32`, for few input channels and few outputs: neighbouring outputs of a line lie side by side in a vector,
//! where a vector of output channels would stay half empty.
//!
//! The padded image is split into planes, one for every input channel and remainder of a column's division by the stride. So
//! what neighbouring outputs read for one tap is contiguous, and starts anywhere: a line of the result is the product of
//! the weights (out × depth) and as many such runs.
//!
//! A kernel whose lines make an even number of blocks of the stride, W₀ … Wₙ₋₁, takes its result in pairs of lines, with three
//! products in place of four (the filtering F(2, 2) of Winograd, "Arithmetic Complexity of Computations", 1980). With B the
//! input's blocks below each other, of which the first of both lines reads B₀ … Bₙ₋₁, and Dⱼ = Bⱼ − Bⱼ₊₁, the pair is
//!
//! - Σ (W₂ᵢ + W₂ᵢ₊₁) B₂ᵢ₊₁ + Σ W₂ᵢ D₂ᵢ
//! - Σ (W₂ᵢ + W₂ᵢ₊₁) B₂ᵢ₊₁ − Σ W₂ᵢ₊₁ D₂ᵢ₊₁

use super::cpu::{Kernel, Problem};
use crate::cpu::block_gemm::{LANES, PANEL, Strided, multiply_transposed};
use crate::cpu::{Float, parallel};
use crate::tensor::{Buffer, DType};

/// Products that are summed before they join a longer sum, which keeps errors small.
const DEPTH: usize = 192;

/// Whether lanes of outputs leave fewer of them empty than lanes of channels.
pub(super) fn pays<T: Float>(problem: &Problem, kernel: Kernel) -> bool {
    let columns = problem.output_map()[1];
    let filled = |len: usize| len as f64 / len.next_multiple_of(LANES).max(1) as f64;
    T::DTYPE == DType::F32 && kernel.out.is_multiple_of(4) && filled(columns) > 1.1 * filled(kernel.out)
}

/// Lines of the padded images, each split into planes (column mod stride, channel, column / stride).
pub(super) struct Planes {
    values: Buffer<f32>,
    /// Each line less the one a stride below it, which is zero outside of the image: for kernels that take lines in pairs.
    differences: Buffer<f32>,
    /// Lines of an image.
    rows: usize,
    /// Elements of a plane's line.
    pitch: usize,
}

impl Planes {
    /// The planes that `kernels` read.
    pub fn of<T: Float>(problem: &Problem, kernels: &[Kernel], input: &[T]) -> Self {
        let [batch, height, width, channels] = problem.extents;
        let (border, stride, input) = (problem.padding(), problem.stride, bytemuck::cast_slice::<T, f32>(input));
        let rows = height + 2 * border;
        let pitch = problem.output_map()[1].next_multiple_of(LANES) + problem.largest().div_ceil(stride);
        let line_len = stride * channels * pitch;
        let mut values = Buffer::recycled(batch * rows * line_len);
        parallel::pieces_mut(&mut values, line_len, |number, planes| {
            planes.fill(0.0);
            let (image, y) = (number / rows, number % rows);
            if !(border..border + height).contains(&y) {
                return;
            }
            let line = &input[(image * height + y - border) * width * channels..][..width * channels];
            for (plane, out) in planes.chunks_exact_mut(pitch).enumerate() {
                let (phase, channel) = (plane / channels, plane % channels);
                // Of the columns of this phase, the first one behind the border.
                let first = (border - phase.min(border)).div_ceil(stride);
                let start = first * stride + phase - border;
                let columns = line.iter().skip(start * channels + channel).step_by(stride * channels);
                out.iter_mut().skip(first).zip(columns).for_each(|(out, &value)| *out = value);
            }
        });
        let in_pairs = kernels.iter().any(|kernel| takes_pairs(kernel.side, stride));
        let mut differences = Buffer::recycled(if in_pairs { values.len() } else { 0 });
        parallel::pieces_mut(&mut differences, line_len, |number, out| {
            let line = &values[number * line_len..][..line_len];
            if number % rows + stride < rows {
                let below = &values[(number + stride) * line_len..][..line_len];
                out.iter_mut().zip(line.iter().zip(below)).for_each(|(out, (line, below))| *out = line - below);
            } else {
                out.copy_from_slice(line);
            }
        });
        Planes { values, differences, rows, pitch }
    }
}

/// Whether a kernel of this side takes lines of the result in pairs.
fn takes_pairs(side: usize, stride: usize) -> bool {
    side.is_multiple_of(2 * stride)
}

/// Weights in the order (depth, out), and where each of the depth's runs starts in a line's planes.
struct Product {
    weight: Buffer<f32>,
    starts: Vec<usize>,
}

impl Product {
    /// Adds the product with planes, from a line and a column on, to `sums` (out, width).
    fn add(&self, planes: &[f32], width: usize, sums: &mut [f32]) {
        let out = sums.len() / width;
        for (starts, weight) in self.starts.chunks(DEPTH).zip(self.weight.chunks(DEPTH * out)) {
            let left = Strided { data: weight, stride: out, columns: out };
            let right = Strided { data: planes, stride: starts, columns: width };
            multiply_transposed(left, right, starts.len(), sums, &[]);
        }
    }
}

/// The elements from `at` on. Images without channels have no planes.
fn from(planes: &[f32], at: usize) -> &[f32] {
    planes.get(at..).unwrap_or_default()
}

enum Products {
    /// Of each line by itself.
    Line(Product),
    /// Of two lines: what both have, and what joins the first and the second, which are products with differences.
    Pair { both: Product, own: [Product; 2] },
}

/// A kernel's weights as its lines read them.
pub(super) struct LineKernel {
    products: Products,
    out: usize,
}

impl LineKernel {
    pub fn new<T: Float>(problem: &Problem, kernel: Kernel, weight: &[T], planes: &Planes) -> Self {
        let (channels, stride, side) = (problem.extents[3], problem.stride, kernel.side);
        let weight: &[f32] = bytemuck::cast_slice(weight);
        let inset = problem.padding() - (side - stride) / 2;
        // Lines of the kernel, and what stands for the element of one of them at (line, column · channels + channel, out).
        let product = |lines: &[usize], element: &dyn Fn(usize, usize, usize) -> f32| {
            let start = |line: usize, at: usize| {
                let (column, channel) = (at / channels + inset, at % channels);
                let plane = column % stride * channels + channel;
                ((inset + line) * stride * channels + plane) * planes.pitch + column / stride
            };
            let runs = || lines.iter().flat_map(|&line| (0..side * channels).map(move |at| (line, at)));
            let starts: Vec<usize> = runs().map(|(line, at)| start(line, at)).collect();
            let mut weight = Buffer::recycled(starts.len() * kernel.out);
            for ((line, at), row) in runs().zip(weight.chunks_exact_mut(kernel.out)) {
                row.iter_mut().enumerate().for_each(|(out, weight)| *weight = element(line, at, out));
            }
            Product { weight, starts }
        };
        let element = |line: usize, at: usize, out: usize| {
            weight[((out * channels + at % channels) * side + line) * side + at / channels]
        };
        let products = if takes_pairs(side, stride) {
            let [even, odd] = [0, 1].map(|rest| (0..side).filter(|y| y / stride % 2 == rest).collect::<Vec<_>>());
            let both = |line: usize, at: usize, out: usize| element(line - stride, at, out) + element(line, at, out);
            let negative = |line: usize, at: usize, out: usize| -element(line, at, out);
            Products::Pair { both: product(&odd, &both), own: [product(&even, &element), product(&odd, &negative)] }
        } else {
            Products::Line(product(&(0..side).collect::<Vec<_>>(), &element))
        };
        LineKernel { products, out: kernel.out }
    }

    /// Adds one or two lines, from `y` on, of an image's result to `output` (y, x, channels), from the kernel's `first` channel
    /// on.
    pub fn add<T: Float>(
        &self,
        problem: &Problem,
        planes: &Planes,
        [image, y]: [usize; 2],
        (output, first): (&mut [T], usize),
    ) {
        let (columns, channels) = (problem.output_map()[1], problem.out_channels());
        let output: &mut [f32] = bytemuck::cast_slice_mut(output);
        let line =
            |y: usize| (image * planes.rows + y * problem.stride) * problem.stride * problem.extents[3] * planes.pitch;
        let mut buffer = Buffer::<f32>::recycled(2 * self.out * PANEL);
        for x in (0..columns).step_by(PANEL) {
            let width = PANEL.min((columns - x).next_multiple_of(LANES));
            let (sums, of_both) = buffer.split_at_mut(self.out * width);
            let of_both = &mut of_both[..self.out * width];
            if let Products::Pair { both, .. } = &self.products {
                of_both.fill(0.0);
                both.add(from(&planes.values, line(y) + x), width, of_both);
            }
            for (number, output) in output.chunks_exact_mut(columns * channels).enumerate() {
                match &self.products {
                    Products::Line(product) => {
                        sums.fill(0.0);
                        product.add(from(&planes.values, line(y + number) + x), width, sums);
                    }
                    Products::Pair { own, .. } => {
                        sums.copy_from_slice(of_both);
                        own[number].add(from(&planes.differences, line(y) + x), width, sums);
                    }
                }
                for (at, output) in output[x * channels..].chunks_exact_mut(channels).take(width).enumerate() {
                    for (out, sums) in output[first..][..self.out].iter_mut().zip(sums.chunks_exact(width)) {
                        *out += sums[at];
                    }
                }
            }
        }
    }
}
