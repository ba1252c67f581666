//! Two ways to the same result. With few input channels (the stem, 3) a row of a window is a short contiguous run, and
//! the windows of a row of outputs are one overlapping strided matrix: [`rows`] multiplies it in place, or, for kernels with
//! few outputs, planes of the image ([`lines`](super::lines)). With many channels (merging) the kernels are
//! convolutions side by side, [`direct`].

use super::rows;
use crate::cpu::{Float, parallel};
use crate::ops::Conv2dOptions;
use crate::ops::conv2d::Geometry;
use crate::ops::conv2d::direct::{self, Part};
use crate::tensor::{Buffer, Shape, Weight};

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Kernel {
    pub side: usize,
    pub out: usize,
}

#[derive(Clone)]
pub(super) struct Problem {
    /// batch, height, width, channels
    pub extents: [usize; 4],
    pub stride: usize,
    pub kernels: Vec<Kernel>,
}

pub(super) struct Gradients<T> {
    pub input: Option<Buffer<T>>,
    pub weights: Vec<Buffer<T>>,
}

impl Problem {
    /// Height and width of the result.
    pub fn output_map(&self) -> [usize; 2] {
        let [_, height, width, _] = self.extents;
        [height / self.stride, width / self.stride]
    }

    pub fn out_channels(&self) -> usize {
        self.kernels.iter().map(|kernel| kernel.out).sum()
    }

    pub fn output_shape(&self) -> Shape {
        let [rows, columns] = self.output_map();
        Shape::from([self.extents[0], rows, columns, self.out_channels()])
    }

    /// The side of the largest window.
    pub fn largest(&self) -> usize {
        self.kernels.iter().map(|kernel| kernel.side).max().unwrap_or(self.stride)
    }

    /// Padding before the map that the largest window needs.
    pub fn padding(&self) -> usize {
        (self.largest() - self.stride) / 2
    }

    /// First channel of each kernel in the result.
    pub fn first_channels(&self) -> Vec<usize> {
        let starts = self.kernels.iter().scan(0, |next, kernel| {
            *next += kernel.out;
            Some(*next - kernel.out)
        });
        starts.collect()
    }

    /// Every kernel as a convolution.
    fn convolutions(&self) -> Vec<Part> {
        let [batch, height, width, in_channels] = self.extents;
        let part = |(kernel, first): (&Kernel, usize)| {
            let padding = [(kernel.side - self.stride) / 2; 2];
            let options = Conv2dOptions { stride: [self.stride; 2], padding, ..Conv2dOptions::default() };
            let geometry = Geometry {
                batch,
                input: [height, width],
                output: self.output_map(),
                in_channels,
                out_channels: kernel.out,
                kernel: [kernel.side; 2],
                options,
            };
            Part { geometry, first }
        };
        self.kernels.iter().zip(self.first_channels()).map(part).collect()
    }

    pub fn prefers_rows(&self) -> bool {
        self.extents[3] <= 16
    }
}

pub(super) fn forward<T: Float>(
    problem: &Problem,
    input: &[T],
    weights: &[Weight<'_, T>],
    biases: &[&[T]],
) -> Buffer<T> {
    let (channels, bias) = (problem.out_channels(), biases.concat());
    if !problem.prefers_rows() {
        return direct::output(&problem.convolutions(), channels, input, weights, Some(&bias));
    }
    let mut output = Buffer::recycled(problem.output_shape().elements());
    parallel::pieces_mut(&mut output, channels * 64, |_, piece| {
        piece.chunks_mut(channels).for_each(|row| row.copy_from_slice(&bias));
    });
    let weights: Vec<&[T]> = weights.iter().map(|weight| weight.values).collect();
    rows::forward(problem, input, &weights, &mut output);
    output
}

pub(super) fn backward<T: Float>(
    problem: &Problem,
    input: &[T],
    weights: &[&[T]],
    grad: &[T],
    needs_input: bool,
) -> Gradients<T> {
    if problem.prefers_rows() {
        return rows::backward(problem, input, weights, grad, needs_input);
    }
    let (parts, channels) = (problem.convolutions(), problem.out_channels());
    Gradients {
        input: needs_input.then(|| direct::input_gradient(&parts, channels, grad, weights, None)),
        weights: parts.iter().map(|part| direct::weight_gradient(part, channels, input, grad)).collect(),
    }
}
