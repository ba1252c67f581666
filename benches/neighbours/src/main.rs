//! Times training steps and single ops in candle and burn, on the processor: the counterpart of `gridgrad bench`.
//!
//! `neighbours step candle --model nin --batch 128 --image 28` prints one line of JSON with the keys of
//! `gridgrad bench step --json` that have a meaning here. `neighbours ops` reads lines `{"op": …, "mode": "burn"}` with ops as
//! `gridgrad bench ops --list` prints them, and answers each with a line. RAYON_NUM_THREADS sets the threads of both frameworks.

mod in_burn;
mod in_candle;
// What tells the memory and processor time of gridgrad's own process.
#[path = "../../../src/bin/gridgrad/process.rs"]
mod process;
mod shapes;

use std::error::Error;
use std::io::{BufRead, Write};
use std::time::{Duration, Instant};

use clap::{Args, Parser, ValueEnum};
use serde::{Deserialize, Serialize};
use serde_json::json;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// One training step; gives the time of forward, backward and optimizer.
type Step = Box<dyn FnMut() -> Result<[Duration; 3]>>;

/// An op on tensors that are there.
type Call = Box<dyn Fn() -> Result<()>>;

#[derive(Parser)]
enum Command {
    /// Times training steps on random images: forward, cross entropy, backward, AdamW.
    Step(StepArgs),
    /// Times the ops that standard input names.
    Ops {
        /// Time for each op and direction, in milliseconds.
        #[arg(long, default_value_t = 300)]
        milliseconds: u64,
    },
}

#[derive(Clone, Copy, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Framework {
    Candle,
    Burn,
}

#[derive(Args)]
struct StepArgs {
    framework: Framework,
    /// nin, resnet18, block (a transformer block on maps of 96 channels), tiny or small (CrossFormers).
    #[arg(long)]
    model: String,
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Side of the images; of the map, for a block.
    #[arg(long, default_value_t = 224)]
    image: usize,
    /// Measured steps.
    #[arg(long, default_value_t = 5)]
    steps: usize,
    /// Steps before the first measured one.
    #[arg(long, default_value_t = 2)]
    warmup: usize,
}

/// An op with its extents, as `gridgrad bench ops --list` prints it.
#[derive(Clone, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
enum Op {
    Linear {
        rows: usize,
        inputs: usize,
        outputs: usize,
        gelu: bool,
    },
    LayerNorm {
        rows: usize,
        channels: usize,
    },
    Softmax {
        rows: usize,
        columns: usize,
    },
    Gelu {
        elements: usize,
    },
    Relu {
        elements: usize,
    },
    Add {
        elements: usize,
    },
    Conv2d {
        batch: usize,
        side: usize,
        channels: [usize; 2],
        kernel: usize,
        stride: usize,
    },
    #[serde(other)]
    Unknown,
}

#[derive(Deserialize)]
struct Request {
    op: Op,
    mode: Framework,
}

impl Op {
    /// Shapes of its inputs; maps are (batch, channels, height, width).
    fn shapes(&self) -> Result<Vec<Vec<usize>>> {
        Ok(match *self {
            Op::Linear { rows, inputs, outputs, .. } => vec![vec![rows, inputs], vec![outputs, inputs], vec![outputs]],
            Op::LayerNorm { rows, channels } => vec![vec![rows, channels], vec![channels], vec![channels]],
            Op::Softmax { rows, columns } => vec![vec![rows, columns]],
            Op::Gelu { elements } | Op::Relu { elements } => vec![vec![elements]],
            Op::Add { elements } => vec![vec![elements]; 2],
            Op::Conv2d { batch, side, channels: [inputs, outputs], kernel, .. } => {
                vec![vec![batch, inputs, side, side], vec![outputs, inputs, kernel, kernel]]
            }
            Op::Unknown => return Err("not an op of this program".into()),
        })
    }

    /// Whether the first input is an image, which needs no gradient.
    fn of_images(&self) -> bool {
        matches!(self, Op::Conv2d { channels: [..=3, _], .. })
    }
}

fn milliseconds(time: Duration) -> f64 {
    1e3 * time.as_secs_f64()
}

/// The middle value; of an even number, the mean of the two. There is at least one.
fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    (values[(values.len() - 1) / 2] + values[values.len() / 2]) / 2.0
}

fn time_steps(args: &StepArgs) -> Result<serde_json::Value> {
    let mut step = match args.framework {
        Framework::Candle => in_candle::training(&args.model, args.batch, args.image)?,
        Framework::Burn => in_burn::training(&args.model, args.batch, args.image)?,
    };
    for _ in 0..args.warmup {
        step()?;
    }
    let before = process::cpu_time();
    let steps: Vec<[Duration; 3]> = (0..args.steps.max(1)).map(|_| step()).collect::<Result<_>>()?;
    let cpu = process::cpu_time().zip(before).map(|(after, before)| (after - before) / steps.len() as u32);
    let wall = || steps.iter().map(|step| milliseconds(step.iter().sum()));
    let part = |part: usize| median(steps.iter().map(|step| milliseconds(step[part])));
    Ok(json!({
        "framework": args.framework,
        "model": args.model,
        "batch": args.batch,
        "image": args.image,
        "threads": rayon::current_num_threads(),
        "wall_ms": median(wall()),
        "forward_ms": part(0),
        "backward_ms": part(1),
        "optimizer_ms": part(2),
        "cpu_ms": cpu.map(milliseconds),
        "peak_bytes": process::peak_bytes(),
        "steps_ms": wall().collect::<Vec<f64>>(),
    }))
}

/// Calls until `time` is over, at least three times after a first one: the median in milliseconds.
fn repeat(call: &Call, time: Duration) -> Result<f64> {
    call()?;
    let (start, mut times) = (Instant::now(), Vec::new());
    while times.len() < 3 || start.elapsed() < time {
        let call_start = Instant::now();
        call()?;
        times.push(milliseconds(call_start.elapsed()));
    }
    Ok(median(times.into_iter()))
}

fn time_op(line: &str, time: Duration) -> Result<serde_json::Value> {
    let Request { op, mode } = serde_json::from_str(line)?;
    let (forward, both) = match mode {
        Framework::Candle => in_candle::op(&op)?,
        Framework::Burn => in_burn::op(&op)?,
    };
    Ok(json!({ "forward_ms": repeat(&forward, time)?, "both_ms": repeat(&both, time)? }))
}

fn main() -> Result<()> {
    match Command::parse() {
        Command::Step(args) => println!("{}", time_steps(&args)?),
        Command::Ops { milliseconds } => {
            for line in std::io::stdin().lock().lines() {
                // An op that a framework cannot run is told, and the others go on.
                let answer = time_op(&line?, Duration::from_millis(milliseconds))
                    .unwrap_or_else(|error| json!({ "error": error.to_string() }));
                println!("{answer}");
                std::io::stdout().flush()?;
            }
        }
    }
    Ok(())
}
