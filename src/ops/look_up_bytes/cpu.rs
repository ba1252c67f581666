//! Pixel by pixel.

use super::ROW;
use crate::cpu::parallel;

/// Pixels of a piece.
const PIECE: usize = 4096;

pub(super) fn look_up_in_parallel<T: Copy + Send + Sync>(output: &mut [T], bytes: &[u8], table: &[T]) {
    let piece = PIECE * (table.len() / ROW);
    parallel::pieces_mut(output, piece, |number, output| look_up(output, &bytes[number * piece..], table));
}

/// `output[i] = table[i mod channels][bytes[i]]`, `table` being (channels, 256).
pub(crate) fn look_up<T: Copy>(output: &mut [T], bytes: &[u8], table: &[T]) {
    match table.as_chunks::<ROW>().0 {
        [row] => look_up_pixels([row], output, bytes),
        [red, green, blue] => look_up_pixels([red, green, blue], output, bytes),
        rows => {
            let channels = rows.len().max(1);
            for (output, bytes) in output.chunks_mut(channels).zip(bytes.chunks(channels)) {
                output.iter_mut().zip(bytes).zip(rows).for_each(|((out, &byte), row)| *out = row[usize::from(byte)]);
            }
        }
    }
}

/// Of a known number of channels, so that there is no loop over them.
fn look_up_pixels<T: Copy, const C: usize>(rows: [&[T; ROW]; C], output: &mut [T], bytes: &[u8]) {
    for (output, bytes) in output.as_chunks_mut::<C>().0.iter_mut().zip(bytes.as_chunks::<C>().0) {
        *output = std::array::from_fn(|channel| rows[channel][usize::from(bytes[channel])]);
    }
}
