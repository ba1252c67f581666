//! Moments of features by class, and what follows from them.

use std::fmt;

use gridgrad::ops::class_moments::{ClassMoments, Scatter, Squares, class_moments};
use gridgrad::ops::concat;
use gridgrad::{DType, Result, Tensor};

use crate::harness::{Derivatives, OpCase, Tolerance, Work, check, check_on_device, randn, test_device};

#[derive(Debug)]
struct Moments {
    rows: usize,
    widths: Vec<usize>,
    classes: usize,
    squares: Squares,
}

impl fmt::Display for Moments {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

impl OpCase for Moments {
    fn inputs(&self) -> Vec<Tensor> {
        let width = self.widths.iter().sum::<usize>();
        // From -1, which does not count, to one more than there are.
        let labels: Vec<i64> = (0..self.rows).map(|row| (row * 5 % (self.classes + 2)) as i64 - 1).collect();
        vec![randn(&[self.rows, width], 0), randn(&[width], 1), Tensor::new(&labels, [self.rows]).unwrap()]
    }

    fn run(&self, inputs: &[Tensor]) -> Result<Tensor> {
        // Statistics are not taken of half types.
        let dtype = inputs[0].dtype();
        let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let (features, pivot) = (inputs[0].detach().cast(wide)?, inputs[1].detach().cast(wide)?);
        let moments = class_moments(&features, &inputs[2], &pivot, &self.widths, self.classes, self.squares)?;
        let sums = moments.sums.reshape([moments.sums.elements()])?;
        concat(&[&moments.counts.cast(wide)?, &sums, &moments.squares], 0)?.cast(dtype)
    }

    fn reference(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        let width = self.widths.iter().sum::<usize>();
        let shifted = |row: usize, f: usize| inputs[0][row * width + f] - inputs[1][f];
        let of_class = |class: f64| (0..self.rows).filter(move |&row| inputs[2][row] == class);
        let classes = || (0..self.classes).map(|class| class as f64);
        let mut result: Vec<f64> = classes().map(|class| of_class(class).count() as f64).collect();
        for class in classes() {
            result.extend((0..width).map(|f| of_class(class).map(|row| shifted(row, f)).sum::<f64>()));
        }
        let product =
            |f: usize, h: usize| classes().flat_map(of_class).map(|row| shifted(row, f) * shifted(row, h)).sum::<f64>();
        match self.squares {
            Squares::Diagonal => result.extend((0..width).map(|f| product(f, f))),
            Squares::Full => {
                let mut first = 0;
                for &own in &self.widths {
                    result.extend((0..own * own).map(|i| product(first + i / own, first + i % own)));
                    first += own;
                }
            }
        }
        result
    }

    fn work(&self) -> Work {
        let values = (self.rows * self.widths.iter().sum::<usize>()) as u64;
        let products: u64 = match self.squares {
            Squares::Diagonal => values,
            Squares::Full => self.widths.iter().map(|width| (self.rows * width * width / 2) as u64).sum(),
        };
        Work { bytes: 8 * values, flops: values + 2 * products }
    }

    fn tolerance(&self) -> Tolerance {
        // Sums over rows, one after the other.
        Tolerance { f64: 1e-13, f32: 1e-5, gradient: 0.0 }
    }

    fn derivatives(&self) -> Derivatives {
        Derivatives::None
    }
}

fn case(rows: usize, widths: &[usize], classes: usize, squares: Squares) -> Box<dyn OpCase> {
    Box::new(Moments { rows, widths: widths.to_vec(), classes, squares })
}

/// ResNet-20's nine blocks on a batch of CIFAR-10.
pub fn benchmarks() -> Vec<Box<dyn OpCase>> {
    let widths = [16, 16, 16, 32, 32, 32, 64, 64, 64];
    [Squares::Diagonal, Squares::Full].map(|squares| case(1024, &widths, 10, squares)).into()
}

#[test]
fn class_moments_agree_with_their_definition() {
    for squares in [Squares::Diagonal, Squares::Full] {
        check(&[
            case(11, &[5, 1, 3], 4, squares),
            case(1, &[1], 1, squares),
            case(0, &[2, 3], 2, squares),
            case(33, &[7, 0, 2], 9, squares),
        ]);
        for (rows, widths) in [(31, [63, 1]), (17, [64, 2]), (16, [65, 33]), (70, [130, 1])] {
            check_on_device(case(rows, &widths, 3, squares).as_ref());
        }
    }
}

fn add_rows(moments: &mut ClassMoments, rows: &[Vec<f64>], labels: &[i64]) {
    let values: Vec<f64> = rows.concat();
    let features = Tensor::new(&values, [rows.len(), values.len() / rows.len()]).unwrap();
    moments.add(&features, &Tensor::new(labels, [labels.len()]).unwrap()).unwrap();
}

fn full(widths: &[usize], classes: usize, rows: &[Vec<f64>], labels: &[i64]) -> ClassMoments {
    let mut moments = ClassMoments::new(widths, classes, Squares::Full).unwrap();
    add_rows(&mut moments, rows, labels);
    moments
}

/// Rows of three classes that differ, far from zero as features behind a ReLU are.
fn sample(width: usize) -> (Vec<Vec<f64>>, Vec<i64>) {
    let noise = randn(&[60, width], 3).to_f64_vec().unwrap();
    let labels: Vec<i64> = (0..60).map(|row| row % 3).collect();
    let row =
        |row: usize| (0..width).map(|f| noise[row * width + f] + 10.0 + (labels[row] * f as i64) as f64).collect();
    ((0..60).map(row).collect(), labels)
}

fn close(a: f64, b: f64, tolerance: f64) {
    assert!((a - b).abs() <= tolerance * a.abs().max(b.abs()).max(1e-300), "{a} and {b}");
}

fn close_scatter(a: &Scatter, b: &Scatter, tolerance: f64) {
    for (a, b) in [(&a.mean, &b.mean), (&a.total, &b.total), (&a.within, &b.within), (&a.between, &b.between)] {
        let scale = b.iter().fold(0.0f64, |scale, value| scale.max(value.abs()));
        assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() <= tolerance * scale), "{a:?} and {b:?}");
    }
}

#[test]
fn known_answers() {
    let moments = full(&[1], 2, &[vec![0.0], vec![2.0], vec![10.0], vec![12.0]], &[0, 0, 1, 1]);
    let scatter = moments.scatter(0).unwrap();
    assert_eq!([scatter.mean[0], scatter.total[0], scatter.within[0], scatter.between[0]], [6.0, 26.0, 1.0, 25.0]);
    let scores = moments.fisher_scores(0, 1e-3).unwrap();
    close(scores.fisher.unwrap(), 25.0 / 1.001, 1e-14);
    close(scores.diagonal, 25.0 / 1.001, 1e-14);
    assert_eq!(scores.ratio, 25.0);
}

#[test]
fn scatter_is_that_of_its_definition_and_positive() {
    let (rows, labels) = sample(4);
    let scatter = full(&[4], 3, &rows, &labels).scatter(0).unwrap();
    let mean = |keep: &dyn Fn(i64) -> bool, f: usize| {
        let values: Vec<f64> = rows.iter().zip(&labels).filter(|(_, l)| keep(**l)).map(|(row, _)| row[f]).collect();
        values.iter().sum::<f64>() / values.len() as f64
    };
    for (f, h) in (0..4).flat_map(|f| (0..4).map(move |h| (f, h))) {
        let deviation = |row: &[f64], label: i64, f| row[f] - mean(&|other| other == label, f);
        let pairs = rows.iter().zip(&labels);
        let within = pairs.map(|(row, &label)| deviation(row, label, f) * deviation(row, label, h)).sum::<f64>() / 60.0;
        let apart = |class, f| mean(&|other| other == class, f) - mean(&|_| true, f);
        let between = (0..3).map(|class| apart(class, f) * apart(class, h)).sum::<f64>() / 3.0;
        assert!((scatter.within[f * 4 + h] - within).abs() < 1e-11);
        assert!((scatter.between[f * 4 + h] - between).abs() < 1e-11);
        close(scatter.total[f * 4 + h], scatter.within[f * 4 + h] + scatter.between[f * 4 + h], 1e-12);
    }
    // Quadratic forms of both are not negative.
    for direction in randn(&[50, 4], 8).to_f64_vec().unwrap().chunks(4) {
        for matrix in [&scatter.within, &scatter.between] {
            let form: f64 = (0..16).map(|i| direction[i / 4] * matrix[i] * direction[i % 4]).sum();
            assert!(form >= -1e-9);
        }
    }
}

#[test]
fn scores_do_not_depend_on_order_names_offset_or_batches() {
    let (rows, labels) = sample(5);
    let reference = full(&[2, 3], 3, &rows, &labels);
    let shifted: Vec<Vec<f64>> = rows.iter().map(|row| row.iter().map(|value| value + 1000.0).collect()).collect();
    let renamed: Vec<i64> = labels.iter().map(|label| (label + 1) % 3).collect();
    let (reversed, backwards): (Vec<_>, Vec<_>) = rows.iter().cloned().zip(labels.iter().copied()).rev().unzip();
    let twice = [rows.clone(), rows.clone()].concat();
    let mut split = ClassMoments::new(&[2, 3], 3, Squares::Full).unwrap();
    let mut merged = split.clone();
    for part in [0..7, 7..8, 8..60] {
        add_rows(&mut split, &rows[part.clone()], &labels[part.clone()]);
        // Each with a pivot of its own.
        merged.merge(&full(&[2, 3], 3, &rows[part.clone()], &labels[part])).unwrap();
    }
    let same = [
        full(&[2, 3], 3, &shifted, &labels),
        full(&[2, 3], 3, &rows, &renamed),
        full(&[2, 3], 3, &reversed, &backwards),
        full(&[2, 3], 3, &twice, &[labels.clone(), labels.clone()].concat()),
        split,
        merged,
        // One more class, that is empty.
        full(&[2, 3], 4, &rows, &labels),
    ];
    for (number, moments) in same.iter().enumerate() {
        for block in 0..2 {
            let [got, want] = [moments, &reference].map(|moments| moments.fisher_scores(block, 1e-3).unwrap());
            close(got.fisher.unwrap(), want.fisher.unwrap(), 1e-9);
            close(got.ratio, want.ratio, 1e-9);
            close(got.diagonal, want.diagonal, 1e-9);
            if number >= 2 {
                close_scatter(&moments.scatter(block).unwrap(), &reference.scatter(block).unwrap(), 1e-11);
            }
        }
    }
}

#[test]
fn fisher_is_invariant_to_linear_maps_and_the_ratio_to_rotations() {
    let (rows, labels) = sample(2);
    let mapped = |map: [[f64; 2]; 2]| -> ClassMoments {
        let apply = |row: &Vec<f64>| map.iter().map(|m| m[0] * row[0] + m[1] * row[1]).collect();
        full(&[2], 3, &rows.iter().map(apply).collect::<Vec<_>>(), &labels)
    };
    let plain = full(&[2], 3, &rows, &labels).fisher_scores(0, 0.0).unwrap();
    let skewed = mapped([[2.0, 0.5], [-1.0, 3.0]]).fisher_scores(0, 0.0).unwrap();
    close(skewed.fisher.unwrap(), plain.fisher.unwrap(), 1e-9);
    let (sin, cos) = 0.7f64.sin_cos();
    let turned = mapped([[3.0 * cos, -3.0 * sin], [3.0 * sin, 3.0 * cos]]).fisher_scores(0, 0.0).unwrap();
    close(turned.ratio, plain.ratio, 1e-10);
    assert!((skewed.ratio - plain.ratio).abs() > 1e-3);
}

#[test]
fn classes_that_do_not_spread_have_infinite_scores_and_one_class_has_none() {
    let indicators: Vec<Vec<f64>> = (0..6).map(|row| (0..3).map(|f| f64::from(row % 3 == f)).collect()).collect();
    let labels = [0, 1, 2, 0, 1, 2];
    let moments = full(&[3], 3, &indicators, &labels);
    let scores = moments.fisher_scores(0, 1e-3).unwrap();
    assert_eq!((scores.fisher, scores.ratio, scores.diagonal), (Some(f64::INFINITY), f64::INFINITY, f64::INFINITY));
    let probe = moments.ridge_probe(0, 1e-2).unwrap();
    assert!(indicators.iter().zip(labels).all(|(row, label)| probe.predict(row) == label as usize));
    let (rows, _) = sample(3);
    let one = full(&[3], 1, &rows, &[0; 60]).fisher_scores(0, 1e-3).unwrap();
    assert!(one.ratio.abs() < 1e-12 && one.fisher.unwrap().abs() < 1e-9);
    let constant = full(&[1], 2, &[vec![3.0], vec![3.0]], &[0, 1]).fisher_scores(0, 1e-3).unwrap();
    assert_eq!((constant.fisher, constant.ratio, constant.diagonal), (Some(0.0), 0.0, 0.0));
}

#[test]
fn the_ridge_probe_solves_its_normal_equations() {
    let (rows, labels) = sample(4);
    let (penalty, n) = (1e-2, rows.len() as f64);
    let probe = full(&[4], 3, &rows, &labels).ridge_probe(0, penalty).unwrap();
    let z: Vec<Vec<f64>> =
        rows.iter().map(|row| (0..4).map(|f| (row[f] - probe.mean[f]) / probe.deviation[f]).collect()).collect();
    for class in 0..3 {
        let weight = &probe.weight[class * 4..][..4];
        for f in 0..4 {
            // Σ z (W z + b − indicator) + n λ W = 0.
            let residual = |(z, &label): (&Vec<f64>, &i64)| {
                let score: f64 = probe.bias[class] + weight.iter().zip(z).map(|(w, z)| w * z).sum::<f64>();
                z[f] * (score - f64::from(label == class as i64))
            };
            let sum: f64 = z.iter().zip(&labels).map(residual).sum();
            assert!((sum + n * penalty * weight[f]).abs() < 1e-9 * n);
        }
    }
    let correct = rows.iter().zip(&labels).filter(|(row, label)| probe.predict(row) == **label as usize).count();
    assert!(correct > 40, "{correct} of 60, 20 would be guessing");
}

/// Features of 1e4 with deviations of 1: without the pivot, nothing of the variance would be left in f32.
#[test]
fn the_pivot_saves_the_variance_in_f32() {
    let values: Vec<f32> = (0..40).map(|i| 1e4 + [-1.0, 1.0][i % 2]).collect();
    let labels = Tensor::new(&[0i64; 40], [40]).unwrap();
    let features = Tensor::new(&values, [40, 1]).unwrap();
    for features in [Some(features.clone()), test_device().map(|device| features.to_device(device).unwrap())] {
        let Some(features) = features else { continue };
        let mut moments = ClassMoments::new(&[1], 1, Squares::Diagonal).unwrap();
        moments.add(&features, &labels.to_device(features.device()).unwrap()).unwrap();
        close(moments.scatter(0).unwrap().total[0], 1.0, 1e-6);
    }
}

#[test]
fn what_cannot_be_scored_is_an_error() {
    let mut moments = ClassMoments::new(&[1, 2], 2, Squares::Diagonal).unwrap();
    assert!(moments.scatter(0).unwrap_err().to_string().contains("expected a block with rows"));
    let labels = |values: &[i64]| Tensor::new(values, [values.len()]).unwrap();
    moments.add(&Tensor::zeros([0, 3], DType::F32).unwrap(), &labels(&[])).unwrap();
    assert_eq!(moments.rows(), 0);
    moments.add(&Tensor::zeros([2, 3], DType::F32).unwrap(), &labels(&[-1, 2])).unwrap();
    assert!(moments.scatter(0).unwrap_err().to_string().contains("no row has a label"));
    let broken = Tensor::new(&[1.0f32, 2.0, f32::NAN], [1, 3]).unwrap();
    let error = moments.add(&broken, &labels(&[0])).unwrap_err().to_string();
    assert!(error.contains("block 1 has features that are not finite"), "{error}");
    assert_eq!(moments.rows(), 0);
    moments.add(&randn(&[2, 3], 0).cast(DType::F32).unwrap(), &labels(&[0, 1])).unwrap();
    assert_eq!(moments.counts(), [1, 1]);
    assert_eq!(moments.fisher_scores(0, 1e-3).unwrap().fisher, None);
    assert!(moments.ridge_probe(0, 1e-2).unwrap_err().to_string().contains("expected Full"));
    assert!(moments.fisher_scores(0, -1.0).unwrap_err().to_string().contains("epsilon -1"));
    assert!(moments.scatter(2).unwrap_err().to_string().contains("block 2 of 2"));
    let other = ClassMoments::new(&[3], 2, Squares::Diagonal).unwrap();
    assert!(moments.merge(&other).is_err());
    assert!(ClassMoments::new(&[], 2, Squares::Full).unwrap_err().to_string().contains("0 blocks and 2 classes"));
    let (z, pivot) = (randn(&[2, 3], 0), randn(&[3], 1));
    let moments = |z: &Tensor, widths: &[usize]| class_moments(z, &labels(&[0, 1]), &pivot, widths, 2, Squares::Full);
    assert!(moments(&z, &[2]).unwrap_err().to_string().contains("expected (rows, 2), (rows) and (2)"));
    assert!(moments(&z.cast(DType::Bf16).unwrap(), &[3]).unwrap_err().to_string().contains("expected f32 or f64"));
}
