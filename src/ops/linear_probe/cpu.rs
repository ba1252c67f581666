//! Block by block: a matrix product, then its rows.

use super::Problem;
use crate::cpu::gemm::{Into, Matrix, Threads, gemm};
use crate::cpu::{Float, parallel};
use crate::tensor::Buffer;

/// Losses, rows that are correct, and logits (blocks, rows, classes).
pub(super) fn forward<T: Float>(
    problem: &Problem,
    features: &[T],
    weight: &[T],
    bias: &[T],
    labels: &[usize],
) -> (Buffer<T>, Buffer<i64>, Buffer<T>) {
    let Problem { rows, classes, ref widths, penalty } = *problem;
    let mut logits = Buffer::zeroed(widths.len() * rows * classes);
    let (mut losses, mut correct) = (Buffer::zeroed(widths.len()), Buffer::zeroed(widths.len()));
    for (block, &width) in widths.iter().enumerate() {
        let own = &mut logits[block * rows * classes..][..rows * classes];
        for row in own.chunks_exact_mut(classes) {
            row.copy_from_slice(&bias[block * classes..][..classes]);
        }
        let (left, right) = (columns(problem, features, rows, block), columns(problem, weight, classes, block));
        gemm(own, classes, left, right.transposed(), Into::Add, Threads::All);
        let mut sum = 0.0;
        for (row, &label) in own.chunks_exact(classes).zip(labels) {
            let (best, largest, total) = statistics(row);
            sum += (total.ln() - (row[label] - largest)).to_f64();
            correct[block] += i64::from(best == label);
        }
        let mut squares = 0.0;
        for row in weight.chunks_exact(problem.features().max(1)) {
            let own = &row[problem.first(block)..][..width];
            squares += own.iter().map(|value| value.to_f64() * value.to_f64()).sum::<f64>();
        }
        losses[block] = T::from_f64(sum / rows as f64 + 0.5 * penalty * squares);
    }
    (losses, correct, logits)
}

/// The features of one block in `rows` rows of all.
fn columns<'a, T: Float>(problem: &Problem, values: &'a [T], rows: usize, block: usize) -> Matrix<'a, T> {
    let (first, all) = (problem.first(block), problem.features());
    // Without rows there is nothing behind the first feature.
    let values = values.get(first..).unwrap_or(&[]);
    Matrix::strided(values, rows, problem.widths[block], all, 1)
}

/// The first of the largest logits, its value, and the sum of exponentials less it.
fn statistics<T: Float>(row: &[T]) -> (usize, T, T) {
    let best = (1..row.len()).fold(0, |best, class| if row[class] > row[best] { class } else { best });
    (best, row[best], row.iter().map(|&value| (value - row[best]).exp()).sum())
}

/// Gradients of weight and bias, from those of the losses.
pub(super) fn backward<T: Float>(
    problem: &Problem,
    features: &[T],
    weight: &[T],
    logits: &[T],
    labels: &[usize],
    grad: &[T],
) -> [Buffer<T>; 2] {
    let Problem { rows, classes, ref widths, penalty } = *problem;
    let (all, share) = (problem.features(), T::from_f64(1.0 / rows as f64));
    let mut differences = Buffer::zeroed(logits.len());
    parallel::pieces_mut(&mut differences, classes, |row, differences| {
        let own = &logits[row * classes..][..classes];
        let (_, largest, total) = statistics(own);
        let factor = grad[row / rows] * share;
        for (class, (difference, &logit)) in differences.iter_mut().zip(own).enumerate() {
            let indicator = if class == labels[row % rows] { T::ONE } else { T::ZERO };
            *difference = ((logit - largest).exp() / total - indicator) * factor;
        }
    });
    let (mut by_weight, mut by_bias) = (Buffer::zeroed(classes * all), Buffer::zeroed(widths.len() * classes));
    for (block, &width) in widths.iter().enumerate() {
        let own = &differences[block * rows * classes..][..rows * classes];
        let decay = T::from_f64(penalty) * grad[block];
        for (class, gradient) in by_weight.chunks_exact_mut(all.max(1)).enumerate() {
            let at = problem.first(block);
            let weight = &weight[class * all + at..][..width];
            gradient[at..][..width].iter_mut().zip(weight).for_each(|(sum, &value)| *sum = decay * value);
        }
        let left = Matrix::row_major(own, rows, classes).transposed();
        let right = columns(problem, features, rows, block);
        if rows > 0 && width > 0 {
            gemm(&mut by_weight[problem.first(block)..], all, left, right, Into::Add, Threads::All);
        }
        let sums = &mut by_bias[block * classes..][..classes];
        for row in own.chunks_exact(classes) {
            sums.iter_mut().zip(row).for_each(|(sum, &value)| *sum += value);
        }
    }
    [by_weight, by_bias]
}
