//! One task per run of groups. Each group owns the rows of its tokens in the output, so tasks write without sharing.
//!
//! A group's rows of Q, K and V are gathered for a run of heads at once, since only reads of long runs are ones that a
//! processor fetches ahead. Per head of width d and group of N tokens, everything lies in scratch of a few ten KiB: Q
//! (N × d), Kᵀ (d × N, scaled), V (N × d) and the scores of up to 64 queries. Widths are rounded up to whole vectors; the
//! padding of a score row is −∞, which the softmax turns into 0.

use std::ops::Range;

use rayon::prelude::*;

use super::dropout::Dropout;
use super::expanded_bias::{ExpandedBias, expand, fold_bias_grads, size, size_number};
use super::gather::{Part, gather, gather_transposed, shares_of_rows};
use super::grouping::{Group, Grouping};
use super::softmax::{self, exponentials};
use crate::cpu::small_gemm::{Ahead, LANES, Left, Onto, multiply};
use crate::cpu::{Float, Stored, simd};
use crate::tensor::Buffer;

/// Queries whose scores are in scratch at once.
const QUERIES: usize = 64;
/// Elements of Q (and of K, and of V) that are gathered at once: together they stay in the L2 cache.
const GATHERED: usize = 12 << 10;

#[derive(Clone, Copy)]
pub(super) struct Problem {
    /// batch, height, width
    pub extents: [usize; 3],
    pub heads: usize,
    pub head_width: usize,
    pub grouping: Grouping,
    pub dropout: Option<Dropout>,
}

/// A group of one image, with the rows of its tokens in the tensor to be written, in the order of local positions.
struct Work<'a, T> {
    image: usize,
    group: Group,
    rows: Vec<&'a mut [T]>,
}

impl Problem {
    fn channels(&self) -> usize {
        self.heads * self.head_width
    }

    /// The head width in whole vectors.
    fn padded_width(&self) -> usize {
        self.head_width.next_multiple_of(LANES)
    }

    /// Hands each group of each image the rows of its tokens.
    fn split<'a, T>(&self, output: &'a mut [T], row: usize) -> Vec<Work<'a, T>> {
        let [_, height, width] = self.extents;
        let groups = self.grouping.groups(height, width);
        let group_of_token = self.grouping.group_of_token(height, width);
        let mut work = Vec::new();
        for (image, output) in output.chunks_mut((height * width * row).max(1)).enumerate() {
            let first = work.len();
            let with_capacity = |&group: &Group| Work { image, group, rows: Vec::with_capacity(group.len()) };
            work.extend(groups.iter().map(with_capacity));
            for (row, &group) in output.chunks_mut(row).zip(&group_of_token) {
                work[first + group].rows.push(row);
            }
        }
        work
    }

    /// The distinct group sizes (rows, columns) of the map. The bias between two tokens depends on their distance
    /// alone, so groups of one size share one expanded bias.
    pub fn sizes(&self) -> Vec<[usize; 2]> {
        let [_, height, width] = self.extents;
        let mut sizes: Vec<[usize; 2]> = self.grouping.groups(height, width).iter().map(size).collect();
        sizes.sort_unstable();
        sizes.dedup();
        sizes
    }

    /// Tokens of the largest group that the map can hold.
    pub fn most_tokens(&self) -> usize {
        let [_, height, width] = self.extents;
        let Grouping { group, interval, .. } = self.grouping;
        let along = |axis: usize, extent: usize| group[axis].min(extent.div_ceil(interval[axis])).max(1);
        along(0, height) * along(1, width)
    }

    /// The number of a query among those of all images and heads.
    fn query_number(&self, image: usize, head: usize, token: usize) -> usize {
        let [_, height, width] = self.extents;
        (image * self.heads + head) * height * width + token
    }

    /// The table row for tokens `query` and `key` of a group with `columns` columns.
    pub fn table_row(&self, columns: usize, query: usize, key: usize) -> usize {
        let [gh, gw] = self.grouping.group;
        let dy = query / columns + gh - 1 - key / columns;
        let dx = query % columns + gw - 1 - key % columns;
        dy * (2 * gw - 1) + dx
    }

    /// Heads that are gathered at once.
    fn heads_per_run(&self) -> usize {
        (GATHERED / (self.most_tokens() * self.padded_width()).max(1)).clamp(1, self.heads.max(1))
    }

    /// The elements of q, k or v (`number`) of some heads from `first` on in a row of qkv.
    fn part(&self, number: usize, first: usize) -> Part {
        let channels = self.channels();
        Part { row: 3 * channels, channel: number * channels + first * self.head_width, width: self.head_width }
    }

    /// Groups that one task takes, by the problem's size alone: about a millisecond of work.
    fn groups_per_task(&self, groups: usize) -> usize {
        let tokens = self.grouping.group[0] * self.grouping.group[1];
        let flops_per_group = 4 * tokens * tokens * self.channels();
        (10_000_000 / flops_per_group.max(1)).clamp(1, groups.div_ceil(16).max(1))
    }
}

#[inline(always)]
fn multiply_elements<T: Float>(values: &mut [T], factors: &[T]) {
    for (value, &factor) in values.iter_mut().zip(factors) {
        *value *= factor;
    }
}

/// Asks for some elements of rows that will be written.
#[inline(always)]
fn fetch_to_write<S>(rows: &[&mut [S]], elements: Range<usize>) {
    for row in rows {
        simd::prefetch_to_write(&row[elements.clone()]);
    }
}

fn halves<T>(items: &[T]) -> [&[T]; 2] {
    let (first, second) = items.split_at(items.len() / 2);
    [first, second]
}

/// Scratch of one task, for groups of up to `tokens` tokens.
struct Scratch<T> {
    tokens: Vec<usize>,
    /// Those of the group that comes next, and where their share for a head lies.
    next: Vec<usize>,
    runs: Vec<Range<usize>>,
    /// Of a run of heads: (head, token, padded width).
    query: Buffer<T>,
    value: Buffer<T>,
    /// Of a run of heads: (head, width, padded tokens).
    transposed_key: Buffer<T>,
    scores: Buffer<T>,
    output: Buffer<T>,
    /// Of the probabilities of one query, by dropout.
    factors: Buffer<T>,
}

impl<T: Float> Scratch<T> {
    /// Takes the tokens of `work`, numbered over the batch, and those of the group behind it.
    fn take_tokens<S>(&mut self, problem: &Problem, work: &Work<'_, S>, next: Option<&Work<'_, S>>) {
        let [_, height, width] = problem.extents;
        for (tokens, work) in [(&mut self.tokens, Some(work)), (&mut self.next, next)] {
            tokens.clear();
            if let Some(work) = work {
                tokens.extend(work.group.tokens(width).map(|token| work.image * height * width + token));
            }
        }
    }

    fn new(problem: &Problem) -> Self {
        let most = problem.sizes().iter().map(|size| size[0] * size[1]).max().unwrap_or(0);
        let padded = most.next_multiple_of(LANES);
        let rows = |heads: usize| Buffer::recycled(heads * most * problem.padded_width());
        let run = problem.heads_per_run();
        Scratch {
            tokens: Vec::with_capacity(most),
            next: Vec::with_capacity(most),
            runs: Vec::with_capacity(2 * most),
            query: rows(run),
            value: rows(run),
            transposed_key: Buffer::recycled(run * padded * problem.head_width),
            scores: Buffer::recycled(QUERIES.min(most) * padded),
            output: rows(1),
            factors: Buffer::recycled(padded),
        }
    }
}

pub(super) fn forward<S: Stored<T>, T: Float>(problem: &Problem, qkv: &[S], table: Option<&[T]>) -> Buffer<S> {
    let [batch, height, width] = problem.extents;
    let mut output = Buffer::recycled(batch * height * width * problem.channels());
    let biases = expand(problem, table);
    let mut work = problem.split(&mut output, problem.channels());
    let per_task = problem.groups_per_task(work.len());
    let body = |task: &mut [Work<'_, S>]| {
        let mut scratch = Scratch::new(problem);
        let mut rest = task;
        while let Some((work, behind)) = rest.split_first_mut() {
            scratch.take_tokens(problem, work, behind.first());
            simd::dispatch(
                #[inline(always)]
                || forward_group(problem, qkv, &biases, work, &mut scratch),
            );
            rest = behind;
        }
    };
    work.par_chunks_mut(per_task).for_each(body);
    drop(work);
    output
}

#[inline(always)]
fn forward_group<S: Stored<T>, T: Float>(
    problem: &Problem,
    qkv: &[S],
    biases: &[ExpandedBias<T>],
    work: &mut Work<'_, S>,
    scratch: &mut Scratch<T>,
) {
    let (channels, d, padded_d) = (problem.channels(), problem.head_width, problem.padded_width());
    let tokens = work.group.len();
    let padded = tokens.next_multiple_of(LANES);
    let bias = &biases[size_number(biases, &work.group)].values;
    let scale = T::ONE / T::from_f64(d as f64).sqrt();
    let image_start = work.image * problem.extents[1] * problem.extents[2];
    let run = problem.heads_per_run();
    for head in 0..problem.heads {
        let in_run = head % run;
        if in_run == 0 {
            let heads = run.min(problem.heads - head);
            let [query, key, value] = [0, 1, 2].map(|number| problem.part(number, head));
            gather(qkv, query, heads, &scratch.tokens, padded_d, &mut scratch.query);
            gather_transposed(qkv, key, heads, &scratch.tokens, (padded, scale), &mut scratch.transposed_key);
            gather(qkv, value, heads, &scratch.tokens, padded_d, &mut scratch.value);
        }
        scratch.runs.clear();
        shares_of_rows::<S>(&scratch.next, 3 * channels, [head, problem.heads], &mut scratch.runs);
        let data = bytemuck::cast_slice(qkv);
        let [ahead, ahead_later] = halves(&scratch.runs).map(|runs| Ahead { data, runs });
        let of_head = in_run * tokens * padded_d..(in_run + 1) * tokens * padded_d;
        let (query, value) = (&scratch.query[of_head.clone()], &scratch.value[of_head]);
        let transposed_key = &scratch.transposed_key[in_run * d * padded..][..d * padded];
        for first in (0..tokens).step_by(QUERIES) {
            let queries = QUERIES.min(tokens - first);
            let scores = &mut scratch.scores[..queries * padded];
            let bias = Onto::Values(&bias[(head * tokens + first) * padded..][..queries * padded]);
            let query = Left::rows(&query[first * padded_d..], padded_d);
            multiply(query, [queries, d, padded], transposed_key, bias, scores, ahead);
            let mut sums = [T::ZERO; QUERIES];
            fetch_to_write(&work.rows[first..first + queries], head * d..(head + 1) * d);
            exponentials(scores, padded, &mut sums[..queries]);
            if let Some(dropout) = &problem.dropout {
                for (row, scores) in scores.chunks_exact_mut(padded).enumerate() {
                    let query = problem.query_number(work.image, head, scratch.tokens[first + row] - image_start);
                    dropout.factors(query, problem.most_tokens(), &mut scratch.factors[..padded]);
                    multiply_elements(scores, &scratch.factors);
                }
            }
            let product = [queries, tokens, padded_d];
            multiply(Left::rows(scores, padded), product, value, Onto::Nothing, &mut scratch.output, ahead_later);
            let rows = work.rows[first..first + queries].iter_mut().zip(scratch.output.chunks_exact(padded_d));
            for ((row, result), sum) in rows.zip(sums) {
                let share = T::ONE / sum;
                let out = &mut row[head * d..][..d];
                for (out, &value) in out.iter_mut().zip(result) {
                    *out = S::store(value * share);
                }
            }
        }
    }
}

/// Scratch that only the backward pass needs.
struct BackwardScratch<T> {
    forward: Scratch<T>,
    /// Of a run of heads, as the query.
    grad: Buffer<T>,
    /// Of a run of heads, as the query and as the transposed key.
    key: Buffer<T>,
    transposed_value: Buffer<T>,
    score_grads: Buffer<T>,
    query_grad: Buffer<T>,
    key_grad: Buffer<T>,
    value_grad: Buffer<T>,
    /// Sums of score gradients, shaped as the expanded biases.
    bias_grads: Vec<Buffer<T>>,
}

impl<T: Float> BackwardScratch<T> {
    fn new(problem: &Problem, biases: &[ExpandedBias<T>], with_bias: bool) -> Self {
        let forward = Scratch::new(problem);
        let like = |buffer: &Buffer<T>| Buffer::recycled(buffer.len());
        BackwardScratch {
            grad: like(&forward.query),
            key: like(&forward.query),
            transposed_value: like(&forward.transposed_key),
            score_grads: like(&forward.scores),
            query_grad: like(&forward.output),
            key_grad: like(&forward.output),
            value_grad: like(&forward.output),
            bias_grads: if with_bias {
                biases.iter().map(|b| Buffer::zeroed(b.values.len())).collect()
            } else {
                vec![]
            },
            forward,
        }
    }
}

/// Gradients of qkv and of the table (empty where there is none).
pub(super) fn backward<S: Stored<T>, T: Float>(
    problem: &Problem,
    qkv: &[S],
    table: Option<&[T]>,
    grad: &[S],
) -> (Buffer<S>, Buffer<T>) {
    let mut dqkv = Buffer::recycled(qkv.len());
    let biases = expand(problem, table);
    let mut work = problem.split(&mut dqkv, 3 * problem.channels());
    let per_task = problem.groups_per_task(work.len());
    let table_len = table.map_or(0, <[T]>::len);
    let tasks = work.len().div_ceil(per_task);
    // One table per task, summed in order: the same bits whichever thread ran which task.
    let mut partial = Buffer::<T>::zeroed(tasks * table_len);
    let body = |(task, dtable): (&mut [Work<'_, S>], &mut [T])| {
        let mut scratch = BackwardScratch::new(problem, &biases, table_len > 0);
        let mut rest = task;
        while let Some((work, behind)) = rest.split_first_mut() {
            scratch.forward.take_tokens(problem, work, behind.first());
            simd::dispatch(
                #[inline(always)]
                || backward_group(problem, qkv, grad, &biases, work, &mut scratch),
            );
            rest = behind;
        }
        fold_bias_grads(problem, &biases, &scratch.bias_grads, dtable);
    };
    if table_len > 0 {
        work.par_chunks_mut(per_task).zip(partial.par_chunks_mut(table_len)).for_each(body);
    } else {
        work.par_chunks_mut(per_task).for_each(|task| body((task, &mut [])));
    }
    drop(work);
    let mut dtable = Buffer::zeroed(table_len);
    for partial in partial.chunks_exact(table_len.max(1)) {
        for (sum, &value) in dtable.iter_mut().zip(partial) {
            *sum += value;
        }
    }
    (dqkv, dtable)
}

/// With P the probabilities and M the factors of dropout: dV = (P ∘ M)ᵀ dO, dP = dO Vᵀ ∘ M, dS = P ∘ (dP − rowsum(P ∘ dP)),
/// dQ = dS K / √d, dK = dSᵀ Q / √d.
#[inline(always)]
fn backward_group<S: Stored<T>, T: Float>(
    problem: &Problem,
    qkv: &[S],
    grad_rows: &[S],
    biases: &[ExpandedBias<T>],
    work: &mut Work<'_, S>,
    scratch: &mut BackwardScratch<T>,
) {
    let (channels, d, padded_d) = (problem.channels(), problem.head_width, problem.padded_width());
    let tokens = work.group.len();
    let padded = tokens.next_multiple_of(LANES);
    let image_start = work.image * problem.extents[1] * problem.extents[2];
    let number = size_number(biases, &work.group);
    let bias = &biases[number].values;
    let scale = T::ONE / T::from_f64(d as f64).sqrt();
    let BackwardScratch { forward, query_grad, key_grad, value_grad, .. } = scratch;
    let run = problem.heads_per_run();
    for head in 0..problem.heads {
        let in_run = head % run;
        if in_run == 0 {
            let heads = run.min(problem.heads - head);
            let [query, key, value] = [0, 1, 2].map(|number| problem.part(number, head));
            gather(qkv, query, heads, &forward.tokens, padded_d, &mut forward.query);
            gather(qkv, key, heads, &forward.tokens, padded_d, &mut scratch.key);
            gather_transposed(qkv, key, heads, &forward.tokens, (padded, scale), &mut forward.transposed_key);
            gather_transposed(qkv, value, heads, &forward.tokens, (padded, T::ONE), &mut scratch.transposed_value);
            let part = Part { row: channels, channel: head * d, width: d };
            gather(grad_rows, part, heads, &forward.tokens, padded_d, &mut scratch.grad);
        }
        let of_head = in_run * tokens * padded_d..(in_run + 1) * tokens * padded_d;
        let (query, grad) = (&forward.query[of_head.clone()], &scratch.grad[of_head.clone()]);
        let key = &scratch.key[of_head];
        let of_head = in_run * d * padded..(in_run + 1) * d * padded;
        let transposed_key = &forward.transposed_key[of_head.clone()];
        let transposed_value = &scratch.transposed_value[of_head];
        forward.runs.clear();
        shares_of_rows::<S>(&forward.next, 3 * channels, [head, problem.heads], &mut forward.runs);
        let of_qkv = forward.runs.len();
        shares_of_rows::<S>(&forward.next, channels, [head, problem.heads], &mut forward.runs);
        let (of_qkv, of_grad) = forward.runs.split_at(of_qkv);
        let [ahead, ahead_later] = halves(of_qkv).map(|runs| Ahead { data: bytemuck::cast_slice(qkv), runs });
        let of_grad = Ahead { data: bytemuck::cast_slice(grad_rows), runs: of_grad };
        for first in (0..tokens).step_by(QUERIES) {
            let queries = QUERIES.min(tokens - first);
            let probabilities = &mut forward.scores[..queries * padded];
            let bias_rows = (head * tokens + first) * padded..(head * tokens + first + queries) * padded;
            let (query, grad) = (&query[first * padded_d..], &grad[first * padded_d..]);
            let to_scores = [queries, d, padded];
            let bias = Onto::Values(&bias[bias_rows.clone()]);
            multiply(Left::rows(query, padded_d), to_scores, transposed_key, bias, probabilities, ahead);
            let score_grads = &mut scratch.score_grads[..queries * padded];
            multiply(Left::rows(grad, padded_d), to_scores, transposed_value, Onto::Nothing, score_grads, ahead_later);
            let to_write = |number: usize| number * channels + head * d..number * channels + (head + 1) * d;
            fetch_to_write(&work.rows[first..first + queries], to_write(0));
            match &problem.dropout {
                None => softmax::gradients(probabilities, score_grads, padded),
                Some(dropout) => {
                    let rows = probabilities.chunks_exact_mut(padded).zip(score_grads.chunks_exact_mut(padded));
                    for (number, (row, grads)) in rows.enumerate() {
                        let query =
                            problem.query_number(work.image, head, forward.tokens[first + number] - image_start);
                        dropout.factors(query, problem.most_tokens(), &mut forward.factors[..padded]);
                        multiply_elements(grads, &forward.factors);
                        softmax::gradients(row, grads, padded);
                        multiply_elements(row, &forward.factors);
                    }
                }
            }
            let over_queries = [tokens, queries, padded_d];
            let onto = if first == 0 { Onto::Nothing } else { Onto::Itself };
            fetch_to_write(&work.rows[first..first + queries], to_write(1));
            multiply(Left::transposed(probabilities, padded), over_queries, grad, onto, value_grad, of_grad);
            multiply(Left::transposed(score_grads, padded), over_queries, query, onto, key_grad, Ahead::default());
            fetch_to_write(&work.rows[first..first + queries], to_write(2));
            let over_keys = [queries, tokens, padded_d];
            let query_grad = &mut query_grad[first * padded_d..];
            multiply(Left::rows(score_grads, padded), over_keys, key, Onto::Nothing, query_grad, Ahead::default());
            if let Some(sums) = scratch.bias_grads.get_mut(number) {
                for (sum, &grad) in sums[bias_rows].iter_mut().zip(&*score_grads) {
                    *sum += grad;
                }
            }
        }
        for (number, (grads, factor)) in
            [(&*query_grad, scale), (&*key_grad, scale), (&*value_grad, T::ONE)].into_iter().enumerate()
        {
            for (row, grads) in work.rows.iter_mut().zip(grads.chunks_exact(padded_d)) {
                let out = &mut row[number * channels + head * d..][..d];
                for (out, &grad) in out.iter_mut().zip(grads) {
                    *out = S::store(grad * factor);
                }
            }
        }
    }
}
