//! Copies and sums by index. Sums run in the order of the indices, whatever the number of threads.

use super::Extents;
use crate::cpu::{Float, parallel};
use crate::tensor::Buffer;

/// Row (o, i) is row (o, indices\[i\]) of the source.
pub(super) fn gather_rows<T: Float>(source: &[T], indices: &[i64], extents: Extents) -> Buffer<T> {
    let Extents { inner, result, .. } = extents;
    let mut output = Buffer::recycled(extents.outer * result * inner);
    let rows_per_piece = (parallel::PIECE / inner.max(1)).max(1);
    parallel::pieces_mut(&mut output, rows_per_piece * inner, |piece, out| {
        for (row, out) in out.chunks_mut(inner).enumerate() {
            let row = piece * rows_per_piece + row;
            let from = row / result * extents.source + indices[row % result] as usize;
            out.copy_from_slice(&source[from * inner..][..inner]);
        }
    });
    output
}

/// Adds to each row of the source the rows that were read from it: the indices are sorted by what they name, so that
/// rows of the source can be summed in parallel.
pub(super) fn scatter_rows<T: Float>(values: &[T], indices: &[i64], extents: Extents, output: &mut [T]) {
    let Extents { inner, result, source, .. } = extents;
    let mut starts = vec![0; source + 1];
    indices.iter().for_each(|&index| starts[index as usize + 1] += 1);
    (0..source).for_each(|index| starts[index + 1] += starts[index]);
    let mut next = starts.clone();
    let mut readers = vec![0; indices.len()];
    for (reader, &index) in indices.iter().enumerate() {
        let next = &mut next[index as usize];
        readers[*next] = reader;
        *next += 1;
    }
    let rows_per_piece = (parallel::PIECE / inner.max(1)).max(1);
    parallel::pieces_mut(output, rows_per_piece * inner, |piece, out| {
        for (row, sums) in out.chunks_mut(inner).enumerate() {
            let row = piece * rows_per_piece + row;
            let (outer, index) = (row / source, row % source);
            for reader in &readers[starts[index]..starts[index + 1]] {
                let values = &values[(outer * result + reader) * inner..][..inner];
                sums.iter_mut().zip(values).for_each(|(sum, &value)| *sum += value);
            }
        }
    });
}

/// Element (o, i, j) is element (o, indices\[o, i, j\], j) of the source.
pub(super) fn gather_elements<T: Float>(source: &[T], indices: &[i64], extents: Extents) -> Buffer<T> {
    let Extents { inner, result, .. } = extents;
    let mut output = Buffer::recycled(indices.len());
    parallel::pieces_mut(&mut output, parallel::PIECE, |piece, out| {
        for (at, out) in out.iter_mut().enumerate() {
            let at = piece * parallel::PIECE + at;
            *out = source[(at / (result * inner) * extents.source + indices[at] as usize) * inner + at % inner];
        }
    });
    output
}

/// Outer parts are independent, and each is summed in order.
pub(super) fn scatter_elements<T: Float>(values: &[T], indices: &[i64], extents: Extents, output: &mut [T]) {
    let Extents { inner, result, source, .. } = extents;
    let outer_per_piece = (parallel::PIECE / (source * inner).max(1)).max(1);
    parallel::pieces_mut(output, outer_per_piece * source * inner, |piece, out| {
        for (outer, sums) in out.chunks_mut(source * inner).enumerate() {
            let first = (piece * outer_per_piece + outer) * result * inner;
            for at in first..first + result * inner {
                sums[indices[at] as usize * inner + at % inner] += values[at];
            }
        }
    });
}
