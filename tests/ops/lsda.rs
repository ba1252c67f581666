//! Long/short-distance attention.

use std::fmt;

use gridgrad::ops::lsda::{Group, Grouping, lsda};
use gridgrad::ops::{concat, embedding, softmax};
use gridgrad::{DType, Result, Tensor};

use crate::harness::{Derivatives, OpCase, ROUNDING, Tolerance, Work, check, randn, test_device};

#[derive(Debug)]
struct Lsda {
    map: [usize; 3],
    heads: usize,
    head_width: usize,
    grouping: Grouping,
    bias: bool,
    /// Factor on q and k: large ones make one logit dominate.
    sharpness: f64,
}

impl fmt::Display for Lsda {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

impl OpCase for Lsda {
    fn inputs(&self) -> Vec<Tensor> {
        let [b, h, w] = self.map;
        let channels = self.heads * self.head_width;
        let mut inputs = vec![randn(&[b, h, w, 3 * channels], 0).scale(self.sharpness).unwrap()];
        if self.bias {
            inputs.push(randn(&[self.grouping.table_rows(), self.heads], 1));
        }
        inputs
    }

    fn run(&self, inputs: &[Tensor]) -> Result<Tensor> {
        lsda(&inputs[0], inputs.get(1), self.heads, self.grouping)
    }

    /// For each query, over all tokens with the same group key, by the specification's table; no padding, no groups.
    fn reference(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        let [batch, height, width] = self.map;
        let (d, channels) = (self.head_width, self.heads * self.head_width);
        let Grouping { group, interval, origin } = self.grouping;
        // (region, phase, local position) of a coordinate.
        let place = |position: usize, axis: usize| {
            let at = position + origin[axis];
            (at / (group[axis] * interval[axis]), at % interval[axis], (at / interval[axis]) % group[axis])
        };
        let mut output = vec![0.0; batch * height * width * channels];
        for image in 0..batch {
            for query in 0..height * width {
                let (y, x) = (place(query / width, 0), place(query % width, 1));
                let keys: Vec<usize> = (0..height * width)
                    .filter(|key| {
                        let (ky, kx) = (place(key / width, 0), place(key % width, 1));
                        (ky.0, ky.1, kx.0, kx.1) == (y.0, y.1, x.0, x.1)
                    })
                    .collect();
                for head in 0..self.heads {
                    let at = |token: usize, part: usize, c: usize| {
                        inputs[0][(image * height * width + token) * 3 * channels + part * channels + head * d + c]
                    };
                    let score = |&key: &usize| {
                        let dot: f64 = (0..d).map(|c| at(query, 0, c) * at(key, 1, c)).sum();
                        let dy = y.2 + group[0] - 1 - place(key / width, 0).2;
                        let dx = x.2 + group[1] - 1 - place(key % width, 1).2;
                        let row = dy * (2 * group[1] - 1) + dx;
                        dot / (d as f64).sqrt() + if self.bias { inputs[1][row * self.heads + head] } else { 0.0 }
                    };
                    let scores: Vec<f64> = keys.iter().map(score).collect();
                    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let sum: f64 = scores.iter().map(|s| (s - largest).exp()).sum();
                    for c in 0..d {
                        let weighted =
                            keys.iter().zip(&scores).map(|(&key, s)| (s - largest).exp() / sum * at(key, 2, c));
                        output[(image * height * width + query) * channels + head * d + c] = weighted.sum();
                    }
                }
            }
        }
        output
    }

    /// Groups of one shape at a time: their tokens gathered, then products and a softmax over (groups, heads, N, N).
    fn composed(&self, inputs: &[Tensor]) -> Option<Result<Tensor>> {
        Some(self.composed(inputs))
    }

    fn work(&self) -> Work {
        let [batch, height, width] = self.map;
        let channels = self.heads * self.head_width;
        let tokens = self.grouping.group[0] * self.grouping.group[1];
        let (map, channels, tokens) = ((batch * height * width) as u64, channels as u64, tokens as u64);
        Work { bytes: 4 * 4 * map * channels, flops: 4 * map * tokens * channels }
    }

    fn tolerance(&self) -> Tolerance {
        // Rounding of a logit of size s changes its exponential by s ulps; finite differences lose likewise.
        let growth = 4.0 * self.sharpness * self.sharpness.max(1.0);
        Tolerance { f64: growth * ROUNDING.f64, f32: growth * ROUNDING.f32, gradient: growth * ROUNDING.gradient }
    }

    fn derivatives(&self) -> Derivatives {
        Derivatives::First
    }
}

impl Lsda {
    fn composed(&self, inputs: &[Tensor]) -> Result<Tensor> {
        let [batch, height, width] = self.map;
        let (heads, d, channels) = (self.heads, self.head_width, self.heads * self.head_width);
        let groups = self.grouping.groups(height, width);
        let tokens = inputs[0].reshape([batch * height * width, 3 * channels])?;
        let shape_of = |group: &Group| [group.rows.count, group.columns.count];
        let mut shapes: Vec<[usize; 2]> = groups.iter().map(shape_of).collect();
        shapes.sort_unstable();
        shapes.dedup();
        // The rows of `outputs` one after the other belong to the tokens of `order`.
        let (mut outputs, mut order) = (Vec::new(), Vec::new());
        for shape in shapes {
            let n = shape[0] * shape[1];
            let members: Vec<i64> = (0..batch)
                .flat_map(|image| groups.iter().map(move |group| (image, group)))
                .filter(|(_, group)| shape_of(group) == shape)
                .flat_map(|(image, group)| {
                    group.tokens(width).map(move |token| (image * height * width + token) as i64)
                })
                .collect();
            let count = members.len() / n;
            let part = |number: usize| {
                let rows = embedding(&tokens, &Tensor::new(&members, [count * n])?)?;
                let part = rows.narrow(1, number * channels, channels)?;
                part.reshape([count, n, heads, d])?.transpose(1, 2)
            };
            let mut scores = part(0)?.scale(1.0 / (d as f64).sqrt())?.matmul(&part(1)?.transpose(2, 3)?)?;
            if self.bias {
                let expanded = embedding(&inputs[1], &Tensor::new(&self.table_rows(shape), [n * n])?)?;
                scores = scores.add(&expanded.transpose(0, 1)?.reshape([1, heads, n, n])?)?;
            }
            let mixed = softmax(&scores, -1)?.matmul(&part(2)?)?;
            outputs.push(mixed.transpose(1, 2)?.reshape([count * n, channels])?);
            order.extend(members);
        }
        if outputs.is_empty() {
            return inputs[0].narrow(3, 0, channels);
        }
        let mut places = vec![0i64; order.len()];
        order.iter().enumerate().for_each(|(place, &token)| places[token as usize] = place as i64);
        let rows = concat(&outputs.iter().collect::<Vec<_>>(), 0)?;
        embedding(&rows, &Tensor::new(&places, [places.len()])?)?.reshape([batch, height, width, channels])
    }

    /// The table row of each pair of tokens in a group of `rows` × `columns`.
    fn table_rows(&self, [rows, columns]: [usize; 2]) -> Vec<i64> {
        let [gh, gw] = self.grouping.group;
        let n = rows * columns;
        let row = |pair: usize| {
            let (query, key) = (pair / n, pair % n);
            let dy = query / columns + gh - 1 - key / columns;
            let dx = query % columns + gw - 1 - key % columns;
            (dy * (2 * gw - 1) + dx) as i64
        };
        (0..n * n).map(row).collect()
    }
}

fn cases() -> Vec<Box<dyn OpCase>> {
    let short = Grouping::short;
    let rectangle = |group, interval| Grouping { group, interval, origin: [0, 0] };
    let list = [
        // batch, height, width; heads; head width; grouping; bias; sharpness
        ([1, 1, 1], 1, 1, short(1), true, 1.0),
        ([2, 4, 4], 2, 8, short(2), true, 1.0),
        ([1, 7, 5], 3, 16, short(3), true, 1.0),
        ([1, 6, 6], 1, 5, Grouping::long(3, 2), true, 1.0),
        ([2, 9, 11], 2, 4, Grouping::long(3, 2), true, 1.0),
        ([1, 13, 3], 1, 32, Grouping::long(4, 5), false, 1.0),
        ([1, 5, 8], 2, 3, rectangle([5, 8], [1, 1]), true, 1.0),
        ([1, 7, 10], 1, 6, rectangle([4, 5], [2, 2]), true, 1.0),
        ([1, 9, 9], 1, 4, Grouping { group: [3, 3], interval: [2, 2], origin: [1, 2] }, true, 1.0),
        ([1, 9, 8], 1, 17, short(9), true, 1.0),
        ([1, 4, 4], 1, 4, short(4), true, 6.0),
        ([0, 4, 4], 1, 4, short(2), true, 1.0),
        // A GPU's tiles are 64 tokens, 32 in heads of 256 bytes and more, of which groups of 16 and 32 share one. Head
        // widths are rounded up to 16, 32, 64 and 128.
        ([1, 1, 1], 1, 16, short(7), true, 1.0),
        ([2, 4, 5], 3, 16, short(2), false, 1.0),
        ([2, 5, 5], 3, 8, Grouping::long(3, 2), true, 1.0),
        ([1, 7, 6], 1, 32, short(5), true, 1.0),
        ([1, 13, 14], 1, 32, Grouping::long(7, 2), true, 1.0),
        ([1, 7, 7], 1, 64, short(7), true, 1.0),
        ([1, 8, 8], 1, 24, short(8), false, 1.0),
        ([1, 13, 5], 1, 16, rectangle([13, 5], [1, 1]), true, 1.0),
        ([1, 10, 7], 1, 64, short(10), true, 1.0),
        ([1, 16, 9], 1, 16, short(16), true, 1.0),
        ([1, 6, 4], 1, 128, short(4), true, 1.0),
        ([1, 6, 6], 1, 104, short(6), true, 1.0),
        // More groups, of several shapes, than a head has blocks.
        ([1, 9, 9], 16, 2, short(2), true, 1.0),
    ];
    let case = |(map, heads, head_width, grouping, bias, sharpness)| {
        Box::new(Lsda { map, heads, head_width, grouping, bias, sharpness }) as Box<dyn OpCase>
    };
    list.into_iter().map(case).collect()
}

/// The attention of CrossFormer-S at batch 8, and of CrossFormer++-S's third stage.
pub fn benchmarks() -> Vec<Box<dyn OpCase>> {
    let case = |side, heads, grouping| {
        let case = Lsda { map: [8, side, side], heads, head_width: 32, grouping, bias: true, sharpness: 1.0 };
        Box::new(case) as Box<dyn OpCase>
    };
    vec![
        case(56, 3, Grouping::short(7)),
        case(56, 3, Grouping::long(7, 8)),
        case(14, 12, Grouping::long(7, 2)),
        case(7, 24, Grouping::short(7)),
        case(14, 8, Grouping::short(14)),
    ]
}

#[test]
fn attention_agrees_with_its_definition() {
    check(&cases());
}

#[test]
fn what_a_gpu_cannot_do_is_an_error() {
    let Some(device) = test_device() else { return };
    let on_device = |shape: &[usize]| randn(shape, 0).cast(DType::F32).unwrap().to_device(device).unwrap();
    let message = |result: Result<Tensor>| result.unwrap_err().to_string();
    let (qkv, bias) = (on_device(&[1, 4, 4, 12]), randn(&[9, 1], 0).cast(DType::F32).unwrap());
    assert!(message(lsda(&qkv, Some(&bias), 1, Grouping::short(2))).contains("to_device"));
    assert!(message(lsda(&on_device(&[1, 1, 1, 3 * 129]), None, 1, Grouping::short(2))).contains("at most 128"));
    let bias = on_device(&[399 * 399, 1]);
    assert!(message(lsda(&qkv, Some(&bias), 1, Grouping::short(200))).contains("shared memory"));
}

#[test]
fn large_logits_give_no_nan() {
    let qkv = randn(&[1, 4, 4, 24], 0).scale(1e3).unwrap().variable().unwrap();
    let output = lsda(&qkv, None, 2, Grouping::short(4)).unwrap();
    let gradient = output.sum_all().unwrap().backward().unwrap().take(&qkv).unwrap();
    assert!(output.to_f64_vec().unwrap().into_iter().chain(gradient.to_f64_vec().unwrap()).all(f64::is_finite));
}

#[test]
fn tokens_of_other_groups_do_not_matter() {
    let grouping = Grouping::long(2, 2);
    let values = randn(&[1, 4, 4, 12], 0).to_f64_vec().unwrap();
    let run = |values: &[f64]| {
        lsda(&Tensor::new(values, [1, 4, 4, 12]).unwrap(), None, 1, grouping).unwrap().to_vec::<f64>().unwrap()
    };
    let (before, mut changed) = (run(&values), values.clone());
    changed[..12].fill(0.0);
    let after = run(&changed);
    for token in 0..16 {
        let same_group = token / 4 % 2 == 0 && token % 2 == 0;
        assert_eq!(before[token * 4..][..4] != after[token * 4..][..4], same_group, "token {token}");
    }
}

#[test]
fn bad_arguments_are_errors() {
    let message = |result: Result<Tensor>| result.unwrap_err().to_string();
    let qkv = randn(&[1, 4, 4, 12], 0);
    assert!(message(lsda(&qkv, None, 0, Grouping::short(2))).contains("0 heads"));
    assert!(message(lsda(&qkv, None, 5, Grouping::short(2))).contains("multiple of 3 · 5"));
    assert!(message(lsda(&qkv, None, 1, Grouping::long(2, 0))).contains("at least 1"));
    assert!(message(lsda(&qkv, Some(&randn(&[9, 2], 0)), 1, Grouping::short(2))).contains("expected (9, 1)"));
    assert!(message(lsda(&randn(&[4, 4, 12], 0), None, 1, Grouping::short(2))).contains("(batch, height, width"));
}
