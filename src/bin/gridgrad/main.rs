//! The command line of gridgrad.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod doctor;

#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Shows what this machine offers: processor, memory, GPU, data sets.
    Doctor {
        /// Prints one JSON object instead of words.
        #[arg(long)]
        json: bool,
    },
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
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
