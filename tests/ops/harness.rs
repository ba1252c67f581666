//! What a case of an op is, and the drivers that run every case.

use std::fmt::Display;

use gridgrad::autograd::{self, GradOptions, GradientCheck};
use gridgrad::cpu::bf16::{has_instructions, without_instructions};
use gridgrad::random::Philox;
use gridgrad::{DType, Device, Result, Tensor};

/// Bytes that an op must read and write at least, and the floating-point operations of its formula, in its `f32` form.
#[derive(Clone, Copy, Debug, Default)]
pub struct Work {
    /// Read and written.
    pub bytes: u64,
    /// A multiply-add counts as two.
    pub flops: u64,
}

/// Which derivatives an op has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Derivatives {
    /// Not differentiable: comparisons, indices.
    None,
    /// First derivatives only; asking for more must be an error.
    First,
    /// Derivatives of derivatives.
    Second,
}

/// Largest allowed difference, relative to the largest element of the reference (at least 1).
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    /// Of a result in `f64`.
    pub f64: f64,
    /// Of a result in `f32`.
    pub f32: f64,
    /// Of a gradient against central differences, whose own error is about 1e-9.
    pub gradient: f64,
}

/// A few roundings for every element; ops that sum many terms or cancel say so in their own tolerance.
pub const ROUNDING: Tolerance = Tolerance { f64: 1e-13, f32: 2e-6, gradient: 1e-6 };

/// One op with fixed parameters. `Display` prints the parameters.
pub trait OpCase: Display + Sync + Send {
    /// The inputs, from fixed seeds: floating-point ones as `f64`, indices as `i64`.
    fn inputs(&self) -> Vec<Tensor>;
    /// The op, through the crate's public interface, in the dtype of the inputs.
    fn run(&self, inputs: &[Tensor]) -> Result<Tensor>;
    /// The op from its formula, written without looking at the implementation.
    fn reference(&self, inputs: &[Vec<f64>]) -> Vec<f64>;
    /// Work of the forward pass.
    fn work(&self) -> Work;
    /// How far from the reference a result may be; overridden with a reason.
    fn tolerance(&self) -> Tolerance {
        ROUNDING
    }
    /// A fused op made of primitive ones, each rounding to the dtype of the inputs: what its low precision is judged
    /// against. `None` where the op is primitive.
    fn composed(&self, _inputs: &[Tensor]) -> Option<Result<Tensor>> {
        None
    }
    /// Which derivatives to check.
    fn derivatives(&self) -> Derivatives {
        Derivatives::Second
    }
}

/// Standard normal `f64` values, numbered so that inputs of one case differ.
pub fn randn(shape: &[usize], number: u64) -> Tensor {
    Tensor::randn(shape, DType::F64, Philox::new(2024).fork(number)).unwrap()
}

/// The case's inputs with floating-point ones in `dtype`.
pub fn inputs_as(case: &dyn OpCase, dtype: DType) -> Vec<Tensor> {
    let cast = |input: Tensor| if input.dtype() == DType::F64 { input.cast(dtype).unwrap() } else { input };
    case.inputs().into_iter().map(cast).collect()
}

/// Runs every driver over every case.
pub fn check(cases: &[Box<dyn OpCase>]) {
    assert!(!cases.is_empty());
    for case in cases {
        check_on_host(case.as_ref());
        check_on_device(case.as_ref());
    }
}

/// The drivers that concern the processor: for cases that are large because its tiles are, which would take the emulator
/// long and mean nothing to kernels.
pub fn check_on_host(case: &dyn OpCase) {
    forward(case, DType::F64, case.tolerance().f64);
    forward(case, DType::F32, case.tolerance().f32);
    // Computed in f32 from rounded inputs, then rounded once: 2⁻⁹ and 2⁻¹² of each element.
    forward(case, DType::Bf16, case.tolerance().f32 + 1.0 / 256.0);
    forward(case, DType::F16, case.tolerance().f32 + 1.0 / 2048.0);
    gradients(case);
    threads(case, DType::F32);
    [DType::F32, DType::Bf16].into_iter().for_each(|dtype| answers(case, dtype));
    if has_instructions() {
        multiplied_in_bf16(case);
        threads(case, DType::Bf16);
    }
}

/// The drivers that concern kernels: for cases at the edges of their tiles, which mean nothing to the processor.
pub fn check_on_device(case: &dyn OpCase) {
    if let Some(device) = test_device() {
        for dtype in [DType::F32, DType::Bf16, DType::F16] {
            on_device(case, device, dtype);
        }
        repeated(case, device);
    }
}

/// Where kernels are tested: `GRIDGRAD_TEST_DEVICE` (`cuda`, say), else the emulator where it is compiled in.
pub fn test_device() -> Option<Device> {
    match std::env::var("GRIDGRAD_TEST_DEVICE") {
        Ok(name) => Some(name.parse().unwrap()),
        Err(_) => cfg!(feature = "emulator").then_some(Device::Emulated),
    }
}

/// Output and gradients on `device` are at most twice as far from those in `f64`, computed from the same rounded
/// inputs, as the processor's are, or those of the op's composed form: one bound for every dtype.
pub fn on_device(case: &dyn OpCase, device: Device, dtype: DType) {
    let rounded = inputs_as(case, dtype);
    let widen = |input: &Tensor| if input.dtype().is_float() { input.cast(DType::F64).unwrap() } else { input.clone() };
    let wide: Vec<Tensor> = rounded.iter().map(widen).collect();
    let results = |inputs: &[Tensor], device: Device| -> Vec<Tensor> {
        let run = |inputs: &[Tensor]| case.run(inputs);
        let moved: Vec<Tensor> = inputs.iter().map(|input| input.to_device(device).unwrap()).collect();
        output_and_gradients(run, &moved, GradOptions::default())
            .unwrap_or_else(|error| panic!("{case} {dtype} on {device}: {error}"))
    };
    let exact = results(&wide, Device::Cpu);
    let baseline = match case.composed(&rounded) {
        None => results(&rounded, Device::Cpu),
        Some(_) => {
            let composed = |inputs: &[Tensor]| case.composed(inputs).unwrap();
            output_and_gradients(composed, &rounded, GradOptions::default()).unwrap()
        }
    };
    let got = results(&rounded, device);
    assert!(got.iter().all(|result| result.device() == device), "{case} {dtype} on {device}");
    twice_as_far(case, &format!("{dtype} on {device}"), &got, &baseline, &exact);
}

/// An answer has the bits of the output that training records, with whatever the op keeps of its inputs for later ones.
fn answers(case: &dyn OpCase, dtype: DType) {
    let inputs = inputs_as(case, dtype);
    let bits = |inputs: &[Tensor]| case.run(inputs).unwrap().raw_bytes().unwrap().to_vec();
    let variable = |input: &Tensor| if input.dtype().is_float() { input.variable().unwrap() } else { input.clone() };
    let recorded = bits(&inputs.iter().map(variable).collect::<Vec<_>>());
    for number in 0..3 {
        assert!(autograd::no_grad(|| bits(&inputs)) == recorded, "{case} {dtype}, answer {number}");
    }
}

/// Where the processor multiplies `bf16`: output and gradients are at most twice as far from those in `f64`, computed
/// from the same rounded inputs, as those by way of `f32`, or those of the op's composed form.
fn multiplied_in_bf16(case: &dyn OpCase) {
    let rounded = inputs_as(case, DType::Bf16);
    let widen = |input: &Tensor| if input.dtype().is_float() { input.cast(DType::F64).unwrap() } else { input.clone() };
    let wide: Vec<Tensor> = rounded.iter().map(widen).collect();
    let run = |inputs: &[Tensor]| case.run(inputs);
    let composed = |inputs: &[Tensor]| case.composed(inputs).unwrap_or_else(|| case.run(inputs));
    let exact = output_and_gradients(run, &wide, GradOptions::default()).unwrap();
    let got = output_and_gradients(run, &rounded, GradOptions::default()).unwrap();
    let baseline = without_instructions(|| output_and_gradients(composed, &rounded, GradOptions::default()).unwrap());
    twice_as_far(case, "bf16", &got, &baseline, &exact);
}

fn twice_as_far(case: &dyn OpCase, how: &str, got: &[Tensor], baseline: &[Tensor], exact: &[Tensor]) {
    assert_eq!(got.len(), exact.len(), "{case} {how}: number of gradients");
    for (number, ((got, baseline), exact)) in got.iter().zip(baseline).zip(exact).enumerate() {
        assert_eq!(got.dtype(), baseline.dtype(), "{case} {how}, result {number}");
        let exact = exact.to_f64_vec().unwrap();
        let scale = exact.iter().filter(|v| v.is_finite()).fold(1.0f64, |scale, v| scale.max(v.abs()));
        let allowed = 2.0 * largest_error(&baseline.to_f64_vec().unwrap(), &exact) + case.tolerance().f32 * scale;
        let error = largest_error(&got.to_f64_vec().unwrap(), &exact);
        assert!(error <= allowed, "{case} {how}, result {number}: error {error:e}, allowed {allowed:e}");
    }
}

/// The largest difference; infinite where one is NaN or infinite and the other is not the same.
fn largest_error(got: &[f64], exact: &[f64]) -> f64 {
    let error = |(&got, &exact): (&f64, &f64)| {
        let same = got == exact || (got.is_nan() && exact.is_nan());
        let difference = (got - exact).abs();
        if same {
            0.0
        } else if difference.is_nan() {
            f64::INFINITY
        } else {
            difference
        }
    };
    assert_eq!(got.len(), exact.len());
    got.iter().zip(exact).map(error).fold(0.0, f64::max)
}

/// Output and gradients on `device` have the same bits again, on the emulator in whatever order threads run.
fn repeated(case: &dyn OpCase, device: Device) {
    for dtype in [DType::F32, DType::Bf16] {
        let inputs: Vec<Tensor> = inputs_as(case, dtype).iter().map(|input| input.to_device(device).unwrap()).collect();
        let bits = |schedule: u64| -> Vec<Vec<u8>> {
            set_schedule(schedule);
            let run = |inputs: &[Tensor]| case.run(inputs);
            let results = output_and_gradients(run, &inputs, GradOptions::default()).unwrap();
            set_schedule(0);
            results.iter().map(|result| result.to_device(Device::Cpu).unwrap().raw_bytes().unwrap().to_vec()).collect()
        };
        let first = bits(0);
        for schedule in [1, 2] {
            assert!(bits(schedule) == first, "{case} {dtype} on {device}: schedule {schedule} changes the result");
        }
    }
}

#[cfg(feature = "emulator")]
fn set_schedule(seed: u64) {
    gridgrad::driver::emulator::set_schedule(seed);
}

#[cfg(not(feature = "emulator"))]
fn set_schedule(_seed: u64) {}

fn forward(case: &dyn OpCase, dtype: DType, tolerance: f64) {
    let inputs = inputs_as(case, dtype);
    let output = case.run(&inputs).unwrap_or_else(|error| panic!("{case} {dtype}: {error}"));
    let values: Vec<Vec<f64>> = inputs.iter().map(|tensor| tensor.to_f64_vec().unwrap()).collect();
    let reference = case.reference(&values);
    assert_eq!(output.elements(), reference.len(), "{case} {dtype}");
    let scale = reference.iter().filter(|v| v.is_finite()).fold(1.0f64, |scale, v| scale.max(v.abs()));
    for (index, (got, want)) in output.to_f64_vec().unwrap().into_iter().zip(reference).enumerate() {
        let same = got == want || (got.is_nan() && want.is_nan());
        assert!(
            same || (got - want).abs() <= tolerance * scale,
            "{case} {dtype}, element {index}: got {got:e}, the reference is {want:e}"
        );
    }
}

fn gradients(case: &dyn OpCase) {
    if case.derivatives() == Derivatives::None {
        return;
    }
    let check = GradientCheck {
        tolerance: case.tolerance().gradient,
        samples: 24,
        second_order: case.derivatives() == Derivatives::Second,
        ..GradientCheck::default()
    };
    let run = |inputs: &[Tensor]| case.run(inputs);
    autograd::check_gradients(run, &case.inputs(), check).unwrap_or_else(|error| panic!("{case}: {error}"));
    if case.derivatives() == Derivatives::First {
        let options = GradOptions { create_graph: true, ..GradOptions::default() };
        let error = all_gradients(case, DType::F64, options).expect_err("a second derivative that is not there");
        assert!(error.to_string().contains("second derivative"), "{case}: {error}");
    }
}

fn all_gradients(case: &dyn OpCase, dtype: DType, options: GradOptions) -> Result<Vec<Tensor>> {
    output_and_gradients(|inputs: &[Tensor]| case.run(inputs), &inputs_as(case, dtype), options)
}

/// The output of `run` followed by the gradients of its sum, weighted, with respect to every floating-point input.
fn output_and_gradients(
    run: impl Fn(&[Tensor]) -> Result<Tensor>,
    inputs: &[Tensor],
    options: GradOptions,
) -> Result<Vec<Tensor>> {
    let inputs: Vec<Tensor> = inputs
        .iter()
        .map(|input| if input.dtype().is_float() { input.variable() } else { Ok(input.clone()) })
        .collect::<Result<_>>()?;
    let output = run(&inputs)?;
    let mut results = vec![output.detach()];
    if output.requires_grad() {
        // Rounded to half precision first, so that every dtype weighs with the same numbers.
        let weights = Tensor::randn(output.shape(), DType::Bf16, Philox::new(5))?.cast(DType::F32)?;
        let weights = weights.cast(output.dtype())?.to_device(output.device())?;
        let options = GradOptions { grad_output: Some(weights), ..options };
        let wanted: Vec<&Tensor> = inputs.iter().filter(|input| input.requires_grad()).collect();
        results.extend(autograd::grad(&output, &wanted, options)?.into_iter().flatten());
    }
    Ok(results)
}

/// Output and gradients have the same bits with one, two and three threads.
fn threads(case: &dyn OpCase, dtype: DType) {
    let bits = |threads: usize| -> Vec<Vec<u8>> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let results = pool.install(|| all_gradients(case, dtype, GradOptions::default())).unwrap();
        results.iter().map(|result| result.raw_bytes().unwrap().to_vec()).collect()
    };
    let one = bits(1);
    for threads in [2, 3] {
        assert!(bits(threads) == one, "{case} {dtype}: {threads} threads change the result");
    }
}
