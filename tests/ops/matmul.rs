//! Batched products and linear maps.

use std::fmt;

use gridgrad::ops::{Transposed, linear};
use gridgrad::{Result, Tensor};

use crate::harness::{OpCase, ROUNDING, Tolerance, Work, check, randn};

/// Sums of `k` products of normal numbers: the error grows with √k roundings.
fn sum_tolerance(k: usize) -> Tolerance {
    let growth = (k as f64).sqrt().max(1.0);
    Tolerance { f64: ROUNDING.f64 * growth, f32: ROUNDING.f32 * growth, ..ROUNDING }
}

#[derive(Debug)]
struct Matmul {
    left_batch: Vec<usize>,
    right_batch: Vec<usize>,
    mnk: [usize; 3],
    transposed: Transposed,
}

impl fmt::Display for Matmul {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

impl OpCase for Matmul {
    fn inputs(&self) -> Vec<Tensor> {
        let [m, n, k] = self.mnk;
        let left = if self.transposed.left { [k, m] } else { [m, k] };
        let right = if self.transposed.right { [n, k] } else { [k, n] };
        vec![randn(&[&self.left_batch[..], &left].concat(), 0), randn(&[&self.right_batch[..], &right].concat(), 1)]
    }

    fn run(&self, inputs: &[Tensor]) -> Result<Tensor> {
        inputs[0].matmul_transposed(&inputs[1], self.transposed)
    }

    /// The cases' batches are equal, or one of them is a single matrix.
    fn reference(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        let [m, n, k] = self.mnk;
        let (left, right): (usize, usize) = (self.left_batch.iter().product(), self.right_batch.iter().product());
        let mut output = Vec::new();
        for batch in 0..left.max(right) {
            let a = &inputs[0][if left == 1 { 0 } else { batch * m * k }..];
            let b = &inputs[1][if right == 1 { 0 } else { batch * k * n }..];
            for row in 0..m {
                for column in 0..n {
                    let product = |i: usize| {
                        let a = if self.transposed.left { a[i * m + row] } else { a[row * k + i] };
                        let b = if self.transposed.right { b[column * k + i] } else { b[i * n + column] };
                        a * b
                    };
                    output.push((0..k).map(product).sum());
                }
            }
        }
        output
    }

    fn work(&self) -> Work {
        let [m, n, k] = self.mnk.map(|extent| extent as u64);
        let count = |batch: &[usize]| batch.iter().product::<usize>() as u64;
        let (left, right) = (count(&self.left_batch), count(&self.right_batch));
        let products = left.max(right);
        Work { bytes: 4 * (left * m * k + right * k * n + products * m * n), flops: 2 * products * m * n * k }
    }

    fn tolerance(&self) -> Tolerance {
        sum_tolerance(self.mnk[2])
    }
}

struct Linear {
    outer: Vec<usize>,
    in_features: usize,
    out_features: usize,
    bias: bool,
}

impl fmt::Display for Linear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "linear {:?}×{} → {}, bias {}", self.outer, self.in_features, self.out_features, self.bias)
    }
}

impl OpCase for Linear {
    fn inputs(&self) -> Vec<Tensor> {
        let mut inputs = vec![
            randn(&[&self.outer[..], &[self.in_features]].concat(), 0),
            randn(&[self.out_features, self.in_features], 1),
        ];
        if self.bias {
            inputs.push(randn(&[self.out_features], 2));
        }
        inputs
    }

    fn run(&self, inputs: &[Tensor]) -> Result<Tensor> {
        linear(&inputs[0], &inputs[1], inputs.get(2))
    }

    fn reference(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        let rows: usize = self.outer.iter().product();
        let value = |row: usize, out: usize| {
            let bias = if self.bias { inputs[2][out] } else { 0.0 };
            let product = |i: usize| inputs[0][row * self.in_features + i] * inputs[1][out * self.in_features + i];
            bias + (0..self.in_features).map(product).sum::<f64>()
        };
        (0..rows * self.out_features).map(|i| value(i / self.out_features, i % self.out_features)).collect()
    }

    fn work(&self) -> Work {
        let rows = self.outer.iter().product::<usize>() as u64;
        let (k, n) = (self.in_features as u64, self.out_features as u64);
        Work { bytes: 4 * (rows * k + k * n + rows * n), flops: 2 * rows * k * n }
    }

    fn tolerance(&self) -> Tolerance {
        sum_tolerance(self.in_features)
    }
}

fn cases() -> Vec<Box<dyn OpCase>> {
    let mut cases: Vec<Box<dyn OpCase>> = Vec::new();
    for (left, right) in [(false, false), (true, false), (false, true), (true, true)] {
        let transposed = Transposed { left, right };
        for (left_batch, right_batch, mnk) in [
            (vec![], vec![], [1, 1, 1]),
            (vec![5], vec![5], [3, 7, 2]),
            (vec![2, 3], vec![], [17, 5, 33]),
            (vec![1], vec![4], [2, 3, 5]),
            (vec![], vec![], [65, 129, 31]),
        ] {
            cases.push(Box::new(Matmul { left_batch, right_batch, mnk, transposed }));
        }
    }
    for (outer, in_features, out_features, bias) in
        [(vec![], 3, 2, true), (vec![5], 1, 1, false), (vec![2, 3, 7], 13, 11, true), (vec![100], 96, 31, true)]
    {
        cases.push(Box::new(Linear { outer, in_features, out_features, bias }));
    }
    cases
}

/// The linear maps of CrossFormer-S at batch 8, first and last stage.
pub fn benchmarks() -> Vec<Box<dyn OpCase>> {
    let linear = |rows, in_features, out_features| {
        Box::new(Linear { outer: vec![rows], in_features, out_features, bias: true }) as Box<dyn OpCase>
    };
    vec![linear(8 * 3136, 96, 384), linear(8 * 3136, 384, 96), linear(8 * 49, 768, 3072), linear(8 * 49, 3072, 768)]
}

#[test]
fn products_agree_with_their_definition() {
    check(&cases());
}

#[test]
fn bad_shapes_are_errors() {
    let message = |result: Result<Tensor>| result.unwrap_err().to_string();
    let (a, b) = (randn(&[2, 3], 0), randn(&[2, 3], 1));
    assert!(message(a.matmul(&b)).contains("matmul: (2, 3) by (2, 3)"));
    assert!(message(a.matmul(&randn(&[3], 0))).contains("matmul"));
    assert!(message(linear(&a, &randn(&[4, 2], 0), None)).contains("the last axis must be 2"));
    assert!(message(linear(&a, &randn(&[4, 3], 0), Some(&randn(&[3], 0)))).contains("bias (3)"));
    assert!(message(a.matmul(&b.cast(gridgrad::DType::F32).unwrap())).contains("dtype f32"));
}
