//! A product that starts from the bias.

use crate::cpu::gemm::{Into, Matrix, Threads, gemm};
use crate::cpu::{Float, parallel};
use crate::tensor::Buffer;

pub(super) fn forward<T: Float>(
    input: &[T],
    weight: &[T],
    bias: Option<&[T]>,
    [rows, in_features, out_features]: [usize; 3],
) -> Buffer<T> {
    let mut output = Buffer::recycled(rows * out_features);
    if let Some(bias) = bias {
        let rows_per_piece = (parallel::PIECE / out_features.max(1)).max(1);
        parallel::pieces_mut(&mut output, rows_per_piece * out_features, |_, piece| {
            piece.chunks_mut(out_features).for_each(|row| row.copy_from_slice(bias));
        });
    }
    let into = if bias.is_some() { Into::Add } else { Into::Overwrite };
    let x = Matrix::row_major(input, rows, in_features);
    let w = Matrix::row_major(weight, out_features, in_features).transposed();
    gemm(&mut output, out_features, x, w, into, Threads::All);
    output
}
