//! The same ops made of the crate's primitive ones, each a pass over memory.

use gridgrad::ops::{Conv2dOptions, concat, conv2d, embedding, layer_norm, linear, softmax};
use gridgrad::{Result, Tensor};

use crate::baseline::{Bench, Run};
use crate::shapes::Op;
use crate::{not_there, ours};

pub fn run(bench: &Bench<'_>) -> Result<Option<Run>> {
    let (shapes, constants) = ours::inputs(&bench.case.op, bench.case.batch);
    let run = match bench.case.op.clone() {
        Op::CrossScaleEmbedding { sides, stride, .. } => {
            bench.of_op(&shapes, constants, move |inputs| convolutions(inputs, &sides, stride))
        }
        Op::Lsda { map, heads, head_width, group, interval } => {
            let attention = Attention { batch: bench.case.batch, map, heads, head_width, group, interval };
            if (0..2).any(|axis| !map[axis].is_multiple_of(group[axis] * interval[axis])) {
                return Err(not_there(bench.device, "unfused attention is written for maps without padding"));
            }
            let rows = attention.table_rows(bench)?;
            bench.of_op(&shapes, constants, move |inputs| attention.attend(&inputs[0], &inputs[1], &rows))
        }
        Op::PositionBias { groups, .. } => {
            let (dtype, bench) = (bench.dtype, Bench { dtype: ours::BIAS_DTYPE, ..*bench });
            let offsets = groups.into_iter().map(|group| offsets(&bench, group)).collect::<Result<Vec<_>>>()?;
            bench.of_outputs(&shapes, constants, move |inputs| {
                let networks = inputs.chunks(ours::BIAS_PARAMETERS).zip(&offsets);
                networks.map(|(network, offsets)| position_bias(network, offsets)?.cast(dtype)).collect()
            })
        }
        Op::LayerNorm { .. } => norm(bench, &[-1]),
        Op::LinearGelu { .. } => {
            bench.of_op(&shapes, constants, |inputs| linear(&inputs[0], &inputs[1], Some(&inputs[2]))?.gelu())
        }
        Op::Softmax { .. } => bench.of_op(&shapes, constants, |inputs| {
            let exponentials = inputs[0].sub(&inputs[0].max(&[-1], true)?)?.exp()?;
            exponentials.div(&exponentials.sum(&[-1], true)?)
        }),
        Op::BatchNorm { .. } => norm(bench, &[0, 1, 2]),
        // Nothing else computes it.
        Op::MaxPool { .. } => return Ok(None),
    };
    run.map(Some)
}

/// Deviations from the mean over `axes`, divided by their root mean square, times the weight, plus the bias.
fn norm(bench: &Bench<'_>, axes: &'static [isize]) -> Result<Run> {
    let (shapes, constants) = ours::inputs(&bench.case.op, bench.case.batch);
    let eps = Tensor::from_index([1], bench.dtype, |_| ours::EPS)?.to_device(bench.device)?;
    bench.of_op(&shapes, constants, move |inputs| {
        let centred = inputs[0].sub(&inputs[0].mean(axes, true)?)?;
        let variance = centred.mul(&centred)?.mean(axes, true)?;
        centred.div(&variance.add(&eps)?.sqrt()?)?.mul(&inputs[1])?.add(&inputs[2])
    })
}

fn convolutions(inputs: &[Tensor], sides: &[usize], stride: usize) -> Result<Tensor> {
    let (weights, biases) = inputs[1..].split_at(sides.len());
    let convolve = |((weight, bias), side): ((&Tensor, &Tensor), &usize)| {
        let padding = [(side - stride) / 2; 2];
        conv2d(
            &inputs[0],
            weight,
            Some(bias),
            Conv2dOptions { stride: [stride; 2], padding, ..Conv2dOptions::default() },
        )
    };
    let maps: Vec<Tensor> = weights.iter().zip(biases).zip(sides).map(convolve).collect::<Result<_>>()?;
    concat(&maps.iter().collect::<Vec<_>>(), -1)
}

/// All offsets of a group, (rows, 2).
fn offsets(bench: &Bench<'_>, [height, width]: [usize; 2]) -> Result<Tensor> {
    let columns = 2 * width - 1;
    let offset = |i: usize| match i % 2 {
        0 => (i / 2 / columns) as f64 - (height - 1) as f64,
        _ => (i / 2 % columns) as f64 - (width - 1) as f64,
    };
    Tensor::from_index([(2 * height - 1) * columns, 2], bench.dtype, offset)?.to_device(bench.device)
}

fn position_bias(inputs: &[Tensor], offsets: &Tensor) -> Result<Tensor> {
    let mut hidden = linear(offsets, &inputs[0], Some(&inputs[1]))?;
    for layer in inputs[2..].chunks(4) {
        let rectified = layer_norm(&hidden, &layer[0], &layer[1], ours::EPS)?.relu()?;
        hidden = linear(&rectified, &layer[2], Some(&layer[3]))?;
    }
    Ok(hidden)
}

/// Attention by partition, products and softmax, as eager frameworks do it.
#[derive(Clone, Copy)]
pub struct Attention {
    pub batch: usize,
    pub map: [usize; 2],
    pub heads: usize,
    pub head_width: usize,
    pub group: [usize; 2],
    pub interval: [usize; 2],
}

impl Attention {
    pub fn tokens(&self) -> usize {
        self.group[0] * self.group[1]
    }

    /// Groups of all images.
    pub fn groups(&self) -> usize {
        self.batch * self.map[0] * self.map[1] / self.tokens()
    }

    /// The table's row for each pair of tokens of a group.
    pub fn table_rows(&self, bench: &Bench<'_>) -> Result<Tensor> {
        let ([gh, gw], n) = (self.group, self.tokens());
        let row = |pair: usize| {
            let (query, key) = (pair / n, pair % n);
            let dy = query / gw + gh - 1 - key / gw;
            let dx = query % gw + gw - 1 - key % gw;
            (dy * (2 * gw - 1) + dx) as i64
        };
        Tensor::new(&(0..n * n).map(row).collect::<Vec<_>>(), [n * n])?.to_device(bench.device)
    }

    /// The bias of each pair, (1, heads, n, n).
    pub fn expand(&self, table: &Tensor, rows: &Tensor) -> Result<Tensor> {
        let n = self.tokens();
        embedding(table, rows)?.transpose(0, 1)?.reshape([1, self.heads, n, n])
    }

    /// From the projection (batch, height, width, 3 · heads · d) to the map that attention returns.
    fn attend(&self, qkv: &Tensor, table: &Tensor, rows: &Tensor) -> Result<Tensor> {
        let ([h, w], [gh, gw], [ih, iw]) = (self.map, self.group, self.interval);
        let (n, heads, d) = (self.tokens(), self.heads, self.head_width);
        let [regions_down, regions_across] = [h / (gh * ih), w / (gw * iw)];
        let split = [self.batch, regions_down, gh, ih, regions_across, gw, iw, 3 * heads * d];
        let grouped = qkv.reshape(split)?.permute(&[0, 1, 4, 3, 6, 2, 5, 7])?;
        let parts = grouped.reshape([self.groups(), n, 3, heads, d])?.permute(&[2, 0, 3, 1, 4])?;
        let part = |number: usize| parts.narrow(0, number, 1)?.reshape([self.groups(), heads, n, d]);
        let mixed = self.mix([part(0)?, part(1)?, part(2)?], &self.expand(table, rows)?)?;
        let back = [self.batch, regions_down, regions_across, ih, iw, gh, gw, heads * d];
        let tokens = mixed.transpose(1, 2)?.reshape(back)?;
        tokens.permute(&[0, 1, 5, 3, 2, 6, 4, 7])?.reshape([self.batch, h, w, heads * d])
    }

    /// softmax(q kᵀ / √d + bias) v, all (groups, heads, n, d).
    pub fn mix(&self, [q, k, v]: [Tensor; 3], bias: &Tensor) -> Result<Tensor> {
        let scores = q.scale(1.0 / (self.head_width as f64).sqrt())?.matmul(&k.transpose(2, 3)?)?;
        softmax(&scores.add(bias)?, -1)?.matmul(&v)
    }
}
