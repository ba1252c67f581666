//! An output line at a time: the weighted sum of input lines, which stays in the cache, then its weighted columns.

use super::Axis;
use crate::cpu::{Float, parallel, simd};
use crate::tensor::Buffer;

pub(super) fn resample<T: Float>(
    input: &[T],
    batch: usize,
    channels: usize,
    [vertical, horizontal]: [&std::sync::Arc<Axis>; 2],
) -> Buffer<T> {
    let (height, lines) = (vertical.input, vertical.output());
    let (in_line, out_line) = (horizontal.input * channels, horizontal.output() * channels);
    let mut output = Buffer::recycled(batch * lines * out_line);
    let lines_per_piece = (parallel::PIECE / out_line.max(1)).max(1);
    parallel::pieces_mut(&mut output, lines_per_piece * out_line, |index, piece| {
        let mut sum = Buffer::recycled(in_line);
        for (line, out) in piece.chunks_mut(out_line).enumerate() {
            let line = index * lines_per_piece + line;
            let image = &input[line / lines * height * in_line..][..height * in_line];
            simd::dispatch(
                #[inline(always)]
                || {
                    weighted_sum(image, vertical.row(line % lines), &mut sum);
                    for (position, out) in out.chunks_mut(channels).enumerate() {
                        weighted_sum(&sum, horizontal.row(position), out);
                    }
                },
            );
        }
    });
    output
}

/// `out` = Σ weight · row, over rows as long as `out`.
#[inline(always)]
fn weighted_sum<T: Float>(rows: &[T], entries: &[(usize, f64)], out: &mut [T]) {
    let len = out.len();
    match entries.split_first() {
        None => out.fill(T::ZERO),
        Some((&(position, weight), rest)) => {
            let weight = T::from_f64(weight);
            out.iter_mut().zip(&rows[position * len..][..len]).for_each(|(out, &value)| *out = weight * value);
            for &(position, weight) in rest {
                let weight = T::from_f64(weight);
                let row = &rows[position * len..][..len];
                out.iter_mut().zip(row).for_each(|(out, &value)| *out = weight.mul_add(value, *out));
            }
        }
    }
}
