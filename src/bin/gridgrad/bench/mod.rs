//! `gridgrad bench`: how fast this machine trains and infers, network by network and op by op.

mod block;
mod inference;
mod measure;
mod network;
mod ops;
mod step;

use clap::{Args, Subcommand};
use gridgrad::{Error, Result};
use serde::Serialize;

use crate::output::print;

/// What to measure.
#[derive(Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Times training steps of a network on random images: forward, backward, optimizer.
    Step(step::StepArgs),
    /// Times a network's answers for random images, without gradients.
    Inference(inference::InferenceArgs),
    /// Times single ops on the processor at the sizes that networks use: forward, as a network answers, which prepares its
    /// weights once, and forward with backward, as it trains.
    Ops(ops::OpsArgs),
    /// Measures what this machine's processor can do at most: multiply-adds and copies.
    Peak {
        /// Prints one line of JSON.
        #[arg(long)]
        json: bool,
    },
}

/// Runs the benchmark and prints what it found.
pub fn run(args: BenchArgs) -> Result<()> {
    match args.what {
        What::Step(args) => show(&step::measure(&args)?, args.subject.json),
        What::Inference(args) => show(&inference::measure(&args)?, args.subject.json),
        What::Ops(args) => ops::run(&args),
        What::Peak { json } => show(&measure::Peak::of_this_machine(), json),
    }
}

fn show<R: Serialize + std::fmt::Display>(report: &R, json: bool) -> Result<()> {
    let text = if json { line_of_json(report)? } else { report.to_string() };
    print(&text)
}

fn line_of_json(report: &impl Serialize) -> Result<String> {
    let text = serde_json::to_string(report).map_err(|error| Error::Config(format!("cannot write JSON: {error}")))?;
    Ok(text + "\n")
}
