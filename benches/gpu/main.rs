//! Times the crate's kernels beside what they are compared with, on the problems of CrossFormer-T, -S, -B and -L.
//!
//! ```text
//! cargo bench --features cuda,cudnn --bench gpu                     # the first GPU, in bf16
//! cargo bench --features cuda,cudnn --bench gpu -- lsda --batch 256 # what matches, one batch
//! cargo bench --bench gpu -- --device cpu --short --quick           # does it run?
//! ```
//!
//! On a GPU times are the device's own, between events in its stream; elsewhere the host's. Every call takes the next of
//! several copies of its inputs, together larger than the second-level cache. A baseline that cannot run is in the table
//! with its reason. Of small problems the host's launches are a part of the time where the GPU waits for them, for every
//! implementation alike. Without a GPU, and where no device is named, the short form runs on the processor.

mod baseline;
mod composed;
mod cublas;
#[cfg(feature = "cudnn")]
mod cudnn;
mod model;
mod ours;
mod pytorch;
mod report;
mod shapes;

use std::path::PathBuf;
use std::time::Duration;

use baseline::{Bench, Stopwatch};
use clap::Parser;
use criterion::Criterion;
use gridgrad::{DType, Device, Error, Result};
use model::Direction;
use report::{Report, Row};
use shapes::Case;

/// Times kernels beside their baselines.
#[derive(Parser)]
struct Arguments {
    /// Only problems whose line contains this
    filter: Option<String>,
    /// cpu, cuda, cuda:N or emulated; where absent the first GPU, or the short form on the processor
    #[arg(long)]
    device: Option<Device>,
    /// f32, bf16 or f16
    #[arg(long, default_value = "bf16", value_parser = ["f32", "bf16", "f16"])]
    dtype: String,
    /// Only problems of this batch
    #[arg(long)]
    batch: Option<usize>,
    /// Small problems, to see that everything runs
    #[arg(long)]
    short: bool,
    /// Few and short samples
    #[arg(long)]
    quick: bool,
    /// Where to write the table, as NAME.md and NAME.json
    #[arg(long, value_name = "NAME")]
    output: Option<PathBuf>,
    /// A Python with PyTorch, which runs the same problems and joins the table
    #[arg(long, value_name = "PYTHON")]
    pytorch: Option<PathBuf>,
    /// Each measurement once, without statistics (`cargo test --benches` says so)
    #[arg(long)]
    test: bool,
    /// What cargo adds
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let device = arguments.device.unwrap_or_else(Device::best);
    gridgrad::driver::require(device)?;
    let dtype = match arguments.dtype.as_str() {
        "f32" => DType::F32,
        "f16" => DType::F16,
        _ => DType::Bf16,
    };
    let short = arguments.short
        || arguments.test
        || device == Device::Emulated
        || arguments.device.is_none() && device == Device::Cpu;
    let mut cases = if short { shapes::short()? } else { shapes::published()? };
    cases.retain(|case| {
        arguments.filter.as_ref().is_none_or(|filter| case.to_string().contains(filter.as_str()))
            && arguments.batch.is_none_or(|batch| case.batch == batch)
    });
    let mut report = Report::new(device, dtype)?;
    let mut criterion = (!arguments.test).then(|| criterion(arguments.quick));
    for case in &cases {
        for direction in Direction::BOTH {
            measure(criterion.as_mut(), Bench { case, direction, device, dtype }, &mut report);
        }
    }
    if let Some(python) = &arguments.pytorch {
        report.rows.extend(pytorch::measure(python, &cases, device, dtype, arguments.quick || arguments.test)?);
    }
    report.finish();
    match &arguments.output {
        Some(name) => report.write(name),
        None => {
            println!("\n{}", report.markdown());
            Ok(())
        }
    }
}

fn criterion(quick: bool) -> Criterion {
    let (samples, warm_up, measured) = if quick { (10, 20, 100) } else { (30, 300, 1000) };
    Criterion::default()
        .sample_size(samples)
        .warm_up_time(Duration::from_millis(warm_up))
        .measurement_time(Duration::from_millis(measured))
        .without_plots()
}

/// All implementations of one problem, a row each; by one call where there is no criterion.
fn measure(criterion: Option<&mut Criterion>, bench: Bench<'_>, report: &mut Report) {
    let mut group = criterion.map(|criterion| criterion.benchmark_group(bench.case.op.room()));
    for (name, implementation) in implementations() {
        let row = match implementation(&bench) {
            Ok(None) => continue,
            Ok(Some(mut run)) => {
                let mut stopwatch = Stopwatch::default();
                if let Some(group) = &mut group {
                    let id =
                        format!("{} {}, batch {}: {name}", bench.direction.name(), bench.case.op, bench.case.batch);
                    group.bench_function(id, |bencher| {
                        bencher.iter_custom(|calls| stopwatch.time(bench.device, calls, &mut *run));
                    });
                } else {
                    stopwatch.time(bench.device, 1, &mut *run);
                }
                match stopwatch.finish() {
                    Ok(samples) => Row::measured(&bench, name, &samples),
                    Err(error) => Row::skipped(&bench, name, &error),
                }
            }
            Err(error) => Row::skipped(&bench, name, &error),
        };
        report.rows.push(row);
    }
}

/// `None` where an implementation has no such op.
type Make = fn(&Bench<'_>) -> Result<Option<baseline::Run>>;

/// By the names of the table; the first is what the others are compared with.
fn implementations() -> Vec<(&'static str, Make)> {
    vec![
        (report::OURS, ours::run as Make),
        ("unfused", composed::run),
        ("cuBLAS", cublas::run),
        #[cfg(feature = "cudnn")]
        ("cuDNN", cudnn::run),
    ]
}

/// For errors that say that an implementation does not do a problem.
fn not_there(device: Device, reason: &str) -> Error {
    Error::DeviceUnavailable { device, reason: reason.into() }
}

/// Names a problem in errors.
fn describe(case: &Case, direction: Direction) -> String {
    format!("{} of {case}", direction.name())
}
