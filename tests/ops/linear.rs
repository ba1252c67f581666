//! Affine maps of the last axis, alone and with a GELU behind them.

use std::fmt;

use gridgrad::autograd::{self, GradOptions};
use gridgrad::cpu::bf16::without_instructions;
use gridgrad::ops::{linear, linear_gelu};
use gridgrad::{DType, Device, Result, Tensor};

use super::matmul::sum_tolerance;
use crate::harness::{OpCase, Tolerance, Work, check, check_on_device, randn, test_device};

struct Linear {
    outer: Vec<usize>,
    in_features: usize,
    out_features: usize,
    bias: bool,
    gelu: bool,
}

impl fmt::Display for Linear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Linear { outer, in_features, out_features, bias, gelu } = self;
        write!(f, "linear {outer:?}×{in_features} → {out_features}, bias {bias}, gelu {gelu}")
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
        let op = if self.gelu { linear_gelu } else { linear };
        op(&inputs[0], &inputs[1], inputs.get(2))
    }

    fn reference(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        let rows: usize = self.outer.iter().product();
        let value = |row: usize, out: usize| {
            let bias = if self.bias { inputs[2][out] } else { 0.0 };
            let product = |i: usize| inputs[0][row * self.in_features + i] * inputs[1][out * self.in_features + i];
            let sum = bias + (0..self.in_features).map(product).sum::<f64>();
            if self.gelu { 0.5 * sum * libm::erfc(-sum / 2f64.sqrt()) } else { sum }
        };
        (0..rows * self.out_features).map(|i| value(i / self.out_features, i % self.out_features)).collect()
    }

    fn work(&self) -> Work {
        let rows = self.outer.iter().product::<usize>() as u64;
        let (k, n) = (self.in_features as u64, self.out_features as u64);
        Work { bytes: 4 * (rows * k + k * n + rows * n), flops: 2 * rows * k * n }
    }

    fn composed(&self, inputs: &[Tensor]) -> Option<Result<Tensor>> {
        self.gelu.then(|| linear(&inputs[0], &inputs[1], inputs.get(2))?.gelu())
    }

    fn tolerance(&self) -> Tolerance {
        sum_tolerance(self.in_features)
    }
}

fn cases() -> Vec<Box<dyn OpCase>> {
    let mut cases: Vec<Box<dyn OpCase>> = Vec::new();
    for gelu in [false, true] {
        for (outer, in_features, out_features, bias) in [
            (vec![], 3, 2, true),
            (vec![5], 1, 1, false),
            (vec![3], 0, 2, true),
            (vec![0], 4, 3, true),
            (vec![2, 3, 7], 13, 11, true),
        ] {
            cases.push(Box::new(Linear { outer, in_features, out_features, bias, gelu }));
        }
    }
    cases
}

/// Around the edges of the kernels' tiles.
fn tile_cases() -> Vec<Linear> {
    let mut cases = Vec::new();
    for gelu in [false, true] {
        for (outer, in_features, out_features, bias) in [
            (vec![100], 96, 31, true),
            (vec![4, 33], 16, 72, false),
            // The large tile on the emulator, with remainders; sums over rows in several blocks.
            (vec![136], 40, 136, true),
            // A split product.
            (vec![7], 520, 16, true),
        ] {
            cases.push(Linear { outer, in_features, out_features, bias, gelu });
        }
    }
    cases
}

/// The linear maps of CrossFormer-S at batch 8, first and last stage.
pub fn benchmarks() -> Vec<Box<dyn OpCase>> {
    let linear = |rows, in_features, out_features, gelu| {
        Box::new(Linear { outer: vec![rows], in_features, out_features, bias: true, gelu }) as Box<dyn OpCase>
    };
    vec![
        linear(8 * 3136, 96, 384, false),
        linear(8 * 3136, 96, 384, true),
        linear(8 * 3136, 384, 96, false),
        linear(8 * 49, 768, 3072, false),
        linear(8 * 49, 768, 3072, true),
        linear(8 * 49, 3072, 768, false),
    ]
}

#[test]
fn linear_maps_agree_with_their_definition() {
    check(&cases());
}

#[test]
fn tiles_agree_with_the_processor() {
    tile_cases().iter().for_each(|case| check_on_device(case));
}

#[test]
fn bad_shapes_are_errors() {
    let message = |result: Result<Tensor>| result.unwrap_err().to_string();
    let x = randn(&[2, 3], 0);
    for op in [linear, linear_gelu] {
        assert!(message(op(&x, &randn(&[4, 2], 0), None)).contains("the last axis must be 2"));
        assert!(message(op(&x, &randn(&[4, 3], 0), Some(&randn(&[3], 0)))).contains("bias (3)"));
        assert!(message(op(&x, &randn(&[3], 0), None)).contains("expected weight (out, in)"));
    }
}

/// The device's rule against the processor's two ops.
#[test]
fn second_derivatives_of_the_fused_op_are_those_of_its_parts() {
    let Some(device) = test_device() else { return };
    let gradients = |op: fn(&Tensor, &Tensor, Option<&Tensor>) -> Result<Tensor>, device: Device| -> Result<Vec<f64>> {
        let input = |shape: &[usize], number| randn(shape, number).cast(DType::F32)?.to_device(device)?.variable();
        let (x, w, b) = (input(&[5, 4], 0)?, input(&[3, 4], 1)?, input(&[3], 2)?);
        let y = op(&x, &w, Some(&b))?.sum_all()?;
        let first = autograd::grad(&y, &[&x, &w, &b], GradOptions { create_graph: true, ..GradOptions::default() })?;
        let mut total = Tensor::scalar(0.0f32).to_device(device)?;
        for gradient in first.iter().flatten() {
            total = total.add(&gradient.square()?.sum_all()?)?;
        }
        let second = autograd::grad(&total, &[&x, &w, &b], GradOptions::default())?;
        Ok(second.iter().flatten().flat_map(|gradient| gradient.to_f64_vec().unwrap()).collect())
    };
    let parts = gradients(|x, w, b| linear(x, w, b)?.gelu(), Device::Cpu).unwrap();
    let fused = gradients(linear_gelu, device).unwrap();
    let scale = parts.iter().fold(1.0f64, |scale, value| scale.max(value.abs()));
    assert_eq!((parts.len(), fused.len()), (35, 35));
    for (part, fused) in parts.iter().zip(&fused) {
        assert!((part - fused).abs() < 1e-5 * scale, "{part} and {fused}");
    }
}

/// The output and all gradients, with a gradient of the output that differs at every element; all
/// inputs are rounded to one type and then taken in another.
fn with_gradients(case: &Linear, dtype: DType, rounded: DType) -> Vec<Vec<f64>> {
    gradients_of(|inputs| case.run(inputs), case, dtype, rounded)
}

fn gradients_of(
    run: impl Fn(&[Tensor]) -> Result<Tensor>,
    case: &Linear,
    dtype: DType,
    rounded: DType,
) -> Vec<Vec<f64>> {
    let results = || -> Result<Vec<Vec<f64>>> {
        let inputs = case.inputs();
        let inputs: Result<Vec<Tensor>> =
            inputs.iter().map(|input| input.cast(rounded)?.cast(dtype)?.variable()).collect();
        let inputs = inputs?;
        let output = run(&inputs)?;
        let grad_output = Some(randn(output.shape(), 7).cast(rounded)?.cast(dtype)?);
        let options = GradOptions { grad_output, ..GradOptions::default() };
        let gradients = autograd::grad(&output, &inputs.iter().collect::<Vec<_>>(), options)?;
        gradients.iter().flatten().chain([&output]).map(Tensor::to_f64_vec).collect()
    };
    results().unwrap()
}

/// In `f32`, rows up to 128, below 1024 and from there on take ways of their own, which depend on the weight's size and
/// widths.
#[test]
fn few_flat_and_tall_products_agree_with_double_precision_for_any_number_of_threads() {
    for (rows, in_features, out_features, bias) in [
        (1024, 16, 24, true),
        (1031, 40, 17, false),
        (1100, 32, 48, true),
        (1037, 600, 32, true),
        (1025, 300, 560, true),
        (2050, 96, 64, false),
        // Flat: panels that are not filled, one strip or several, one chunk of the depth or several.
        // Few rows, by dot products: blocks that are not filled, several chunks of the depth.
        (1, 64, 1000, true),
        (5, 67, 70, false),
        (49, 520, 96, true),
        (127, 1100, 65, true),
        (128, 64, 64, false),
        (129, 80, 112, true),
        (392, 300, 73, true),
        (131, 70, 1560, false),
        (1023, 176, 96, true),
    ] {
        for gelu in [false, true] {
            let case = Linear { outer: vec![rows], in_features, out_features, bias, gelu };
            let exact = with_gradients(&case, DType::F64, DType::F32);
            let single = with_gradients(&case, DType::F32, DType::F32);
            for (number, (exact, single)) in exact.iter().zip(&single).enumerate() {
                let size = exact.iter().fold(1.0, |size: f64, value| size.max(value.abs()));
                for (index, (exact, single)) in exact.iter().zip(single).enumerate() {
                    assert!(
                        (exact - single).abs() < 5e-6 * size,
                        "{case}, result {number} at {index}: {single} for {exact}"
                    );
                }
            }
            same_for_any_number_of_threads(&case, DType::F32, &single);
        }
    }
}

fn same_for_any_number_of_threads(case: &Linear, dtype: DType, results: &[Vec<f64>]) {
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        assert_eq!(
            pool.install(|| with_gradients(case, dtype, dtype)),
            results,
            "{case} {dtype} with {threads} threads"
        );
    }
}

/// In `bf16` a processor may multiply in `bf16`: output and gradients are at most twice as far from those in `f64`, from the
/// same rounded inputs, as those of the separate ops by way of `f32`, as other processors compute them.
#[test]
fn products_of_bf16_are_as_good_as_those_of_f32_for_any_number_of_threads() {
    for (rows, in_features, out_features, bias) in [
        (1, 1, 1, true),
        (3, 0, 2, true),
        (0, 4, 3, true),
        (42, 13, 11, true),
        (392, 96, 70, true),
        (1031, 40, 17, false),
        (1100, 33, 48, true),
        (1037, 600, 32, true),
        (1025, 300, 560, true),
        (2050, 96, 64, false),
    ] {
        for gelu in [false, true] {
            let case = Linear { outer: vec![rows], in_features, out_features, bias, gelu };
            let exact = with_gradients(&case, DType::F64, DType::Bf16);
            let direct = with_gradients(&case, DType::Bf16, DType::Bf16);
            let composed = |inputs: &[Tensor]| case.composed(inputs).unwrap_or_else(|| case.run(inputs));
            let converted = without_instructions(|| gradients_of(composed, &case, DType::Bf16, DType::Bf16));
            for (number, (exact, (direct, converted))) in exact.iter().zip(direct.iter().zip(&converted)).enumerate() {
                let error = |got: &[f64]| got.iter().zip(exact).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
                let size = exact.iter().fold(1.0, |size: f64, value| size.max(value.abs()));
                let (direct, converted) = (error(direct), error(converted));
                assert!(direct <= 2.0 * converted + 1e-6 * size, "{case}, result {number}: {direct:e}, {converted:e}");
            }
            same_for_any_number_of_threads(&case, DType::Bf16, &direct);
        }
    }
}

/// Threads share few rows in another way than many.
#[test]
fn rows_of_bf16_have_the_same_bits_among_any_others() {
    for gelu in [false, true] {
        let case = Linear { outer: vec![300], in_features: 70, out_features: 300, bias: true, gelu };
        let inputs: Vec<Tensor> = case.inputs().iter().map(|input| input.cast(DType::Bf16).unwrap()).collect();
        let all = case.run(&inputs).unwrap();
        for rows in [1, 2, 49, 256] {
            let few = [&[inputs[0].narrow(0, 7, rows).unwrap()], &inputs[1..]].concat();
            let of_few = autograd::no_grad(|| case.run(&few).unwrap());
            let expected = all.narrow(0, 7, rows).unwrap();
            assert_eq!(of_few.raw_bytes().unwrap(), expected.raw_bytes().unwrap(), "{case}, {rows} rows");
        }
    }
}
