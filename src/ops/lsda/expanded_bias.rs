//! The table of position biases as rows of scores, and their gradients back to the table.

use super::cpu::Problem;
use super::grouping::Group;
use crate::cpu::small_gemm::LANES;
use crate::cpu::{Float, parallel};
use crate::tensor::Buffer;

/// Rows and columns.
pub(super) fn size(group: &Group) -> [usize; 2] {
    [group.rows.count, group.columns.count]
}

/// The bias of one group size as score rows: (heads, N, padded N), with −∞ in the padding.
pub(super) struct ExpandedBias<T> {
    pub size: [usize; 2],
    /// The table row for each pair of tokens, (N, N).
    table_rows: Vec<usize>,
    pub values: Buffer<T>,
}

pub(super) fn expand<T: Float>(problem: &Problem, table: Option<&[T]>) -> Vec<ExpandedBias<T>> {
    let expand = |size: [usize; 2]| {
        let tokens = size[0] * size[1];
        let padded = tokens.next_multiple_of(LANES);
        let pair = |pair: usize| problem.table_row(size[1], pair / tokens, pair % tokens);
        let table_rows: Vec<usize> = (0..tokens * tokens).map(pair).collect();
        let mut values = Buffer::recycled(problem.heads * tokens * padded);
        parallel::pieces_mut(&mut values, padded, |row, scores| {
            let (head, query) = (row / tokens, row % tokens);
            for (key, score) in scores.iter_mut().enumerate() {
                *score = match table {
                    _ if key >= tokens => T::NEG_INFINITY,
                    Some(table) => table[table_rows[query * tokens + key] * problem.heads + head],
                    None => T::ZERO,
                };
            }
        });
        ExpandedBias { size, table_rows, values }
    };
    problem.sizes().into_iter().map(expand).collect()
}

/// Which of the sorted `biases` belongs to `group`.
pub(super) fn size_number<T>(biases: &[ExpandedBias<T>], group: &Group) -> usize {
    biases.partition_point(|bias| bias.size < size(group))
}

/// Adds the gradients of expanded biases to the table rows that they were expanded from.
pub(super) fn fold_bias_grads<T: Float>(
    problem: &Problem,
    biases: &[ExpandedBias<T>],
    bias_grads: &[Buffer<T>],
    dtable: &mut [T],
) {
    for (bias, grads) in biases.iter().zip(bias_grads) {
        let tokens = bias.size[0] * bias.size[1];
        let padded = tokens.next_multiple_of(LANES);
        for (pair, &row) in bias.table_rows.iter().enumerate() {
            let (query, key) = (pair / tokens, pair % tokens);
            let sums = &mut dtable[row * problem.heads..][..problem.heads];
            for (sum, grads) in sums.iter_mut().zip(grads.chunks_exact(tokens * padded)) {
                *sum += grads[query * padded + key];
            }
        }
    }
}
