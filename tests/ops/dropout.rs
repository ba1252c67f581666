//! Dropout of elements and of residual branches.

use std::fmt;

use gridgrad::ops::{drop_path, dropout};
use gridgrad::random::Philox;
use gridgrad::{DType, Result, Tensor};

use crate::harness::{OpCase, Work, check, randn};

const SEED: u64 = 11;

#[derive(Debug)]
struct Dropout {
    shape: Vec<usize>,
    p: f64,
    /// `drop_path`, one decision per sample.
    path: bool,
}

impl fmt::Display for Dropout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

impl OpCase for Dropout {
    fn inputs(&self) -> Vec<Tensor> {
        vec![randn(&self.shape, 0)]
    }

    fn run(&self, inputs: &[Tensor]) -> Result<Tensor> {
        let op = if self.path { drop_path } else { dropout };
        op(&inputs[0], self.p, Philox::new(SEED))
    }

    fn reference(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        let sample: usize = if self.path { self.shape[1..].iter().product() } else { 1 };
        let value = |(i, &x): (usize, &f64)| {
            let kept = f64::from(Philox::new(SEED).bits((i / sample) as u64)) >= self.p * 2f64.powi(32);
            if kept { x / (1.0 - self.p) } else { 0.0 }
        };
        inputs[0].iter().enumerate().map(value).collect()
    }

    fn work(&self) -> Work {
        let elements = self.shape.iter().product::<usize>() as u64;
        Work { bytes: 8 * elements, flops: elements }
    }
}

fn cases() -> Vec<Box<dyn OpCase>> {
    let mut cases: Vec<Box<dyn OpCase>> = Vec::new();
    for p in [0.0, 0.1, 0.5, 0.9] {
        // Around the 64 numbers that are drawn at once, and around one piece of a parallel loop.
        for shape in [vec![], vec![0], vec![1], vec![3, 21], vec![64], vec![65], vec![3, 5, 1100]] {
            cases.push(Box::new(Dropout { shape, p, path: false }));
        }
        for shape in [vec![0, 3], vec![3, 0], vec![1], vec![9], vec![5, 3, 7], vec![3, 8191], vec![40, 500]] {
            cases.push(Box::new(Dropout { shape, p, path: true }));
        }
    }
    cases.push(Box::new(Dropout { shape: vec![100], p: 1.0, path: false }));
    cases
}

/// CrossFormer-S at batch 8, first stage.
pub fn benchmarks() -> Vec<Box<dyn OpCase>> {
    [false, true].map(|path| Box::new(Dropout { shape: vec![8, 3136, 96], p: 0.1, path }) as Box<dyn OpCase>).into()
}

#[test]
fn dropout_agrees_with_its_definition() {
    check(&cases());
}

#[test]
fn the_share_of_survivors_and_the_mean_are_right() {
    let n = 100_000;
    let ones = Tensor::ones([n], DType::F32).unwrap();
    for p in [0.1, 0.3, 0.75] {
        for op in [dropout, drop_path] {
            let output = op(&ones, p, Philox::new(1)).unwrap().to_f64_vec().unwrap();
            let kept = output.iter().filter(|&&v| v != 0.0).count() as f64 / n as f64;
            // Four standard deviations.
            assert!((kept - (1.0 - p)).abs() < 4.0 * (p * (1.0 - p) / n as f64).sqrt(), "{p}: {kept}");
            assert!(output.iter().all(|&v| v == 0.0 || v == f64::from((1.0 / (1.0 - p)) as f32)));
        }
    }
}

#[test]
fn the_backward_makes_the_same_mask_again_and_other_streams_make_others() {
    let x = Tensor::ones([1000], DType::F32).unwrap().variable().unwrap();
    let output = dropout(&x, 0.4, Philox::new(1)).unwrap();
    let gradients = output.sum_all().unwrap().backward().unwrap();
    assert_eq!(gradients.get(&x).unwrap().to_f64_vec().unwrap(), output.to_f64_vec().unwrap());
    assert_ne!(dropout(&x, 0.4, Philox::new(2)).unwrap().to_f64_vec().unwrap(), output.to_f64_vec().unwrap());
}

#[test]
fn a_nan_is_not_hidden() {
    let x = Tensor::full([100], f64::NAN, DType::F32).unwrap();
    for p in [0.5, 1.0] {
        assert!(dropout(&x, p, Philox::new(1)).unwrap().to_f64_vec().unwrap().iter().all(|v| v.is_nan()));
    }
}

#[test]
fn bad_arguments_are_errors() {
    let message = |result: Result<Tensor>| result.unwrap_err().to_string();
    let (x, stream) = (randn(&[2], 0), Philox::new(0));
    for p in [-0.1, 1.1, f64::NAN] {
        assert!(message(dropout(&x, p, stream)).contains("dropout: probability"));
        assert!(message(drop_path(&x, p, stream)).contains("drop_path: probability"));
    }
    assert!(message(drop_path(&x, 1.0, stream)).contains("to below 1"));
    assert!(message(drop_path(&randn(&[], 0), 0.1, stream)).contains("got a scalar"));
    assert!(message(dropout(&Tensor::new(&[1i64], [1]).unwrap(), 0.1, stream)).contains("got dtype i64"));
}
