//! Functions of one, two and three elements.

use std::fmt;

use gridgrad::autograd::{GradOptions, grad};
use gridgrad::ops::{Binary, Unary, select};
use gridgrad::{DType, Device, Result, Tensor};

use crate::harness::{Derivatives, OpCase, ROUNDING, Tolerance, Work, check, randn, test_device};

struct UnaryCase {
    function: Unary,
    shape: Vec<usize>,
}

impl fmt::Display for UnaryCase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {:?}", self.function, self.shape)
    }
}

fn formula(function: Unary, x: f64) -> f64 {
    match function {
        Unary::Neg => -x,
        Unary::Abs => x.abs(),
        Unary::Square => x * x,
        Unary::Sqrt => x.sqrt(),
        Unary::Recip => 1.0 / x,
        Unary::Exp => x.exp(),
        Unary::Ln => x.ln(),
        Unary::Sin => x.sin(),
        Unary::Cos => x.cos(),
        Unary::Tanh => x.tanh(),
        Unary::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        Unary::Erf => libm::erf(x),
        Unary::Relu => {
            if x < 0.0 {
                0.0
            } else {
                x
            }
        }
        Unary::LeakyRelu(slope) => {
            if x < 0.0 {
                slope * x
            } else {
                x
            }
        }
        Unary::Silu => x / (1.0 + (-x).exp()),
        Unary::Gelu => 0.5 * x * libm::erfc(-x / 2f64.sqrt()),
        Unary::Softplus => {
            if x > 30.0 {
                x
            } else {
                x.exp().ln_1p()
            }
        }
        Unary::Scale(factor) => factor * x,
        Unary::Shift(offset) => x + offset,
        Unary::Powf(power) => x.powf(power),
        Unary::Clamp(low, high) => {
            if x < low {
                low
            } else if x > high {
                high
            } else {
                x
            }
        }
    }
}

/// Every function, with parameters.
const FUNCTIONS: [Unary; 24] = [
    Unary::Neg,
    Unary::Abs,
    Unary::Square,
    Unary::Sqrt,
    Unary::Recip,
    Unary::Exp,
    Unary::Ln,
    Unary::Sin,
    Unary::Cos,
    Unary::Tanh,
    Unary::Sigmoid,
    Unary::Erf,
    Unary::Relu,
    Unary::LeakyRelu(0.1),
    Unary::LeakyRelu(1.5),
    Unary::Silu,
    Unary::Gelu,
    Unary::Softplus,
    Unary::Scale(-1.75),
    Unary::Shift(0.5),
    Unary::Powf(0.5),
    Unary::Powf(-2.0),
    Unary::Powf(0.0),
    Unary::Clamp(-0.5, 0.75),
];

/// Functions on positive numbers, or whose derivatives grow without bound at 0.
fn positive(function: Unary) -> bool {
    matches!(function, Unary::Sqrt | Unary::Ln | Unary::Powf(_) | Unary::Recip)
}

impl OpCase for UnaryCase {
    /// Normal numbers moved away from the kinks, where a finite difference means nothing; in [½, ∞) where `positive`.
    fn inputs(&self) -> Vec<Tensor> {
        let inputs = randn(&self.shape, 0);
        let away = |x: f64| if x.abs() < 0.01 { x + 0.05 } else { x };
        let value = |x: f64| if positive(self.function) { x.abs() + 0.5 } else { away(x) };
        let values: Vec<f64> = inputs.to_f64_vec().unwrap().into_iter().map(value).collect();
        vec![Tensor::new(&values, self.shape.clone()).unwrap()]
    }

    fn run(&self, inputs: &[Tensor]) -> Result<Tensor> {
        inputs[0].unary(self.function)
    }

    fn reference(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        inputs[0].iter().map(|&x| formula(self.function, x)).collect()
    }

    fn work(&self) -> Work {
        let elements = self.shape.iter().product::<usize>() as u64;
        Work { bytes: 8 * elements, flops: elements }
    }

    fn tolerance(&self) -> Tolerance {
        // Third derivatives of the reciprocals reach 100 at ½, which the differences of the second ones see.
        let steep = matches!(self.function, Unary::Recip | Unary::Powf(_));
        Tolerance { gradient: if steep { 1e-5 } else { ROUNDING.gradient }, ..ROUNDING }
    }
}

struct BinaryCase {
    function: Binary,
    left: Vec<usize>,
    right: Vec<usize>,
}

impl fmt::Display for BinaryCase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {:?} {:?}", self.function, self.left, self.right)
    }
}

const BINARY: [Binary; 8] = [
    Binary::Add,
    Binary::Sub,
    Binary::Mul,
    Binary::Div,
    Binary::Maximum,
    Binary::Minimum,
    Binary::Greater,
    Binary::Equal,
];

/// The shape both broadcast to, and for each of its elements the index of each operand's element.
fn broadcast(operands: &[&[usize]]) -> (Vec<usize>, Vec<Vec<usize>>) {
    let rank = operands.iter().map(|shape| shape.len()).max().unwrap_or(0);
    let padded: Vec<Vec<usize>> =
        operands.iter().map(|shape| [vec![1; rank - shape.len()], shape.to_vec()].concat()).collect();
    let extent = |axis: usize| padded.iter().map(|shape| shape[axis]).find(|&extent| extent != 1).unwrap_or(1);
    let shape: Vec<usize> = (0..rank).map(extent).collect();
    let indices = (0..shape.iter().product()).map(|flat: usize| {
        let mut rest = flat;
        let mut position = vec![0; rank];
        for axis in (0..rank).rev() {
            position[axis] = rest % shape[axis];
            rest /= shape[axis];
        }
        let index = |operand: &Vec<usize>| {
            (0..rank).fold(0, |index, axis| index * operand[axis] + if operand[axis] == 1 { 0 } else { position[axis] })
        };
        padded.iter().map(index).collect()
    });
    let indices = indices.collect();
    (shape, indices)
}

impl OpCase for BinaryCase {
    /// A few coarse values, so that many pairs are equal, where the op can be equal on purpose and has no derivative;
    /// else normal numbers, the divisors at least ½ in size.
    fn inputs(&self) -> Vec<Tensor> {
        let discrete = matches!(self.function, Binary::Greater | Binary::Equal);
        let value = |x: f64, divisor: bool| match (discrete, divisor) {
            (true, _) => x.round(),
            (_, true) => x + 0.5f64.copysign(x),
            _ => x,
        };
        let operand = |shape: &[usize], number, divisor| {
            let values: Vec<f64> =
                randn(shape, number).to_f64_vec().unwrap().into_iter().map(|x| value(x, divisor)).collect();
            Tensor::new(&values, shape).unwrap()
        };
        vec![operand(&self.left, 0, false), operand(&self.right, 1, self.function == Binary::Div)]
    }

    fn run(&self, inputs: &[Tensor]) -> Result<Tensor> {
        inputs[0].binary(&inputs[1], self.function)
    }

    fn reference(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        let f = |a: f64, b: f64| match self.function {
            Binary::Add => a + b,
            Binary::Sub => a - b,
            Binary::Mul => a * b,
            Binary::Div => a / b,
            Binary::Maximum => a.max(b),
            Binary::Minimum => a.min(b),
            Binary::Greater => f64::from(a > b),
            Binary::Equal => f64::from(a == b),
        };
        let (_, indices) = broadcast(&[&self.left, &self.right]);
        indices.iter().map(|at| f(inputs[0][at[0]], inputs[1][at[1]])).collect()
    }

    fn work(&self) -> Work {
        let (shape, _) = broadcast(&[&self.left, &self.right]);
        let count = |shape: &[usize]| shape.iter().product::<usize>() as u64;
        Work { bytes: 4 * (count(&self.left) + count(&self.right) + count(&shape)), flops: count(&shape) }
    }

    fn derivatives(&self) -> Derivatives {
        match self.function {
            Binary::Greater | Binary::Equal => Derivatives::None,
            _ => Derivatives::Second,
        }
    }

    fn tolerance(&self) -> Tolerance {
        // 1/b³ reaches 8 at the smallest divisor, and sums of such terms gather in stretched operands.
        let gradient = if self.function == Binary::Div { 1e-5 } else { ROUNDING.gradient };
        Tolerance { gradient, ..ROUNDING }
    }
}

/// mask, on_true, on_false
struct Select([Vec<usize>; 3]);

impl fmt::Display for Select {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "select {:?}", self.0)
    }
}

impl OpCase for Select {
    fn inputs(&self) -> Vec<Tensor> {
        let [mask, yes, no] = &self.0;
        vec![randn(mask, 0), randn(yes, 1), randn(no, 2)]
    }

    /// The mask is made inside, as a comparison: a finite difference must not move it from 0.
    fn run(&self, inputs: &[Tensor]) -> Result<Tensor> {
        select(&inputs[0].greater(&inputs[0].full_like(0.0)?)?, &inputs[1], &inputs[2])
    }

    fn reference(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        let [mask, yes, no] = &self.0;
        let (_, indices) = broadcast(&[mask, yes, no]);
        let value = |at: &Vec<usize>| if inputs[0][at[0]] > 0.0 { inputs[1][at[1]] } else { inputs[2][at[2]] };
        indices.iter().map(value).collect()
    }

    fn work(&self) -> Work {
        let count: usize = self.0.iter().map(|shape| shape.iter().product::<usize>()).sum();
        Work { bytes: 4 * count as u64, flops: 0 }
    }
}

/// Pairs of shapes: equal, scalars, rows, columns, inner and outer axes stretched on either side, empty, and sizes
/// around one piece of a parallel loop.
fn patterns() -> Vec<[Vec<usize>; 2]> {
    vec![
        [vec![], vec![]],
        [vec![0], vec![1]],
        [vec![3, 0], vec![3, 1]],
        [vec![7], vec![7]],
        [vec![5, 3], vec![]],
        [vec![1, 1], vec![4]],
        [vec![5, 3], vec![3]],
        [vec![5, 3], vec![5, 1]],
        [vec![5, 1], vec![1, 3]],
        [vec![3, 1], vec![2, 1, 4]],
        [vec![2, 1, 3, 1], vec![1, 5, 1, 4]],
        [vec![2, 3, 1, 4], vec![3, 6, 4]],
        // Whole accesses of a GPU along rows, with either operand stretched there.
        [vec![3, 1, 16], vec![2, 1]],
        [vec![5, 24], vec![24]],
        [vec![8191], vec![8191]],
        [vec![3, 2750], vec![2750]],
        [vec![2, 9001], vec![2, 1]],
    ]
}

fn cases() -> Vec<Box<dyn OpCase>> {
    let mut cases: Vec<Box<dyn OpCase>> = Vec::new();
    for function in FUNCTIONS {
        for shape in [vec![], vec![0], vec![3, 5], vec![8193]] {
            cases.push(Box::new(UnaryCase { function, shape }));
        }
    }
    for function in BINARY {
        for [left, right] in patterns() {
            cases.push(Box::new(BinaryCase { function, left: right.clone(), right: left.clone() }));
            cases.push(Box::new(BinaryCase { function, left, right }));
        }
    }
    for shapes in [
        [vec![], vec![], vec![]],
        [vec![8200], vec![8200], vec![8200]],
        [vec![3, 1], vec![4], vec![]],
        [vec![4], vec![2, 3, 4], vec![3, 1]],
        [vec![0], vec![1], vec![]],
    ] {
        cases.push(Box::new(Select(shapes)));
    }
    cases
}

/// CrossFormer-S at batch 8, first stage: the activation of the MLP, the residual sum, a product with a row.
pub fn benchmarks() -> Vec<Box<dyn OpCase>> {
    let (hidden, tokens) = (vec![8, 3136, 384], vec![8, 3136, 96]);
    let binary = |function, right: &[usize]| {
        Box::new(BinaryCase { function, left: tokens.clone(), right: right.to_vec() }) as Box<dyn OpCase>
    };
    vec![
        Box::new(UnaryCase { function: Unary::Gelu, shape: hidden }),
        Box::new(UnaryCase { function: Unary::Relu, shape: tokens.clone() }),
        binary(Binary::Add, &tokens),
        binary(Binary::Mul, &[96]),
    ]
}

#[test]
fn elementwise_functions_agree_with_their_formulas() {
    check(&cases());
}

/// What a function tends to at an infinity or gives at another special value, where `formula` cannot say it.
fn limit(function: Unary, x: f64) -> f64 {
    let (infinite, negative) = (x.is_infinite(), x < 0.0);
    match function {
        Unary::Silu | Unary::Gelu if infinite && negative => 0.0,
        _ => formula(function, x),
    }
}

/// The processor's compute types, and `f32` where kernels are tested.
fn places() -> Vec<(DType, Device)> {
    let mut places = vec![(DType::F32, Device::Cpu), (DType::F64, Device::Cpu)];
    places.extend(test_device().map(|device| (DType::F32, device)));
    places
}

#[test]
fn special_values_give_the_limits_of_the_formulas() {
    let tiny = f64::from(f32::from_bits(1));
    let subnormal = f64::from(f32::from_bits(0x0040_0001));
    let mut specials =
        vec![0.0, tiny, subnormal, f64::from(f32::MIN_POSITIVE), 1e-3, 1e4, 65504.0, 1e30, f64::INFINITY];
    specials.extend(specials.clone().iter().map(|x| -x));
    specials.push(f64::NAN);
    // Trigonometric functions of infinity are NaN; a slope of 0 at an infinity, too.
    for function in FUNCTIONS {
        for (dtype, device) in places() {
            // f32 has its own rounding of 1e30, which the formula must see.
            let input = Tensor::new(&specials, [specials.len()]).unwrap().cast(dtype).unwrap();
            let input = input.to_device(device).unwrap();
            let output = input.unary(function).unwrap();
            for (x, got) in input.to_f64_vec().unwrap().into_iter().zip(output.to_f64_vec().unwrap()) {
                let exact = limit(function, x);
                let want = if dtype == DType::F32 { f64::from(exact as f32) } else { exact };
                let close = (got - want).abs() <= 3e-6 * want.abs().max(1e-30);
                // Φ is computed to the rounding of ½, also where it is smaller.
                let close = close || (function == Unary::Gelu && (got - want).abs() < 1e-6 * x.abs());
                let same = got == want || (got.is_nan() && want.is_nan()) || close;
                assert!(same, "{function:?}({x:e}) in {dtype} on {device} gives {got:e}, the limit is {want:e}");
            }
        }
    }
}

#[test]
fn gradients_at_special_values_are_finite_and_a_nan_stays() {
    let activations = [
        Unary::Abs,
        Unary::Tanh,
        Unary::Sigmoid,
        Unary::Erf,
        Unary::Relu,
        Unary::LeakyRelu(0.1),
        Unary::Silu,
        Unary::Gelu,
        Unary::Softplus,
        Unary::Clamp(-1.0, 1.0),
    ];
    let values = [0.0, -0.0, 1e4, -1e4, 65504.0, -65504.0, f64::INFINITY, f64::NEG_INFINITY, f64::NAN];
    for function in activations {
        for (dtype, device) in places() {
            for create_graph in [false, true] {
                let x = Tensor::new(&values, [values.len()]).unwrap().cast(dtype).unwrap();
                let x = x.to_device(device).unwrap().variable().unwrap();
                let options = GradOptions {
                    create_graph,
                    grad_output: Some(x.full_like(1.0).unwrap()),
                    ..GradOptions::default()
                };
                let slopes =
                    grad(&x.unary(function).unwrap(), &[&x], options).unwrap().remove(0).unwrap().to_f64_vec().unwrap();
                let (nan, finite) = slopes.split_last().unwrap();
                assert!(nan.is_nan(), "{function:?} {dtype} on {device}: the slope at NaN is {nan}");
                // Every activation ends in straight lines.
                for (pair, x) in finite.chunks(2).zip([0.0, 1e4, 65504.0, f64::INFINITY]) {
                    let far =
                        |sign: f64| (formula(function, sign * 1e5) - formula(function, sign * 0.9e5)) / (sign * 1e4);
                    let want = if x == 0.0 { continue } else { [far(1.0), far(-1.0)] };
                    let same = pair.iter().zip(want).all(|(got, want)| (got - want).abs() < 1e-6);
                    assert!(same, "{function:?} {dtype} on {device} at ±{x}: {pair:?}, the limits are {want:?}");
                }
            }
        }
    }
}

#[test]
fn the_slope_of_a_constant_power_is_zero_even_at_zero() {
    let x = Tensor::scalar(0.0f64).variable().unwrap();
    assert_eq!(x.powf(0.0).unwrap().backward().unwrap().get(&x).unwrap().item().unwrap(), 0.0);
}

#[test]
fn softplus_keeps_its_precision_where_it_is_small() {
    for (dtype, device) in places() {
        for x in [-5.0f64, -12.0, -20.0, -60.0] {
            let input = Tensor::scalar(x).cast(dtype).unwrap().to_device(device).unwrap();
            let (got, want) = (input.softplus().unwrap().item().unwrap(), x.exp().ln_1p());
            assert!((got / want - 1.0).abs() < 1e-6, "softplus({x}) = {got:e} on {device}, not {want:e}");
        }
    }
}

#[test]
fn a_nan_on_either_side_stays() {
    for (dtype, device) in places() {
        let [nan, one] = [f64::NAN, 1.0].map(|x| Tensor::scalar(x).cast(dtype).unwrap().to_device(device).unwrap());
        for function in [Binary::Add, Binary::Sub, Binary::Mul, Binary::Div, Binary::Maximum, Binary::Minimum] {
            for (a, b) in [(&nan, &one), (&one, &nan)] {
                assert!(a.binary(b, function).unwrap().item().unwrap().is_nan(), "{function:?} on {device}");
            }
        }
        // Comparisons are answers, not numbers: NaN is neither greater than nor equal to anything.
        for function in [Binary::Greater, Binary::Equal] {
            assert_eq!(nan.binary(&nan, function).unwrap().item().unwrap(), 0.0);
        }
    }
}

#[test]
fn equal_operands_share_the_gradient_of_an_extremum() {
    for function in [Binary::Maximum, Binary::Minimum] {
        let a = Tensor::scalar(2.0f64).variable().unwrap();
        let b = Tensor::scalar(2.0f64).variable().unwrap();
        let gradients = a.binary(&b, function).unwrap().backward().unwrap();
        assert_eq!([&a, &b].map(|x| gradients.get(x).unwrap().item().unwrap()), [0.5, 0.5]);
    }
}

#[test]
fn select_ignores_what_it_does_not_take() {
    for (dtype, device) in places() {
        let tensor = |values: [f64; 2]| {
            let tensor = Tensor::new(&values, [2]).unwrap().cast(dtype).unwrap();
            tensor.to_device(device).unwrap().variable().unwrap()
        };
        let (mask, yes, no) = (tensor([1.0, 0.0]).detach(), tensor([1.0, f64::INFINITY]), tensor([f64::NAN, 2.0]));
        let output = select(&mask, &yes, &no).unwrap();
        assert_eq!(output.to_f64_vec().unwrap(), [1.0, 2.0]);
        let gradients = output.sum_all().unwrap().backward().unwrap();
        assert_eq!(gradients.get(&yes).unwrap().to_f64_vec().unwrap(), [1.0, 0.0]);
        assert_eq!(gradients.get(&no).unwrap().to_f64_vec().unwrap(), [0.0, 1.0]);
    }
}

#[test]
fn operands_must_be_on_one_device() {
    let Some(device) = test_device() else { return };
    let here = Tensor::scalar(1.0f32);
    let there = here.to_device(device).unwrap();
    let message = |result: Result<Tensor>| result.unwrap_err().to_string();
    assert!(message(here.add(&there)).contains("add: tensors are on cpu and"));
    assert!(message(select(&there, &there, &here)).contains("select: tensors are on"));
}

#[test]
fn bad_arguments_are_errors() {
    let message = |result: Result<Tensor>| result.unwrap_err().to_string();
    let (a, b) = (randn(&[2, 3], 0), randn(&[2], 0));
    assert!(message(a.add(&b)).contains("(2, 3) and (2) do not broadcast"));
    assert!(message(a.mul(&a.cast(DType::F32).unwrap())).contains("got dtype f32, expected f64"));
    let labels = Tensor::new(&[1i64], [1]).unwrap();
    assert!(message(labels.exp()).contains("got dtype i64"));
    assert!(message(labels.add(&labels)).contains("got dtype i64"));
    assert!(message(select(&a, &a, &b)).contains("select: (2, 3) and (2)"));
    assert!(message(select(&labels, &a, &a)).contains("got dtype i64"));
}
