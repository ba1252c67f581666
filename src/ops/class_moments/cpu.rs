//! Classes in parallel, then features or rows of the matrices. Sums run over rows in order.

use super::{Problem, Squares};
use crate::cpu::{Float, parallel};
use crate::tensor::Buffer;

/// Counts, sums and squares.
pub(super) fn moments<T: Float>(
    problem: &Problem,
    features: &[T],
    labels: &[i64],
    pivot: &[T],
) -> (Buffer<i64>, Buffer<T>, Buffer<T>) {
    let width = problem.features();
    let mut of_class = vec![Vec::new(); problem.classes];
    let mut used = Vec::with_capacity(labels.len());
    for (row, &label) in labels.iter().enumerate() {
        if let Some(rows) = usize::try_from(label).ok().and_then(|label| of_class.get_mut(label)) {
            rows.push(row);
            used.push(row);
        }
    }
    let counts = Buffer::from_fn(problem.classes, |class| of_class[class].len() as i64);
    let mut sums = Buffer::zeroed(problem.classes * width);
    parallel::pieces_mut(&mut sums, width, |class, sums| {
        for &row in &of_class[class] {
            let values = features[row * width..][..width].iter().zip(pivot);
            sums.iter_mut().zip(values).for_each(|(sum, (&value, &origin))| *sum += value - origin);
        }
    });
    // Without the rows that don't count, and the pivot.
    let mut shifted = Buffer::zeroed(used.len() * width);
    parallel::pieces_mut(&mut shifted, width, |number, shifted| {
        let values = features[used[number] * width..][..width].iter().zip(pivot);
        shifted.iter_mut().zip(values).for_each(|(shifted, (&value, &origin))| *shifted = value - origin);
    });
    let squares = match problem.squares {
        Squares::Diagonal => diagonal(&shifted, width),
        Squares::Full => full(problem, &shifted, width),
    };
    (counts, sums, squares)
}

fn diagonal<T: Float>(shifted: &[T], width: usize) -> Buffer<T> {
    let rows = shifted.len() / width.max(1);
    parallel::accumulate(rows, 64, width, |rows, sums| {
        for row in rows {
            let values = &shifted[row * width..][..width];
            sums.iter_mut().zip(values).for_each(|(sum, &value)| *sum = value.mul_add(value, *sum));
        }
    })
}

/// The matrices of the blocks, one after the other; their rows are computed one by one.
fn full<T: Float>(problem: &Problem, shifted: &[T], width: usize) -> Buffer<T> {
    let mut squares = Buffer::zeroed(problem.squares_len());
    let mut rest = &mut squares[..];
    for (block, &own) in problem.widths.iter().enumerate() {
        let first = problem.first(block);
        let (matrix, behind) = rest.split_at_mut(own * own);
        parallel::pieces_mut(matrix, own, |feature, sums| {
            for row in shifted.chunks_exact(width) {
                let (value, values) = (row[first + feature], &row[first..][..own]);
                sums.iter_mut().zip(values).for_each(|(sum, &other)| *sum = value.mul_add(other, *sum));
            }
        });
        rest = behind;
    }
    squares
}
