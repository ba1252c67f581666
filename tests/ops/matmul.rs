//! Batched products.

use std::fmt;

use gridgrad::ops::Transposed;
use gridgrad::{Result, Tensor};

use crate::harness::{OpCase, ROUNDING, Tolerance, Work, check, check_on_device, randn, test_device};

/// Sums of `k` products of normal numbers: the error grows with √k roundings.
pub fn sum_tolerance(k: usize) -> Tolerance {
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

impl Matmul {
    /// The operands' matrices for each of the result, by walking the axes from the front.
    fn batch(&self) -> Vec<[usize; 2]> {
        let rank = self.left_batch.len().max(self.right_batch.len());
        let padded = |batch: &[usize]| [vec![1; rank - batch.len()], batch.to_vec()].concat();
        let mut matrices = vec![[0, 0]];
        for (left, right) in padded(&self.left_batch).into_iter().zip(padded(&self.right_batch)) {
            let along = |[a, b]: [usize; 2]| {
                (0..left.max(right)).map(move |i| [a * left + i.min(left - 1), b * right + i.min(right - 1)])
            };
            matrices = matrices.into_iter().flat_map(along).collect();
        }
        matrices
    }
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

    fn reference(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        let [m, n, k] = self.mnk;
        let mut output = Vec::new();
        for [left, right] in self.batch() {
            let (a, b) = (&inputs[0][left * m * k..], &inputs[1][right * k * n..]);
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
        let products = self.batch().len() as u64;
        Work { bytes: 4 * (left * m * k + right * k * n + products * m * n), flops: 2 * products * m * n * k }
    }

    fn tolerance(&self) -> Tolerance {
        sum_tolerance(self.mnk[2])
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
            // Nothing to add up, one row, one column.
            (vec![2], vec![2], [3, 2, 0]),
            (vec![3], vec![1], [1, 9, 16]),
            (vec![], vec![], [24, 1, 8]),
        ] {
            cases.push(Box::new(Matmul { left_batch, right_batch, mnk, transposed }));
        }
    }
    // Axes that no operand merges, more than a kernel counts.
    let transposed = Transposed::default();
    for (left_batch, right_batch) in [(vec![2, 1, 3], vec![2, 1]), (vec![2, 1, 2, 1, 2], vec![3, 1, 2, 1])] {
        cases.push(Box::new(Matmul { left_batch, right_batch, mnk: [2, 3, 4], transposed }));
    }
    cases
}

/// Around the edges of the kernels' tiles.
fn tile_cases() -> Vec<Matmul> {
    let mut cases = Vec::new();
    for (left, right) in [(false, false), (true, false), (false, true), (true, true)] {
        let transposed = Transposed { left, right };
        for (left_batch, right_batch, mnk) in [
            // Rows of whole 16 bytes: a small tile, and a little more and less than one.
            (vec![], vec![], [64, 64, 32]),
            (vec![2], vec![2], [72, 56, 40]),
            // Enough tiles on the emulator for the large one, with remainders.
            (vec![], vec![], [136, 136, 40]),
            // Few tiles and many terms: k is split.
            (vec![], vec![], [8, 16, 520]),
            (vec![], vec![], [5, 3, 775]),
        ] {
            cases.push(Matmul { left_batch, right_batch, mnk, transposed });
        }
    }
    cases
}

/// Attention scores and their use, of 49 tokens in 64 windows, 3 heads of 32 channels.
pub fn benchmarks() -> Vec<Box<dyn OpCase>> {
    let product = |mnk, right| {
        let batch = vec![64 * 3];
        let transposed = Transposed { left: false, right };
        Box::new(Matmul { left_batch: batch.clone(), right_batch: batch, mnk, transposed }) as Box<dyn OpCase>
    };
    vec![product([49, 49, 32], true), product([49, 32, 49], false)]
}

#[test]
fn products_agree_with_their_definition() {
    check(&cases());
}

#[test]
fn tiles_agree_with_the_processor() {
    tile_cases().iter().for_each(|case| check_on_device(case));
}

#[test]
fn bad_shapes_are_errors() {
    let message = |result: Result<Tensor>| result.unwrap_err().to_string();
    let (a, b) = (randn(&[2, 3], 0), randn(&[2, 3], 1));
    assert!(message(a.matmul(&b)).contains("matmul: (2, 3) by (2, 3)"));
    assert!(message(a.matmul(&randn(&[3], 0))).contains("matmul"));
    assert!(message(a.matmul(&b.cast(gridgrad::DType::F32).unwrap())).contains("dtype f32"));
}

#[test]
fn operands_on_two_devices_are_an_error() {
    let Some(device) = test_device() else { return };
    let a = randn(&[2, 2], 0).cast(gridgrad::DType::F32).unwrap();
    let error = a.matmul(&a.to_device(device).unwrap()).unwrap_err();
    assert!(matches!(error, gridgrad::Error::DeviceMismatch { op: "matmul", .. }), "{error}");
}
