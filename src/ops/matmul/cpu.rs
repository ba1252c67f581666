//! One product with all threads, or one thread per product where there are many.

use super::Transposed;
use crate::cpu::gemm::{Into, Matrix, Threads, gemm};
use crate::cpu::{Float, parallel};
use crate::tensor::Buffer;

pub(super) struct Problem {
    /// m, n, k
    pub extents: [usize; 3],
    pub transposed: Transposed,
    /// The operand's matrix for each matrix of the result.
    pub left_batches: Vec<usize>,
    pub right_batches: Vec<usize>,
}

pub(super) fn matmul<T: Float>(problem: &Problem, left: &[T], right: &[T]) -> Buffer<T> {
    let [m, n, k] = problem.extents;
    let batches = problem.left_batches.len();
    let mut output = Buffer::recycled(batches * m * n);
    let product = |batch: usize, out: &mut [T], threads: Threads| {
        let a = &left[problem.left_batches[batch] * m * k..][..m * k];
        let b = &right[problem.right_batches[batch] * k * n..][..k * n];
        let a =
            if problem.transposed.left { Matrix::row_major(a, k, m).transposed() } else { Matrix::row_major(a, m, k) };
        let b =
            if problem.transposed.right { Matrix::row_major(b, n, k).transposed() } else { Matrix::row_major(b, k, n) };
        gemm(out, n, a, b, Into::Overwrite, threads);
    };
    if batches < 4 {
        output.chunks_mut((m * n).max(1)).enumerate().for_each(|(batch, out)| product(batch, out, Threads::All));
    } else {
        parallel::pieces_mut(&mut output, m * n, |batch, out| product(batch, out, Threads::One));
    }
    output
}
