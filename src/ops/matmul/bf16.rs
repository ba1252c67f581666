//! Products in `bf16`, where the processor multiplies it.

use super::cpu::Problem;
use crate::cpu::bf16::{Panels, bf16, multiply_rows, multiply_transposed};
use crate::cpu::parallel;
use crate::tensor::Buffer;

pub(super) fn matmul(problem: &Problem, left: &[bf16], right: &[bf16]) -> Buffer<bf16> {
    let [m, n, k] = problem.extents;
    let batches = problem.left_batches.len();
    let product = |batch: usize| {
        let a = &left[problem.left_batches[batch] * m * k..][..m * k];
        let b = &right[problem.right_batches[batch] * k * n..][..k * n];
        let b = if problem.transposed.right { Panels::of_columns(b, k, n) } else { Panels::of_rows(b, k, n) };
        if problem.transposed.left {
            multiply_transposed(&Panels::of_rows(a, k, m), &b)
        } else {
            multiply_rows(a, &b, None, m)
        }
    };
    if batches == 1 {
        return product(0);
    }
    let mut output = Buffer::recycled(batches * m * n);
    parallel::pieces_mut(&mut output, m * n, |batch, out| out.copy_from_slice(&product(batch)));
    output
}
