//! Strided copies.

use crate::cpu::parallel;
use crate::tensor::{Buffer, Element};

/// Elements in row-major order of `shape`, read at `strides` (0 repeats, as in a broadcast).
pub(super) fn gather_strided<T: Element>(source: &[T], shape: &[usize], strides: &[usize]) -> Buffer<T> {
    let mut output = Buffer::recycled(shape.iter().product());
    if output.is_empty() {
        return output;
    }
    let (inner, step) = match (shape.last(), strides.last()) {
        (Some(&inner), Some(&step)) => (inner, step),
        _ => (1, 0),
    };
    let outer = shape.len().saturating_sub(1);
    let rows_per_piece = (parallel::PIECE / inner).max(1);
    parallel::pieces_mut(&mut output, rows_per_piece * inner, |index, piece| {
        for (row, out) in piece.chunks_mut(inner).enumerate() {
            let (mut rest, mut start) = (index * rows_per_piece + row, 0);
            for axis in (0..outer).rev() {
                start += rest % shape[axis] * strides[axis];
                rest /= shape[axis];
            }
            match step {
                1 => out.copy_from_slice(&source[start..][..inner]),
                0 => out.fill(source[start]),
                _ => out.iter_mut().zip(source[start..].iter().step_by(step)).for_each(|(out, &value)| *out = value),
            }
        }
    });
    output
}

/// Copies `len` elements per row: from `source_start` of rows `source_stride` apart to `start` of rows `stride` apart.
pub(super) fn copy_rows<T: Element>(
    source: &[T],
    source_stride: usize,
    source_start: usize,
    output: &mut [T],
    stride: usize,
    start: usize,
    len: usize,
) {
    if len == 0 || stride == 0 {
        return;
    }
    let rows_per_piece = (parallel::PIECE / stride).max(1);
    parallel::pieces_mut(output, rows_per_piece * stride, |index, piece| {
        for (row, out) in piece.chunks_mut(stride).enumerate() {
            let from = (index * rows_per_piece + row) * source_stride + source_start;
            out[start..start + len].copy_from_slice(&source[from..][..len]);
        }
    });
}
