//! `bf16` rows, widened a few at a time: the passes over a row find it in the nearest cache, in `f32`.

use half::bf16;

use super::cpu::{Rows, SAVED, forward_rows};
use crate::cpu::bf16::{narrow, widen_into};
use crate::cpu::{parallel, simd};
use crate::tensor::Buffer;

/// Elements that are widened at once.
const WIDENED: usize = 2048;

#[inline(always)]
fn narrow_into(wide: &[f32], narrowed: &mut [bf16]) {
    for (narrowed, &wide) in narrowed.iter_mut().zip(wide) {
        *narrowed = narrow(wide);
    }
}

/// As [`super::cpu::forward`].
pub(super) fn forward(input: &[bf16], weight: &[f32], bias: &[f32], eps: f64) -> (Buffer<bf16>, Buffer<f32>) {
    let width = weight.len().max(1);
    let mut output = Buffer::recycled(input.len());
    let mut statistics = Buffer::recycled(input.len() / width * SAVED);
    let per_piece = (parallel::PIECE / width).max(1);
    let per_step = (WIDENED / width).max(1);
    parallel::pieces_mut2(
        (&mut output, per_piece * width),
        (&mut statistics, per_piece * SAVED),
        |index, output, statistics| {
            let input = &input[index * per_piece * width..][..output.len()];
            let mut scratch = vec![0.0; 2 * per_step * width];
            let (x, y) = scratch.split_at_mut(per_step * width);
            simd::dispatch(
                #[inline(always)]
                || {
                    let steps = input.chunks(per_step * width).zip(output.chunks_mut(per_step * width));
                    for ((input, output), statistics) in steps.zip(statistics.chunks_mut(per_step * SAVED)) {
                        let (x, y) = (&mut x[..input.len()], &mut y[..input.len()]);
                        widen_into(input, x);
                        forward_rows(x, weight, bias, eps as f32, y, statistics);
                        narrow_into(y, output);
                    }
                },
            );
        },
    );
    (output, statistics)
}

/// As [`super::cpu::backward`].
pub(super) fn backward(
    input: &[bf16],
    weight: &[f32],
    statistics: &[f32],
    grad: &[bf16],
    input_wanted: bool,
) -> (Option<Buffer<bf16>>, Buffer<f32>) {
    let width = weight.len().max(1);
    let (rows, sums) = (input.len() / width, 2 * weight.len());
    // Partial sums are few, and each is of rows enough that it costs nothing beside them.
    let per_part = (4 * parallel::PIECE / width).max(1).max(rows.div_ceil(64));
    let per_step = (WIDENED / width).max(1);
    let mut dx = input_wanted.then(|| Buffer::<bf16>::recycled(input.len()));
    let mut partial = Buffer::<f32>::zeroed(rows.div_ceil(per_part) * sums);
    let body = |part: usize, dx: &mut [bf16], sums: &mut [f32]| {
        let rows = part * per_part..rows.min((part + 1) * per_part);
        let mut scratch = vec![0.0; 3 * per_step * width];
        let (x, rest) = scratch.split_at_mut(per_step * width);
        let (dy, out) = rest.split_at_mut(per_step * width);
        simd::dispatch(
            #[inline(always)]
            || {
                for first in rows.clone().step_by(per_step) {
                    let count = per_step.min(rows.end - first);
                    let (at, len) = (first * width, count * width);
                    let (x, dy, out) = (&mut x[..len], &mut dy[..len], &mut out[..len]);
                    widen_into(&input[at..][..len], x);
                    widen_into(&grad[at..][..len], dy);
                    let statistics = &statistics[first * SAVED..][..count * SAVED];
                    let step = Rows { input: x, grad: dy, statistics, weight };
                    if dx.is_empty() {
                        step.backward(None, sums);
                    } else {
                        step.backward(Some(out), sums);
                        narrow_into(out, &mut dx[at - rows.start * width..][..len]);
                    }
                }
            },
        );
    };
    if let Some(dx) = &mut dx {
        parallel::pieces_mut2((dx, per_part * width), (&mut partial, sums), body);
    } else {
        parallel::pieces_mut(&mut partial, sums, |part, sums| body(part, &mut [], sums));
    }
    let mut total = Buffer::zeroed(sums);
    for partial in partial.chunks_exact(sums.max(1)) {
        total.iter_mut().zip(partial).for_each(|(total, &value)| *total += value);
    }
    (dx, total)
}
