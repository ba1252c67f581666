//! Layer normalisation.

use std::fmt;

use gridgrad::autograd::{GradOptions, grad};
use gridgrad::ops::layer_norm;
use gridgrad::{DType, Device, Result, Tensor};

use crate::harness::{OpCase, ROUNDING, Tolerance, Work, check, randn, test_device};

struct LayerNorm {
    outer: Vec<usize>,
    channels: usize,
    /// Added to the input, whose deviation is 1.
    mean: f64,
    eps: f64,
}

impl fmt::Display for LayerNorm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "layer_norm {:?}×{}, mean {}, eps {}", self.outer, self.channels, self.mean, self.eps)
    }
}

impl OpCase for LayerNorm {
    fn inputs(&self) -> Vec<Tensor> {
        let input = randn(&[&self.outer[..], &[self.channels]].concat(), 0).shift(self.mean).unwrap();
        vec![input, randn(&[self.channels], 1), randn(&[self.channels], 2)]
    }

    fn run(&self, inputs: &[Tensor]) -> Result<Tensor> {
        layer_norm(&inputs[0], &inputs[1], &inputs[2], self.eps)
    }

    fn reference(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        let n = self.channels as f64;
        let row = |row: &[f64]| -> Vec<f64> {
            let mean = row.iter().sum::<f64>() / n;
            let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
            let normalised = row.iter().map(|x| (x - mean) / (variance + self.eps).sqrt());
            normalised.zip(inputs[1].iter().zip(&inputs[2])).map(|(x, (w, b))| x * w + b).collect()
        };
        inputs[0].chunks(self.channels.max(1)).flat_map(row).collect()
    }

    fn work(&self) -> Work {
        let elements = (self.outer.iter().product::<usize>() * self.channels) as u64;
        Work { bytes: 4 * (2 * elements + 2 * self.channels as u64), flops: 8 * elements }
    }

    fn tolerance(&self) -> Tolerance {
        // The reference itself loses ulp(mean) in its subtraction, and so do central differences.
        let size = self.mean.abs().max(1.0);
        // With one or two channels, eps alone keeps the deviation from 0, so the output is steep in the input.
        let steepness = if self.channels < 4 { 10.0 } else { 1.0 };
        Tolerance {
            f64: ROUNDING.f64 * size * steepness,
            f32: ROUNDING.f32 * steepness,
            gradient: ROUNDING.gradient * size.sqrt() * steepness,
        }
    }
}

fn cases() -> Vec<Box<dyn OpCase>> {
    let case = |outer: &[usize], channels, mean, eps| {
        Box::new(LayerNorm { outer: outer.to_vec(), channels, mean, eps }) as Box<dyn OpCase>
    };
    let mut cases = vec![
        case(&[], 5, 0.0, 1e-5),
        case(&[0], 4, 0.0, 1e-5),
        case(&[3, 2], 0, 0.0, 1e-5),
        case(&[2, 3, 7], 96, 0.0, 1e-6),
        case(&[301], 33, 0.0, 1e-5),
        case(&[9], 64, 2048.0, 1e-5),
    ];
    // Around the width of the vector loops and up to the widest rows that models use.
    // Groups of a part of a warp, of a block; rows too wide for registers.
    let shapes = [(67, 40), (2, 1032), (2, 2044), (1, 8192), (1, 8200)];
    cases.extend(shapes.map(|(rows, channels)| case(&[rows], channels, 0.5, 1e-1)));
    cases.extend([1, 2, 15, 16, 17, 31, 49, 768, 1024].map(|channels| case(&[5], channels, 0.5, 1e-1)));
    cases
}

/// CrossFormer-S at batch 8: the first norm of each stage.
pub fn benchmarks() -> Vec<Box<dyn OpCase>> {
    [(3136, 96), (784, 192), (196, 384), (49, 768)]
        .map(|(tokens, channels)| {
            Box::new(LayerNorm { outer: vec![8, tokens], channels, mean: 0.0, eps: 1e-5 }) as Box<dyn OpCase>
        })
        .into()
}

#[test]
fn layer_norm_agrees_with_its_formula() {
    check(&cases());
}

/// A deviation of 1 around 60 000 has an ulp of 1/256: whatever is lost beyond the input's own rounding shows.
#[test]
fn a_large_mean_does_not_cancel() {
    let channels = 96;
    let values: Vec<f32> = (0..channels).map(|i| 60_000.0 + (i % 7) as f32).collect();
    let (weight, bias) =
        (Tensor::ones([channels], DType::F32).unwrap(), Tensor::zeros([channels], DType::F32).unwrap());
    let input = Tensor::new(&values, [1, channels]).unwrap().variable().unwrap();
    let output = layer_norm(&input, &weight, &bias, 0.0).unwrap();
    let exact = LayerNorm { outer: vec![1], channels, mean: 0.0, eps: 0.0 };
    let inputs = [input.to_f64_vec().unwrap(), weight.to_f64_vec().unwrap(), bias.to_f64_vec().unwrap()];
    for (got, want) in output.to_f64_vec().unwrap().into_iter().zip(exact.reference(&inputs)) {
        assert!((got - want).abs() < 1e-6, "{got} {want}");
    }
    // The gradient at the far row is that of the same row around 0.
    let near = input.detach().shift(-60_000.0).unwrap().variable().unwrap();
    let slope = |input: &Tensor| {
        let output = layer_norm(input, &weight, &bias, 0.0).unwrap();
        let grad_output = Some(randn(&[1, channels], 3).cast(DType::F32).unwrap());
        grad(&output, &[input], GradOptions { grad_output, ..GradOptions::default() }).unwrap().remove(0).unwrap()
    };
    for (far, near) in slope(&input).to_f64_vec().unwrap().into_iter().zip(slope(&near).to_f64_vec().unwrap()) {
        assert!((far - near).abs() < 1e-6, "{far} {near}");
    }
}

/// The sums over rows have more terms than blocks: each block walks over several rows.
#[test]
fn gradients_of_many_rows_agree_on_a_device() {
    let Some(device) = test_device() else { return };
    for channels in [520, 5] {
        let rows = if channels == 5 { 2100 } else { 260 };
        let inputs = [randn(&[rows, channels], 0), randn(&[channels], 1), randn(&[channels], 2)];
        let grad_output = randn(&[rows, channels], 3).cast(DType::F32).unwrap();
        let gradients = |device: Device| -> Vec<f64> {
            let there = |tensor: &Tensor| tensor.cast(DType::F32).unwrap().to_device(device).unwrap();
            let [x, w, b] = inputs.each_ref().map(|input| there(input).variable().unwrap());
            let output = layer_norm(&x, &w, &b, 1e-5).unwrap();
            let options = GradOptions { grad_output: Some(there(&grad_output)), ..GradOptions::default() };
            let gradients = grad(&output, &[&x, &w, &b], options).unwrap();
            gradients.into_iter().flatten().flat_map(|gradient| gradient.to_f64_vec().unwrap()).collect()
        };
        for (got, want) in gradients(device).into_iter().zip(gradients(Device::Cpu)) {
            assert!((got - want).abs() < 2e-4, "{channels} channels: {got} and {want}");
        }
    }
}

#[test]
fn a_nan_spoils_its_own_row_and_no_other() {
    let (weight, bias) = (Tensor::ones([2], DType::F32).unwrap(), Tensor::zeros([2], DType::F32).unwrap());
    let input = Tensor::new(&[1.0, f32::NAN, 1.0, 3.0], [2, 2]).unwrap();
    let output = layer_norm(&input, &weight, &bias, 0.0).unwrap().to_vec::<f32>().unwrap();
    assert!(output[0].is_nan() && output[1].is_nan());
    assert_eq!(output[2..], [-1.0, 1.0]);
}

#[test]
fn bad_arguments_are_errors() {
    let message = |result: Result<Tensor>| result.unwrap_err().to_string();
    let (input, weight) = (randn(&[2, 3], 0), randn(&[3], 1));
    assert!(message(layer_norm(&input, &randn(&[2], 0), &weight, 0.0)).contains("input (2, 3), weight (2), bias (3)"));
    assert!(message(layer_norm(&input, &weight, &randn(&[1], 0), 0.0)).contains("bias (1)"));
    assert!(message(layer_norm(&input, &input, &input, 0.0)).contains("expected weight (channels)"));
    assert!(message(layer_norm(&input, &weight, &weight, -1.0)).contains("eps -1"));
    assert!(message(layer_norm(&input, &weight, &weight, f64::NAN)).contains("eps NaN"));
    assert!(message(layer_norm(&input, &weight, &weight.cast(DType::F32).unwrap(), 0.0)).contains("got dtype f32"));
    let labels = Tensor::new(&[1i64], [1]).unwrap();
    assert!(message(layer_norm(&labels, &labels, &labels, 0.0)).contains("got dtype i64"));
}
