//! Long/short-distance attention.

use std::fmt;

use gridgrad::ops::lsda::{Group, Grouping, lsda, lsda_dropout};
use gridgrad::ops::{concat, embedding, softmax};
use gridgrad::random::Philox;
use gridgrad::{DType, Device, Result, Tensor};

use crate::harness::{
    Derivatives, OpCase, ROUNDING, Tolerance, Work, check, check_on_device, on_device, randn, test_device,
};

#[derive(Debug)]
struct Lsda {
    map: [usize; 3],
    heads: usize,
    head_width: usize,
    grouping: Grouping,
    bias: bool,
    /// Factor on q and k: large ones make one logit dominate.
    sharpness: f64,
    /// Rate of dropout.
    p: f64,
}

const SEED: u64 = 23;

/// What dropout makes of a probability of 1: query `row` of all images, heads and tokens, key in place `key` of its group
/// of up to `tokens`.
fn factor(p: f64, tokens: usize, row: usize, key: usize) -> f64 {
    let block = row * tokens.div_ceil(32) * 4 + key / 32 * 4 + key % 8 / 2;
    let word = Philox::new(SEED).block(block as u64)[key / 8 % 4];
    let number = if key.is_multiple_of(2) { word & 0xFFFF } else { word >> 16 };
    let threshold = (p * 65536.0).round();
    if f64::from(number) < threshold { 0.0 } else { 65536.0 / (65536.0 - threshold) }
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
        if self.p > 0.0 {
            let stream = Philox::new(SEED);
            return lsda_dropout(&inputs[0], inputs.get(1), self.heads, self.grouping, self.p, stream);
        }
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
                    let row = (image * self.heads + head) * height * width + query;
                    for c in 0..d {
                        let weighted = keys.iter().zip(&scores).enumerate().map(|(place, (&key, s))| {
                            let factor = factor(self.p, self.most_tokens(), row, place);
                            (s - largest).exp() / sum * factor * at(key, 2, c)
                        });
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
    /// Tokens of the largest group that fits on the map.
    fn most_tokens(&self) -> usize {
        let along = |axis: usize| {
            let reach = self.map[axis + 1].div_ceil(self.grouping.interval[axis]);
            self.grouping.group[axis].min(reach).max(1)
        };
        along(0) * along(1)
    }

    /// The factors of dropout for groups of `n` tokens, whose `members` are tokens of all images: (groups, heads, n, n).
    fn factors(&self, members: &[i64], n: usize, dtype: DType) -> Result<Tensor> {
        let image = self.map[1] * self.map[2];
        let value = |i: usize| {
            let (group, head, query, key) = (i / (self.heads * n * n), i / (n * n) % self.heads, i / n % n, i % n);
            let token = members[group * n + query] as usize;
            let row = (token / image * self.heads + head) * image + token % image;
            factor(self.p, self.most_tokens(), row, key)
        };
        Tensor::from_index([members.len() / n, self.heads, n, n], dtype, value)
    }

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
            let mut weights = softmax(&scores, -1)?;
            if self.p > 0.0 {
                weights = weights.mul(&self.factors(&members, n, weights.dtype())?)?;
            }
            let mixed = weights.matmul(&part(2)?)?;
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
        Box::new(Lsda { map, heads, head_width, grouping, bias, sharpness, p: 0.0 }) as Box<dyn OpCase>
    };
    list.into_iter().map(case).collect()
}

fn dropout_cases() -> Vec<Box<dyn OpCase>> {
    let case = |(map, heads, head_width, grouping, bias, p)| {
        Box::new(Lsda { map, heads, head_width, grouping, bias, sharpness: 1.0, p }) as Box<dyn OpCase>
    };
    [
        ([1, 1, 1], 1, 1, Grouping::short(1), true, 0.5),
        // Groups of several shapes, several to a block.
        ([2, 7, 5], 3, 8, Grouping::short(3), true, 0.3),
        ([1, 9, 7], 2, 16, Grouping::long(3, 2), false, 0.1),
        ([1, 7, 7], 1, 32, Grouping::short(7), true, 0.1),
        // Several tiles, of 64 and of 32 tokens.
        ([1, 9, 8], 1, 20, Grouping::short(9), true, 0.6),
        ([1, 6, 6], 1, 66, Grouping::short(6), true, 0.2),
        ([1, 3, 3], 1, 4, Grouping::short(3), true, 1.0),
    ]
    .into_iter()
    .map(case)
    .collect()
}

/// The attention of CrossFormer-S at batch 8, and of CrossFormer++-S's third stage.
pub fn benchmarks() -> Vec<Box<dyn OpCase>> {
    let case = |side, heads, grouping| {
        let case = Lsda { map: [8, side, side], heads, head_width: 32, grouping, bias: true, sharpness: 1.0, p: 0.0 };
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
fn dropout_agrees_with_its_definition() {
    check(&dropout_cases());
}

#[test]
fn dropout_keeps_the_mean_and_takes_the_share_that_it_should() {
    // All weights of a group of 16 are 1/16 and all values 1, so that an output is the share of keys that are kept.
    let qkv = Tensor::from_index([1, 64, 64, 3], DType::F64, |i| f64::from(u8::from(i % 3 == 2))).unwrap();
    for p in [0.0, 1e-6, 0.1, 0.5, 0.9] {
        let output = lsda_dropout(&qkv, None, 1, Grouping::long(4, 3), p, Philox::new(4)).unwrap();
        let values = output.to_f64_vec().unwrap();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        // Four standard deviations.
        let allowed = 1e-12 + 4.0 * (p / (1.0 - p) / (16 * values.len()) as f64).sqrt();
        assert!((mean - 1.0).abs() < allowed, "{p}: {mean}");
        if p == 0.5 {
            assert!(values.iter().any(|&value| value < 0.8) && values.iter().any(|&value| value > 1.2));
        }
    }
}

#[test]
fn the_processor_and_a_gpu_drop_the_same_probabilities() {
    let Some(device) = test_device() else { return };
    // As above: counts of kept keys, which rounding does not touch.
    let qkv = Tensor::from_index([2, 9, 10, 6], DType::F32, |i| f64::from(u8::from(i % 6 > 3))).unwrap();
    for grouping in [Grouping::short(3), Grouping::long(3, 2), Grouping::short(9)] {
        let counts = |device: Device| -> Vec<f64> {
            let qkv = qkv.to_device(device).unwrap();
            let output = lsda_dropout(&qkv, None, 2, grouping, 0.5, Philox::new(8).fork(3)).unwrap();
            let scaled = output.to_f64_vec().unwrap().into_iter();
            let tokens = (grouping.group[0] * grouping.group[1]) as f64;
            // Groups at the edge have fewer tokens: compared as shares of them, to a thousandth of a key.
            scaled.map(|value| (value * tokens * 1000.0).round()).collect()
        };
        assert_eq!(counts(Device::Cpu), counts(device), "{grouping:?}");
    }
}

#[test]
fn streams_decide_what_is_dropped() {
    let qkv = randn(&[1, 4, 4, 12], 0).cast(DType::F32).unwrap();
    let run = |stream| lsda_dropout(&qkv, None, 2, Grouping::short(4), 0.3, stream).unwrap().to_vec::<f32>().unwrap();
    let stream = Philox::new(5).stream("attention");
    assert_eq!(run(stream), run(stream));
    assert_ne!(run(stream), run(stream.fork(1)));
}

#[test]
fn sums_that_find_no_room_in_shared_memory_are_parked_elsewhere() {
    // The table of groups of 45 × 45, of which the map has a corner, leaves less than dK and dV of a tile need.
    let grouping = Grouping::short(45);
    let case = Lsda { map: [1, 9, 8], heads: 1, head_width: 32, grouping, bias: true, sharpness: 1.0, p: 0.0 };
    check_on_device(&case);
}

/// Every group size from 2 to 16 with every head width, in both directions: one group, or as much of it as keeps the
/// emulator quick, and a second one that is cut off by the map.
#[test]
fn every_group_size_and_head_width_has_a_kernel() {
    let Some(device) = test_device() else { return };
    for side in 2..=16 {
        for head_width in [16usize, 32, 64, 128] {
            for dtype in [DType::F32, DType::Bf16, DType::F16] {
                // All sizes in one dtype or another; the largest in all.
                let chosen = (side + head_width.ilog2() as usize + dtype as usize).is_multiple_of(3);
                let everywhere = side == 16 && head_width == 32;
                if !(chosen || everywhere) {
                    continue;
                }
                let case = Lsda {
                    map: [1, side, side + 1],
                    heads: 1,
                    head_width,
                    grouping: Grouping::short(side),
                    bias: true,
                    sharpness: 1.0,
                    p: 0.0,
                };
                on_device(&case, device, dtype);
            }
        }
    }
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
    for p in [-0.1, 1.1, f64::NAN] {
        let result = lsda_dropout(&qkv, None, 1, Grouping::short(2), p, Philox::new(0));
        assert!(message(result).contains("lsda: probability"));
    }
}
