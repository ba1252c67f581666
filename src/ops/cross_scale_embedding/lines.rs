//! Line by line in `f32`, for few input channels and few outputs: neighbouring outputs of a line lie side by side in a vector,
//! where a vector of output channels would stay half empty.
//!
//! The padded image is split into planes, one for every input channel and remainder of a column's division by the stride. So
//! what neighbouring outputs read for one tap is contiguous, and starts anywhere: a line of the result is the product of
//! the weights (out × depth) and as many such runs.

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
    /// Lines of an image.
    rows: usize,
    /// Elements of a plane's line.
    pitch: usize,
}

impl Planes {
    pub fn of<T: Float>(problem: &Problem, input: &[T]) -> Self {
        let [batch, height, width, channels] = problem.extents;
        let (border, stride, input) = (problem.padding(), problem.stride, bytemuck::cast_slice::<T, f32>(input));
        let rows = height + 2 * border;
        let pitch = problem.output_map()[1].next_multiple_of(LANES) + problem.largest().div_ceil(stride);
        let mut values = Buffer::recycled(batch * rows * stride * channels * pitch);
        parallel::pieces_mut(&mut values, stride * channels * pitch, |number, planes| {
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
        Planes { values, rows, pitch }
    }
}

/// A kernel's weights in the order (depth, out), and where each of the depth's runs starts in a line's planes.
pub(super) struct LineKernel {
    weight: Buffer<f32>,
    starts: Vec<usize>,
    out: usize,
}

impl LineKernel {
    pub fn new<T: Float>(problem: &Problem, kernel: Kernel, weight: &[T], planes: &Planes) -> Self {
        let (channels, stride, side) = (problem.extents[3], problem.stride, kernel.side);
        let weight: &[f32] = bytemuck::cast_slice(weight);
        let depth = side * side * channels;
        let inset = problem.padding() - (side - stride) / 2;
        let start = |at: usize| {
            let (r, column, channel) = (at / channels / side, at / channels % side + inset, at % channels);
            ((inset + r) * stride * channels + column % stride * channels + channel) * planes.pitch + column / stride
        };
        let element = |i: usize| {
            let (at, out) = (i / kernel.out, i % kernel.out);
            weight[(out * channels + at % channels) * side * side + at / channels]
        };
        let weight = Buffer::from_fn(depth * kernel.out, element);
        LineKernel { weight, starts: (0..depth).map(start).collect(), out: kernel.out }
    }

    /// Adds line `y` of an image's result to `output` (x, channels), from the kernel's `first` channel on.
    pub fn add<T: Float>(
        &self,
        problem: &Problem,
        planes: &Planes,
        [image, y]: [usize; 2],
        (output, first): (&mut [T], usize),
    ) {
        let (columns, channels) = (problem.output_map()[1], problem.out_channels());
        let line = (image * planes.rows + y * problem.stride) * problem.stride * problem.extents[3] * planes.pitch;
        let mut sums = Buffer::<f32>::recycled(self.out * PANEL);
        let output: &mut [f32] = bytemuck::cast_slice_mut(output);
        for x in (0..columns).step_by(PANEL) {
            let width = PANEL.min((columns - x).next_multiple_of(LANES));
            let sums = &mut sums[..self.out * width];
            sums.fill(0.0);
            for (starts, weight) in self.starts.chunks(DEPTH).zip(self.weight.chunks(DEPTH * self.out)) {
                let left = Strided { data: weight, stride: self.out, columns: self.out };
                let right = Strided { data: &planes.values[line + x..], stride: starts, columns: width };
                multiply_transposed(left, right, starts.len(), sums, &[]);
            }
            for (at, output) in output[x * channels..].chunks_exact_mut(channels).take(width).enumerate() {
                for (out, sums) in output[first..][..self.out].iter_mut().zip(sums.chunks_exact(width)) {
                    *out += sums[at];
                }
            }
        }
    }
}
