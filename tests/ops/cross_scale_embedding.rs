//! Several convolutions of one stride, side by side.

use std::fmt;

use gridgrad::ops::{Conv2dOptions, concat, conv2d, cross_scale_embedding};
use gridgrad::{DType, Result, Tensor};

use crate::harness::{Derivatives, OpCase, ROUNDING, Tolerance, Work, check, randn, test_device};

#[derive(Debug)]
struct Embedding {
    input: [usize; 4],
    /// Side and output channels.
    kernels: Vec<[usize; 2]>,
    stride: usize,
}

impl fmt::Display for Embedding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

impl OpCase for Embedding {
    fn inputs(&self) -> Vec<Tensor> {
        let weight =
            |(number, &[side, out]): (usize, &[usize; 2])| randn(&[out, self.input[3], side, side], 1 + number as u64);
        let bias = |(number, &[_, out]): (usize, &[usize; 2])| randn(&[out], 50 + number as u64);
        let weights = self.kernels.iter().enumerate().map(weight);
        std::iter::once(randn(&self.input, 0)).chain(weights).chain(self.kernels.iter().enumerate().map(bias)).collect()
    }

    fn run(&self, inputs: &[Tensor]) -> Result<Tensor> {
        let (weights, biases) = inputs[1..].split_at(self.kernels.len());
        cross_scale_embedding(&inputs[0], weights, biases, self.stride)
    }

    fn reference(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        let [batch, height, width, channels] = self.input;
        let mut output = Vec::new();
        for image in 0..batch {
            for y in 0..height / self.stride {
                for x in 0..width / self.stride {
                    for (number, &[side, out]) in self.kernels.iter().enumerate() {
                        let (weight, bias) = (&inputs[1 + number], &inputs[1 + self.kernels.len() + number]);
                        let padding = (side - self.stride) / 2;
                        for o in 0..out {
                            let mut sum = bias[o];
                            for r in 0..side {
                                for s in 0..side {
                                    let (row, column) = (y * self.stride + r, x * self.stride + s);
                                    if row < padding || column < padding {
                                        continue;
                                    }
                                    let (row, column) = (row - padding, column - padding);
                                    if row >= height || column >= width {
                                        continue;
                                    }
                                    for c in 0..channels {
                                        sum += inputs[0][((image * height + row) * width + column) * channels + c]
                                            * weight[((o * channels + c) * side + r) * side + s];
                                    }
                                }
                            }
                            output.push(sum);
                        }
                    }
                }
            }
        }
        output
    }

    fn work(&self) -> Work {
        let [batch, height, width, channels] = self.input.map(|extent| extent as u64);
        let outputs = batch * (height / self.stride as u64) * (width / self.stride as u64);
        let weights: u64 = self.kernels.iter().map(|&[side, out]| (side * side * out) as u64 * channels).sum();
        let out: u64 = self.kernels.iter().map(|kernel| kernel[1] as u64).sum();
        Work { bytes: 4 * (batch * height * width * channels + weights + outputs * out), flops: 2 * outputs * weights }
    }

    fn tolerance(&self) -> Tolerance {
        let largest = self.kernels.iter().map(|kernel| kernel[0]).max().unwrap_or(1);
        let growth = ((largest * largest * self.input[3]) as f64).sqrt();
        Tolerance { f64: growth * ROUNDING.f64, f32: growth * ROUNDING.f32, gradient: growth * ROUNDING.gradient }
    }

    fn composed(&self, inputs: &[Tensor]) -> Option<Result<Tensor>> {
        let (weights, biases) = inputs[1..].split_at(self.kernels.len());
        let convolve = |((weight, bias), &[side, _]): ((&Tensor, &Tensor), &[usize; 2])| {
            let padding = [(side - self.stride) / 2; 2];
            let options = Conv2dOptions { stride: [self.stride; 2], padding, ..Conv2dOptions::default() };
            conv2d(&inputs[0], weight, Some(bias), options)
        };
        let parts: Result<Vec<Tensor>> = weights.iter().zip(biases).zip(&self.kernels).map(convolve).collect();
        Some(parts.and_then(|parts| concat(&parts.iter().collect::<Vec<_>>(), -1)))
    }

    fn derivatives(&self) -> Derivatives {
        Derivatives::First
    }
}

fn cases() -> Vec<Box<dyn OpCase>> {
    let case = |input, kernels: &[[usize; 2]], stride| {
        Box::new(Embedding { input, kernels: kernels.to_vec(), stride }) as Box<dyn OpCase>
    };
    vec![
        case([1, 4, 4, 3], &[[4, 2]], 4),
        case([2, 13, 9, 3], &[[4, 4], [8, 2], [16, 1], [32, 1]], 4),
        case([1, 1, 1, 1], &[[1, 1], [3, 2]], 1),
        case([1, 7, 5, 2], &[[2, 17], [4, 3]], 2),
        case([2, 6, 7, 17], &[[2, 5], [4, 5]], 2),
        case([3, 3, 2, 20], &[[4, 3], [2, 4], [6, 1]], 2),
        case([1, 5, 5, 18], &[[1, 2]], 1),
        case([0, 8, 8, 3], &[[4, 2], [8, 2]], 4),
        // Two channels at once, and more of the result than a tile has columns.
        case([1, 9, 10, 3], &[[2, 34], [4, 2]], 2),
        // Two channels at once in the result, but not in the windows.
        case([1, 9, 9, 5], &[[3, 4], [5, 2]], 3),
        // Eight at once, one tile and a bit, sums of more terms than a tile takes.
        case([1, 24, 22, 8], &[[2, 72], [4, 8]], 2),
        // Eight at once in the windows, but not in the result.
        case([2, 5, 6, 16], &[[4, 7], [2, 1]], 2),
        // One channel; the position after a full tile.
        case([1, 43, 3, 1], &[[1, 3], [3, 1]], 1),
        // More positions than a part of the weight gradient has.
        case([1, 24, 23, 1], &[[1, 2]], 1),
    ]
}

/// The embeddings of CrossFormer-S at batch 8.
pub fn benchmarks() -> Vec<Box<dyn OpCase>> {
    let case = |side, channels, kernels: &[[usize; 2]], stride| {
        let case = Embedding { input: [8, side, side, channels], kernels: kernels.to_vec(), stride };
        Box::new(case) as Box<dyn OpCase>
    };
    vec![
        case(224, 3, &[[4, 48], [8, 24], [16, 12], [32, 12]], 4),
        case(56, 96, &[[2, 96], [4, 96]], 2),
        case(14, 384, &[[2, 384], [4, 384]], 2),
    ]
}

#[test]
fn embeddings_agree_with_their_definition() {
    check(&cases());
}

#[test]
fn bad_arguments_are_errors() {
    let run = |input: &[usize], weight: &[usize], bias: usize, stride: usize| {
        let result = cross_scale_embedding(&randn(input, 0), &[randn(weight, 1)], &[randn(&[bias], 2)], stride);
        result.unwrap_err().to_string()
    };
    assert!(run(&[1, 3, 8, 3], &[2, 3, 4, 4], 2, 4).contains("no window of stride 4"));
    assert!(run(&[1, 8, 8, 3], &[2, 3, 4, 4], 2, 0).contains("no window of stride 0"));
    assert!(run(&[1, 8, 8, 3], &[2, 3, 5, 5], 2, 4).contains("kernel 5 for stride 4"));
    assert!(run(&[1, 8, 8, 3], &[2, 3, 2, 2], 2, 4).contains("kernel 2 for stride 4"));
    assert!(run(&[1, 8, 8, 3], &[2, 4, 4, 4], 2, 4).contains("for 3 channels"));
    assert!(run(&[1, 8, 8, 3], &[2, 3, 4, 4], 3, 4).contains("bias (3)"));
    assert!(cross_scale_embedding(&randn(&[1, 8, 8, 3], 0), &[], &[], 4).is_err());
}

#[test]
fn what_a_device_cannot_do_is_an_error() {
    let Some(device) = test_device() else { return };
    let on_device = |shape: &[usize]| randn(shape, 0).cast(DType::F32).unwrap().to_device(device).unwrap();
    let input = on_device(&[1, 2, 2, 1]);
    let run = |count: usize| {
        let (weights, biases) = (vec![on_device(&[1, 1, 2, 2]); count], vec![on_device(&[1]); count]);
        cross_scale_embedding(&input, &weights, &biases, 2)
    };
    assert_eq!(run(16).unwrap().shape().to_vec(), [1, 1, 1, 16]);
    assert!(run(17).unwrap_err().to_string().contains("17 kernels; expected at most 16 on a GPU"));
    let host = randn(&[1], 0).cast(DType::F32).unwrap();
    let mixed = cross_scale_embedding(&input, &[on_device(&[1, 1, 2, 2])], &[host], 2);
    assert!(mixed.unwrap_err().to_string().contains("to_device"));
}
