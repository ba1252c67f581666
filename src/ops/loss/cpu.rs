//! Rows of logits against rows of target probabilities, which for labels are never written out.

use crate::cpu::{Float, lanes, parallel, simd};
use crate::ops::softmax::cpu::largest;
use crate::tensor::Buffer;

/// Target probabilities of each row, before smoothing.
#[derive(Clone, Copy)]
pub(super) enum Rows<'a, T> {
    /// 1 at the class; `None` for a row that does not count.
    Labels(&'a [Option<usize>]),
    /// Any weights, of the logits' shape.
    Soft(&'a [T]),
}

/// The smoothed target `keep` · t + `spread` of one row.
#[derive(Clone, Copy)]
pub(super) struct Smoothing<T> {
    pub keep: T,
    pub spread: T,
}

/// Numbers per row in the saved statistics: the largest logit, and the logarithm of the sum of exponentials above it.
const SAVED: usize = 2;

/// The loss of each row, and the statistics that [`backward`] reads.
pub(super) fn forward<T: Float>(
    logits: &[T],
    classes: usize,
    targets: Rows<'_, T>,
    smoothing: Smoothing<T>,
) -> (Buffer<T>, Buffer<T>) {
    let rows = logits.len() / classes;
    let (mut losses, mut statistics) = (Buffer::recycled(rows), Buffer::recycled(rows * SAVED));
    let per_piece = (parallel::PIECE / classes).max(1);
    parallel::pieces_mut2((&mut losses, per_piece), (&mut statistics, per_piece * SAVED), |index, losses, saved| {
        simd::dispatch(
            #[inline(always)]
            || {
                for (at, (loss, saved)) in losses.iter_mut().zip(saved.chunks_exact_mut(SAVED)).enumerate() {
                    let row = index * per_piece + at;
                    let x = &logits[row * classes..][..classes];
                    let statistics = statistics_of(x);
                    *loss = loss_of(x, targets, row, smoothing, statistics);
                    saved.copy_from_slice(&statistics);
                }
            },
        );
    });
    (losses, statistics)
}

#[inline(always)]
fn statistics_of<T: Float>(x: &[T]) -> [T; SAVED] {
    let largest = largest(x);
    let [sum] = lanes::sum(
        x,
        #[inline(always)]
        |x| [(x - largest).exp()],
    );
    [largest, sum.ln()]
}

/// Σ (keep · t + spread) · (−ln p), where a weight of 0 counts as 0 even if ln p is −∞.
#[inline(always)]
fn loss_of<T: Float>(
    x: &[T],
    targets: Rows<'_, T>,
    row: usize,
    smoothing: Smoothing<T>,
    [largest, ln_sum]: [T; SAVED],
) -> T {
    let surprise = |x: T| ln_sum - (x - largest);
    match targets {
        Rows::Labels(labels) => {
            let Some(label) = labels[row] else { return T::ZERO };
            let own = smoothing.keep * surprise(x[label]);
            if smoothing.spread == T::ZERO {
                return own;
            }
            let [all] = lanes::sum(
                x,
                #[inline(always)]
                |x| [surprise(x)],
            );
            smoothing.spread.mul_add(all, own)
        }
        Rows::Soft(targets) => {
            let [loss] = lanes::zip_sum(
                x,
                &targets[row * x.len()..][..x.len()],
                #[inline(always)]
                |x, t| {
                    let weight = smoothing.keep.mul_add(t, smoothing.spread);
                    [if weight == T::ZERO { T::ZERO } else { weight * surprise(x) }]
                },
            );
            loss
        }
    }
}

/// (p · Σ weights − weights) · `scales[row]`, with weights as in [`loss_of`] and p = softmax of the logits.
pub(super) fn backward<T: Float>(
    logits: &[T],
    classes: usize,
    targets: Rows<'_, T>,
    smoothing: Smoothing<T>,
    statistics: &[T],
    scales: &[T],
) -> Buffer<T> {
    let mut output = Buffer::recycled(logits.len());
    let per_piece = (parallel::PIECE / classes).max(1);
    let Smoothing { keep, spread } = smoothing;
    let spread_total = spread * T::from_f64(classes as f64);
    parallel::pieces_mut(&mut output, per_piece * classes, |index, piece| {
        simd::dispatch(
            #[inline(always)]
            || {
                for (at, dx) in piece.chunks_exact_mut(classes).enumerate() {
                    let row = index * per_piece + at;
                    let x = &logits[row * classes..][..classes];
                    let (scale, saved) = (scales[row], &statistics[row * SAVED..][..SAVED]);
                    let (largest, ln_sum) = (saved[0], saved[1]);
                    let probability = |x: T| (x - largest - ln_sum).exp();
                    match targets {
                        Rows::Labels(labels) => {
                            let Some(label) = labels[row] else {
                                dx.fill(T::ZERO);
                                continue;
                            };
                            let total = keep + spread_total;
                            let values = dx.iter_mut().zip(x);
                            values.for_each(|(dx, &x)| *dx = (probability(x) * total - spread) * scale);
                            dx[label] = (probability(x[label]) * total - spread - keep) * scale;
                        }
                        Rows::Soft(targets) => {
                            let targets = &targets[row * classes..][..classes];
                            let [sum] = lanes::sum(
                                targets,
                                #[inline(always)]
                                |t| [t],
                            );
                            let total = keep.mul_add(sum, spread_total);
                            for (dx, (&x, &t)) in dx.iter_mut().zip(x.iter().zip(targets)) {
                                *dx = (probability(x) * total - keep.mul_add(t, spread)) * scale;
                            }
                        }
                    }
                }
            },
        );
    });
    output
}
