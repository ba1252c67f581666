//! The command line of gridgrad.

use std::process::ExitCode;
use std::thread::available_parallelism;

use clap::{Parser, Subcommand};

mod bench;
mod certify;
mod checkpoint;
mod device;
mod doctor;
mod eval;
mod finite_aggregation;
mod info;
mod kernels;
mod output;
mod pictures;
mod predict;
mod process;
mod progress;
mod run;
mod settings;
mod train;

/// Cross-scale vision transformers, trained and run from one command.
#[derive(Parser)]
#[command(version, propagate_version = true, arg_required_else_help = true)]
struct Arguments {
    /// Threads to compute with; where absent, RAYON_NUM_THREADS or all processors.
    #[arg(long, global = true, value_name = "N", display_order = 100)]
    threads: Option<usize>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Trains a network on images and leaves checkpoints, metrics and pictures in a folder.
    #[command(subcommand)]
    Train(train::Train),
    /// Makes one run of the shards of an ensemble.
    MergeShards(finite_aggregation::MergeShards),
    /// Measures a trained network on a data set.
    Eval(eval::Eval),
    /// Tells what images show.
    Predict(predict::Predict),
    /// Shows a network's layers, parameters and multiply-adds.
    Info(info::Info),
    /// Runs a network with given weights on given tensors: the bridge to other frameworks.
    Run(run::Run),
    /// Certifies the answers of an ensemble against poisoned training data.
    Certify(certify::Certify),
    /// Measures the speed of training on this machine.
    Bench(bench::BenchArgs),
    /// Lists the GPU kernels: registers, shared memory, occupancy, bytes and FLOPs.
    Kernels(kernels::KernelsArgs),
    /// Shows what this machine offers: processor, memory, GPU, data sets.
    Doctor {
        /// Prints one JSON object instead of words.
        #[arg(long)]
        json: bool,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = set_threads(arguments.threads).and_then(|()| match arguments.command {
        Command::Train(train) => train::run(train),
        Command::MergeShards(merge) => merge.run(),
        Command::Eval(eval) => eval::run(eval),
        Command::Predict(predict) => predict::run(predict),
        Command::Info(info) => info::run(&info),
        Command::Run(run) => run::run(&run),
        Command::Certify(args) => certify::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Kernels(args) => kernels::run(&args),
        Command::Doctor { json } => doctor::run(json),
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::complain(&format!("error: {error}"));
            // As for a flag that cannot be read.
            let refused = matches!(error, gridgrad::Error::DeviceUnavailable { .. });
            if refused { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
    }
}

/// Where there are several threads, this one is among them and does not wait for another one to wake up at every op. Alone it
/// could not serve others, such as a loader's, while it waits for them.
fn set_threads(threads: Option<usize>) -> gridgrad::Result<()> {
    if let Some(threads) = threads.filter(|threads| !(1..=1024).contains(threads)) {
        return Err(gridgrad::Error::Config(format!("--threads {threads} is not in 1 to 1024")));
    }
    let threads =
        threads.or_else(asked_of_rayon).unwrap_or_else(|| available_parallelism().map_or(1, |threads| threads.get()));
    let builder = rayon::ThreadPoolBuilder::new().num_threads(threads);
    let builder = if threads > 1 { builder.use_current_thread() } else { builder };
    builder.build_global().map_err(|error| gridgrad::Error::Config(format!("cannot start {threads} threads: {error}")))
}

/// What the environment asks for with RAYON_NUM_THREADS, read as rayon reads it: zero and what is no number ask for nothing.
fn asked_of_rayon() -> Option<usize> {
    std::env::var("RAYON_NUM_THREADS").ok()?.parse().ok().filter(|threads| *threads > 0)
}
