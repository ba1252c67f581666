//! Linear classifiers of many blocks at once.

use std::fmt;

use gridgrad::ops::{CrossEntropyOptions, ProbeLoss, Targets, cross_entropy, linear, linear_probe};
use gridgrad::{DType, Device, Result, Tensor};

use crate::harness::{Derivatives, OpCase, Tolerance, Work, check, check_on_device, randn, test_device};

#[derive(Debug)]
struct Probe {
    rows: usize,
    classes: usize,
    widths: Vec<usize>,
    penalty: f64,
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

impl Probe {
    fn width(&self) -> usize {
        self.widths.iter().sum()
    }

    /// Frozen, so no input of the case; exact in every dtype.
    fn features(&self) -> Tensor {
        randn(&[self.rows, self.width()], 9).cast(DType::Bf16).unwrap()
    }

    fn labels(&self) -> Vec<i64> {
        (0..self.rows).map(|row| (row * 7 / 3 % self.classes) as i64).collect()
    }

    fn probe(&self, weight: &Tensor, bias: &Tensor) -> Result<ProbeLoss> {
        let device = weight.device();
        let features = self.features().cast(weight.dtype())?.to_device(device)?;
        let labels = Tensor::new(&self.labels(), [self.rows])?.to_device(device)?;
        linear_probe(&features, weight, bias, &labels, &self.widths, self.penalty)
    }

    fn first(&self, block: usize) -> usize {
        self.widths[..block].iter().sum()
    }
}

impl OpCase for Probe {
    fn inputs(&self) -> Vec<Tensor> {
        let blocks = self.widths.len();
        vec![randn(&[self.classes, self.width()], 0).scale(0.5).unwrap(), randn(&[blocks, self.classes], 1)]
    }

    fn run(&self, inputs: &[Tensor]) -> Result<Tensor> {
        Ok(self.probe(&inputs[0], &inputs[1])?.loss)
    }

    fn reference(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        let (features, labels) = (self.features().to_f64_vec().unwrap(), self.labels());
        let block_loss = |block: usize| {
            let (first, own) = (self.first(block), self.widths[block]);
            let weight = |class: usize, f: usize| inputs[0][class * self.width() + first + f];
            let row_loss = |row: usize| {
                let logit = |class: usize| {
                    let product = |f| weight(class, f) * features[row * self.width() + first + f];
                    inputs[1][block * self.classes + class] + (0..own).map(product).sum::<f64>()
                };
                let logits: Vec<f64> = (0..self.classes).map(logit).collect();
                logits.iter().map(|x| x.exp()).sum::<f64>().ln() - logits[labels[row] as usize]
            };
            let squares: f64 = (0..self.classes).flat_map(|k| (0..own).map(move |f| weight(k, f).powi(2))).sum();
            (0..self.rows).map(row_loss).sum::<f64>() / self.rows as f64 + self.penalty / 2.0 * squares
        };
        (0..self.widths.len()).map(block_loss).collect()
    }

    fn work(&self) -> Work {
        let [rows, classes, width] = [self.rows, self.classes, self.width()].map(|extent| extent as u64);
        Work { bytes: 4 * (rows + classes) * width, flops: 2 * rows * classes * width }
    }

    fn tolerance(&self) -> Tolerance {
        // Sums of as many products as there are features or rows.
        Tolerance { f64: 1e-12, f32: 1e-5, gradient: 1e-6 }
    }

    fn composed(&self, inputs: &[Tensor]) -> Option<Result<Tensor>> {
        Some(composed(self, inputs))
    }

    fn derivatives(&self) -> Derivatives {
        Derivatives::First
    }
}

/// The probes one by one, op by op.
fn composed(case: &Probe, inputs: &[Tensor]) -> Result<Tensor> {
    let features = case.features().cast(inputs[0].dtype())?;
    let labels = Tensor::new(&case.labels(), [case.rows])?;
    let mut losses = Vec::new();
    for (block, &own) in case.widths.iter().enumerate() {
        let weight = inputs[0].narrow(1, case.first(block), own)?;
        let bias = inputs[1].narrow(0, block, 1)?.reshape([case.classes])?;
        let logits = linear(&features.narrow(1, case.first(block), own)?, &weight, Some(&bias))?;
        let loss = cross_entropy(&logits, Targets::Labels(&labels), CrossEntropyOptions::default())?;
        losses.push(loss.add(&weight.square()?.sum_all()?.scale(case.penalty / 2.0)?)?.reshape([1])?);
    }
    gridgrad::ops::concat(&losses.iter().collect::<Vec<_>>(), 0)
}

fn case(rows: usize, classes: usize, widths: &[usize], penalty: f64) -> Box<dyn OpCase> {
    Box::new(Probe { rows, classes, widths: widths.to_vec(), penalty })
}

/// ResNet-20's nine blocks on a batch of CIFAR-10.
pub fn benchmarks() -> Vec<Box<dyn OpCase>> {
    vec![case(1024, 10, &[16, 16, 16, 32, 32, 32, 64, 64, 64], 1e-4)]
}

#[test]
fn linear_probes_agree_with_their_formula() {
    check(&[
        case(7, 3, &[5, 1, 4], 0.0),
        case(6, 8, &[16, 8], 1e-2),
        case(1, 2, &[1], 0.1),
        case(4, 1, &[3, 2], 0.0),
        case(5, 4, &[3, 0, 2], 0.5),
    ]);
    // Beyond a tile of rows, classes and features, and a piece of rows, which is also a part.
    for case in [case(65, 66, &[67, 3], 0.1), case(64, 64, &[64, 72], 0.0), case(1027, 2, &[3, 1], 0.0)] {
        check_on_device(case.as_ref());
    }
}

#[test]
fn correct_rows_are_those_with_the_largest_logit_and_ties_go_to_the_lowest_class() {
    for device in [Some(Device::Cpu), test_device()].into_iter().flatten() {
        let on = |values: &[f32], shape: [usize; 2]| Tensor::new(values, shape).unwrap().to_device(device).unwrap();
        // Logits of block 0: (x, -x, x); of block 1: all 0 but for the bias.
        let features = on(&[1.0, 5.0, -1.0, 5.0, 0.0, 5.0, 2.0, 5.0], [4, 2]);
        let (weight, bias) =
            (on(&[1.0, 0.0, -1.0, 0.0, 1.0, 0.0], [3, 2]), on(&[0.0, 0.0, 0.0, 0.0, 1.0, 1.0], [2, 3]));
        let labels = Tensor::new(&[0i64, 1, 0, 2], [4]).unwrap().to_device(device).unwrap();
        let probes = linear_probe(&features, &weight, &bias, &labels, &[1, 1], 0.0).unwrap();
        assert_eq!(probes.correct.to_vec::<i64>().unwrap(), [3, 1], "{device}");
    }
}

#[test]
fn zero_weights_have_the_loss_of_guessing() {
    let (weight, bias) = (Tensor::zeros([5, 4], DType::F64).unwrap(), Tensor::zeros([1, 5], DType::F64).unwrap());
    let labels = Tensor::new(&[0i64, 1, 2, 3, 4], [5]).unwrap();
    let probes = linear_probe(&randn(&[5, 4], 0), &weight, &bias, &labels, &[4], 1.0).unwrap();
    assert!((probes.loss.item().unwrap() - 5f64.ln()).abs() < 1e-14);
    assert_eq!(probes.correct.to_vec::<i64>().unwrap(), [1]);
}

#[test]
fn features_get_no_gradient() {
    let features = randn(&[3, 2], 0).variable().unwrap();
    let (weight, bias) = (randn(&[2, 2], 1).variable().unwrap(), randn(&[1, 2], 2).variable().unwrap());
    let labels = Tensor::new(&[0i64, 1, 1], [3]).unwrap();
    let probes = linear_probe(&features, &weight, &bias, &labels, &[2], 0.0).unwrap();
    let gradients = probes.loss.sum_all().unwrap().backward().unwrap();
    assert!(gradients.get(&features).is_none() && gradients.get(&weight).is_some() && gradients.get(&bias).is_some());
}

#[test]
fn bad_arguments_are_errors() {
    let message = |result: Result<ProbeLoss>| result.unwrap_err().to_string();
    let (z, w, b) = (randn(&[2, 3], 0), randn(&[4, 3], 1), randn(&[1, 4], 2));
    let labels = |values: &[i64]| Tensor::new(values, [values.len()]).unwrap();
    let good = labels(&[0, 3]);
    assert!(message(linear_probe(&z, &w, &b, &labels(&[0, 4]), &[3], 0.0)).contains("label 4 of row 1"));
    assert!(message(linear_probe(&z, &w, &b, &labels(&[-1, 0]), &[3], 0.0)).contains("label -1 of row 0"));
    assert!(message(linear_probe(&z, &w, &b, &good, &[2], 0.0)).contains("blocks of Some(2) features"));
    assert!(message(linear_probe(&z, &w, &b, &good, &[2, 1], 0.0)).contains("(blocks, classes)"));
    assert!(message(linear_probe(&z, &w, &b, &labels(&[0]), &[3], 0.0)).contains("got (2, 3), (4, 3), (1, 4), (1)"));
    assert!(message(linear_probe(&z, &w, &b, &good, &[], 0.0)).contains("0 blocks"));
    assert!(message(linear_probe(&z, &w, &b, &good, &[3], -1.0)).contains("penalty -1"));
    assert!(message(linear_probe(&z, &w.cast(DType::F32).unwrap(), &b, &good, &[3], 0.0)).contains("got dtype f32"));
    if let Some(device) = test_device() {
        let on = |tensor: &Tensor| tensor.cast(DType::F32).unwrap().to_device(device).unwrap();
        let outside = labels(&[0, 9]).to_device(device).unwrap();
        let probes = linear_probe(&on(&z), &on(&w), &on(&b), &outside, &[3], 0.0).unwrap();
        assert!(probes.loss.item().unwrap().is_nan() && probes.correct.item().unwrap() <= 1.0);
    }
}
