//! The command line of gridgrad.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod bench;
mod doctor;

#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Measures the speed of training on this machine.
    Bench(bench::BenchArgs),
    /// Shows what this machine offers: processor, memory, GPU, data sets.
    Doctor {
        /// Prints one JSON object instead of words.
        #[arg(long)]
        json: bool,
    },
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Bench(args) => bench::run(args),
        Command::Doctor { json } => doctor::run(json),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
