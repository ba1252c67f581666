//! Row by row, for few input channels.
//!
//! For one row of outputs and one row r of a kernel of side k, the inputs of output x are k · C contiguous elements that
//! start stride · C elements after those of output x − 1: an (outputs × k C) matrix with overlapping rows. Multiplied by
//! row r of the weights, (k C × O), and summed over r, it gives the outputs without a copy of any window.

use super::cpu::{Gradients, Kernel, Problem};
use super::lines::{self, LineKernel, Planes};
use crate::cpu::small_gemm::{Ahead, LANES, Left, Onto, multiply};
use crate::cpu::{Float, parallel};
use crate::tensor::Buffer;

/// The input with a border of zeros, so that no window leaves it.
struct Padded<T> {
    values: Buffer<T>,
    rows: usize,
    /// Elements of one row.
    row: usize,
}

fn pad<T: Float>(problem: &Problem, input: &[T]) -> Padded<T> {
    let [batch, height, width, channels] = problem.extents;
    let (border, row) = (problem.padding(), (width + 2 * problem.padding()) * channels);
    let rows = height + 2 * border;
    let mut values = Buffer::recycled(batch * rows * row);
    parallel::pieces_mut(&mut values, row, |number, out| {
        let (image, y) = (number / rows, number % rows);
        out.fill(T::ZERO);
        if (border..border + height).contains(&y) {
            let source = &input[(image * height + y - border) * width * channels..][..width * channels];
            out[border * channels..][..width * channels].copy_from_slice(source);
        }
    });
    Padded { values, rows, row }
}

impl<T: Float> Padded<T> {
    /// The windows' row `r` for output row `y`: element (output x, i) is at `x · stride · channels + i`.
    fn windows(&self, problem: &Problem, kernel: Kernel, image: usize, y: usize, r: usize) -> &[T] {
        let inset = problem.padding() - (kernel.side - problem.stride) / 2;
        let row = image * self.rows + y * problem.stride + inset + r;
        &self.values[row * self.row + inset * problem.extents[3]..(row + 1) * self.row]
    }
}

/// A kernel's weights as (r, column · channel, out), outs in whole vectors with zeros behind them.
fn pack<T: Float>(problem: &Problem, kernel: Kernel, weight: &[T]) -> Buffer<T> {
    let (channels, side, padded) = (problem.extents[3], kernel.side, kernel.out.next_multiple_of(LANES));
    let mut packed = Buffer::zeroed(side * side * channels * padded);
    for (tap, packed) in packed.chunks_exact_mut(padded).enumerate() {
        let (position, channel) = (tap / channels, tap % channels);
        for (out, packed) in packed[..kernel.out].iter_mut().enumerate() {
            *packed = weight[(out * channels + channel) * side * side + position];
        }
    }
    packed
}

/// Adds the convolutions to `output`, which holds the biases.
pub(super) fn forward<T: Float>(problem: &Problem, input: &[T], weights: &[&[T]], output: &mut [T]) {
    let [rows, columns] = problem.output_map();
    let out_channels = problem.out_channels();
    let by_lines = |kernel: &Kernel| lines::pays::<T>(problem, *kernel);
    let kernels: Vec<Kernel> = problem.kernels.iter().copied().filter(by_lines).collect();
    let planes = (!kernels.is_empty()).then(|| Planes::of(problem, &kernels, input));
    let padded = pad(problem, input);
    let ways: Vec<Way<T>> = problem
        .kernels
        .iter()
        .zip(weights)
        .map(|(&kernel, weight)| match &planes {
            Some(planes) if by_lines(&kernel) => Way::Lines(LineKernel::new(problem, kernel, weight, planes), planes),
            _ => Way::Windows(pack(problem, kernel, weight)),
        })
        .collect();
    let first_channels = problem.first_channels();
    let line_len = columns * out_channels;
    // Two lines of an image, or its last one: the image, the first line, the result.
    let mut pairs: Vec<([usize; 2], &mut [T])> = Vec::new();
    for (image, output) in output.chunks_mut((rows * line_len).max(1)).enumerate() {
        pairs.extend(output.chunks_mut(2 * line_len).enumerate().map(|(pair, output)| ([image, 2 * pair], output)));
    }
    parallel::pieces_mut(&mut pairs, 1, |_, pair| {
        let ([image, y], output) = &mut pair[0];
        for ((&kernel, way), &first) in problem.kernels.iter().zip(&ways).zip(&first_channels) {
            match way {
                Way::Lines(kernel, planes) => kernel.add(problem, planes, [*image, *y], (&mut *output, first)),
                Way::Windows(weight) => {
                    for (number, line) in output.chunks_mut(line_len).enumerate() {
                        add_windows(problem, &padded, (kernel, weight), [*image, *y + number], (line, first));
                    }
                }
            }
        }
    });
}

/// How the lines of a kernel's result are computed, with its weights in the order for that.
enum Way<'a, T> {
    Lines(LineKernel, &'a Planes),
    Windows(Buffer<T>),
}

/// Adds line `y` of an image's result to `output` (x, channels), from the kernel's `first` channel on.
fn add_windows<T: Float>(
    problem: &Problem,
    padded: &Padded<T>,
    (kernel, packed): (Kernel, &[T]),
    [image, y]: [usize; 2],
    (output, first): (&mut [T], usize),
) {
    let (channels, columns) = (problem.extents[3], problem.output_map()[1]);
    let (depth, width) = (kernel.side * channels, kernel.out.next_multiple_of(LANES));
    let mut sums = Buffer::zeroed(columns * width);
    for (r, weight) in packed.chunks_exact(depth * width).enumerate() {
        let windows = Left::rows(padded.windows(problem, kernel, image, y, r), problem.stride * channels);
        multiply(windows, [columns, depth, width], weight, Onto::Itself, &mut sums, Ahead::default());
    }
    for (output, sums) in output.chunks_exact_mut(problem.out_channels()).zip(sums.chunks_exact(width)) {
        output[first..][..kernel.out].iter_mut().zip(sums).for_each(|(out, &sum)| *out += sum);
    }
}

pub(super) fn backward<T: Float>(
    problem: &Problem,
    input: &[T],
    weights: &[&[T]],
    grad: &[T],
    needs_input: bool,
) -> Gradients<T> {
    let padded = pad(problem, input);
    Gradients {
        weights: problem
            .kernels
            .iter()
            .zip(problem.first_channels())
            .map(|(&kernel, first)| weight_gradient(problem, &padded, kernel, first, grad))
            .collect(),
        input: needs_input.then(|| input_gradient(problem, weights, grad)),
    }
}

/// A kernel's channels of one row of output gradients, in whole vectors.
fn grad_row<T: Float>(problem: &Problem, kernel: Kernel, first: usize, row: usize, grad: &[T], out: &mut [T]) {
    let (columns, channels) = (problem.output_map()[1], problem.out_channels());
    let grad = grad[row * columns * channels..].chunks_exact(channels);
    for (out, grad) in out.chunks_exact_mut(kernel.out.next_multiple_of(LANES)).zip(grad) {
        out[..kernel.out].copy_from_slice(&grad[first..][..kernel.out]);
        out[kernel.out..].fill(T::ZERO);
    }
}

fn weight_gradient<T: Float>(
    problem: &Problem,
    padded: &Padded<T>,
    kernel: Kernel,
    first: usize,
    grad: &[T],
) -> Buffer<T> {
    /// Each partial sum is as large as the weights, so there are few of them.
    const PARTS: usize = 16;
    let [batch, _, _, channels] = problem.extents;
    let [rows, columns] = problem.output_map();
    let (depth, width) = (kernel.side * channels, kernel.out.next_multiple_of(LANES));
    let grain = (batch * rows).div_ceil(PARTS);
    let packed = parallel::accumulate(batch * rows, grain, kernel.side * depth * width, |range, sums| {
        let mut row_grad = Buffer::recycled(columns * width);
        for row in range {
            grad_row(problem, kernel, first, row, grad, &mut row_grad);
            for (r, sums) in sums.chunks_exact_mut(depth * width).enumerate() {
                let windows = padded.windows(problem, kernel, row / rows, row % rows, r);
                let transposed = Left::transposed(windows, problem.stride * channels);
                multiply(transposed, [depth, columns, width], &row_grad, Onto::Itself, sums, Ahead::default());
            }
        }
    });
    let taps = kernel.side * kernel.side;
    Buffer::from_fn(kernel.out * channels * taps, |i| {
        let (out, channel, tap) = (i / (channels * taps), i / taps % channels, i % taps);
        packed[(tap * channels + channel) * width + out]
    })
}

fn input_gradient<T: Float>(problem: &Problem, weights: &[&[T]], grad: &[T]) -> Buffer<T> {
    let [batch, height, width, channels] = problem.extents;
    let [rows, columns] = problem.output_map();
    let border = problem.padding();
    let row_len = (width + 2 * border) * channels;
    // Weights as (r, out, column · channel), the transposes of the forward's.
    let transposed = |kernel: Kernel, weight: &[T]| -> Buffer<T> {
        let (depth, padded_depth) = (kernel.side * channels, (kernel.side * channels).next_multiple_of(LANES));
        let padded_out = kernel.out.next_multiple_of(LANES);
        let packed = pack(problem, kernel, weight);
        Buffer::from_fn(kernel.side * padded_out * padded_depth, |i| {
            let (r, out, at) = (i / (padded_out * padded_depth), i / padded_depth % padded_out, i % padded_depth);
            if at < depth { packed[(r * depth + at) * padded_out + out] } else { T::ZERO }
        })
    };
    let transposed: Vec<Buffer<T>> =
        problem.kernels.iter().zip(weights).map(|(&kernel, weight)| transposed(kernel, weight)).collect();
    let mut gradient = Buffer::recycled(batch * height * width * channels);
    parallel::pieces_mut(&mut gradient, height * width * channels, |image, gradient| {
        let mut padded = Buffer::<T>::zeroed((height + 2 * border) * row_len);
        for ((&kernel, weight), first) in problem.kernels.iter().zip(&transposed).zip(problem.first_channels()) {
            let (depth, out) = (kernel.side * channels, kernel.out.next_multiple_of(LANES));
            let (padded_depth, inset) = (depth.next_multiple_of(LANES), border - (kernel.side - problem.stride) / 2);
            let mut row_grad = Buffer::recycled(columns * out);
            let mut windows = Buffer::recycled(columns * padded_depth);
            for y in 0..rows {
                grad_row(problem, kernel, first, image * rows + y, grad, &mut row_grad);
                for (r, weight) in weight.chunks_exact(out * padded_depth).enumerate() {
                    let left = Left::rows(&row_grad, out);
                    multiply(left, [columns, out, padded_depth], weight, Onto::Nothing, &mut windows, Ahead::default());
                    let start = (y * problem.stride + inset + r) * row_len + inset * channels;
                    for (x, window) in windows.chunks_exact(padded_depth).enumerate() {
                        let sums = &mut padded[start + x * problem.stride * channels..][..depth];
                        sums.iter_mut().zip(window).for_each(|(sum, &value)| *sum += value);
                    }
                }
            }
        }
        for (y, gradient) in gradient.chunks_exact_mut(width * channels).enumerate() {
            gradient.copy_from_slice(&padded[(y + border) * row_len + border * channels..][..width * channels]);
        }
    });
    gradient
}
