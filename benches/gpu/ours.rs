//! The crate's own ops.

use gridgrad::ops::lsda::{Grouping, lsda};
use gridgrad::ops::position_bias::{Affine, BiasLayer, PositionBiasNetwork};
use gridgrad::ops::{
    BatchNormMode, Pool2dOptions, batch_norm, cross_scale_embedding, dynamic_position_bias, layer_norm, linear_gelu,
    max_pool2d, softmax,
};
use gridgrad::{Result, Tensor};

use crate::baseline::{Bench, Run};
use crate::shapes::Op;

pub const EPS: f64 = 1e-5;

/// The shapes of an op's inputs, and how many of the first need no gradient.
pub fn inputs(op: &Op, batch: usize) -> (Vec<Vec<usize>>, usize) {
    match op {
        Op::CrossScaleEmbedding { map: [h, w], channels, sides, out, image, .. } => {
            let weights = sides.iter().zip(out).map(|(&side, &out)| vec![out, *channels, side, side]);
            let biases = out.iter().map(|&out| vec![out]);
            let shapes = std::iter::once(vec![batch, *h, *w, *channels]).chain(weights).chain(biases).collect();
            (shapes, usize::from(*image))
        }
        Op::Lsda { map: [h, w], heads, head_width, group: [gh, gw], .. } => {
            (vec![vec![batch, *h, *w, 3 * heads * head_width], vec![(2 * gh - 1) * (2 * gw - 1), *heads]], 0)
        }
        Op::PositionBias { width, heads, .. } => {
            let mut shapes = vec![vec![*width, 2], vec![*width]];
            for out in [*width, *width, *heads] {
                shapes.extend([vec![*width], vec![*width], vec![out, *width], vec![out]]);
            }
            (shapes, 0)
        }
        Op::LayerNorm { rows, width } => (vec![vec![batch * rows, *width], vec![*width], vec![*width]], 0),
        Op::LinearGelu { rows, input, output } => {
            (vec![vec![batch * rows, *input], vec![*output, *input], vec![*output]], 0)
        }
        Op::Softmax { rows, width } => (vec![vec![batch * rows, *width]], 0),
        Op::MaxPool { map: [h, w], channels } => (vec![vec![batch, *h, *w, *channels]], 0),
        Op::BatchNorm { map: [h, w], channels } => {
            (vec![vec![batch, *h, *w, *channels], vec![*channels], vec![*channels]], 0)
        }
    }
}

pub fn run(bench: &Bench<'_>) -> Result<Option<Run>> {
    let (shapes, constants) = inputs(&bench.case.op, bench.case.batch);
    let op = bench.case.op.clone();
    bench.of_op(&shapes, constants, move |inputs| compute(&op, inputs)).map(Some)
}

fn compute(op: &Op, inputs: &[Tensor]) -> Result<Tensor> {
    match *op {
        Op::CrossScaleEmbedding { stride, .. } => {
            let (weights, biases) = inputs[1..].split_at((inputs.len() - 1) / 2);
            cross_scale_embedding(&inputs[0], weights, biases, stride)
        }
        Op::Lsda { heads, group, interval, .. } => {
            lsda(&inputs[0], Some(&inputs[1]), heads, Grouping { group, interval, origin: [0; 2] })
        }
        Op::PositionBias { group, .. } => dynamic_position_bias(&network(inputs), group),
        Op::LayerNorm { .. } => layer_norm(&inputs[0], &inputs[1], &inputs[2], EPS),
        Op::LinearGelu { .. } => linear_gelu(&inputs[0], &inputs[1], Some(&inputs[2])),
        Op::Softmax { .. } => softmax(&inputs[0], -1),
        Op::MaxPool { .. } => max_pool2d(&inputs[0], windows()),
        Op::BatchNorm { .. } => {
            Ok(batch_norm(&inputs[0], Some(&inputs[1]), Some(&inputs[2]), BatchNormMode::Train, EPS)?.output)
        }
    }
}

/// As `Op::MaxPool` says.
fn windows() -> Pool2dOptions {
    Pool2dOptions { stride: [2; 2], padding: [1; 2], ..Pool2dOptions::tiling([3; 2]) }
}

fn network(inputs: &[Tensor]) -> PositionBiasNetwork {
    let affine = |at: usize| Affine { weight: inputs[at].clone(), bias: inputs[at + 1].clone() };
    let layer = |number: usize| BiasLayer { norm: affine(2 + 4 * number), linear: affine(4 + 4 * number) };
    PositionBiasNetwork { projection: affine(0), layers: [layer(0), layer(1), layer(2)], residual: false, eps: EPS }
}
