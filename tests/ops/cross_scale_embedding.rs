//! Several convolutions of one stride, side by side.

use std::fmt;

use gridgrad::ops::{
    Conv2dOptions, EmbeddingNorm, EmbeddingOptions, ImageLayout, PixelNormalisation, concat, conv2d,
    cross_scale_embedding, cross_scale_embedding_with, layer_norm,
};
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

const EPS: f64 = 1e-5;

/// An embedding of images as they are stored, with the layer norm that follows.
struct Stem {
    embedding: Embedding,
    layout: ImageLayout,
    bytes: bool,
    normalised: bool,
    norm: bool,
}

impl fmt::Display for Stem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Stem { embedding, layout, bytes, normalised, norm } = self;
        write!(f, "{embedding} {layout:?}, bytes {bytes}, normalised {normalised}, layer norm {norm}")
    }
}

impl Stem {
    fn normalisation(&self) -> PixelNormalisation {
        let channels = self.embedding.input[3];
        let mean = (0..channels).map(|channel| 0.4 + 0.05 * channel as f32).collect();
        let deviation = (0..channels).map(|channel| 0.25 - 0.02 * channel as f32).collect();
        PixelNormalisation { mean, deviation }
    }

    fn options(&self, inputs: &[Tensor]) -> EmbeddingOptions {
        let [weight, bias] = [0, 1].map(|i| inputs[1 + 2 * self.embedding.kernels.len() + i].clone());
        EmbeddingOptions {
            stride: self.embedding.stride,
            layout: self.layout,
            normalise: self.normalised.then(|| self.normalisation()),
            layer_norm: self.norm.then_some(EmbeddingNorm { weight, bias, eps: EPS }),
        }
    }

    /// The passes that the op saves: layout, dtype, normalisation.
    fn plain_images(&self, images: &Tensor, dtype: DType) -> Result<Tensor> {
        let mut images = images.clone();
        if self.layout == ImageLayout::ChannelsFirst {
            images = images.permute(&[0, 2, 3, 1])?;
        }
        if self.bytes {
            images = images.cast(if dtype == DType::F64 { dtype } else { DType::F32 })?.scale(1.0 / 255.0)?;
        }
        if self.normalised {
            let PixelNormalisation { mean, deviation } = self.normalisation();
            let row = |values: &[f32]| Tensor::new(values, [values.len()])?.cast(images.dtype());
            images = images.sub(&row(&mean)?)?.div(&row(&deviation)?)?;
        }
        images.cast(dtype)
    }
}

impl OpCase for Stem {
    fn inputs(&self) -> Vec<Tensor> {
        let mut inputs = self.embedding.inputs();
        let out: usize = self.embedding.kernels.iter().map(|kernel| kernel[1]).sum();
        let [batch, height, width, channels] = self.embedding.input;
        let shape = match self.layout {
            ImageLayout::ChannelsLast => [batch, height, width, channels],
            ImageLayout::ChannelsFirst => [batch, channels, height, width],
        };
        if self.bytes {
            let pixels: Vec<u8> = (0..shape.iter().product()).map(|i: usize| (i * 89 % 256) as u8).collect();
            inputs[0] = Tensor::new(&pixels, shape).unwrap();
        } else {
            inputs[0] = randn(&shape, 0);
        }
        inputs.extend([randn(&[out], 90), randn(&[out], 91)]);
        inputs
    }

    fn run(&self, inputs: &[Tensor]) -> Result<Tensor> {
        let kernels = self.embedding.kernels.len();
        let (weights, biases) = inputs[1..=2 * kernels].split_at(kernels);
        cross_scale_embedding_with(&inputs[0], weights, biases, &self.options(inputs))
    }

    fn reference(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        let [batch, height, width, channels] = self.embedding.input;
        let PixelNormalisation { mean, deviation } = self.normalisation();
        let mut inputs = inputs.to_vec();
        let stored = inputs[0].clone();
        for (i, value) in inputs[0].iter_mut().enumerate() {
            let (image, pixel, channel) =
                (i / (height * width * channels), i / channels % (height * width), i % channels);
            assert!(image < batch);
            *value = match self.layout {
                ImageLayout::ChannelsLast => stored[i],
                ImageLayout::ChannelsFirst => stored[(image * channels + channel) * height * width + pixel],
            };
            *value /= if self.bytes { 255.0 } else { 1.0 };
            if self.normalised {
                *value = (*value - f64::from(mean[channel])) / f64::from(deviation[channel]);
            }
        }
        let kernels = self.embedding.kernels.len();
        let mut output = self.embedding.reference(&inputs[..=2 * kernels]);
        if self.norm {
            let (weight, bias) = (&inputs[1 + 2 * kernels], &inputs[2 + 2 * kernels]);
            for row in output.chunks_mut(weight.len()) {
                let mean = row.iter().sum::<f64>() / row.len() as f64;
                let variance = row.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / row.len() as f64;
                for ((value, weight), bias) in row.iter_mut().zip(weight).zip(bias) {
                    *value = (*value - mean) / (variance + EPS).sqrt() * weight + bias;
                }
            }
        }
        output
    }

    fn work(&self) -> Work {
        self.embedding.work()
    }

    fn tolerance(&self) -> Tolerance {
        let Tolerance { f64, f32, gradient } = self.embedding.tolerance();
        // The layer norm of few channels magnifies.
        Tolerance { f64: 10.0 * f64, f32: 10.0 * f32, gradient: 10.0 * gradient }
    }

    fn composed(&self, inputs: &[Tensor]) -> Option<Result<Tensor>> {
        let kernels = self.embedding.kernels.len();
        let dtype = inputs[1].dtype();
        let run = || {
            let mut plain = inputs[..=2 * kernels].to_vec();
            plain[0] = self.plain_images(&inputs[0], dtype)?;
            let output = self.embedding.composed(&plain).expect("embeddings have a composed form")?;
            if !self.norm {
                return Ok(output);
            }
            layer_norm(&output, &inputs[1 + 2 * kernels], &inputs[2 + 2 * kernels], EPS)
        };
        Some(run())
    }

    fn derivatives(&self) -> Derivatives {
        Derivatives::First
    }
}

fn stems() -> Vec<Box<dyn OpCase>> {
    let case = |input, kernels: &[[usize; 2]], stride, layout, [bytes, normalised, norm]: [bool; 3]| {
        let embedding = Embedding { input, kernels: kernels.to_vec(), stride };
        Box::new(Stem { embedding, layout, bytes, normalised, norm }) as Box<dyn OpCase>
    };
    use ImageLayout::{ChannelsFirst, ChannelsLast};
    vec![
        case([1, 8, 12, 3], &[[4, 8], [8, 4], [16, 3]], 4, ChannelsLast, [true, true, true]),
        case([1, 9, 8, 3], &[[4, 5], [8, 4]], 4, ChannelsFirst, [true, true, false]),
        case([2, 7, 5, 2], &[[1, 3], [3, 4]], 1, ChannelsFirst, [false, true, true]),
        case([1, 5, 6, 1], &[[2, 9], [4, 3]], 2, ChannelsLast, [true, false, false]),
        case([1, 8, 6, 3], &[[2, 8], [4, 8]], 2, ChannelsFirst, [false, false, false]),
        // Too many channels for one kernel with the layer norm.
        case([1, 4, 6, 24], &[[2, 8], [4, 6]], 2, ChannelsLast, [false, false, true]),
        case([1, 8, 12, 3], &[[4, 16]], 4, ChannelsLast, [false, false, true]),
    ]
}

#[test]
fn stems_agree_with_the_passes_that_they_fuse() {
    check(&stems());
}

#[test]
fn images_in_f32_give_halves_and_a_gradient_in_f32() {
    let half = |tensor: Tensor| tensor.cast(DType::Bf16).unwrap();
    let (weight, bias) = (half(randn(&[5, 3, 8, 8], 1)), half(randn(&[5], 2)));
    let images = randn(&[1, 8, 8, 3], 0).cast(DType::F32).unwrap();
    let run = |images: &Tensor, weight: &Tensor, bias: &Tensor| {
        let images = images.variable().unwrap();
        let (weight, bias) = (std::slice::from_ref(weight), std::slice::from_ref(bias));
        let output = cross_scale_embedding_with(&images, weight, bias, &EmbeddingOptions::new(4)).unwrap();
        let gradient =
            output.cast(DType::F32).unwrap().sum(&[0, 1, 2, 3], false).unwrap().backward().unwrap().take(&images);
        (output.detach(), gradient.unwrap())
    };
    let (output, gradient) = run(&images, &weight, &bias);
    assert_eq!((output.dtype(), gradient.dtype()), (DType::Bf16, DType::F32));
    let Some(device) = test_device() else { return };
    let [on_images, on_weight, on_bias] = [&images, &weight, &bias].map(|tensor| tensor.to_device(device).unwrap());
    let (got, got_gradient) = run(&on_images, &on_weight, &on_bias);
    assert_eq!(got_gradient.dtype(), DType::F32);
    for (got, want) in [(got, output), (got_gradient, gradient)] {
        let pairs = got.to_f64_vec().unwrap().into_iter().zip(want.to_f64_vec().unwrap());
        pairs.for_each(|(got, want)| assert!((got - want).abs() <= 0.02 * want.abs().max(1.0), "{got} and {want}"));
    }
}

#[test]
fn bad_formats_are_errors() {
    let f32 = |shape: &[usize]| randn(shape, 0).cast(DType::F32).unwrap();
    let run = |input: Tensor, mean: &[f32], deviation: &[f32]| {
        let normalise = Some(PixelNormalisation { mean: mean.to_vec(), deviation: deviation.to_vec() });
        let options = EmbeddingOptions { normalise, ..EmbeddingOptions::new(4) };
        let (weight, bias) = (f32(&[2, 3, 4, 4]), f32(&[2]));
        cross_scale_embedding_with(&input, &[weight], &[bias], &options).unwrap_err().to_string()
    };
    assert!(run(f32(&[1, 8, 8, 3]), &[0.5; 2], &[1.0; 3]).contains("for each of 3 channels"));
    assert!(run(f32(&[1, 8, 8, 3]), &[0.5; 3], &[1.0, 0.0, 1.0]).contains("deviations above 0"));
    assert!(run(f32(&[1, 8, 8, 3]), &[f32::NAN; 3], &[1.0; 3]).contains("finite"));
    assert!(run(f32(&[1, 8, 8, 3]).cast(DType::Bf16).unwrap(), &[0.5; 3], &[1.0; 3]).contains("input of bf16"));
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
        case([0, 4, 6, 20], &[[2, 3], [4, 2]], 2),
        // Lines of outputs fill more lanes than channels do: whole and partial vectors of them, odd extents.
        case([1, 12, 56, 3], &[[4, 12], [8, 20], [16, 12]], 4),
        case([1, 8, 184, 3], &[[4, 12], [8, 4]], 4),
        case([2, 5, 29, 2], &[[2, 12], [4, 4]], 2),
        // Pairs of lines and one more.
        case([2, 20, 12, 3], &[[4, 8], [8, 12], [16, 8], [32, 4]], 4),
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
        // A group of eight positions; a group that is not full.
        case([1, 3, 11, 1], &[[1, 3], [5, 2]], 1),
        // Slices of channels, more of them than one, with a rest; images side by side in a block.
        case([5, 4, 4, 72], &[[2, 6], [4, 9]], 2),
        // Of the weight gradient: parts of one tile each, and a part of several;
        case([1, 64, 43, 1], &[[1, 2], [3, 3]], 1),
        case([1, 22, 23, 16], &[[5, 4]], 1),
        // a stem whose largest window is more than a block's;
        case([1, 28, 36, 3], &[[4, 13], [8, 7], [16, 5], [32, 3]], 4),
        // several columns of units, the last with a rest, and as many slices of channels;
        case([1, 5, 7, 37], &[[2, 67], [4, 41]], 2),
        // images side by side in a tile, and one more;
        case([17, 2, 3, 5], &[[1, 11], [3, 2]], 1),
        // a map of one position, and one of one row.
        case([1, 2, 2, 7], &[[2, 3], [4, 1]], 2),
        case([1, 1, 131, 1], &[[1, 1], [7, 3]], 1),
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
    assert!(run(&[1, 8, 8, 20], &[0, 20, 4, 4], 0, 4).contains("without outputs"));
    assert!(run(&[1, 8, 160, 0], &[4, 0, 4, 4], 4, 4).contains("without outputs or channels"));
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
