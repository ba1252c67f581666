//! Single ops, at the sizes of CrossFormer-S (8 images of 224 × 224), ResNet-18 for CIFAR and Network-in-Network (128
//! images each).

use std::time::{Duration, Instant};

use clap::Args;
use gridgrad::autograd::{GradOptions, grad, no_grad};
use gridgrad::ops::lsda::Grouping;
use gridgrad::ops::position_bias::{Affine, BiasLayer, PositionBiasNetwork};
use gridgrad::ops::{self, BatchNormMode, Conv2dOptions, CrossEntropyOptions, Pool2dOptions, Targets};
use gridgrad::random::Philox;
use gridgrad::{DType, Error, Result, Tensor};
use serde::Serialize;

use super::measure::{median, milliseconds};
use super::{line_of_json, print};
use crate::process::cpu_time;

#[derive(Args)]
pub struct OpsArgs {
    /// Prints the ops, one a line, and measures none.
    #[arg(long)]
    list: bool,
    /// Measures those alone whose line holds this.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Measures the op of this number alone, counted from 0 in the order of --list.
    #[arg(long, value_name = "N")]
    number: Option<usize>,
    /// Time for each op and direction, in milliseconds.
    #[arg(long, default_value_t = 300)]
    milliseconds: u64,
    /// Prints a line of JSON for each op.
    #[arg(long)]
    json: bool,
}

/// An op and its extents, as JSON has them.
#[derive(Clone, Serialize)]
#[serde(tag = "op", rename_all = "snake_case")]
enum Op {
    Linear {
        rows: usize,
        inputs: usize,
        outputs: usize,
        gelu: bool,
    },
    Lsda {
        batch: usize,
        side: usize,
        heads: usize,
        head_width: usize,
        group: usize,
        interval: usize,
    },
    /// `kernels` are (side, output channels).
    CrossScaleEmbedding {
        batch: usize,
        side: usize,
        channels: usize,
        kernels: Vec<[usize; 2]>,
        stride: usize,
    },
    PositionBias {
        width: usize,
        heads: usize,
        group: usize,
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
    Dropout {
        elements: usize,
    },
    DropPath {
        batch: usize,
        elements: usize,
    },
    Conv2d {
        batch: usize,
        side: usize,
        channels: [usize; 2],
        kernel: usize,
        stride: usize,
    },
    BatchNorm {
        batch: usize,
        side: usize,
        channels: usize,
    },
    MaxPool {
        batch: usize,
        side: usize,
        channels: usize,
        kernel: usize,
        stride: usize,
        padding: usize,
    },
    AvgPool {
        batch: usize,
        side: usize,
        channels: usize,
        kernel: usize,
        stride: usize,
        padding: usize,
    },
    GlobalAvgPool {
        batch: usize,
        side: usize,
        channels: usize,
    },
    CrossEntropy {
        rows: usize,
        classes: usize,
    },
}

#[derive(Serialize)]
struct Listed<'a> {
    number: usize,
    #[serde(flatten)]
    op: &'a Op,
    /// Operations of the forward pass: two per multiply-add, or one per element and function.
    flops: u64,
    /// Bytes that the forward pass must read and write.
    bytes: u64,
    /// Whether the first input is an image, which needs no gradient.
    image: bool,
}

/// Times in milliseconds.
#[derive(Serialize)]
struct Measured<'a> {
    #[serde(flatten)]
    listed: Listed<'a>,
    forward_ms: f64,
    /// Forward, and backward to all inputs that need gradients.
    both_ms: f64,
    /// Processor time of all threads for `both_ms`, mean; absent where the system does not tell.
    both_cpu_ms: Option<f64>,
}

pub fn run(args: &OpsArgs) -> Result<()> {
    let ops = all();
    if let Some(number) = args.number.filter(|&number| number >= ops.len()) {
        return Err(Error::Config(format!("--number {number}: there are {} ops, counted from 0", ops.len())));
    }
    let mut found = false;
    for (number, op) in ops.iter().enumerate() {
        let listed = op.listed(number);
        let line = line_of_json(&listed)?;
        let wanted =
            args.only.as_ref().is_none_or(|text| line.contains(text)) && args.number.is_none_or(|n| n == number);
        if !wanted {
            continue;
        }
        found = true;
        let text = match args.list {
            true => line,
            false => {
                let measured = measure(op, listed, Duration::from_millis(args.milliseconds))?;
                if args.json { line_of_json(&measured)? } else { measured.to_string() }
            }
        };
        print(&text)?;
    }
    if found { Ok(()) } else { Err(Error::Config("no op matches; `gridgrad bench ops --list` prints all".to_owned())) }
}

fn measure<'a>(op: &Op, listed: Listed<'a>, time: Duration) -> Result<Measured<'a>> {
    let inputs = op.inputs()?;
    let forward = || no_grad(|| op.run(&inputs)).map(drop);
    let variable = |(number, input): (usize, &Tensor)| {
        if input.dtype().is_float() && !(listed.image && number == 0) { input.variable() } else { Ok(input.clone()) }
    };
    let variables: Vec<Tensor> = inputs.iter().enumerate().map(variable).collect::<Result<_>>()?;
    let wanted: Vec<&Tensor> = variables.iter().filter(|input| input.requires_grad()).collect();
    let output = op.run(&variables)?;
    let grad_output = Tensor::randn(output.shape(), output.dtype(), Philox::new(5))?;
    drop(output);
    let both = || {
        let output = op.run(&variables)?;
        let options = GradOptions { grad_output: Some(grad_output.clone()), ..GradOptions::default() };
        grad(&output, &wanted, options).map(drop)
    };
    let (forward_ms, _) = repeat(&forward, time)?;
    let (both_ms, both_cpu_ms) = repeat(&both, time)?;
    Ok(Measured { listed, forward_ms, both_ms, both_cpu_ms })
}

/// Calls until `time` is over, at least three times after a first one: the median, and the mean processor time.
fn repeat(call: &dyn Fn() -> Result<()>, time: Duration) -> Result<(f64, Option<f64>)> {
    call()?;
    let (start, cpu, mut times) = (Instant::now(), cpu_time(), Vec::new());
    while times.len() < 3 || start.elapsed() < time {
        let call_start = Instant::now();
        call()?;
        times.push(milliseconds(call_start.elapsed()));
    }
    let cpu = cpu_time().zip(cpu).map(|(after, before)| milliseconds(after - before) / times.len() as f64);
    Ok((median(times), cpu))
}

/// Every op at every size, CrossFormer-S's first.
fn all() -> Vec<Op> {
    [crossformer(), resnet(), network_in_network()].concat()
}

fn crossformer() -> Vec<Op> {
    let mut ops = vec![Op::CrossScaleEmbedding {
        batch: 8,
        side: 224,
        channels: 3,
        kernels: vec![[4, 48], [8, 24], [16, 12], [32, 12]],
        stride: 4,
    }];
    for (side, channels, interval) in [(56, 96, 8), (28, 192, 4), (14, 384, 2), (7, 768, 1)] {
        let (rows, heads) = (8 * side * side, channels / 32);
        let linear = |inputs, outputs, gelu| Op::Linear { rows, inputs, outputs, gelu };
        let lsda = |interval| Op::Lsda { batch: 8, side, heads, head_width: 32, group: 7, interval };
        ops.extend([linear(channels, 3 * channels, false), linear(channels, channels, false)]);
        ops.extend([linear(channels, 4 * channels, true), linear(4 * channels, channels, false), lsda(1)]);
        if interval > 1 {
            ops.push(lsda(interval));
            let kernels = vec![[2, channels], [4, channels]];
            ops.push(Op::CrossScaleEmbedding { batch: 8, side, channels, kernels, stride: 2 });
        }
        ops.extend([Op::LayerNorm { rows, channels }, Op::Add { elements: rows * channels }]);
        ops.push(Op::PositionBias { width: channels / 4 / 4, heads, group: 7 });
    }
    let hidden = 8 * 3136 * 384;
    ops.extend([Op::Gelu { elements: hidden }, Op::Dropout { elements: hidden / 4 }]);
    ops.push(Op::DropPath { batch: 8, elements: 3136 * 96 });
    ops.extend([Op::Softmax { rows: 8 * 3 * 3136, columns: 49 }, Op::CrossEntropy { rows: 8, classes: 1000 }]);
    ops
}

fn resnet() -> Vec<Op> {
    let conv = |side, channels, kernel, stride| Op::Conv2d { batch: 128, side, channels, kernel, stride };
    let mut ops = vec![conv(32, [3, 64], 3, 1)];
    for (side, channels) in [(32, 64), (16, 128), (8, 256), (4, 512)] {
        if channels > 64 {
            ops.push(conv(2 * side, [channels / 2, channels], 3, 2));
            ops.push(conv(2 * side, [channels / 2, channels], 1, 2));
        }
        ops.push(conv(side, [channels; 2], 3, 1));
        ops.push(Op::BatchNorm { batch: 128, side, channels });
    }
    ops.push(Op::Relu { elements: 128 * 1024 * 64 });
    ops.extend([Op::GlobalAvgPool { batch: 128, side: 4, channels: 512 }, Op::CrossEntropy { rows: 128, classes: 10 }]);
    ops
}

fn network_in_network() -> Vec<Op> {
    let conv = |side, channels, kernel| Op::Conv2d { batch: 128, side, channels, kernel, stride: 1 };
    let pool = [128, 28, 96];
    vec![
        conv(28, [1, 192], 5),
        conv(28, [192, 160], 1),
        conv(28, [160, 96], 1),
        Op::BatchNorm { batch: 128, side: 28, channels: 192 },
        Op::MaxPool { batch: pool[0], side: pool[1], channels: pool[2], kernel: 3, stride: 2, padding: 1 },
        conv(14, [96, 192], 5),
        conv(14, [192, 192], 1),
        Op::AvgPool { batch: 128, side: 14, channels: 192, kernel: 3, stride: 2, padding: 1 },
        conv(7, [192, 192], 3),
        conv(7, [192, 192], 1),
        Op::GlobalAvgPool { batch: 128, side: 7, channels: 192 },
    ]
}

impl Op {
    fn listed(&self, number: usize) -> Listed<'_> {
        let (flops, bytes) = self.work();
        let channels = match self {
            Op::Conv2d { channels, .. } => channels[0],
            Op::CrossScaleEmbedding { channels, .. } => *channels,
            _ => usize::MAX,
        };
        Listed { number, op: self, flops, bytes, image: channels <= 3 }
    }

    /// Height and width of a map that a kernel leaves.
    fn output_side(&self) -> usize {
        match *self {
            Op::Conv2d { side, kernel, stride, .. } => (side + 2 * (kernel / 2) - kernel) / stride + 1,
            Op::MaxPool { side, kernel, stride, padding, .. } | Op::AvgPool { side, kernel, stride, padding, .. } => {
                (side + 2 * padding - kernel) / stride + 1
            }
            Op::CrossScaleEmbedding { side, stride, .. } => side / stride,
            _ => 0,
        }
    }

    /// Operations, and bytes in `f32`, of the forward pass.
    fn work(&self) -> (u64, u64) {
        let positions = self.output_side().pow(2);
        let (flops, floats) = match self {
            Op::Linear { rows, inputs, outputs, gelu } => {
                (rows * outputs * (2 * inputs + usize::from(*gelu)), rows * (inputs + outputs) + inputs * outputs)
            }
            Op::Lsda { batch, side, heads, head_width, group, .. } => {
                let (tokens, keys) = (batch * side * side, group * group);
                (4 * tokens * keys * heads * head_width, 4 * tokens * heads * head_width)
            }
            Op::CrossScaleEmbedding { batch, side, channels, kernels, .. } => {
                let weights: usize = kernels.iter().map(|[side, out]| side * side * channels * out).sum();
                let out: usize = kernels.iter().map(|[_, out]| out).sum();
                (2 * batch * positions * weights, batch * (side * side * channels + positions * out) + weights)
            }
            Op::PositionBias { width, heads, group } => {
                let rows = (2 * group - 1).pow(2);
                (2 * rows * (2 * width + 2 * width * width + width * heads), rows * heads + 2 * width * width)
            }
            Op::LayerNorm { rows, channels } => (7 * rows * channels, 2 * rows * channels),
            Op::Softmax { rows, columns } => (4 * rows * columns, 2 * rows * columns),
            Op::Gelu { elements } | Op::Relu { elements } | Op::Dropout { elements } => (*elements, 2 * elements),
            Op::Add { elements } => (*elements, 3 * elements),
            Op::DropPath { batch, elements } => (batch * elements, 2 * batch * elements),
            Op::Conv2d { batch, side, channels: [inputs, outputs], kernel, .. } => {
                let weights = inputs * outputs * kernel * kernel;
                (2 * batch * positions * weights, batch * (side * side * inputs + positions * outputs) + weights)
            }
            Op::BatchNorm { batch, side, channels } => {
                let elements = batch * side * side * channels;
                (7 * elements, 2 * elements)
            }
            Op::MaxPool { batch, side, channels, kernel, .. } | Op::AvgPool { batch, side, channels, kernel, .. } => {
                let outputs = batch * positions * channels;
                (outputs * kernel * kernel, batch * side * side * channels + outputs)
            }
            Op::GlobalAvgPool { batch, side, channels } => {
                (batch * side * side * channels, batch * channels * (side * side + 1))
            }
            Op::CrossEntropy { rows, classes } => (4 * rows * classes, rows * classes),
        };
        (flops as u64, 4 * floats as u64)
    }

    /// Random inputs: the map first, then parameters.
    fn inputs(&self) -> Result<Vec<Tensor>> {
        let shapes: Vec<Vec<usize>> = match self {
            Op::Linear { rows, inputs, outputs, .. } => {
                vec![vec![*rows, *inputs], vec![*outputs, *inputs], vec![*outputs]]
            }
            Op::Lsda { batch, side, heads, head_width, group, .. } => {
                vec![vec![*batch, *side, *side, 3 * heads * head_width], vec![(2 * group - 1).pow(2), *heads]]
            }
            Op::CrossScaleEmbedding { batch, side, channels, kernels, .. } => {
                let weights = kernels.iter().map(|&[side, out]| vec![out, *channels, side, side]);
                let biases = kernels.iter().map(|&[_, out]| vec![out]);
                std::iter::once(vec![*batch, *side, *side, *channels]).chain(weights).chain(biases).collect()
            }
            &Op::PositionBias { width, heads, .. } => {
                let layer = |out| [vec![width], vec![width], vec![out, width], vec![out]];
                [vec![vec![width, 2], vec![width]], layer(width).into(), layer(width).into(), layer(heads).into()]
                    .concat()
            }
            Op::LayerNorm { rows, channels } => vec![vec![*rows, *channels], vec![*channels], vec![*channels]],
            Op::Softmax { rows, columns } => vec![vec![*rows, *columns]],
            Op::CrossEntropy { rows, classes } => vec![vec![*rows, *classes]],
            Op::Gelu { elements } | Op::Relu { elements } | Op::Dropout { elements } => vec![vec![*elements]],
            Op::Add { elements } => vec![vec![*elements]; 2],
            Op::DropPath { batch, elements } => vec![vec![*batch, *elements]],
            Op::Conv2d { batch, side, channels: [inputs, outputs], kernel, .. } => {
                vec![vec![*batch, *side, *side, *inputs], vec![*outputs, *inputs, *kernel, *kernel]]
            }
            Op::BatchNorm { batch, side, channels } => {
                vec![vec![*batch, *side, *side, *channels], vec![*channels], vec![*channels]]
            }
            Op::MaxPool { batch, side, channels, .. }
            | Op::AvgPool { batch, side, channels, .. }
            | Op::GlobalAvgPool { batch, side, channels } => vec![vec![*batch, *side, *side, *channels]],
        };
        let draw = |(number, shape): (usize, &Vec<usize>)| {
            Tensor::randn(shape.as_slice(), DType::F32, Philox::new(1).fork(number as u64))
        };
        let mut inputs: Vec<Tensor> = shapes.iter().enumerate().map(draw).collect::<Result<_>>()?;
        if let &Op::CrossEntropy { rows, classes } = self {
            let labels: Vec<i64> = (0..rows).map(|row| Philox::new(2).below(row as u64, classes) as i64).collect();
            inputs.push(Tensor::new(&labels, [rows])?);
        }
        Ok(inputs)
    }

    fn run(&self, inputs: &[Tensor]) -> Result<Tensor> {
        let input = &inputs[0];
        match *self {
            Op::Linear { gelu: false, .. } => ops::linear(input, &inputs[1], Some(&inputs[2])),
            Op::Linear { .. } => ops::linear_gelu(input, &inputs[1], Some(&inputs[2])),
            Op::Lsda { heads, group, interval, .. } => {
                let grouping = if interval == 1 { Grouping::short(group) } else { Grouping::long(group, interval) };
                ops::lsda::lsda(input, Some(&inputs[1]), heads, grouping)
            }
            Op::CrossScaleEmbedding { ref kernels, stride, .. } => {
                let (weights, biases) = inputs[1..].split_at(kernels.len());
                ops::cross_scale_embedding(input, weights, biases, stride)
            }
            Op::PositionBias { group, .. } => position_bias(inputs, group),
            Op::LayerNorm { .. } => ops::layer_norm(input, &inputs[1], &inputs[2], 1e-5),
            Op::Softmax { .. } => ops::softmax(input, -1),
            Op::Gelu { .. } => input.gelu(),
            Op::Relu { .. } => input.relu(),
            Op::Add { .. } => input.add(&inputs[1]),
            Op::Dropout { .. } => ops::dropout(input, 0.1, Philox::new(3)),
            Op::DropPath { .. } => ops::drop_path(input, 0.1, Philox::new(3)),
            Op::Conv2d { kernel, stride, .. } => {
                let options =
                    Conv2dOptions { stride: [stride; 2], padding: [kernel / 2; 2], ..Conv2dOptions::default() };
                ops::conv2d(input, &inputs[1], None, options)
            }
            Op::BatchNorm { .. } => {
                Ok(ops::batch_norm(input, Some(&inputs[1]), Some(&inputs[2]), BatchNormMode::Train, 1e-5)?.output)
            }
            Op::MaxPool { kernel, stride, padding, .. } => ops::max_pool2d(input, pool(kernel, stride, padding)),
            Op::AvgPool { kernel, stride, padding, .. } => ops::avg_pool2d(input, pool(kernel, stride, padding)),
            Op::GlobalAvgPool { .. } => ops::global_avg_pool2d(input),
            Op::CrossEntropy { .. } => {
                ops::cross_entropy(input, Targets::Labels(&inputs[1]), CrossEntropyOptions::default())
            }
        }
    }
}

fn position_bias(inputs: &[Tensor], group: usize) -> Result<Tensor> {
    let affine = |first: usize| Affine { weight: inputs[first].clone(), bias: inputs[first + 1].clone() };
    let layer = |number: usize| BiasLayer { norm: affine(2 + 4 * number), linear: affine(4 + 4 * number) };
    let layers = [layer(0), layer(1), layer(2)];
    let network = PositionBiasNetwork { projection: affine(0), layers, residual: false, eps: 1e-5 };
    ops::dynamic_position_bias(&network, [group; 2])
}

fn pool(kernel: usize, stride: usize, padding: usize) -> Pool2dOptions {
    Pool2dOptions { stride: [stride; 2], padding: [padding; 2], ..Pool2dOptions::tiling([kernel; 2]) }
}

impl std::fmt::Display for Measured<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Listed { number, op, flops, bytes, .. } = &self.listed;
        let rate = |work: u64| work as f64 / self.forward_ms / 1e6;
        let name = serde_json::to_string(op).map_err(|_| std::fmt::Error)?;
        write!(
            f,
            "{number:>3}  forward {:>9.3} ms {:>7.1} GFLOP/s {:>6.1} GB/s",
            self.forward_ms,
            rate(*flops),
            rate(*bytes)
        )?;
        writeln!(f, "  and backward {:>9.3} ms  {name}", self.both_ms)
    }
}
