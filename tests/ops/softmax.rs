//! Softmax and its logarithm.

use std::fmt;

use gridgrad::ops::{log_softmax, softmax};
use gridgrad::{Result, Tensor};

use crate::harness::{OpCase, ROUNDING, Tolerance, Work, check, randn};

#[derive(Debug)]
struct Softmax {
    shape: Vec<usize>,
    axis: isize,
    logarithm: bool,
    /// Factor on standard normal logits.
    spread: f64,
}

impl fmt::Display for Softmax {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

impl OpCase for Softmax {
    fn inputs(&self) -> Vec<Tensor> {
        vec![randn(&self.shape, 0).scale(self.spread).unwrap()]
    }

    fn run(&self, inputs: &[Tensor]) -> Result<Tensor> {
        if self.logarithm { log_softmax(&inputs[0], self.axis) } else { softmax(&inputs[0], self.axis) }
    }

    fn reference(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        let axis = self.axis.rem_euclid(self.shape.len() as isize) as usize;
        let (count, inner) = (self.shape[axis], self.shape[axis + 1..].iter().product::<usize>());
        let value = |at: usize| {
            let first = at / (count * inner) * count * inner + at % inner;
            let logits: Vec<f64> = (0..count).map(|i| inputs[0][first + i * inner]).collect();
            let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = logits.iter().map(|x| (x - largest).exp()).sum();
            let logarithm = inputs[0][at] - largest - sum.ln();
            if self.logarithm { logarithm } else { logarithm.exp() }
        };
        (0..inputs[0].len()).map(value).collect()
    }

    fn work(&self) -> Work {
        let elements = self.shape.iter().product::<usize>() as u64;
        Work { bytes: 8 * elements, flops: 5 * elements }
    }

    fn tolerance(&self) -> Tolerance {
        // A logarithm's error is relative to its size, and the largest of the reference measures it. The second
        // derivative in central differences grows with the spread of the logits.
        Tolerance { gradient: ROUNDING.gradient * self.spread.max(1.0), ..ROUNDING }
    }
}

fn cases() -> Vec<Box<dyn OpCase>> {
    let mut cases: Vec<Box<dyn OpCase>> = Vec::new();
    for logarithm in [false, true] {
        let mut add = |shape: &[usize], axis, spread| {
            cases.push(Box::new(Softmax { shape: shape.to_vec(), axis, logarithm, spread }));
        };
        for width in [1, 2, 15, 16, 17, 49, 1000] {
            add(&[3, width], -1, 1.0);
        }
        add(&[7], 0, 1.0);
        add(&[4, 5, 6], 0, 1.0);
        add(&[4, 5, 6], 1, 1.0);
        add(&[4, 5, 6], -2, 30.0);
        add(&[201, 49], 1, 10.0);
        add(&[0, 3], 1, 1.0);
        add(&[3, 0], 1, 1.0);
    }
    cases
}

/// CrossFormer-S at batch 8: attention of stage 1 (64 groups of 49 tokens, 3 heads) and of stage 4 (24 heads).
pub fn benchmarks() -> Vec<Box<dyn OpCase>> {
    [[8 * 64 * 3, 49, 49], [8 * 24, 49, 49]]
        .map(|shape| {
            Box::new(Softmax { shape: shape.to_vec(), axis: -1, logarithm: false, spread: 1.0 }) as Box<dyn OpCase>
        })
        .into()
}

#[test]
fn softmax_agrees_with_its_formula() {
    check(&cases());
}

#[test]
fn masks_and_extreme_logits_follow_the_limits() {
    let values = |logits: &[f32], op: fn(&Tensor, isize) -> Result<Tensor>| {
        op(&Tensor::new(logits, [logits.len()]).unwrap(), 0).unwrap().to_vec::<f32>().unwrap()
    };
    let (low, high, nan) = (f32::NEG_INFINITY, f32::INFINITY, f32::NAN);
    assert_eq!(values(&[low, 0.0, low, 0.0], softmax), [0.0, 0.5, 0.0, 0.5]);
    assert_eq!(values(&[low, 3.0], log_softmax), [low, 0.0]);
    assert_eq!(values(&[1e4, -1e4, 65504.0], softmax), [0.0, 0.0, 1.0]);
    assert_eq!(values(&[1e4, 65504.0], log_softmax), [-55504.0, 0.0]);
    assert_eq!(values(&[f32::MAX, f32::MIN], softmax), [1.0, 0.0]);
    for row in [[low, low], [high, 0.0], [high, high], [nan, 0.0], [0.0, nan], [low, nan]] {
        assert!(values(&row, softmax).iter().all(|v| v.is_nan()), "{row:?}");
        assert!(values(&row, log_softmax).iter().all(|v| v.is_nan()), "{row:?}");
    }
}

#[test]
fn a_masked_logit_gets_no_gradient() {
    let logits = Tensor::new(&[f32::NEG_INFINITY, 0.5, 1.0], [3]).unwrap().variable().unwrap();
    let gradients = softmax(&logits, 0).unwrap().square().unwrap().sum_all().unwrap().backward().unwrap();
    let gradient = gradients.get(&logits).unwrap().to_vec::<f32>().unwrap();
    assert_eq!(gradient[0], 0.0);
    assert!(gradient[1] < 0.0 && (gradient[1] + gradient[2]).abs() < 1e-7);
}

#[test]
fn bad_arguments_are_errors() {
    let message = |result: Result<Tensor>| result.unwrap_err().to_string();
    assert!(message(softmax(&randn(&[2, 3], 0), 2)).contains("softmax: axis 2 of a tensor of shape (2, 3)"));
    assert!(message(log_softmax(&randn(&[], 0), 0)).contains("log_softmax: axis 0"));
    assert!(message(softmax(&Tensor::new(&[1i64], [1]).unwrap(), 0)).contains("got dtype i64"));
}
