//! Long/short-distance attention with a learned position bias: the attention of CrossFormer (ICLR 2022, section 3.2),
//! and of any model whose tokens attend within windows or strided grids (Swin without shift, MaxViT).
//!
//! Tokens are read and written in the layout of the projections; there is no partition, no padding copy and no score
//! matrix in memory. The backward pass recomputes the scores.

pub(crate) mod cost;
mod cpu;
mod dropout;
mod expanded_bias;
mod gather;
pub(crate) mod gpu;
mod grouping;
mod softmax;

use crate::autograd::{Backward, Function, record};
use crate::random::Philox;
use crate::tensor::{Place, dispatch_stored, place};
use crate::{Error, Result, Tensor};

use dropout::Dropout;
pub use grouping::{Group, Grouping, Line};

const OP: &str = "lsda";

/// Attention within groups of tokens.
///
/// For each head and each query token i of a group, with d = C / heads and (gy, gx) the local positions:
///
/// ```text
/// output_i = Σ_j softmax_j(q_i · k_j / √d + T[gy_i − gy_j, gx_i − gx_j]) v_j
/// ```
///
/// - `qkv`: (B, H, W, 3 C), the channels of Q, then K, then V, each head by head.
/// - `bias`: the table T, ((2 G_h − 1)(2 G_w − 1), heads): row (dy + G_h − 1)(2 G_w − 1) + dx + G_w − 1. None for no bias.
/// - Result: (B, H, W, C), head by head.
///
/// First derivatives only. The same bits for any number of threads. Cost: 4 N d multiply-adds per token and head for
/// groups of N tokens.
///
/// # Errors
/// Where the shapes do not match, `heads` does not divide C, or the grouping has a zero. On a GPU also where a head has
/// more than 128 channels, or a group is too large for its shared memory; the error names the sizes.
///
/// ```
/// use gridgrad::ops::lsda::{Grouping, lsda};
/// use gridgrad::{DType, Tensor, random::Philox};
/// let grouping = Grouping::long(4, 2);
/// let qkv = Tensor::randn([1, 8, 8, 3 * 6], DType::F32, Philox::new(0))?;
/// let bias = Tensor::zeros([grouping.table_rows(), 2], DType::F32)?;
/// assert_eq!(lsda(&qkv, Some(&bias), 2, grouping)?.shape().to_vec(), [1, 8, 8, 6]);
/// # Ok::<(), gridgrad::Error>(())
/// ```
pub fn lsda(qkv: &Tensor, bias: Option<&Tensor>, heads: usize, grouping: Grouping) -> Result<Tensor> {
    attend(qkv, bias, heads, grouping, None)
}

/// [`lsda`] with dropout of the probabilities (Srivastava et al. 2014): each is set to 0 with probability `p`, and the
/// others are divided by 1 − p, after the softmax.
///
/// The rate is rounded to a multiple of 2⁻¹⁶, so that the mean is kept exactly. The decision on a pair follows from
/// `stream` and the pair's place alone: the backward pass makes it again, and any device makes the same one.
///
/// # Errors
/// As [`lsda`], and where `p` is outside \[0, 1\].
///
/// ```
/// use gridgrad::ops::lsda::{Grouping, lsda, lsda_dropout};
/// use gridgrad::{DType, Tensor, random::Philox};
/// let qkv = Tensor::randn([1, 8, 8, 3 * 6], DType::F32, Philox::new(0))?;
/// let (grouping, stream) = (Grouping::long(4, 2), Philox::new(1).stream("attention"));
/// let mixed = lsda_dropout(&qkv, None, 2, grouping, 0.1, stream)?;
/// assert_ne!(mixed.to_vec::<f32>()?, lsda(&qkv, None, 2, grouping)?.to_vec::<f32>()?);
/// assert_eq!(mixed.to_vec::<f32>()?, lsda_dropout(&qkv, None, 2, grouping, 0.1, stream)?.to_vec::<f32>()?);
/// # Ok::<(), gridgrad::Error>(())
/// ```
pub fn lsda_dropout(
    qkv: &Tensor,
    bias: Option<&Tensor>,
    heads: usize,
    grouping: Grouping,
    p: f64,
    stream: Philox,
) -> Result<Tensor> {
    attend(qkv, bias, heads, grouping, Dropout::new(OP, p, stream)?)
}

fn attend(
    qkv: &Tensor,
    bias: Option<&Tensor>,
    heads: usize,
    grouping: Grouping,
    dropout: Option<Dropout>,
) -> Result<Tensor> {
    let dtype = qkv.dtype();
    let [batch, height, width, channels] = qkv.dims::<4>(OP, "qkv (batch, height, width, 3·channels)")?;
    grouping.check(OP)?;
    if heads == 0 || !channels.is_multiple_of(3 * heads) {
        let message = format!("qkv has {channels} channels; expected a multiple of 3 · {heads} heads");
        return Err(Error::shape(OP, message));
    }
    if let Some(bias) = bias {
        bias.expect_dtype(OP, dtype)?;
        if **bias.shape() != [grouping.table_rows(), heads] {
            let [gh, gw] = grouping.group;
            let expected = format!("({}, {heads}) for groups of {gh}×{gw}", grouping.table_rows());
            return Err(Error::shape(OP, format!("bias table {}; expected {expected}", bias.shape())));
        }
    }
    let head_width = channels / 3 / heads;
    let problem = cpu::Problem { extents: [batch, height, width], heads, head_width, grouping, dropout };
    let inputs: Vec<&Tensor> = [Some(qkv), bias].into_iter().flatten().collect();
    let output = match place(OP, &inputs)? {
        Place::Gpu(gpu) => gpu::forward(gpu, &problem, qkv, bias)?,
        Place::Host => dispatch_stored!(OP, dtype, (S, T) => {
            let table = bias.map(|bias| bias.floats::<T>(OP)).transpose()?;
            let output = cpu::forward::<S, T>(&problem, &qkv.stored(OP)?, table.as_deref());
            Tensor::from_stored(output, [batch, height, width, channels / 3], dtype)
        })?,
    };
    Ok(record(output, &inputs, |_| LsdaRule { qkv: qkv.clone(), bias: bias.cloned(), problem }))
}

/// What one query attends to in [`lsda`]: for each head the weights of all H · W keys, 0 outside the query's group. For
/// pictures and tests: plain loops, off the tape.
///
/// # Errors
/// As [`lsda`], and where the image or the query (y, x) is not there.
pub fn attention_weights(
    qkv: &Tensor,
    bias: Option<&Tensor>,
    heads: usize,
    grouping: Grouping,
    image: usize,
    [y, x]: [usize; 2],
) -> Result<Vec<Vec<f32>>> {
    const OP: &str = "attention_weights";
    let [batch, height, width, channels] = qkv.dims::<4>(OP, "qkv (batch, height, width, 3·channels)")?;
    grouping.check(OP)?;
    if image >= batch || y >= height || x >= width || heads == 0 || !channels.is_multiple_of(3 * heads) {
        let message = format!("image {image}, query ({y}, {x}), {heads} heads for qkv {}", qkv.shape());
        return Err(Error::argument(OP, message));
    }
    let (channels, d, query) = (channels / 3, channels / 3 / heads, y * width + x);
    let groups = grouping.groups(height, width);
    let group = groups[grouping.group_of_token(height, width)[query]];
    let values = qkv.to_f64_vec()?;
    let table = bias.map(Tensor::to_f64_vec).transpose()?;
    let row = |token: usize, part: usize, head: usize| {
        &values[((image * height * width + token) * 3 + part) * channels + head * d..][..d]
    };
    let tokens: Vec<usize> = group.tokens(width).collect();
    let own = tokens.iter().position(|&token| token == query).unwrap_or(0);
    let problem = cpu::Problem { extents: [batch, height, width], heads, head_width: d, grouping, dropout: None };
    let weights = |head: usize| {
        let score = |(local, &token): (usize, &usize)| {
            let dot: f64 = row(query, 0, head).iter().zip(row(token, 1, head)).map(|(a, b)| a * b).sum();
            let bias = |table: &Vec<f64>| table[problem.table_row(group.columns.count, own, local) * heads + head];
            dot / (d as f64).sqrt() + table.as_ref().map_or(0.0, bias)
        };
        let scores: Vec<f64> = tokens.iter().enumerate().map(score).collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|score| (score - largest).exp()).sum();
        let mut map = vec![0.0; height * width];
        tokens.iter().zip(scores).for_each(|(&token, score)| map[token] = ((score - largest).exp() / sum) as f32);
        map
    };
    Ok((0..heads).map(weights).collect())
}

struct LsdaRule {
    qkv: Tensor,
    bias: Option<Tensor>,
    problem: cpu::Problem,
}

impl Function for LsdaRule {
    fn name(&self) -> &'static str {
        OP
    }

    fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        backward.first_order_only(OP)?;
        let (dtype, bias, grad) = (self.qkv.dtype(), self.bias.as_ref(), backward.grad());
        let (dqkv, dtable) = match place(OP, &[&self.qkv, grad])? {
            Place::Gpu(gpu) => gpu::backward(gpu, &self.problem, &self.qkv, bias, grad)?,
            Place::Host => dispatch_stored!(OP, dtype, (S, T) => {
                let table = bias.map(|bias| bias.floats::<T>(OP)).transpose()?;
                let (dqkv, dtable) =
                    cpu::backward::<S, T>(&self.problem, &self.qkv.stored(OP)?, table.as_deref(), &grad.stored(OP)?);
                let dtable = bias.map(|bias| Tensor::from_floats(dtable, bias.shape(), dtype)).transpose()?;
                Ok((Tensor::from_stored(dqkv, self.qkv.shape(), dtype)?, dtable))
            })?,
        };
        Ok([Some(Some(dqkv)), bias.map(|_| dtable)].into_iter().flatten().collect())
    }
}
