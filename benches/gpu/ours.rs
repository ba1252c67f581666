//! The crate's own ops.

use gridgrad::ops::lsda::{Grouping, lsda};
use gridgrad::ops::position_bias::{Affine, BiasLayer, PositionBiasNetwork, dynamic_position_biases};
use gridgrad::ops::{
    BatchNormMode, Pool2dOptions, batch_norm, cross_scale_embedding, layer_norm, linear_gelu, max_pool2d, softmax,
};
use gridgrad::{DType, Result, Tensor};

use crate::baseline::{Bench, Run};
use crate::shapes::Op;

pub const EPS: f64 = 1e-5;
/// Parameters of a bias network.
pub const BIAS_PARAMETERS: usize = 14;
/// What bias networks are kept and computed in; their tables are in the problem's own.
pub const BIAS_DTYPE: DType = DType::F32;

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
        Op::PositionBias { groups, width, heads } => {
            let mut shapes = vec![vec![*width, 2], vec![*width]];
            for out in [*width, *width, *heads] {
                shapes.extend([vec![*width], vec![*width], vec![out, *width], vec![out]]);
            }
            (vec![shapes; groups.len()].concat(), 0)
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
    let (op, dtype) = (bench.case.op.clone(), bench.dtype);
    let stored = if matches!(op, Op::PositionBias { .. }) { BIAS_DTYPE } else { dtype };
    let bench = Bench { dtype: stored, ..*bench };
    bench.of_outputs(&shapes, constants, move |inputs| compute(&op, inputs, dtype)).map(Some)
}

fn compute(op: &Op, inputs: &[Tensor], dtype: DType) -> Result<Vec<Tensor>> {
    let output = match *op {
        Op::CrossScaleEmbedding { stride, .. } => {
            let (weights, biases) = inputs[1..].split_at((inputs.len() - 1) / 2);
            cross_scale_embedding(&inputs[0], weights, biases, stride)
        }
        Op::Lsda { heads, group, interval, .. } => {
            lsda(&inputs[0], Some(&inputs[1]), heads, Grouping { group, interval, origin: [0; 2] })
        }
        Op::PositionBias { ref groups, .. } => {
            let networks: Vec<_> = inputs.chunks(BIAS_PARAMETERS).map(network).collect();
            let pairs: Vec<_> = networks.iter().zip(groups.iter().copied()).collect();
            return dynamic_position_biases(&pairs, dtype);
        }
        Op::LayerNorm { .. } => layer_norm(&inputs[0], &inputs[1], &inputs[2], EPS),
        Op::LinearGelu { .. } => linear_gelu(&inputs[0], &inputs[1], Some(&inputs[2])),
        Op::Softmax { .. } => softmax(&inputs[0], -1),
        Op::MaxPool { .. } => max_pool2d(&inputs[0], windows()),
        Op::BatchNorm { .. } => {
            Ok(batch_norm(&inputs[0], Some(&inputs[1]), Some(&inputs[2]), BatchNormMode::Train, EPS)?.output)
        }
    };
    Ok(vec![output?])
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
