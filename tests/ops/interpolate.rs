//! Interpolation.

use std::fmt;

use gridgrad::ops::{Interpolation, interpolate};
use gridgrad::{DType, Result, Tensor};

use crate::harness::{OpCase, Work, check, randn};

#[derive(Debug)]
struct Interpolate {
    /// batch, height, width, channels
    input: [usize; 4],
    size: [usize; 2],
    interpolation: Interpolation,
}

impl fmt::Display for Interpolate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

impl Interpolate {
    /// How much output position `out` reads of input position `at`.
    fn weight(&self, axis: usize, out: usize, at: usize) -> f64 {
        let (extent, size) = (self.input[axis + 1], self.size[axis]);
        let place = |align_corners: bool| match align_corners {
            true if size == 1 => 0.0,
            true => (out * (extent - 1)) as f64 / (size - 1) as f64,
            false => (out as f64 + 0.5) * extent as f64 / size as f64 - 0.5,
        };
        // Positions beyond the border stand for the border.
        let repeated = |kernel: &dyn Fn(f64) -> f64, place: f64| -> f64 {
            (-8..extent as isize + 8)
                .filter(|position| (*position).clamp(0, extent as isize - 1) as usize == at)
                .map(|position| kernel(place - position as f64))
                .sum()
        };
        match self.interpolation {
            Interpolation::Nearest => f64::from(u8::from(out * extent / size == at)),
            Interpolation::Bilinear { align_corners } => repeated(&|x| (1.0 - x.abs()).max(0.0), place(align_corners)),
            Interpolation::Bicubic { align_corners } => {
                let a = -0.75;
                let keys = move |x: f64| match x.abs() {
                    x if x <= 1.0 => (a + 2.0) * x.powi(3) - (a + 3.0) * x.powi(2) + 1.0,
                    x if x < 2.0 => a * x.powi(3) - 5.0 * a * x.powi(2) + 8.0 * a * x - 4.0 * a,
                    _ => 0.0,
                };
                repeated(&keys, place(align_corners))
            }
        }
    }
}

impl OpCase for Interpolate {
    fn inputs(&self) -> Vec<Tensor> {
        vec![randn(&self.input, 0)]
    }

    fn run(&self, inputs: &[Tensor]) -> Result<Tensor> {
        interpolate(&inputs[0], self.size, self.interpolation)
    }

    fn reference(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        let ([batch, height, width, channels], [rows, columns]) = (self.input, self.size);
        let mut output = Vec::new();
        for b in 0..batch {
            for (y, x) in (0..rows).flat_map(|y| (0..columns).map(move |x| (y, x))) {
                for c in 0..channels {
                    let mut sum = 0.0;
                    for (i, j) in (0..height).flat_map(|i| (0..width).map(move |j| (i, j))) {
                        let weight = self.weight(0, y, i) * self.weight(1, x, j);
                        sum += weight * inputs[0][((b * height + i) * width + j) * channels + c];
                    }
                    output.push(sum);
                }
            }
        }
        output
    }

    fn work(&self) -> Work {
        let [batch, height, width, channels] = self.input.map(|extent| extent as u64);
        let [rows, columns] = self.size.map(|extent| extent as u64);
        let taps = match self.interpolation {
            Interpolation::Nearest => 1,
            Interpolation::Bilinear { .. } => 2,
            Interpolation::Bicubic { .. } => 4,
        };
        let lines = batch * rows * channels;
        Work {
            bytes: 4 * batch * channels * (height * width + rows * columns),
            flops: 2 * taps * lines * (width + columns),
        }
    }
}

const KINDS: [Interpolation; 5] = [
    Interpolation::Nearest,
    Interpolation::Bilinear { align_corners: false },
    Interpolation::Bilinear { align_corners: true },
    Interpolation::Bicubic { align_corners: false },
    Interpolation::Bicubic { align_corners: true },
];

fn cases() -> Vec<Box<dyn OpCase>> {
    let shapes = [
        ([1, 1, 1, 1], [1, 1]),
        ([1, 1, 1, 2], [3, 2]),
        ([2, 4, 3, 5], [8, 6]),
        ([1, 7, 5, 3], [5, 11]),
        ([1, 6, 13, 2], [2, 3]),
        ([1, 2, 3, 1], [1, 7]),
        ([0, 2, 3, 4], [4, 4]),
        ([1, 5, 4, 2], [5, 4]),
    ];
    let case = |(input, size): ([usize; 4], [usize; 2]), interpolation| {
        Box::new(Interpolate { input, size, interpolation }) as Box<dyn OpCase>
    };
    shapes.into_iter().flat_map(|shape| KINDS.map(|interpolation| case(shape, interpolation))).collect()
}

/// Doubling a feature map, and resizing images.
pub fn benchmarks() -> Vec<Box<dyn OpCase>> {
    let case = |input, size, interpolation| Box::new(Interpolate { input, size, interpolation }) as Box<dyn OpCase>;
    vec![
        case([8, 56, 56, 96], [112, 112], KINDS[0]),
        case([8, 56, 56, 96], [112, 112], KINDS[1]),
        case([8, 256, 256, 3], [224, 224], KINDS[3]),
    ]
}

#[test]
fn interpolation_agrees_with_its_definition() {
    check(&cases());
}

#[test]
fn the_same_size_is_the_identity() {
    let x = randn(&[1, 5, 3, 2], 0);
    for kind in KINDS {
        assert_eq!(interpolate(&x, [5, 3], kind).unwrap().to_f64_vec().unwrap(), x.to_f64_vec().unwrap(), "{kind:?}");
    }
}

#[test]
fn bad_arguments_are_errors() {
    let x = randn(&[1, 5, 3, 2], 0);
    for kind in KINDS {
        assert!(interpolate(&x, [0, 3], kind).unwrap_err().to_string().contains("extents must be positive"));
        assert!(interpolate(&x, [usize::MAX, 3], kind).unwrap_err().to_string().contains("too many elements"));
        assert!(interpolate(&randn(&[5, 3, 2], 0), [5, 3], kind).unwrap_err().to_string().contains("expected input"));
        assert!(interpolate(&Tensor::zeros([1, 0, 3, 2], DType::F32).unwrap(), [5, 3], kind).is_err());
        assert!(interpolate(&Tensor::zeros([1, 2, 3, 2], DType::U8).unwrap(), [5, 3], kind).is_err());
    }
}
