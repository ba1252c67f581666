//! Sums, means, extrema and indices of the largest.

use std::fmt;

use gridgrad::tensor::Shape;
use gridgrad::{DType, Device, Result, Tensor};

use crate::harness::{Derivatives, OpCase, ROUNDING, Tolerance, Work, check, randn, test_device};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Sum,
    Mean,
    Max,
    Min,
}

#[derive(Debug)]
struct Reduce {
    kind: Kind,
    shape: Vec<usize>,
    axes: Vec<isize>,
    keep: bool,
}

impl fmt::Display for Reduce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

impl Reduce {
    fn reduced(&self) -> Vec<bool> {
        let rank = self.shape.len() as isize;
        (0..rank).map(|axis| self.axes.iter().any(|&a| a.rem_euclid(rank) == axis)).collect()
    }

    fn count(&self) -> usize {
        self.shape.iter().zip(self.reduced()).filter(|(_, reduced)| *reduced).map(|(&extent, _)| extent).product()
    }
}

impl OpCase for Reduce {
    fn inputs(&self) -> Vec<Tensor> {
        vec![randn(&self.shape, 0)]
    }

    fn run(&self, inputs: &[Tensor]) -> Result<Tensor> {
        let x = &inputs[0];
        let output = match self.kind {
            Kind::Sum => x.sum(&self.axes, self.keep),
            Kind::Mean => x.mean(&self.axes, self.keep),
            Kind::Max => x.max(&self.axes, self.keep),
            Kind::Min => x.min(&self.axes, self.keep),
        }?;
        let extents = self.shape.iter().zip(self.reduced());
        let expected: Vec<usize> = if self.keep {
            extents.map(|(&extent, reduced)| if reduced { 1 } else { extent }).collect()
        } else {
            extents.filter(|(_, reduced)| !reduced).map(|(&extent, _)| extent).collect()
        };
        assert_eq!(**output.shape(), expected, "{self}");
        Ok(output)
    }

    fn reference(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        let reduced = self.reduced();
        let kept: usize = self.shape.iter().zip(&reduced).filter(|(_, reduced)| !**reduced).map(|(&n, _)| n).product();
        let mut groups = vec![Vec::new(); kept];
        for (flat, &value) in inputs[0].iter().enumerate() {
            let (mut rest, mut index, mut stride) = (flat, 0, 1);
            for (&extent, &reduced) in self.shape.iter().zip(&reduced).rev() {
                if !reduced {
                    index += rest % extent * stride;
                    stride *= extent;
                }
                rest /= extent;
            }
            groups[index].push(value);
        }
        let combine = |group: Vec<f64>| match self.kind {
            Kind::Sum => group.iter().sum(),
            Kind::Mean => group.iter().sum::<f64>() / group.len() as f64,
            Kind::Max => group.into_iter().fold(f64::NEG_INFINITY, f64::max),
            Kind::Min => group.into_iter().fold(f64::INFINITY, f64::min),
        };
        groups.into_iter().map(combine).collect()
    }

    fn work(&self) -> Work {
        let elements = self.shape.iter().product::<usize>() as u64;
        let count = self.count() as u64;
        Work { bytes: 4 * (elements + elements / count.max(1)), flops: elements }
    }

    fn tolerance(&self) -> Tolerance {
        let growth = if self.kind == Kind::Sum { (self.count() as f64).sqrt().max(1.0) } else { 1.0 };
        Tolerance { f64: ROUNDING.f64 * growth, f32: ROUNDING.f32 * growth, ..ROUNDING }
    }
}

/// A reduction to the shape that was stretched.
struct SumTo {
    from: Vec<usize>,
    to: Vec<usize>,
}

impl fmt::Display for SumTo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sum {:?} to {:?}", self.from, self.to)
    }
}

impl OpCase for SumTo {
    fn inputs(&self) -> Vec<Tensor> {
        vec![randn(&self.from, 0)]
    }

    fn run(&self, inputs: &[Tensor]) -> Result<Tensor> {
        inputs[0].sum_to(&Shape::from(&self.to[..]))
    }

    fn reference(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        let missing = self.from.len() - self.to.len();
        let mut sums = vec![0.0; self.to.iter().product()];
        for (flat, value) in inputs[0].iter().enumerate() {
            let (mut rest, mut index, mut stride) = (flat, 0, 1);
            for (axis, &extent) in self.from.iter().enumerate().rev() {
                if axis >= missing && self.to[axis - missing] != 1 {
                    index += rest % extent * stride;
                    stride *= extent;
                }
                rest /= extent;
            }
            sums[index] += value;
        }
        sums
    }

    fn work(&self) -> Work {
        let [from, to] = [&self.from, &self.to].map(|shape| shape.iter().product::<usize>() as u64);
        Work { bytes: 4 * (from + to), flops: from }
    }

    fn tolerance(&self) -> Tolerance {
        let count: usize = self.from.iter().product();
        let growth = (count as f64).sqrt().max(1.0);
        Tolerance { f64: ROUNDING.f64 * growth, f32: ROUNDING.f32 * growth, ..ROUNDING }
    }
}

/// Index of the largest along the last axis.
struct Argmax(Vec<usize>);

impl fmt::Display for Argmax {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "argmax {:?}", self.0)
    }
}

impl OpCase for Argmax {
    /// Rounded, so that there are ties.
    fn inputs(&self) -> Vec<Tensor> {
        let values: Vec<f64> = randn(&self.0, 0).to_f64_vec().unwrap().into_iter().map(f64::round).collect();
        vec![Tensor::new(&values, self.0.clone()).unwrap()]
    }

    fn run(&self, inputs: &[Tensor]) -> Result<Tensor> {
        inputs[0].argmax()
    }

    fn reference(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        let first_largest = |row: &[f64]| {
            let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            row.iter().position(|&v| v == largest).unwrap() as f64
        };
        inputs[0].chunks(self.0[self.0.len() - 1]).map(first_largest).collect()
    }

    fn work(&self) -> Work {
        Work { bytes: 4 * self.0.iter().product::<usize>() as u64, flops: 0 }
    }

    fn derivatives(&self) -> Derivatives {
        Derivatives::None
    }
}

fn cases() -> Vec<Box<dyn OpCase>> {
    let mut cases: Vec<Box<dyn OpCase>> = Vec::new();
    let axis_sets: [(&[usize], &[isize]); 21] = [
        (&[], &[]),
        (&[5], &[0]),
        (&[3, 4], &[]),
        (&[3, 17], &[1]),
        (&[17, 3], &[0]),
        (&[3, 4], &[-1, 0]),
        (&[2, 3, 4], &[1]),
        (&[2, 3, 4], &[0, 2]),
        (&[2, 3, 4, 5], &[-2, 1]),
        (&[2, 3, 4, 5], &[0, 3]),
        (&[2, 1, 3], &[1]),
        (&[0, 3], &[1]),
        // Around one piece of a parallel loop, and several parts of a parallel sum.
        (&[20_011], &[0]),
        (&[3, 9001], &[1]),
        (&[9001, 3], &[0]),
        (&[700, 3, 5], &[1]),
        (&[700, 3, 5], &[2]),
        // Columns in fours, and chunks of rows and of columns on a GPU.
        (&[3, 33, 36], &[1]),
        (&[1100, 8], &[0]),
        (&[5, 8, 3, 4], &[0, 2]),
        (&[2, 5000], &[1]),
    ];
    for kind in [Kind::Sum, Kind::Mean, Kind::Max, Kind::Min] {
        for (shape, axes) in axis_sets {
            let small = shape.iter().product::<usize>() < 1000;
            for &keep in if small { &[false, true][..] } else { &[false] } {
                cases.push(Box::new(Reduce { kind, shape: shape.to_vec(), axes: axes.to_vec(), keep }));
            }
        }
    }
    // The sum of nothing is 0, the mean of nothing NaN.
    for kind in [Kind::Sum, Kind::Mean] {
        for (shape, axes) in [(vec![0], vec![0]), (vec![3, 0], vec![1]), (vec![2, 0, 3], vec![1])] {
            cases.push(Box::new(Reduce { kind, shape, axes, keep: false }));
        }
    }
    for (from, to) in [
        (vec![2, 3], vec![2, 3]),
        (vec![2, 3], vec![]),
        (vec![2, 3], vec![3]),
        (vec![2, 3], vec![2, 1]),
        (vec![4, 2, 3, 5], vec![2, 1, 5]),
        (vec![4, 2, 3, 5], vec![4, 1, 3, 1]),
        (vec![0, 3], vec![1, 3]),
        (vec![1, 3], vec![3]),
    ] {
        cases.push(Box::new(SumTo { from, to }));
    }
    for shape in [vec![1], vec![7], vec![5, 9], vec![2, 3, 4], vec![0, 4], vec![9001, 2], vec![2, 9001]] {
        cases.push(Box::new(Argmax(shape)));
    }
    cases
}

/// CrossFormer-S at batch 8, first stage: the gradient of a bias, and the mean over the tokens of the last stage.
pub fn benchmarks() -> Vec<Box<dyn OpCase>> {
    let reduce = |kind, shape: &[usize], axes: &[isize]| {
        Box::new(Reduce { kind, shape: shape.to_vec(), axes: axes.to_vec(), keep: false }) as Box<dyn OpCase>
    };
    vec![
        reduce(Kind::Sum, &[8 * 3136, 384], &[0]),
        reduce(Kind::Sum, &[8 * 3136, 384], &[1]),
        reduce(Kind::Max, &[8 * 3136, 384], &[1]),
        reduce(Kind::Mean, &[8, 49, 768], &[1]),
    ]
}

#[test]
fn reductions_agree_with_their_definition() {
    check(&cases());
}

/// At every position of rows that fill vector registers and their remainder.
#[test]
fn a_nan_is_never_hidden() {
    for (shape, axis) in [([1, 37], 1), ([3, 37], 1), ([37, 1], 0), ([37, 3], 0)] {
        for at in 0..37 {
            let place = |i: usize| if axis == 1 { i % 37 } else { i / shape[1] };
            let x =
                Tensor::from_index(shape, DType::F32, |i| if place(i) == at { f64::NAN } else { i as f64 }).unwrap();
            nan_is_found(&x, axis, at);
            if let Some(device) = test_device() {
                nan_is_found(&x.to_device(device).unwrap(), axis, at);
            }
        }
    }
    let several = Tensor::new(&[1.0f32, f32::NAN, f32::INFINITY, f32::NAN], [4]).unwrap();
    for device in devices() {
        let several = several.to_device(device).unwrap();
        assert_eq!(several.argmax().unwrap().item().unwrap(), 1.0);
        assert!(several.max(&[0], false).unwrap().item().unwrap().is_nan());
    }
}

fn devices() -> Vec<Device> {
    std::iter::once(Device::Cpu).chain(test_device()).collect()
}

fn nan_is_found(x: &Tensor, axis: isize, at: usize) {
    for result in [x.max(&[axis], false), x.min(&[axis], false), x.sum(&[axis], false)] {
        assert!(result.unwrap().to_f64_vec().unwrap().iter().all(|v| v.is_nan()), "{x:?}, NaN at {at}");
    }
    if axis == 1 {
        assert!(x.argmax().unwrap().to_f64_vec().unwrap().iter().all(|&index| index == at as f64));
    }
}

#[test]
fn infinities_are_extrema_like_any_other() {
    for device in devices() {
        let x = Tensor::new(&[f32::NEG_INFINITY, f32::NEG_INFINITY], [2]).unwrap().to_device(device).unwrap();
        assert_eq!(x.max(&[0], false).unwrap().item().unwrap(), f64::NEG_INFINITY);
        assert_eq!(x.argmax().unwrap().item().unwrap(), 0.0);
        assert_eq!(x.neg().unwrap().min(&[0], false).unwrap().item().unwrap(), f64::INFINITY);
    }
}

#[test]
fn equal_extrema_share_the_gradient() {
    let x = Tensor::new(&[3.0f64, 1.0, 3.0, 3.0], [2, 2]).unwrap().variable().unwrap();
    let all = x.max(&[0, 1], false).unwrap().backward().unwrap();
    let third = 1.0 / 3.0;
    assert_eq!(all.get(&x).unwrap().to_f64_vec().unwrap(), [third, 0.0, third, third]);
    let rows = x.min(&[1], false).unwrap().sum_all().unwrap().backward().unwrap();
    assert_eq!(rows.get(&x).unwrap().to_f64_vec().unwrap(), [0.0, 1.0, 0.5, 0.5]);
}

/// A running sum of a million equal numbers would be off by far more than this.
#[test]
fn long_sums_lose_little() {
    let n = 1 << 20;
    let x = Tensor::full([n], 0.1, DType::F32).unwrap();
    let exact = f64::from(0.1f32) * n as f64;
    assert!((x.sum_all().unwrap().item().unwrap() / exact - 1.0).abs() < 1e-5);
    // Each of 64 parts adds 2¹³ rows one after another.
    let columns = x.reshape([n / 2, 2]).unwrap().sum(&[0], false).unwrap();
    assert!(columns.to_f64_vec().unwrap().iter().all(|sum| (sum / (exact / 2.0) - 1.0).abs() < 5e-4));
}

#[test]
fn the_mean_of_half_precision_does_not_overflow() {
    for dtype in [DType::F16, DType::Bf16] {
        for device in devices() {
            let x = Tensor::full([3, 1000], 1000.0, dtype).unwrap().to_device(device).unwrap();
            assert_eq!(x.mean_all().unwrap().item().unwrap(), 1000.0);
            assert_eq!(x.mean(&[1], false).unwrap().to_f64_vec().unwrap(), [1000.0; 3]);
        }
    }
}

#[test]
fn bad_arguments_are_errors() {
    let message = |result: Result<Tensor>| result.unwrap_err().to_string();
    let x = randn(&[2, 3], 0);
    assert!(message(x.sum(&[2], false)).contains("sum: axis 2 of a tensor of shape (2, 3)"));
    assert!(message(x.mean(&[-3], false)).contains("mean: axis -3"));
    assert!(message(x.sum(&[1, -1], false)).contains("name one twice"));
    assert!(message(randn(&[2, 0], 0).max(&[1], false)).contains("an axis of (2, 0) is empty"));
    assert!(randn(&[2, 0], 0).min(&[1], false).is_err());
    assert!(message(randn(&[2, 0], 0).argmax()).contains("no values on its last axis"));
    assert!(message(randn(&[], 0).argmax()).contains("argmax"));
    assert!(message(x.sum_to(&Shape::from([2]))).contains("sum_to"));
    assert!(message(x.sum_to(&Shape::from([2, 3, 1]))).contains("sum_to"));
    let labels = Tensor::new(&[1i64], [1]).unwrap();
    assert!(message(labels.sum(&[0], false)).contains("sum: got dtype i64"));
    assert!(labels.argmax().is_err());
}
