//! Ops over a leading model axis: against references, and that a model's bits are its own.

use std::fmt;

use gridgrad::autograd::{GradOptions, grad};
use gridgrad::ops::{
    BatchNormMode, BatchStatistics, Conv2dOptions, Counts, batch_norm, batch_norm_relu_each, concat, conv2d_each,
    crops_each, linear_each,
};
use gridgrad::{DType, Device, Result, Tensor};

use crate::harness::{Derivatives, OpCase, ROUNDING, Tolerance, Work, check, randn, test_device};

const EPS: f64 = 1e-5;

/// 1 for the elements of real samples of a tensor (models, batch, …), 0 for the padding.
fn mask(counts: &[usize], like: &Tensor) -> Result<Tensor> {
    let (models, batch) = (like.shape()[0], like.shape()[1]);
    let sample = like.elements() / (models * batch);
    let real = |at: usize| if at / sample % batch < counts[at / sample / batch] { 1.0 } else { 0.0 };
    Tensor::from_index(like.shape(), like.dtype(), real)?.to_device(like.device())
}

#[derive(Debug)]
struct ConvEach {
    counts: Vec<usize>,
    /// batch, height, width, channels
    input: [usize; 4],
    out_channels: usize,
    kernel: usize,
    bias: bool,
}

impl fmt::Display for ConvEach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

impl ConvEach {
    fn terms(&self) -> usize {
        self.kernel * self.kernel * self.input[3]
    }

    fn outputs(&self) -> usize {
        self.counts.len() * self.input[..3].iter().product::<usize>() * self.out_channels
    }
}

impl OpCase for ConvEach {
    fn inputs(&self) -> Vec<Tensor> {
        let (models, k) = (self.counts.len(), self.kernel);
        let weight = [models, self.out_channels, self.input[3], k, k];
        let mut inputs = vec![randn(&[&[models], &self.input[..]].concat(), 0), randn(&weight, 1)];
        if self.bias {
            inputs.push(randn(&[models, self.out_channels], 2));
        }
        inputs
    }

    /// Padding is zero in what the op reads, and left out of what it gives.
    fn run(&self, inputs: &[Tensor]) -> Result<Tensor> {
        let (counts, options) = (
            Counts::new(&self.counts, inputs[0].device())?,
            Conv2dOptions { padding: [self.kernel / 2; 2], ..Conv2dOptions::default() },
        );
        let x = inputs[0].mul(&mask(&self.counts, &inputs[0])?)?;
        let y = conv2d_each(&x, &inputs[1], inputs.get(2), &counts, options)?;
        y.mul(&mask(&self.counts, &y)?)
    }

    fn reference(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        let ([batch, height, width, channels], k) = (self.input, self.kernel);
        let mut output = vec![0.0; self.outputs()];
        for (at, out) in output.iter_mut().enumerate() {
            let (feature, position) = (at % self.out_channels, at / self.out_channels);
            let (x, y, sample) = (position % width, position / width % height, position / width / height);
            let (model, of_model) = (sample / batch, sample % batch);
            if of_model >= self.counts[model] {
                continue;
            }
            let feature = model * self.out_channels + feature;
            *out = if self.bias { inputs[2][feature] } else { 0.0 };
            for (i, j) in (0..k).flat_map(|i| (0..k).map(move |j| (i, j))) {
                let (row, column) = ((y + i).wrapping_sub(k / 2), (x + j).wrapping_sub(k / 2));
                if row < height && column < width {
                    *out += (0..channels)
                        .map(|c| {
                            inputs[0][((sample * height + row) * width + column) * channels + c]
                                * inputs[1][((feature * channels + c) * k + i) * k + j]
                        })
                        .sum::<f64>();
                }
            }
        }
        output
    }

    fn work(&self) -> Work {
        Work { bytes: 8 * self.outputs() as u64, flops: 2 * (self.outputs() * self.terms()) as u64 }
    }

    fn tolerance(&self) -> Tolerance {
        let growth = (self.terms() as f64).sqrt().max(1.0);
        Tolerance { f64: ROUNDING.f64 * growth, f32: ROUNDING.f32 * growth, ..ROUNDING }
    }
}

#[test]
fn convolutions_of_each_model() {
    let case = |counts: &[usize], input, out_channels, kernel, bias| {
        Box::new(ConvEach { counts: counts.to_vec(), input, out_channels, kernel, bias }) as Box<dyn OpCase>
    };
    check(&[
        case(&[2, 1, 2], [2, 5, 4, 3], 5, 3, false),
        case(&[1, 3], [3, 4, 5, 8], 17, 1, true),
        case(&[2], [2, 3, 3, 1], 70, 5, true),
        case(&[1, 1], [1, 1, 1, 1], 1, 1, false),
    ]);
}

#[derive(Debug)]
struct BatchNormReluEach {
    counts: Vec<usize>,
    /// batch, …, channels
    shape: Vec<usize>,
    train: bool,
}

impl fmt::Display for BatchNormReluEach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

impl BatchNormReluEach {
    fn channels(&self) -> usize {
        self.shape[self.shape.len() - 1]
    }

    fn running(&self, like: &Tensor) -> Result<BatchStatistics> {
        let dtype = if like.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let vector = |start: f64| {
            let shape = [self.counts.len(), self.channels()];
            Tensor::from_index(shape, dtype, |c| start + c as f64 / 8.0)?.to_device(like.device())
        };
        Ok(BatchStatistics { mean: vector(-0.5)?, variance: vector(0.5)? })
    }
}

impl OpCase for BatchNormReluEach {
    fn inputs(&self) -> Vec<Tensor> {
        let vector = [self.counts.len(), self.channels()];
        vec![randn(&[&[self.counts.len()], &self.shape[..]].concat(), 0), randn(&vector, 1), randn(&vector, 2)]
    }

    fn run(&self, inputs: &[Tensor]) -> Result<Tensor> {
        let counts = Counts::new(&self.counts, inputs[0].device())?;
        let running = self.running(&inputs[0])?;
        let mode = if self.train { BatchNormMode::Train } else { BatchNormMode::Eval(&running) };
        Ok(batch_norm_relu_each(&inputs[0], &inputs[1], &inputs[2], mode, &counts, EPS)?.output)
    }

    fn reference(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        let channels = self.channels();
        let model_len: usize = self.shape.iter().product();
        let real = |model: usize| model_len / self.shape[0] * self.counts[model];
        let running = self.running(&self.inputs()[0]).unwrap();
        let running = [running.mean, running.variance].map(|vector| vector.to_f64_vec().unwrap());
        let value = |at: usize| {
            let (model, within, channel) = (at / model_len, at % model_len, at % channels);
            if within >= real(model) {
                return 0.0;
            }
            let own = model * channels + channel;
            let column = || inputs[0][model * model_len..][..real(model)].iter().skip(channel).step_by(channels);
            let count = column().count() as f64;
            let mean = if self.train { column().sum::<f64>() / count } else { running[0][own] };
            let spread = column().map(|v| (v - mean).powi(2)).sum::<f64>() / count;
            let variance = if self.train { spread } else { running[1][own] };
            ((inputs[0][at] - mean) / (variance + EPS).sqrt() * inputs[1][own] + inputs[2][own]).max(0.0)
        };
        (0..inputs[0].len()).map(value).collect()
    }

    fn work(&self) -> Work {
        let elements = (self.counts.len() * self.shape.iter().product::<usize>()) as u64;
        Work { bytes: 12 * elements, flops: 8 * elements }
    }

    fn tolerance(&self) -> Tolerance {
        Tolerance { f64: 1e-12, f32: 1e-5, gradient: 1e-5 }
    }

    fn composed(&self, inputs: &[Tensor]) -> Option<Result<Tensor>> {
        let running = self.running(&inputs[0]).ok()?;
        let model = |model: usize| -> Result<Tensor> {
            let own = |tensor: &Tensor| {
                let shape = tensor.shape()[1..].to_vec();
                tensor.narrow(0, model, 1)?.reshape(shape)
            };
            let statistics = BatchStatistics { mean: own(&running.mean)?, variance: own(&running.variance)? };
            let mode = if self.train { BatchNormMode::Train } else { BatchNormMode::Eval(&statistics) };
            let real = own(&inputs[0])?.narrow(0, 0, self.counts[model])?;
            let normalised = batch_norm(&real, Some(&own(&inputs[1])?), Some(&own(&inputs[2])?), mode, EPS)?.output;
            normalised.relu()?.pad(0, 0, self.shape[0] - self.counts[model])
        };
        let all = (0..self.counts.len()).map(model).collect::<Result<Vec<_>>>();
        Some(all.and_then(|all| concat(&all.iter().collect::<Vec<_>>(), 0)?.reshape(inputs[0].shape())))
    }

    fn derivatives(&self) -> Derivatives {
        Derivatives::First
    }
}

#[test]
fn batch_norm_and_relu_of_each_model() {
    let case = |counts: &[usize], shape: &[usize], train| {
        Box::new(BatchNormReluEach { counts: counts.to_vec(), shape: shape.to_vec(), train }) as Box<dyn OpCase>
    };
    check(&[
        case(&[3, 2, 1], &[3, 5, 7, 4], true),
        case(&[2], &[2, 3, 5], true),
        case(&[1, 4], &[4, 6, 3, 37], true),
        case(&[2, 3], &[3, 2, 2, 8], false),
        case(&[5, 2], &[5, 11, 13, 4], true),
    ]);
}

/// Output and gradients of a convolution with bias, batch norm, ReLU and a linear map, as bits for each model. Models
/// are numbered: `numbers` share the launch.
fn network_bits(numbers: &[usize], counts: &[usize], batch: usize, device: Device) -> Vec<Vec<u8>> {
    let (side, channels, features) = (30, 2, 5);
    let stacked = |rank_shape: &[usize], seed: u64| {
        let own = |&number: &usize| randn(rank_shape, seed + 100 * number as u64).cast(DType::F32).unwrap();
        let all: Vec<Tensor> = numbers.iter().map(own).collect();
        let shape = [&[numbers.len()], rank_shape].concat();
        concat(&all.iter().collect::<Vec<_>>(), 0).unwrap().reshape(shape).unwrap()
    };
    let own: Vec<usize> = numbers.iter().map(|&number| counts[number]).collect();
    // The same images of a model, whatever the padding behind them.
    let images = stacked(&[5, side, side, channels], 0).narrow(1, 0, batch).unwrap();
    let images = images.mul(&mask(&own, &images).unwrap()).unwrap();
    let vectors = [features * channels, features, features, features, 3 * features, 3];
    let shapes: [&[usize]; 6] =
        [&[features, channels, 1, 1], &[features], &[features], &[features], &[3, features], &[3]];
    let mut variables = vec![images];
    for (number, (shape, len)) in shapes.iter().zip(vectors).enumerate() {
        assert_eq!(shape.iter().product::<usize>(), len);
        variables.push(stacked(shape, 1 + number as u64));
    }
    let variables: Vec<Tensor> =
        variables.iter().map(|value| value.to_device(device).unwrap().variable().unwrap()).collect();
    let [x, conv, conv_bias, scale, shift, weight, bias] = &variables[..] else { panic!("seven variables") };
    let counts = Counts::new(&own, device).unwrap();
    let y = conv2d_each(x, conv, Some(conv_bias), &counts, Conv2dOptions::default()).unwrap();
    let y = batch_norm_relu_each(&y, scale, shift, BatchNormMode::Train, &counts, EPS).unwrap().output;
    let pooled = y.mean(&[2, 3], false).unwrap();
    let logits = linear_each(&pooled, weight, Some(bias), &counts).unwrap();
    let logits = logits.mul(&mask(&own, &logits).unwrap()).unwrap();
    let wanted: Vec<&Tensor> = variables.iter().collect();
    let options = GradOptions { grad_output: Some(logits.detach()), ..GradOptions::default() };
    let gradients = grad(&logits, &wanted, options).unwrap();
    let results = std::iter::once(logits.detach()).chain(gradients.into_iter().flatten());
    let results: Vec<Tensor> = results.map(|result| result.to_device(Device::Cpu).unwrap()).collect();
    (0..numbers.len())
        .map(|model| {
            let of_model = |(number, result): (usize, &Tensor)| {
                let part = result.narrow(0, model, 1).unwrap();
                // Logits and the gradient of the images have samples, of which the padding is left out.
                let part = if number < 2 { part.narrow(1, 0, own[model]).unwrap() } else { part };
                part.raw_bytes().unwrap().to_vec()
            };
            results.iter().enumerate().flat_map(of_model).collect()
        })
        .collect()
}

#[test]
fn the_bits_of_a_model_do_not_depend_on_its_mates() {
    let counts = [2, 5, 1, 3, 4];
    for device in std::iter::once(Device::Cpu).chain(test_device()) {
        // On the emulator, the largest and the two smallest: more than one part of every sum.
        let all: &[usize] = if device == Device::Cpu { &[0, 1, 2, 3, 4] } else { &[2, 1, 0] };
        let alone: Vec<Vec<u8>> =
            all.iter().map(|&number| network_bits(&[number], &counts, counts[number], device).remove(0)).collect();
        let together = network_bits(all, &counts, 5, device);
        assert!(together == alone, "a group on {device}");
        let reversed: Vec<usize> = all.iter().rev().copied().collect();
        let mut other = network_bits(&reversed, &counts, 5, device);
        other.reverse();
        assert!(other == alone, "another order on {device}");
    }
}

#[test]
fn no_number_of_one_model_reaches_another() {
    let counts = Counts::full(2, 3);
    let x = randn(&[2, 3, 4, 4, 2], 0);
    let vectors = [randn(&[2, 2], 2), randn(&[2, 2], 3)];
    let run = |spoilt: bool| {
        let spoil = |at: usize| if spoilt && at < 8 { f64::NAN } else { 0.0 };
        let weight = randn(&[2, 2, 2, 2, 1], 1).add(&Tensor::from_index([2, 2, 2, 2, 1], DType::F64, spoil).unwrap());
        let (weight, x) = (weight.unwrap().variable().unwrap(), x.variable().unwrap());
        let y = conv2d_each(&x, &weight, None, &counts, Conv2dOptions::default()).unwrap();
        let y = batch_norm_relu_each(&y, &vectors[0], &vectors[1], BatchNormMode::Train, &counts, EPS).unwrap().output;
        let gradients = y.square().unwrap().sum_all().unwrap().backward().unwrap();
        let results = [y.detach(), gradients.get(&x).unwrap().clone(), gradients.get(&weight).unwrap().clone()];
        results.map(|result| [0, 1].map(|model| result.narrow(0, model, 1).unwrap().to_vec::<f64>().unwrap()))
    };
    for (clean, spoilt) in run(false).into_iter().zip(run(true)) {
        assert!(spoilt[0].iter().any(|value| value.is_nan()));
        assert_eq!(clean[1], spoilt[1]);
    }
}

#[test]
fn crops_are_shifted_mirrored_and_normalised() {
    let images = Tensor::new(&Vec::from_iter(0..2 * 3 * 4 * 3u8), [2, 3, 4, 3]).unwrap();
    let plan = [1i64, -1, 2, 0, 0, 0, -3, 1, -1, 0, 0, 0, 1, 2, 0, 1];
    let mean = Tensor::new(&[0.5f32, 0.25, 0.125, 0.0, 0.1, 0.2], [2, 3]).unwrap();
    let deviation = Tensor::new(&[0.5f32, 2.0, 1.0, 0.3, 0.7, 0.9], [2, 3]).unwrap();
    let plan = Tensor::new(&plan, [2, 2, 4]).unwrap();
    let batch = crops_each(&images, &plan, &mean, &deviation).unwrap();
    let (plan_values, mean_values) = (plan.to_vec::<i64>().unwrap(), mean.to_vec::<f32>().unwrap());
    let spread = deviation.to_vec::<f32>().unwrap();
    for (at, got) in batch.to_vec::<f32>().unwrap().into_iter().enumerate() {
        let (c, x, y, sample) = (at % 3, at / 3 % 4, at / 12 % 3, at / 36);
        let [image, top, left, flip] = plan_values[sample * 4..][..4] else { panic!("four numbers") };
        let x = if flip == 1 { 3 - x } else { x } as i64 + left;
        let y = y as i64 + top;
        let inside = (0..3).contains(&y) && (0..4).contains(&x);
        let byte = if inside && image >= 0 { ((image * 3 + y) * 4 + x) as f32 * 3.0 + c as f32 } else { 0.0 };
        let own = sample / 2 * 3 + c;
        let expected = if image < 0 { 0.0 } else { (byte / 255.0 - mean_values[own]) / spread[own] };
        assert_eq!(got, expected, "element {at}");
    }
    let beyond = Tensor::new(&[2i64, 0, 0, 0], [1, 1, 4]).unwrap();
    let one = Tensor::ones([1, 3], DType::F32).unwrap();
    assert!(crops_each(&images, &beyond, &one, &one).unwrap_err().to_string().contains("image 2 of 2"));
    assert!(crops_each(&images, &plan, &one, &one).is_err());
    let Some(device) = test_device() else { return };
    let there = |tensor: &Tensor| tensor.to_device(device).unwrap();
    let on_device = crops_each(&there(&images), &there(&plan), &there(&mean), &there(&deviation)).unwrap();
    assert_eq!(on_device.to_vec::<f32>().unwrap(), batch.to_vec::<f32>().unwrap());
}

#[test]
fn counts_that_do_not_fit_are_errors() {
    let (x, w) = (randn(&[2, 3, 4, 4, 2], 0), randn(&[2, 5, 2, 1, 1], 1));
    let run = |counts: &Counts, options| conv2d_each(&x, &w, None, counts, options).unwrap_err().to_string();
    let plain = Conv2dOptions::default();
    assert!(run(&Counts::full(3, 3), plain).contains("for 2 models of 3 samples"));
    assert!(run(&Counts::full(2, 2), plain).contains("for 2 models of 3 samples"));
    assert!(run(&Counts::new(&[4, 1], Device::Cpu).unwrap(), plain).contains("for 2 models of 3 samples"));
    assert!(run(&Counts::full(2, 3), Conv2dOptions { groups: 2, ..plain }).contains("one group"));
    assert!(Counts::new(&[], Device::Cpu).is_err() && Counts::new(&[1, 0], Device::Cpu).is_err());
    let linear = linear_each(&randn(&[2, 3, 4], 0), &randn(&[2, 5, 3], 1), None, &Counts::full(2, 3));
    assert!(linear.is_err());
    let vector = randn(&[2, 2], 2);
    let short = batch_norm_relu_each(&x, &vector, &randn(&[2], 3), BatchNormMode::Train, &Counts::full(2, 3), EPS);
    assert!(short.unwrap_err().to_string().contains("(2) for input"));
    let Some(device) = test_device() else { return };
    let [x, w] = [&x, &w].map(|tensor| tensor.cast(DType::F32).unwrap().to_device(device).unwrap());
    let host = Counts::new(&[2, 3], Device::Cpu).unwrap();
    assert!(conv2d_each(&x, &w, None, &host, plain).unwrap_err().to_string().contains("the counts are on the host"));
}

pub fn benchmarks() -> Vec<Box<dyn OpCase>> {
    let convolution = |input, kernel| {
        Box::new(ConvEach { counts: vec![50; 2], input, out_channels: 192, kernel, bias: false }) as Box<dyn OpCase>
    };
    let shape = vec![50, 28, 28, 192];
    vec![
        convolution([50, 14, 14, 96], 5),
        convolution([50, 28, 28, 192], 1),
        Box::new(BatchNormReluEach { counts: vec![50; 2], shape, train: true }),
    ]
}
