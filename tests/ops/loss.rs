//! Losses.

use std::fmt;

use gridgrad::autograd::{GradOptions, grad};
use gridgrad::ops::{
    CrossEntropyOptions, Reduction, Targets, binary_cross_entropy_with_logits, cross_entropy, mse_loss,
};
use gridgrad::random::Philox;
use gridgrad::{DType, Device, Error, Result, Tensor};

use crate::harness::{OpCase, ROUNDING, Tolerance, Work, check, randn, test_device};

fn reduce(losses: Vec<f64>, counted: usize, reduction: Reduction) -> Vec<f64> {
    match reduction {
        Reduction::Mean => vec![losses.iter().sum::<f64>() / counted as f64],
        Reduction::Sum => vec![losses.iter().sum()],
        Reduction::None => losses,
    }
}

const REDUCTIONS: [Reduction; 3] = [Reduction::Mean, Reduction::Sum, Reduction::None];

struct CrossEntropy {
    outer: Vec<usize>,
    classes: usize,
    soft: bool,
    /// Factor on standard normal logits.
    spread: f64,
    options: CrossEntropyOptions,
}

impl fmt::Display for CrossEntropy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let CrossEntropy { outer, classes, soft, spread, options } = self;
        write!(f, "cross_entropy {outer:?}×{classes}, soft {soft}, spread {spread}, {options:?}")
    }
}

impl CrossEntropy {
    fn rows(&self) -> usize {
        self.outer.iter().product()
    }
}

impl OpCase for CrossEntropy {
    fn inputs(&self) -> Vec<Tensor> {
        let shape = [&self.outer[..], &[self.classes]].concat();
        let targets = if self.soft {
            // Between 0 and 1, with rows that do not sum to 1.
            Tensor::uniform(shape.clone(), 0.0, 1.0, DType::F64, Philox::new(3)).unwrap()
        } else {
            let labels: Vec<i64> = (0..self.rows()).map(|row| (row * 7 % self.classes) as i64).collect();
            Tensor::new(&labels, self.outer.clone()).unwrap()
        };
        vec![randn(&shape, 0).scale(self.spread).unwrap(), targets]
    }

    fn run(&self, inputs: &[Tensor]) -> Result<Tensor> {
        let targets = if self.soft { Targets::Soft(&inputs[1]) } else { Targets::Labels(&inputs[1]) };
        cross_entropy(&inputs[0], targets, self.options)
    }

    fn reference(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        let (mut losses, mut counted) = (Vec::new(), 0);
        for row in 0..self.rows() {
            let logits = &inputs[0][row * self.classes..][..self.classes];
            let ignored = !self.soft && Some(inputs[1][row] as i64) == self.options.ignore_index;
            let log_sum = logits.iter().map(|x| x.exp()).sum::<f64>().ln();
            let target = |class: usize| match self.soft {
                true => inputs[1][row * self.classes + class],
                false => f64::from(inputs[1][row] == class as f64),
            };
            let smoothing = self.options.label_smoothing;
            let smoothed = |class: usize| (1.0 - smoothing) * target(class) + smoothing / self.classes as f64;
            let loss: f64 = (0..self.classes).map(|class| smoothed(class) * (log_sum - logits[class])).sum();
            losses.push(if ignored { 0.0 } else { loss });
            counted += usize::from(!ignored);
        }
        reduce(losses, counted, self.options.reduction)
    }

    fn work(&self) -> Work {
        let elements = (self.rows() * self.classes) as u64;
        Work { bytes: 4 * elements * if self.soft { 2 } else { 1 }, flops: 4 * elements }
    }

    fn tolerance(&self) -> Tolerance {
        // Soft targets add up the losses of all classes.
        let terms = if self.soft { (self.classes as f64).sqrt() } else { 1.0 };
        Tolerance { f32: ROUNDING.f32 * terms, ..ROUNDING }
    }
}

struct Pointwise {
    name: &'static str,
    shapes: [Vec<usize>; 2],
    reduction: Reduction,
}

impl fmt::Display for Pointwise {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?}, {:?}", self.name, self.shapes, self.reduction)
    }
}

impl OpCase for Pointwise {
    fn inputs(&self) -> Vec<Tensor> {
        let targets = Tensor::uniform(self.shapes[1].clone(), 0.0, 1.0, DType::F64, Philox::new(3)).unwrap();
        vec![randn(&self.shapes[0], 0), targets]
    }

    fn run(&self, inputs: &[Tensor]) -> Result<Tensor> {
        let op = if self.name == "mse_loss" { mse_loss } else { binary_cross_entropy_with_logits };
        op(&inputs[0], &inputs[1], self.reduction)
    }

    /// The second operand of the cases is as large as the first or repeats along its rows.
    fn reference(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        let loss = |(x, t): (&f64, &f64)| match self.name {
            "mse_loss" => (x - t) * (x - t),
            _ => {
                let probability = 1.0 / (1.0 + (-x).exp());
                -t * probability.ln() - (1.0 - t) * (1.0 - probability).ln()
            }
        };
        let losses: Vec<f64> = inputs[0].iter().zip(inputs[1].iter().cycle()).map(loss).collect();
        let count = losses.len();
        reduce(losses, count, self.reduction)
    }

    fn work(&self) -> Work {
        let [elements, targets] = [0, 1].map(|i| self.shapes[i].iter().product::<usize>() as u64);
        Work { bytes: 4 * (elements + targets), flops: 3 * elements }
    }
}

fn cases() -> Vec<Box<dyn OpCase>> {
    let mut cases: Vec<Box<dyn OpCase>> = Vec::new();
    for reduction in REDUCTIONS {
        for (soft, label_smoothing, ignore_index) in
            [(false, 0.0, None), (false, 0.1, Some(2)), (false, 1.0, Some(-100)), (true, 0.0, None), (true, 0.2, None)]
        {
            let options = CrossEntropyOptions { label_smoothing, reduction, ignore_index };
            for (outer, classes, spread) in
                [(vec![], 3, 1.0), (vec![5], 1, 1.0), (vec![2, 3], 17, 3.0), (vec![901], 10, 1.0), (vec![2], 1000, 1.0)]
            {
                cases.push(Box::new(CrossEntropy { outer, classes, soft, spread, options }));
            }
        }
    }
    // A block for each row.
    for (soft, label_smoothing) in [(false, 0.1), (true, 0.0)] {
        let options = CrossEntropyOptions { label_smoothing, ..Default::default() };
        cases.push(Box::new(CrossEntropy { outer: vec![3], classes: 4099, soft, spread: 1.0, options }));
    }
    cases
}

fn pointwise_cases() -> Vec<Box<dyn OpCase>> {
    let mut cases: Vec<Box<dyn OpCase>> = Vec::new();
    for reduction in REDUCTIONS {
        for name in ["mse_loss", "binary_cross_entropy_with_logits"] {
            for shapes in [[vec![], vec![]], [vec![3, 5], vec![3, 5]], [vec![4, 3], vec![3]]] {
                cases.push(Box::new(Pointwise { name, shapes, reduction }));
            }
        }
    }
    cases
}

/// The head of CrossFormer-S at batch 8, and dense prediction on 150 classes.
pub fn benchmarks() -> Vec<Box<dyn OpCase>> {
    let case = |outer: &[usize], classes, soft, label_smoothing| {
        let options = CrossEntropyOptions { label_smoothing, ..Default::default() };
        Box::new(CrossEntropy { outer: outer.to_vec(), classes, soft, spread: 1.0, options }) as Box<dyn OpCase>
    };
    vec![case(&[8], 1000, true, 0.0), case(&[8, 56, 56], 150, false, 0.1)]
}

#[test]
fn cross_entropy_agrees_with_its_formula() {
    check(&cases());
}

#[test]
fn pointwise_losses_agree_with_their_formulas() {
    check(&pointwise_cases());
}

/// The host checks labels that it has; where the device has them, rows of bad ones are NaN and the host has not waited.
#[test]
fn labels_on_a_device_are_not_copied_to_the_host() {
    let Some(device) = test_device() else { return };
    let logits = Tensor::new(&[0.0f32, 0.0, f32::NAN, 1.0, 0.0, 0.0], [3, 2]).unwrap();
    let logits = logits.to_device(device).unwrap().variable().unwrap();
    let options = CrossEntropyOptions { ignore_index: Some(-100), ..Default::default() };
    let host = |labels: [i64; 3]| Tensor::new(&labels, [3]).unwrap();
    let there = |labels: [i64; 3]| host(labels).to_device(device).unwrap();
    for labels in [host([0, -100, -100]), there([0, -100, -100])] {
        let loss = cross_entropy(&logits, Targets::Labels(&labels), options).unwrap();
        assert_eq!((loss.device(), loss.item().unwrap() as f32), (device, std::f32::consts::LN_2));
        let gradient = loss.backward().unwrap().get(&logits).unwrap().to_f64_vec().unwrap();
        assert_eq!(gradient, [-0.5, 0.5, 0.0, 0.0, 0.0, 0.0]);
    }
    let none = cross_entropy(&logits, Targets::Labels(&there([-100; 3])), options).unwrap();
    assert!(none.item().unwrap().is_nan());

    for bad in [2, -1, i64::MAX, i64::MIN] {
        let refused = cross_entropy(&logits, Targets::Labels(&host([0, -100, bad])), options).unwrap_err();
        assert!(refused.to_string().contains(&format!("label {bad} of row 2, expected 0 to 1")), "{refused}");
        let labels = there([0, -100, bad]);
        let loss = cross_entropy(&logits, Targets::Labels(&labels), options).unwrap();
        assert!(loss.item().unwrap().is_nan());
        let gradient = loss.backward().unwrap().get(&logits).unwrap().to_f64_vec().unwrap();
        assert_eq!(gradient[..4], [-0.25, 0.25, 0.0, 0.0]);
        assert!(gradient[4..].iter().all(|value| value.is_nan()));
    }

    let soft = Tensor::ones([3, 2], DType::F32).unwrap();
    let mixed = cross_entropy(&logits, Targets::Soft(&soft), options).unwrap_err();
    assert!(matches!(mixed, Error::DeviceMismatch { .. }));
    let mixed = cross_entropy(&soft, Targets::Labels(&there([0; 3])), options).unwrap_err();
    assert!(matches!(mixed, Error::DeviceMismatch { .. }));
}

#[test]
fn extreme_logits_follow_the_limits() {
    let low = f32::NEG_INFINITY;
    let logits = Tensor::new(&[1e4f32, -1e4, 0.0, low, 0.0, 0.0], [2, 3]).unwrap().variable().unwrap();
    let labels = Tensor::new(&[1i64, 2], [2]).unwrap();
    let options = CrossEntropyOptions { reduction: Reduction::None, ..Default::default() };
    let losses = cross_entropy(&logits, Targets::Labels(&labels), options).unwrap();
    assert_eq!(losses.to_vec::<f32>().unwrap(), [2e4, std::f32::consts::LN_2]);
    // A masked class whose target is 0.
    let soft = Tensor::new(&[0.0f32, 1.0, 0.0, 0.0, 0.5, 0.5], [2, 3]).unwrap();
    let losses = cross_entropy(&logits, Targets::Soft(&soft), options).unwrap();
    assert_eq!(losses.to_vec::<f32>().unwrap(), [2e4, std::f32::consts::LN_2]);
    let gradients = losses.sum_all().unwrap().backward().unwrap();
    assert_eq!(gradients.get(&logits).unwrap().to_vec::<f32>().unwrap(), [1.0, -1.0, 0.0, 0.0, 0.0, 0.0]);

    let logits = Tensor::new(&[20.0f32, -20.0, 1e4, -1e4], [4]).unwrap();
    let targets = Tensor::new(&[1.0f32, 0.0, 0.0, 1.0], [4]).unwrap();
    let losses = binary_cross_entropy_with_logits(&logits, &targets, Reduction::None).unwrap().to_f64_vec().unwrap();
    let tiny = (-20f64).exp().ln_1p();
    assert!(losses[..2].iter().all(|loss| (loss / tiny - 1.0).abs() < 1e-6), "{losses:?}");
    assert_eq!(losses[2..], [1e4, 1e4]);
}

#[test]
fn ignored_rows_do_not_count_even_if_they_are_nan() {
    let logits = Tensor::new(&[0.0f32, 0.0, f32::NAN, 1.0], [2, 2]).unwrap().variable().unwrap();
    let labels = Tensor::new(&[0i64, -100], [2]).unwrap();
    let options = CrossEntropyOptions { ignore_index: Some(-100), ..Default::default() };
    let loss = cross_entropy(&logits, Targets::Labels(&labels), options).unwrap();
    assert_eq!(loss.item().unwrap() as f32, std::f32::consts::LN_2);
    assert_eq!(loss.backward().unwrap().get(&logits).unwrap().to_f64_vec().unwrap(), [-0.5, 0.5, 0.0, 0.0]);
    let none = Tensor::new(&[-100i64, -100], [2]).unwrap();
    assert!(cross_entropy(&logits, Targets::Labels(&none), options).unwrap().item().unwrap().is_nan());
}

/// Gradients of gradients are made of other ops, and of labels written out by a kernel.
#[test]
fn second_derivatives_on_a_device_are_those_of_the_processor() {
    let Some(device) = test_device() else { return };
    let labels = Tensor::new(&[3i64, 1, 7, 0, 2], [5]).unwrap();
    let input = randn(&[5, 8], 0).cast(DType::F32).unwrap();
    let weights = randn(&[5, 8], 1).cast(DType::F32).unwrap();
    for reduction in REDUCTIONS {
        let options = CrossEntropyOptions { label_smoothing: 0.1, reduction, ignore_index: Some(1) };
        let second = |device: Device| {
            let there = |tensor: &Tensor| tensor.to_device(device).unwrap();
            let logits = there(&input).variable().unwrap();
            let loss = cross_entropy(&logits, Targets::Labels(&there(&labels)), options).unwrap().sum_all().unwrap();
            let graph = GradOptions { create_graph: true, ..GradOptions::default() };
            let first = grad(&loss, &[&logits], graph).unwrap().remove(0).unwrap();
            let along = first.mul(&there(&weights)).unwrap().sum_all().unwrap();
            let second = grad(&along, &[&logits], GradOptions::default()).unwrap().remove(0).unwrap();
            [first, second].map(|tensor| tensor.to_f64_vec().unwrap()).concat()
        };
        for (got, want) in second(device).into_iter().zip(second(Device::Cpu)) {
            assert!((got - want).abs() < 1e-6, "{reduction:?}: {got} and {want}");
        }
    }
}

#[test]
fn bad_arguments_are_errors() {
    let logits = randn(&[2, 3], 0);
    let message = |targets: Targets<'_>, options| cross_entropy(&logits, targets, options).unwrap_err().to_string();
    let labels = |values: &[i64]| Tensor::new(values, [values.len()]).unwrap();
    let options = CrossEntropyOptions::default();
    assert!(message(Targets::Labels(&labels(&[0, 3])), options).contains("label 3 of row 1, expected 0 to 2"));
    assert!(message(Targets::Labels(&labels(&[-1, 0])), options).contains("label -1 of row 0"));
    assert!(message(Targets::Labels(&labels(&[0])), options).contains("targets (1) for logits (2, 3), expected (2)"));
    assert!(message(Targets::Soft(&labels(&[0, 1])), options).contains("expected (2, 3)"));
    assert!(message(Targets::Soft(&logits.cast(DType::F32).unwrap()), options).contains("got dtype f32"));
    assert!(message(Targets::Labels(&randn(&[2], 0)), options).contains("got dtype f64"));
    for label_smoothing in [-0.1, 1.5, f64::NAN] {
        let options = CrossEntropyOptions { label_smoothing, ..options };
        assert!(message(Targets::Labels(&labels(&[0, 1])), options).contains("label smoothing"));
    }
    let empty = cross_entropy(&randn(&[2, 0], 0), Targets::Labels(&labels(&[0, 0])), options);
    assert!(empty.unwrap_err().to_string().contains("expected (…, classes)"));
    assert!(mse_loss(&logits, &randn(&[2], 0), Reduction::Mean).is_err());
}
