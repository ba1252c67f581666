//! Convolutions and transposed convolutions.

use std::fmt;

use gridgrad::autograd::{GradOptions, grad};
use gridgrad::ops::{Conv2dOptions, conv_transpose2d, conv2d};
use gridgrad::{DType, Result, Tensor};

use crate::harness::{OpCase, ROUNDING, Tolerance, Work, check, check_on_device, check_on_host, randn, test_device};

/// Sums of `terms` products of normal numbers: the error grows with the root of their number.
fn sum_tolerance(terms: usize) -> Tolerance {
    let growth = (terms as f64).sqrt().max(1.0);
    Tolerance { f64: ROUNDING.f64 * growth, f32: ROUNDING.f32 * growth, ..ROUNDING }
}

const PLAIN: Conv2dOptions = Conv2dOptions { stride: [1; 2], padding: [0; 2], dilation: [1; 2], groups: 1 };

#[derive(Debug)]
struct Conv2d {
    /// batch, height, width, channels
    input: [usize; 4],
    out_channels: usize,
    kernel: [usize; 2],
    bias: bool,
    options: Conv2dOptions,
}

impl fmt::Display for Conv2d {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

impl Conv2d {
    fn output(&self) -> [usize; 2] {
        let Conv2dOptions { stride, padding, dilation, .. } = self.options;
        [0, 1].map(|axis| {
            let window = dilation[axis] * (self.kernel[axis] - 1) + 1;
            (self.input[axis + 1] + 2 * padding[axis] - window) / stride[axis] + 1
        })
    }

    fn terms(&self) -> usize {
        self.kernel[0] * self.kernel[1] * self.input[3] / self.options.groups
    }
}

impl OpCase for Conv2d {
    fn inputs(&self) -> Vec<Tensor> {
        let weight = [self.out_channels, self.input[3] / self.options.groups, self.kernel[0], self.kernel[1]];
        let mut inputs = vec![randn(&self.input, 0), randn(&weight, 1)];
        if self.bias {
            inputs.push(randn(&[self.out_channels], 2));
        }
        inputs
    }

    fn run(&self, inputs: &[Tensor]) -> Result<Tensor> {
        conv2d(&inputs[0], &inputs[1], inputs.get(2), self.options)
    }

    fn reference(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        let Conv2dOptions { stride, padding, dilation, groups } = self.options;
        let ([batch, height, width, channels], [kh, kw]) = (self.input, self.kernel);
        let (group_in, group_out) = (channels / groups, self.out_channels / groups);
        let [out_height, out_width] = self.output();
        let mut output = Vec::new();
        for b in 0..batch {
            for (y, x) in (0..out_height).flat_map(|y| (0..out_width).map(move |x| (y, x))) {
                for o in 0..self.out_channels {
                    let mut sum = if self.bias { inputs[2][o] } else { 0.0 };
                    for (i, j) in (0..kh).flat_map(|i| (0..kw).map(move |j| (i, j))) {
                        let (row, column) = (y * stride[0] + i * dilation[0], x * stride[1] + j * dilation[1]);
                        if row < padding[0] || column < padding[1] {
                            continue;
                        }
                        let (row, column) = (row - padding[0], column - padding[1]);
                        if row >= height || column >= width {
                            continue;
                        }
                        for c in 0..group_in {
                            let channel = o / group_out * group_in + c;
                            let value = inputs[0][((b * height + row) * width + column) * channels + channel];
                            sum += value * inputs[1][((o * group_in + c) * kh + i) * kw + j];
                        }
                    }
                    output.push(sum);
                }
            }
        }
        output
    }

    fn work(&self) -> Work {
        let [out_height, out_width] = self.output();
        let outputs = self.input[0] * out_height * out_width * self.out_channels;
        let values = self.input.iter().product::<usize>() + self.out_channels * self.terms() + outputs;
        Work { bytes: 4 * values as u64, flops: 2 * (outputs * self.terms()) as u64 }
    }

    fn tolerance(&self) -> Tolerance {
        sum_tolerance(self.terms())
    }
}

#[derive(Debug)]
struct ConvTranspose2d {
    /// batch, height, width, channels
    input: [usize; 4],
    out_channels: usize,
    kernel: [usize; 2],
    options: Conv2dOptions,
    output_padding: [usize; 2],
}

impl fmt::Display for ConvTranspose2d {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

impl OpCase for ConvTranspose2d {
    fn inputs(&self) -> Vec<Tensor> {
        let weight = [self.input[3], self.out_channels / self.options.groups, self.kernel[0], self.kernel[1]];
        vec![randn(&self.input, 0), randn(&weight, 1), randn(&[self.out_channels], 2)]
    }

    fn run(&self, inputs: &[Tensor]) -> Result<Tensor> {
        conv_transpose2d(&inputs[0], &inputs[1], Some(&inputs[2]), self.options, self.output_padding)
    }

    /// Every input value paints its kernel into the output.
    fn reference(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        let Conv2dOptions { stride, padding, dilation, groups } = self.options;
        let ([batch, height, width, channels], [kh, kw]) = (self.input, self.kernel);
        let (group_in, group_out) = (channels / groups, self.out_channels / groups);
        let extent = |axis: usize| {
            (self.input[axis + 1] - 1) * stride[axis]
                + dilation[axis] * (self.kernel[axis] - 1)
                + 1
                + self.output_padding[axis]
                - 2 * padding[axis]
        };
        let (out_height, out_width) = (extent(0), extent(1));
        let mut output: Vec<f64> =
            (0..batch * out_height * out_width * self.out_channels).map(|i| inputs[2][i % self.out_channels]).collect();
        for at in 0..batch * height * width * channels {
            let (channel, x, y) = (at % channels, at / channels % width, at / channels / width % height);
            let b = at / channels / width / height;
            for (i, j) in (0..kh).flat_map(|i| (0..kw).map(move |j| (i, j))) {
                let row = (y * stride[0] + i * dilation[0]).checked_sub(padding[0]).filter(|&row| row < out_height);
                let column = (x * stride[1] + j * dilation[1]).checked_sub(padding[1]).filter(|&c| c < out_width);
                let (Some(row), Some(column)) = (row, column) else { continue };
                for o in 0..group_out {
                    let weight = inputs[1][((channel * group_out + o) * kh + i) * kw + j];
                    let feature = channel / group_in * group_out + o;
                    output[((b * out_height + row) * out_width + column) * self.out_channels + feature] +=
                        inputs[0][at] * weight;
                }
            }
        }
        output
    }

    fn work(&self) -> Work {
        let inputs: usize = self.input.iter().product();
        let terms = self.kernel[0] * self.kernel[1] * self.out_channels / self.options.groups;
        let area: usize = self.options.stride.iter().product::<usize>() * self.out_channels;
        let outputs = inputs / self.input[3].max(1) * area;
        Work { bytes: 4 * (inputs + outputs + terms * self.input[3]) as u64, flops: 2 * (inputs * terms) as u64 }
    }

    fn tolerance(&self) -> Tolerance {
        sum_tolerance(self.kernel[0] * self.kernel[1] * self.input[3])
    }
}

fn conv(input: [usize; 4], out_channels: usize, kernel: [usize; 2], options: Conv2dOptions) -> Box<dyn OpCase> {
    Box::new(Conv2d { input, out_channels, kernel, bias: true, options })
}

#[test]
fn paddings_and_strides_beyond_memory_cost_nothing() -> Result<()> {
    const FAR: usize = 1 << 40;
    for channels in [16, 3] {
        let input = randn(&[1, 3, 3, 2], 1).cast(DType::F32)?;
        let weight = randn(&[channels, 2, 2, 2], 2).cast(DType::F32)?;
        let options = Conv2dOptions { stride: [FAR; 2], padding: [FAR; 2], ..PLAIN };
        let far = conv2d(&input, &weight, None, options)?;
        assert_eq!(far.shape().to_vec(), [1, 3, 3, channels]);
        // The middle window alone lies on the map.
        let whole = conv2d(&input, &weight, None, PLAIN)?;
        let (far, whole) = (far.to_vec::<f32>()?, whole.to_vec::<f32>()?);
        for (position, values) in far.chunks(channels).enumerate() {
            for (value, first) in values.iter().zip(&whole) {
                let expected = if position == 4 { *first } else { 0.0 };
                assert!((value - expected).abs() < 1e-5, "{channels} channels: {value} at {position}, not {expected}");
            }
        }
    }
    Ok(())
}

fn cases() -> Vec<Box<dyn OpCase>> {
    let mut cases = vec![
        // Maps of one position, pointwise convolutions, and pointwise ones that are not: padded, strided, grouped.
        conv([1, 1, 1, 1], 1, [1, 1], PLAIN),
        conv([2, 5, 7, 3], 4, [1, 1], PLAIN),
        conv([2, 5, 7, 3], 4, [1, 1], Conv2dOptions { padding: [1, 0], ..PLAIN }),
        conv([2, 7, 6, 5], 3, [1, 1], Conv2dOptions { stride: [2, 3], ..PLAIN }),
        // Primes, asymmetrical kernels and paddings.
        conv([1, 7, 11, 3], 5, [3, 3], Conv2dOptions { padding: [1, 1], ..PLAIN }),
        conv([2, 11, 5, 2], 3, [5, 1], Conv2dOptions { padding: [2, 0], ..PLAIN }),
        conv([1, 5, 13, 2], 3, [1, 4], Conv2dOptions { padding: [0, 3], ..PLAIN }),
        conv([1, 5, 4, 2], 3, [2, 3], Conv2dOptions { stride: [2, 1], padding: [1, 2], ..PLAIN }),
        // Kernels larger than the map; padding beyond the kernel; strides beyond the kernel.
        conv([2, 2, 3, 2], 3, [5, 4], Conv2dOptions { padding: [2, 1], ..PLAIN }),
        conv([1, 3, 2, 2], 2, [2, 2], Conv2dOptions { padding: [3, 4], ..PLAIN }),
        conv([1, 11, 9, 2], 3, [2, 1], Conv2dOptions { stride: [4, 3], ..PLAIN }),
        conv([1, 11, 9, 2], 3, [2, 2], Conv2dOptions { stride: [3, 5], padding: [1, 2], ..PLAIN }),
        // Strides that divide the kernel and strides that do not; input positions that no window reaches.
        conv([2, 8, 12, 3], 5, [4, 4], Conv2dOptions { stride: [4, 4], ..PLAIN }),
        conv([1, 16, 16, 3], 6, [8, 8], Conv2dOptions { stride: [4, 4], padding: [2, 2], ..PLAIN }),
        conv([2, 9, 8, 4], 3, [3, 3], Conv2dOptions { stride: [2, 2], padding: [1, 1], ..PLAIN }),
        conv([1, 10, 11, 2], 3, [3, 3], Conv2dOptions { stride: [4, 4], ..PLAIN }),
        // Dilation, alone, with stride, with groups.
        conv([1, 9, 9, 2], 3, [3, 3], Conv2dOptions { dilation: [2, 3], padding: [2, 3], ..PLAIN }),
        conv([1, 11, 10, 2], 4, [3, 2], Conv2dOptions { dilation: [2, 3], stride: [2, 2], padding: [1, 1], groups: 2 }),
        conv([1, 13, 12, 1], 2, [3, 3], Conv2dOptions { dilation: [3, 2], stride: [2, 3], ..PLAIN }),
        // Groups, and depthwise in the widths of its vector blocks.
        conv([2, 5, 6, 6], 9, [3, 2], Conv2dOptions { groups: 3, padding: [1, 1], ..PLAIN }),
        conv([1, 5, 5, 4], 8, [3, 3], Conv2dOptions { groups: 4, padding: [1, 1], ..PLAIN }),
        conv([2, 6, 7, 41], 41, [3, 3], Conv2dOptions { groups: 41, padding: [1, 1], ..PLAIN }),
        conv([1, 9, 8, 9], 9, [3, 4], Conv2dOptions { groups: 9, stride: [2, 3], padding: [2, 1], dilation: [2, 1] }),
        // Maps of padding alone; no images, and enough positions for several tiles and parts.
        conv([1, 0, 3, 2], 3, [2, 3], Conv2dOptions { padding: [1, 1], ..PLAIN }),
        conv([2, 3, 0, 17], 17, [1, 1], Conv2dOptions { padding: [0, 1], ..PLAIN }),
        conv([0, 5, 5, 3], 4, [3, 3], PLAIN),
        conv([0, 5, 5, 3], 3, [3, 3], Conv2dOptions { groups: 3, ..PLAIN }),
        conv([3, 23, 19, 5], 7, [3, 3], Conv2dOptions { padding: [1, 1], ..PLAIN }),
        conv([3, 29, 31, 3], 8, [4, 4], Conv2dOptions { stride: [2, 2], padding: [1, 1], ..PLAIN }),
        // Few channels, in pieces that cut images.
        conv([1, 37, 6, 2], 3, [2, 3], Conv2dOptions { padding: [1, 0], stride: [3, 1], ..PLAIN }),
        conv([17, 3, 4, 4], 12, [2, 2], Conv2dOptions { dilation: [1, 2], groups: 2, padding: [0, 2], ..PLAIN }),
        // Few channels into whole vectors of outputs, read from padded lines, overlapping or not, of padding alone, and where
        // tiles begin and end within lines; from patches where strides leave gaps, and with dilation.
        conv([2, 4, 5, 3], 16, [3, 3], Conv2dOptions { padding: [1, 1], ..PLAIN }),
        conv([2, 11, 7, 2], 16, [3, 2], Conv2dOptions { stride: [3, 2], padding: [2, 1], ..PLAIN }),
        conv([2, 11, 7, 2], 16, [3, 2], Conv2dOptions { stride: [4, 3], padding: [2, 1], ..PLAIN }),
        conv([1, 7, 8, 1], 32, [3, 2], Conv2dOptions { dilation: [2, 3], padding: [2, 3], ..PLAIN }),
        conv([1, 0, 3, 2], 16, [2, 3], Conv2dOptions { padding: [1, 1], ..PLAIN }),
        conv([3, 19, 13, 1], 16, [2, 3], Conv2dOptions { padding: [0, 2], ..PLAIN }),
    ];
    cases.push(Box::new(Conv2d { input: [2, 4, 5, 3], out_channels: 2, kernel: [3, 3], bias: false, options: PLAIN }));
    let transposed = |input, out_channels, kernel, options, output_padding| {
        Box::new(ConvTranspose2d { input, out_channels, kernel, options, output_padding }) as Box<dyn OpCase>
    };
    cases.extend([
        transposed([1, 1, 1, 1], 1, [1, 1], PLAIN, [0, 0]),
        transposed([2, 3, 4, 5], 3, [1, 1], PLAIN, [0, 0]),
        transposed([1, 4, 5, 3], 2, [3, 3], Conv2dOptions { padding: [1, 1], ..PLAIN }, [0, 0]),
        transposed([2, 3, 5, 4], 3, [4, 4], Conv2dOptions { stride: [2, 2], padding: [1, 1], ..PLAIN }, [0, 0]),
        transposed([1, 4, 3, 2], 3, [3, 2], Conv2dOptions { stride: [2, 3], padding: [1, 0], ..PLAIN }, [1, 2]),
        transposed([1, 3, 3, 4], 6, [3, 3], Conv2dOptions { dilation: [2, 3], groups: 2, ..PLAIN }, [1, 2]),
        transposed([1, 3, 4, 5], 5, [3, 3], Conv2dOptions { stride: [2, 2], groups: 5, ..PLAIN }, [1, 1]),
        transposed([0, 3, 4, 5], 2, [3, 3], PLAIN, [0, 0]),
    ]);
    cases
}

/// The layers that models spend their time in.
pub fn benchmarks() -> Vec<Box<dyn OpCase>> {
    let padded = Conv2dOptions { padding: [1; 2], ..PLAIN };
    vec![
        // CrossFormer's cross-scale embedding at batch 8, and the one before its second stage.
        conv([8, 224, 224, 3], 48, [4, 4], Conv2dOptions { stride: [4; 2], ..PLAIN }),
        conv([8, 224, 224, 3], 12, [32, 32], Conv2dOptions { stride: [4; 2], padding: [14; 2], ..PLAIN }),
        conv([8, 56, 56, 96], 96, [4, 4], Conv2dOptions { stride: [2; 2], padding: [1; 2], ..PLAIN }),
        // ResNet-18 for CIFAR at batch 128: stem, first and last stage, a halving.
        conv([128, 32, 32, 3], 64, [3, 3], padded),
        conv([128, 32, 32, 64], 64, [3, 3], padded),
        conv([128, 4, 4, 512], 512, [3, 3], padded),
        conv([128, 32, 32, 64], 128, [3, 3], Conv2dOptions { stride: [2; 2], ..padded }),
        // Depthwise, as dynamic position biases and mobile networks use it.
        conv([8, 56, 56, 96], 96, [3, 3], Conv2dOptions { groups: 96, ..padded }),
        Box::new(ConvTranspose2d {
            input: [32, 16, 16, 128],
            out_channels: 64,
            kernel: [4, 4],
            options: Conv2dOptions { stride: [2; 2], ..padded },
            output_padding: [0; 2],
        }),
    ]
}

#[test]
fn convolutions_agree_with_their_definition() {
    check(&cases());
}

/// More taps times channels than one panel of the processor holds, of few channels and of many.
fn panels() -> Vec<Box<dyn OpCase>> {
    vec![
        conv([3, 24, 5, 2], 5, [3, 400], Conv2dOptions { padding: [1, 199], stride: [2, 1], ..PLAIN }),
        conv([1, 4, 5, 400], 6, [3, 3], Conv2dOptions { padding: [1, 1], ..PLAIN }),
    ]
}

#[test]
fn convolutions_of_many_terms_agree_with_their_definition() {
    panels().iter().for_each(|case| check_on_host(case.as_ref()));
}

/// Where tiles of the kernels (64 or 128 by 64 or 128 sums, 16 or 32 terms, 4 or 8 channels of a copy) begin and end.
fn edges() -> Vec<Box<dyn OpCase>> {
    let padded = Conv2dOptions { padding: [1; 2], ..PLAIN };
    let depthwise = |groups| Conv2dOptions { groups, ..padded };
    vec![
        // One row below a tile, a tile, one row more; columns and terms likewise; channels in whole copies and not.
        conv([1, 1, 125, 8], 63, [1, 1], Conv2dOptions { padding: [0, 1], ..PLAIN }),
        conv([2, 8, 6, 16], 64, [1, 1], Conv2dOptions { padding: [0, 1], ..PLAIN }),
        conv([1, 3, 41, 31], 65, [1, 1], Conv2dOptions { padding: [0, 1], ..PLAIN }),
        conv([1, 1, 9, 33], 129, [1, 1], Conv2dOptions { padding: [0, 1], ..PLAIN }),
        // Pointwise, without images.
        conv([0, 3, 4, 8], 8, [1, 1], PLAIN),
        conv([1, 5, 4, 8], 8, [3, 3], padded),
        conv([1, 6, 5, 4], 12, [3, 3], padded),
        // Enough blocks for wide tiles, forward and backward.
        conv([1, 23, 39, 66], 66, [1, 1], Conv2dOptions { padding: [0, 1], ..PLAIN }),
        // Every option with whole copies; phases of the input gradient of different sizes, and without taps.
        conv(
            [2, 10, 9, 16],
            16,
            [3, 3],
            Conv2dOptions { stride: [3, 3], padding: [1, 1], dilation: [1, 2], groups: 2 },
        ),
        conv([1, 9, 7, 16], 24, [1, 1], Conv2dOptions { stride: [2, 3], ..PLAIN }),
        conv(
            [1, 12, 11, 16],
            8,
            [4, 3],
            Conv2dOptions { stride: [4, 2], dilation: [2, 4], padding: [3, 4], groups: 1 },
        ),
        // The weight gradient in several parts, the last one short.
        conv([2, 17, 19, 8], 16, [2, 1], PLAIN),
        // Depthwise: whole vectors and single channels, more than a block's, lines of 5 taps, strides, several parts.
        conv([2, 6, 7, 16], 16, [3, 3], Conv2dOptions { stride: [2, 2], dilation: [1, 2], ..depthwise(16) }),
        conv([1, 3, 4, 264], 264, [2, 2], depthwise(264)),
        conv([1, 4, 7, 7], 7, [1, 5], depthwise(7)),
        conv([2, 18, 17, 8], 8, [2, 2], depthwise(8)),
    ]
}

#[test]
fn kernels_agree_at_the_edges_of_their_tiles() {
    edges().iter().for_each(|case| check_on_device(case.as_ref()));
}

#[test]
fn tensors_on_two_devices_are_an_error() {
    let Some(device) = test_device() else { return };
    let (x, w) = (randn(&[1, 4, 4, 2], 0).cast(DType::F32).unwrap(), randn(&[3, 2, 3, 3], 1).cast(DType::F32).unwrap());
    let error = conv2d(&x.to_device(device).unwrap(), &w, None, PLAIN).unwrap_err().to_string();
    assert!(error.contains("conv2d"), "{error}");
}

#[test]
fn a_third_derivative_is_the_trilinear_form() {
    // L = Σ conv(x, w)² has ∂²L/∂x² = 2 convᵀ conv, whose gradient by w is linear in w again.
    let (x, w) = (randn(&[1, 4, 4, 2], 0).variable().unwrap(), randn(&[3, 2, 3, 3], 1).variable().unwrap());
    let again = || GradOptions { create_graph: true, ..GradOptions::default() };
    let loss = conv2d(&x, &w, None, PLAIN).unwrap().square().unwrap().sum_all().unwrap();
    let first = grad(&loss, &[&x], again()).unwrap().remove(0).unwrap();
    let second = grad(&first.square().unwrap().sum_all().unwrap(), &[&x], again()).unwrap().remove(0).unwrap();
    let third = grad(&second.sum_all().unwrap(), &[&w], again()).unwrap().remove(0).unwrap();
    // |∇ₓL|² has degree 4 in w, so Euler's identity gives ⟨w, ∂/∂w⟩ of the sum of its gradient as 4 times that sum.
    let euler = third.mul(&w).unwrap().sum_all().unwrap().item().unwrap();
    let sum = second.sum_all().unwrap().item().unwrap();
    assert!((euler - 4.0 * sum).abs() < 1e-9 * sum.abs(), "{euler} and {sum}");
}

#[test]
fn bad_arguments_are_errors() {
    let x = randn(&[1, 4, 5, 6], 0);
    let refuse = |weight: [usize; 4], options| conv2d(&x, &randn(&weight, 1), None, options).unwrap_err().to_string();
    assert!(refuse([4, 5, 1, 1], PLAIN).contains("input (1, 4, 5, 6), weight (4, 5, 1, 1)"));
    assert!(refuse([4, 6, 3, 3], Conv2dOptions { stride: [0, 1], ..PLAIN }).contains("must be positive"));
    assert!(refuse([4, 6, 3, 3], Conv2dOptions { dilation: [1, 0], ..PLAIN }).contains("must be positive"));
    assert!(refuse([4, 6, 3, 3], Conv2dOptions { groups: 0, ..PLAIN }).contains("must be positive"));
    assert!(refuse([4, 2, 3, 3], Conv2dOptions { groups: 3, ..PLAIN }).contains("does not divide into 3 groups"));
    assert!(refuse([4, 6, 5, 3], PLAIN).contains("larger than input"));
    assert!(refuse([4, 6, 3, 3], Conv2dOptions { dilation: [1, 3], ..PLAIN }).contains("larger than input"));
    assert!(refuse([4, 6, 3, 3], Conv2dOptions { dilation: [usize::MAX, 1], ..PLAIN }).contains("larger"));
    assert!(refuse([4, 6, 3, 3], Conv2dOptions { padding: [usize::MAX, 1], ..PLAIN }).contains("larger"));
    assert!(
        refuse([4, 6, 1, 1], Conv2dOptions { padding: [usize::MAX / 8; 2], ..PLAIN }).contains("too many elements")
    );
    assert!(refuse([4, 0, 3, 3], PLAIN).contains("empty"));
    let w = randn(&[4, 6, 3, 3], 1);
    let message = |result: Result<Tensor>| result.unwrap_err().to_string();
    assert!(message(conv2d(&x, &w, Some(&randn(&[3], 0)), PLAIN)).contains("bias (3) for 4 output channels"));
    assert!(message(conv2d(&x, &w.cast(DType::F32).unwrap(), None, PLAIN)).contains("dtype f32"));
    assert!(message(conv2d(&randn(&[4, 5, 6], 0), &w, None, PLAIN)).contains("expected input"));
    let far = Conv2dOptions { stride: [usize::MAX; 2], padding: [1; 2], ..PLAIN };
    assert_eq!(**conv2d(&x, &w, None, far).unwrap().shape(), [1, 1, 1, 4]);
}

#[test]
fn bad_arguments_of_the_transpose_are_errors() {
    let x = randn(&[1, 4, 5, 6], 0);
    let refuse = |weight: [usize; 4], options, output_padding| {
        conv_transpose2d(&x, &randn(&weight, 1), None, options, output_padding).unwrap_err().to_string()
    };
    assert!(refuse([4, 6, 3, 3], PLAIN, [0; 2]).contains("weight (4, 6, 3, 3)"));
    assert!(refuse([6, 2, 3, 3], PLAIN, [1, 0]).contains("output padding [1, 0]"));
    assert!(refuse([6, 2, 3, 3], Conv2dOptions { groups: 4, ..PLAIN }, [0; 2]).contains("4 groups"));
    assert!(refuse([6, 2, 3, 3], Conv2dOptions { padding: [3, 3], ..PLAIN }, [0; 2]).contains("leaves no output"));
    assert!(refuse([6, 2, 3, 3], Conv2dOptions { stride: [usize::MAX; 2], ..PLAIN }, [0; 2]).contains("leaves no"));
    assert!(refuse([6, 2, 3, 3], Conv2dOptions { stride: [usize::MAX / 16; 2], ..PLAIN }, [0; 2]).contains("too many"));
    assert!(refuse([6, 2, 3, 3], Conv2dOptions { stride: [0; 2], ..PLAIN }, [0; 2]).contains("must be positive"));
}

/// Shapes at the edges of the processor's blocks in `f32`: 8, 6 and 4 rows, panels of 32 and 16 columns, groups of 8
/// terms, tiles of 6 × 6 inputs; kernels that are filtered minimally, and those beside them that are not.
fn blocks() -> Vec<Conv2d> {
    let case = |input, out_channels, kernel, padding, options: Conv2dOptions| {
        let options = Conv2dOptions { padding: [padding; 2], ..options };
        Conv2d { input, out_channels, kernel: [kernel; 2], bias: true, options }
    };
    let strided = Conv2dOptions { stride: [2; 2], ..PLAIN };
    vec![
        case([2, 9, 7, 16], 32, 3, 1, PLAIN),
        case([3, 4, 4, 48], 16, 3, 1, PLAIN),
        case([1, 13, 6, 64], 48, 3, 0, PLAIN),
        case([2, 5, 8, 112], 80, 3, 2, PLAIN),
        case([2, 14, 13, 32], 48, 5, 2, PLAIN),
        case([1, 7, 9, 80], 16, 5, 4, PLAIN),
        case([1, 5, 5, 16], 16, 5, 0, PLAIN),
        case([11, 12, 12, 16], 16, 3, 1, PLAIN),
        // No multiple of 16, other kernels, strides, groups.
        case([2, 7, 6, 24], 33, 3, 1, PLAIN),
        case([3, 7, 5, 16], 16, 4, 1, PLAIN),
        case([2, 9, 8, 16], 40, 3, 1, strided),
        case([2, 9, 8, 32], 17, 1, 0, strided),
        case([1, 11, 13, 40], 47, 1, 0, PLAIN),
        case([2, 13, 11, 1], 33, 5, 2, PLAIN),
        case([1, 12, 12, 3], 64, 3, 1, PLAIN),
        case([2, 6, 7, 20], 36, 3, 1, Conv2dOptions { groups: 2, ..PLAIN }),
        case([1, 35, 37, 5], 9, 3, 1, PLAIN),
        // Patches read in place, of few positions and of many.
        case([2, 4, 4, 80], 72, 3, 1, PLAIN),
        case([3, 12, 11, 32], 70, 3, 1, strided),
        case([5, 3, 3, 64], 9, 1, 0, strided),
        case([1, 32, 16, 32], 64, 2, 0, strided),
        case([1, 21, 20, 64], 64, 1, 0, strided),
        case([1, 26, 26, 32], 32, 3, 1, PLAIN),
        // Runs longer than a share of the depth; whole taps of a weight gradient with features of half a panel; positions
        // between the windows of a pointwise kernel; an odd number of channels with long runs.
        case([3, 5, 6, 288], 24, 3, 1, PLAIN),
        case([3, 6, 9, 72], 80, 2, 1, PLAIN),
        case([1, 9, 8, 64], 40, 1, 1, strided),
        case([2, 6, 5, 45], 37, 3, 1, PLAIN),
    ]
}

/// Output and gradients, in the dtype of `inputs`.
fn output_and_gradients(case: &Conv2d, inputs: &[Tensor], grad_output: &Tensor) -> Vec<Tensor> {
    let inputs: Vec<Tensor> = inputs.iter().map(|input| input.variable().unwrap()).collect();
    let output = case.run(&inputs).unwrap();
    let options = GradOptions { grad_output: Some(grad_output.clone()), ..GradOptions::default() };
    let gradients = grad(&output, &inputs.iter().collect::<Vec<_>>(), options).unwrap();
    [output.detach()].into_iter().chain(gradients.into_iter().flatten()).collect()
}

/// The case's inputs and a gradient of its output, rounded.
fn rounded(case: &Conv2d, dtype: DType) -> (Vec<Tensor>, Tensor) {
    let [height, width] = case.output();
    let grad_output = randn(&[case.input[0], height, width, case.out_channels], 7);
    let rounded = |tensor: &Tensor| tensor.cast(dtype).unwrap();
    (case.inputs().iter().map(rounded).collect(), rounded(&grad_output))
}

fn bits(tensor: &Tensor) -> Vec<u8> {
    tensor.raw_bytes().unwrap().to_vec()
}

fn root_mean_square(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0.0), |(sum, count), value| (sum + value * value, count + 1.0));
    f64::sqrt(sum / f64::max(count, 1.0))
}

#[test]
fn blocks_agree_with_double_precision_for_any_number_of_threads() {
    // Half of the distance to the next number, twice: of the result and, in the gradients of a bias, of its parts.
    for (dtype, rounding) in [(DType::F32, 0.0), (DType::Bf16, f64::exp2(-8.0))] {
        for case in blocks() {
            let (inputs, grad_output) = rounded(&case, dtype);
            let run = || output_and_gradients(&case, &inputs, &grad_output);
            let got = run();
            let wide: Vec<Tensor> = inputs.iter().map(|input| input.cast(DType::F64).unwrap()).collect();
            let exact = output_and_gradients(&case, &wide, &grad_output.cast(DType::F64).unwrap());
            for (number, (got, exact)) in got.iter().zip(&exact).enumerate() {
                let (got, exact) = (got.to_f64_vec().unwrap(), exact.to_f64_vec().unwrap());
                let scale = root_mean_square(exact.iter().copied());
                let excess = |(a, b): (&f64, &f64)| (a - b).abs() - rounding * b.abs();
                let error = got.iter().zip(&exact).map(excess).fold(0f64, f64::max);
                assert!(
                    error <= 4e-6 * scale,
                    "{case}, {dtype}, result {number}: error {error:e}, values of {scale:e}"
                );
            }
            for threads in [1, 2, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                for (number, (got, again)) in got.iter().zip(pool.install(run)).enumerate() {
                    assert_eq!(bits(got), bits(&again), "{case}, {dtype}, result {number}, {threads} threads");
                }
            }
        }
    }
}

/// A plain sum in `f32`, term by term, has larger errors: minimal filtering loses no accuracy.
#[test]
fn errors_stay_below_those_of_plain_sums() {
    for case in
        blocks().into_iter().filter(|case| case.options == Conv2dOptions { padding: case.options.padding, ..PLAIN })
    {
        let (inputs, grad_output) = rounded(&case, DType::F32);
        let got = output_and_gradients(&case, &inputs, &grad_output)[0].to_f64_vec().unwrap();
        let values: Vec<Vec<f64>> = inputs.iter().map(|input| input.to_f64_vec().unwrap()).collect();
        let exact = case.reference(&values);
        let plain = plain_sums(&case, &values);
        let error = |values: &[f64]| root_mean_square(values.iter().zip(&exact).map(|(a, b)| a - b));
        let (error, plain) = (error(&got), error(&plain));
        assert!(error <= 1.05 * plain, "{case}: error {error:e}, of plain sums {plain:e}");
    }
}

/// The definition, every operation rounded to `f32`.
fn plain_sums(case: &Conv2d, inputs: &[Vec<f64>]) -> Vec<f64> {
    let ([batch, height, width, channels], [kh, kw]) = (case.input, case.kernel);
    let [out_height, out_width] = case.output();
    let padding = case.options.padding;
    let mut output = Vec::new();
    for (b, y) in (0..batch).flat_map(|b| (0..out_height).map(move |y| (b, y))) {
        for (x, o) in (0..out_width).flat_map(|x| (0..case.out_channels).map(move |o| (x, o))) {
            let mut sum = inputs[2][o] as f32;
            for (i, j) in (0..kh).flat_map(|i| (0..kw).map(move |j| (i, j))) {
                let (row, column) = ((y + i).wrapping_sub(padding[0]), (x + j).wrapping_sub(padding[1]));
                if row >= height || column >= width {
                    continue;
                }
                for c in 0..channels {
                    let value = inputs[0][((b * height + row) * width + column) * channels + c] as f32;
                    let weight = inputs[1][((o * channels + c) * kh + i) * kw + j] as f32;
                    sum = value.mul_add(weight, sum);
                }
            }
            output.push(f64::from(sum));
        }
    }
    output
}

/// What an op keeps of a weight for later answers is that of the weight's own values.
#[test]
fn answers_have_the_bits_of_training_whatever_is_kept() {
    for case in blocks() {
        for dtype in [DType::F32, DType::Bf16] {
            let of_dtype = |tensor: &Tensor| tensor.cast(dtype).unwrap();
            let inputs: Vec<Tensor> = case.inputs().iter().map(of_dtype).collect();
            let other = of_dtype(&randn(inputs[1].shape(), 8));
            let bits = |inputs: &[Tensor]| case.run(inputs).unwrap().raw_bytes().unwrap().to_vec();
            let with_weight = |weight: &Tensor| [&inputs[..1], std::slice::from_ref(weight), &inputs[2..]].concat();
            let (expected, of_other) = (bits(&inputs), bits(&with_weight(&other)));
            gridgrad::autograd::no_grad(|| {
                for number in 0..3 {
                    assert_eq!(bits(&inputs), expected, "{case}, {dtype}, answer {number}");
                    assert_eq!(bits(&with_weight(&other)), of_other, "{case}, {dtype}, other weight, answer {number}");
                }
            });
        }
    }
}

/// An ensemble is certified by training on batches that are filled up: images whose output has no gradient change no bit
/// of the weight's gradient, and an image's own results are the same in every batch.
#[test]
fn images_without_gradient_change_no_bit() {
    let more = |case: &Conv2d, batch| Conv2d { input: [batch, case.input[1], case.input[2], case.input[3]], ..*case };
    let batches = |case: &Conv2d| [case.input[0], 13];
    for (case, dtype) in blocks().iter().flat_map(|case| [(case, DType::F32), (case, DType::Bf16)]) {
        for batch in batches(case) {
            let (few, many) = (more(case, batch), more(case, batch + 9));
            let (inputs, grad_output) = rounded(&many, dtype);
            let images = |tensor: &Tensor| tensor.narrow(0, 0, batch).unwrap();
            let zeros = grad_output.narrow(0, batch, 9).unwrap().scale(0.0).unwrap();
            let filled = gridgrad::ops::concat(&[&images(&grad_output), &zeros], 0).unwrap();
            let fewer: Vec<Tensor> = [images(&inputs[0])].into_iter().chain(inputs[1..].iter().cloned()).collect();
            let expected = output_and_gradients(&few, &fewer, &images(&grad_output));
            let got = output_and_gradients(&many, &inputs, &filled);
            let at = format!("{case}, {dtype}, batch {batch}");
            assert_eq!(bits(&got[2]), bits(&expected[2]), "{at}: weight gradient");
            assert_eq!(bits(&images(&got[0])), bits(&expected[0]), "{at}: output");
            assert_eq!(bits(&images(&got[1])), bits(&expected[1]), "{at}: input gradient");
        }
    }
}
