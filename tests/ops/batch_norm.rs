//! Batch normalisation.

use std::fmt;

use gridgrad::autograd::{GradOptions, grad};
use gridgrad::ops::{BatchNormMode, BatchStatistics, batch_norm, batch_norm_relu};
use gridgrad::{DType, Device, Error, Result, Tensor};

use crate::harness::{OpCase, Tolerance, Work, check, randn, test_device};

struct BatchNorm {
    shape: Vec<usize>,
    affine: bool,
    train: bool,
    /// Added to the input: a mean far from zero must not cost precision.
    offset: f64,
    /// Whether a ReLU follows, in the same op.
    relu: bool,
}

const EPS: f64 = 1e-5;

impl fmt::Display for BatchNorm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { shape, affine, train, offset, relu } = self;
        write!(f, "batch_norm {shape:?}, affine {affine}, train {train}, offset {offset}, relu {relu}")
    }
}

impl BatchNorm {
    fn channels(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    fn running(&self) -> BatchStatistics {
        let value = |c: usize| 0.5 + c as f64 / 8.0;
        let vector = |shift: f64| Tensor::from_index([self.channels()], DType::F64, |c| value(c) + shift).unwrap();
        BatchStatistics { mean: vector(-1.0), variance: vector(0.0) }
    }

    /// Half-precision inputs are normalised by statistics in `f32`.
    fn running_dtype(inputs: &[Tensor]) -> DType {
        if inputs[0].dtype() == DType::F64 { DType::F64 } else { DType::F32 }
    }
}

impl OpCase for BatchNorm {
    fn inputs(&self) -> Vec<Tensor> {
        let mut inputs = vec![randn(&self.shape, 0).shift(self.offset).unwrap()];
        if self.affine {
            inputs.extend([randn(&[self.channels()], 1), randn(&[self.channels()], 2)]);
        }
        inputs
    }

    fn run(&self, inputs: &[Tensor]) -> Result<Tensor> {
        let there = |vector: Tensor| vector.cast(Self::running_dtype(inputs))?.to_device(inputs[0].device());
        let BatchStatistics { mean, variance } = self.running();
        let running = BatchStatistics { mean: there(mean)?, variance: there(variance)? };
        let mode = if self.train { BatchNormMode::Train } else { BatchNormMode::Eval(&running) };
        if self.relu {
            return Ok(batch_norm_relu(&inputs[0], &inputs[1], &inputs[2], mode, EPS)?.output);
        }
        Ok(batch_norm(&inputs[0], inputs.get(1), inputs.get(2), mode, EPS)?.output)
    }

    fn reference(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        let channels = self.channels();
        let (x, rows) = (&inputs[0], inputs[0].len() / channels);
        let running = self.running();
        let statistics = |c: usize| {
            if !self.train {
                return (running.mean.to_f64_vec().unwrap()[c], running.variance.to_f64_vec().unwrap()[c]);
            }
            let column = || x.iter().skip(c).step_by(channels);
            let mean = column().sum::<f64>() / rows as f64;
            (mean, column().map(|v| (v - mean).powi(2)).sum::<f64>() / rows as f64)
        };
        let statistics: Vec<(f64, f64)> = (0..channels).map(statistics).collect();
        let value = |(i, v): (usize, &f64)| {
            let (mean, variance) = statistics[i % channels];
            let (weight, bias) =
                if self.affine { (inputs[1][i % channels], inputs[2][i % channels]) } else { (1.0, 0.0) };
            let normalised = (v - mean) / (variance + EPS).sqrt() * weight + bias;
            if self.relu { normalised.max(0.0) } else { normalised }
        };
        x.iter().enumerate().map(value).collect()
    }

    fn work(&self) -> Work {
        let elements = self.shape.iter().product::<usize>() as u64;
        Work { bytes: 4 * 2 * elements, flops: if self.train { 6 } else { 2 } * elements }
    }

    fn tolerance(&self) -> Tolerance {
        // Two values per channel may lie close together: their difference is divided by a small deviation. And the
        // differences of an offset input have its rounding.
        Tolerance { f64: 1e-12, f32: 2e-5 + 1e-6 * self.offset, gradient: 1e-6 }
    }
}

fn case(shape: &[usize], affine: bool, train: bool, offset: f64) -> Box<dyn OpCase> {
    Box::new(BatchNorm { shape: shape.to_vec(), affine, train, offset, relu: false })
}

fn relu_case(shape: &[usize], train: bool) -> Box<dyn OpCase> {
    Box::new(BatchNorm { shape: shape.to_vec(), affine: true, train, offset: 0.0, relu: true })
}

fn cases() -> Vec<Box<dyn OpCase>> {
    let mut cases = Vec::new();
    for train in [true, false] {
        for affine in [true, false] {
            cases.push(case(&[5, 1], affine, train, 0.0));
            cases.push(case(&[2, 3, 5, 7], affine, train, 0.0));
            cases.push(case(&[97, 13], affine, train, 0.0));
        }
        cases.push(case(&[3, 1, 1, 4], true, train, 0.0));
        cases.extend([relu_case(&[5, 1], train), relu_case(&[2, 3, 5, 7], train), relu_case(&[97, 13], train)]);
    }
    cases.extend([relu_case(&[70, 124], true), relu_case(&[3, 31, 29, 5], true), relu_case(&[0, 4, 4, 3], false)]);
    // Tiles of columns: one below, at and above the width of one, with vectors and without.
    cases.extend([31, 33, 124, 128, 132].map(|channels| case(&[70, channels], true, true, 0.0)));
    // Several blocks and parts of uneven length.
    cases.push(case(&[3, 31, 29, 5], true, true, 0.0));
    cases.push(case(&[0, 4, 4, 3], true, false, 0.0));
    cases.push(case(&[1, 1, 1, 3], true, false, 0.0));
    cases
}

/// The first and last stage of ResNet-18 for CIFAR at batch 128.
pub fn benchmarks() -> Vec<Box<dyn OpCase>> {
    vec![case(&[128, 32, 32, 64], true, true, 0.0), case(&[128, 4, 4, 512], true, true, 0.0)]
}

#[test]
fn normalisation_agrees_with_its_definition() {
    check(&cases());
}

#[test]
fn a_far_mean_costs_no_precision() {
    let case = BatchNorm { shape: vec![5000, 3], affine: false, train: true, offset: 1000.0, relu: false };
    let input = case.inputs()[0].cast(DType::F32).unwrap();
    for device in std::iter::once(Device::Cpu).chain(test_device()) {
        let got = case.run(&[input.to_device(device).unwrap()]).unwrap().to_f64_vec().unwrap();
        for (got, want) in got.into_iter().zip(case.reference(&[input.to_f64_vec().unwrap()])) {
            assert!((got - want).abs() < case.tolerance().f32, "{got} and {want} on {device}");
        }
    }
}

#[test]
fn statistics_are_the_batchs_and_update_the_running_ones() {
    let x = Tensor::new(&[1.0f32, 10.0, 2.0, 10.0, 6.0, 10.0], [3, 2]).unwrap();
    let batch = batch_norm(&x, None, None, BatchNormMode::Train, EPS).unwrap().batch.unwrap();
    assert_eq!(batch.mean.to_vec::<f32>().unwrap(), [3.0, 10.0]);
    assert_eq!(batch.variance.to_vec::<f32>().unwrap(), [7.0, 0.0]);
    let vector = |value: f32| Tensor::new(&[value; 2], [2]).unwrap();
    let running = BatchStatistics { mean: vector(1.0), variance: vector(2.0) }.updated(&batch, 0.5).unwrap();
    assert_eq!(running.mean.to_vec::<f32>().unwrap(), [2.0, 5.5]);
    assert_eq!(running.variance.to_vec::<f32>().unwrap(), [4.5, 1.0]);
    assert!(batch_norm(&x, None, None, BatchNormMode::Eval(&running), EPS).unwrap().batch.is_none());

    let Some(device) = test_device() else { return };
    let batch =
        batch_norm(&x.to_device(device).unwrap(), None, None, BatchNormMode::Train, EPS).unwrap().batch.unwrap();
    assert_eq!(batch.mean.to_vec::<f32>().unwrap(), [3.0, 10.0]);
    assert_eq!(batch.variance.to_vec::<f32>().unwrap(), [7.0, 0.0]);
    let there = |value: f32| vector(value).to_device(device).unwrap();
    let running = BatchStatistics { mean: there(1.0), variance: there(2.0) }.updated(&batch, 0.5).unwrap();
    assert_eq!((running.mean.device(), running.variance.device()), (device, device));
    assert_eq!(running.mean.to_vec::<f32>().unwrap(), [2.0, 5.5]);
    assert_eq!(running.variance.to_vec::<f32>().unwrap(), [4.5, 1.0]);
    let short = BatchStatistics {
        mean: there(1.0),
        variance: Tensor::zeros([3], DType::F32).unwrap().to_device(device).unwrap(),
    };
    assert!(short.updated(&batch, 0.5).unwrap_err().to_string().contains("got (3), expected (2)"));
    let mixed = batch_norm(&x.to_device(device).unwrap(), Some(&vector(1.0)), None, BatchNormMode::Train, EPS);
    assert!(matches!(mixed.unwrap_err(), Error::DeviceMismatch { .. }));
}

#[test]
fn the_fused_relu_gives_the_bits_of_the_two_ops() {
    let (x, weight, bias) = (randn(&[6, 5, 3, 20], 0), randn(&[20], 1), randn(&[20], 2));
    let [x, weight, bias] = [x, weight, bias].map(|tensor| tensor.cast(DType::F32).unwrap());
    let running = BatchStatistics { mean: bias.clone(), variance: weight.square().unwrap() };
    for device in std::iter::once(Device::Cpu).chain(test_device()) {
        let there = |tensor: &Tensor| tensor.to_device(device).unwrap();
        let running = BatchStatistics { mean: there(&running.mean), variance: there(&running.variance) };
        for mode in [BatchNormMode::Train, BatchNormMode::Eval(&running)] {
            let inputs = [&x, &weight, &bias].map(|tensor| there(tensor).variable().unwrap());
            let [x, weight, bias] = &inputs;
            let fused = batch_norm_relu(x, weight, bias, mode, EPS).unwrap();
            let two = batch_norm(x, Some(weight), Some(bias), mode, EPS).unwrap();
            let pairs = fused.batch.as_ref().zip(two.batch.as_ref());
            for (a, b) in pairs.iter().flat_map(|(a, b)| [(&a.mean, &b.mean), (&a.variance, &b.variance)]) {
                assert_eq!(a.to_vec::<f32>().unwrap(), b.to_vec::<f32>().unwrap(), "statistics on {device}");
            }
            let two = two.output.relu().unwrap();
            assert_eq!(fused.output.to_vec::<f32>().unwrap(), two.to_vec::<f32>().unwrap(), "output on {device}");
            let gradients = |output: &Tensor| {
                let options = GradOptions { grad_output: Some(x.detach()), ..GradOptions::default() };
                let gradients = grad(output, &[x, weight, bias], options).unwrap();
                gradients.into_iter().map(|gradient| gradient.unwrap().to_vec::<f32>().unwrap()).collect::<Vec<_>>()
            };
            assert_eq!(gradients(&fused.output), gradients(&two), "gradients on {device}");
        }
    }
}

#[test]
fn bad_arguments_of_the_fused_relu_are_errors() {
    let (x, vector) = (randn(&[4, 3], 0), randn(&[3], 1));
    let refuse = |x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64| {
        batch_norm_relu(x, weight, bias, BatchNormMode::Train, eps).unwrap_err().to_string()
    };
    assert!(refuse(&x, &randn(&[4], 0), &vector, EPS).contains("(1, 4) for input (1, 4, 3)"));
    assert!(refuse(&x, &vector.cast(DType::F32).unwrap(), &vector, EPS).contains("dtype f32"));
    assert!(refuse(&x, &vector, &vector, 0.0).contains("positive eps"));
    assert!(refuse(&randn(&[1, 3], 0), &vector, &vector, EPS).contains("two values per channel"));
    assert!(refuse(&randn(&[3], 0), &vector, &vector, EPS).contains("expected (batch, …, channels)"));
    assert!(refuse(&Tensor::zeros([4, 3], DType::I64).unwrap(), &vector, &vector, EPS).contains("dtype i64"));
    let short = BatchStatistics { mean: vector.clone(), variance: randn(&[2], 0) };
    let eval = batch_norm_relu(&x, &vector, &vector, BatchNormMode::Eval(&short), EPS);
    assert!(eval.unwrap_err().to_string().contains("(1, 2) for input"));
}

#[test]
fn half_precision_maps_take_single_precision_parameters() {
    let (x, weight) = (randn(&[8, 3], 0).cast(DType::Bf16).unwrap(), Tensor::ones([3], DType::F32).unwrap());
    let weight = weight.variable().unwrap();
    let output = batch_norm(&x, Some(&weight), None, BatchNormMode::Train, EPS).unwrap().output;
    assert_eq!(output.dtype(), DType::Bf16);
    let gradients = output.square().unwrap().sum_all().unwrap().backward().unwrap();
    assert_eq!(gradients.get(&weight).unwrap().dtype(), DType::F32);

    let Some(device) = test_device() else { return };
    let there = |tensor: &Tensor| tensor.detach().to_device(device).unwrap();
    let weight = there(&weight).variable().unwrap();
    let on_device = batch_norm(&there(&x), Some(&weight), None, BatchNormMode::Train, EPS).unwrap().output;
    assert_eq!(on_device.to_f64_vec().unwrap(), output.to_f64_vec().unwrap());
    let options = GradOptions { grad_output: Some(there(&x)), ..GradOptions::default() };
    assert_eq!(grad(&on_device, &[&weight], options).unwrap()[0].as_ref().unwrap().dtype(), DType::F32);
}

#[test]
fn bad_arguments_are_errors() {
    let train = |x: &Tensor, weight: Option<&Tensor>, eps: f64| {
        batch_norm(x, weight, None, BatchNormMode::Train, eps).unwrap_err().to_string()
    };
    let x = randn(&[4, 3], 0);
    assert!(train(&x, Some(&randn(&[4], 0)), EPS).contains("(4) for input (4, 3)"));
    assert!(train(&x, Some(&randn(&[3], 0).cast(DType::F32).unwrap()), EPS).contains("dtype f32"));
    assert!(train(&x, None, 0.0).contains("eps must be positive"));
    assert!(train(&x, None, f64::NAN).contains("eps must be positive"));
    assert!(train(&randn(&[1, 1, 1, 3], 0), None, EPS).contains("two values per channel"));
    assert!(train(&randn(&[0, 2, 2, 3], 0), None, EPS).contains("two values per channel"));
    assert!(train(&randn(&[4, 0], 0), None, EPS).contains("no channels"));
    assert!(train(&randn(&[], 0), None, EPS).contains("no channels"));
    assert!(train(&Tensor::zeros([4, 3], DType::I64).unwrap(), None, EPS).contains("dtype i64"));
}
