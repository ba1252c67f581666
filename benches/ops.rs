//! Times every op at the sizes that models use, in `f32`: forward, and forward with backward.
//!
//! The cases are those of the tests (`tests/ops`). `cargo bench --bench ops -- softmax` runs those whose name matches,
//! `-- --quick` fewer samples, `-- --test` each case once, and `RAYON_NUM_THREADS=1` in front counts on one thread.
//!
//! Throughput is the work of the forward formula over the time, GB/s where memory bounds the op; where arithmetic does,
//! Gelem/s stands for GFLOP/s. Backward adds time and no work to it.

use std::cell::LazyCell;
use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput};
use gridgrad::autograd::{GradOptions, grad};
use gridgrad::random::Philox;
use gridgrad::{DType, Result, Tensor};
use harness::{Derivatives, OpCase, Work, inputs_as};

#[allow(dead_code, unused_imports, reason = "the tests use the rest")]
#[path = "../tests/ops/main.rs"]
mod ops;

// Where the cases look for it.
use ops::harness;

/// Operations per byte from which arithmetic bounds an op: 100 GFLOP/s over 10 GB/s of one core.
const ARITHMETIC_BOUND: u64 = 10;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    for (room, cases) in ops::benchmarks() {
        let mut group = criterion.benchmark_group(room);
        group.sample_size(10);
        for case in &cases {
            let case = case.as_ref();
            group.throughput(throughput(case.work()));
            // Made when the filter lets the first closure through.
            let inputs = LazyCell::new(|| inputs_as(case, DType::F32));
            group.bench_function(BenchmarkId::new("forward", case), |bencher| {
                let inputs = &*inputs;
                bencher.iter(|| run(case, black_box(inputs)));
            });
            if case.derivatives() != Derivatives::None {
                let backward = LazyCell::new(|| Backward::new(case).unwrap_or_else(|error| panic!("{case}: {error}")));
                group.bench_function(BenchmarkId::new("forward and backward", case), |bencher| {
                    let backward = &*backward;
                    bencher.iter(|| backward.run(case).unwrap_or_else(|error| panic!("{case}: {error}")));
                });
            }
        }
        group.finish();
    }
    criterion.final_summary();
}

fn throughput(Work { bytes, flops }: Work) -> Throughput {
    if flops > ARITHMETIC_BOUND * bytes { Throughput::Elements(flops) } else { Throughput::BytesDecimal(bytes) }
}

fn run(case: &dyn OpCase, inputs: &[Tensor]) -> Tensor {
    case.run(inputs).unwrap_or_else(|error| panic!("{case}: {error}"))
}

/// What the walk backward starts from.
struct Backward {
    inputs: Vec<Tensor>,
    grad_output: Tensor,
}

impl Backward {
    fn new(case: &dyn OpCase) -> Result<Self> {
        let variable = |input: Tensor| if input.dtype().is_float() { input.variable() } else { Ok(input) };
        let inputs: Vec<Tensor> = inputs_as(case, DType::F32).into_iter().map(variable).collect::<Result<_>>()?;
        let output = case.run(&inputs)?;
        let grad_output = Tensor::randn(output.shape(), output.dtype(), Philox::new(5))?;
        Ok(Backward { inputs, grad_output })
    }

    /// The gradients with respect to every floating-point input.
    fn run(&self, case: &dyn OpCase) -> Result<Vec<Option<Tensor>>> {
        let output = case.run(black_box(&self.inputs))?;
        let wanted: Vec<&Tensor> = self.inputs.iter().filter(|input| input.requires_grad()).collect();
        grad(&output, &wanted, GradOptions { grad_output: Some(self.grad_output.clone()), ..GradOptions::default() })
    }
}
