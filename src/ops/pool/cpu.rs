//! Largest values of windows, and where they were.

use super::Window;
use crate::cpu::{Float, Stored, parallel, simd};
use crate::tensor::{Buffer, Element};

/// The largest value of each window, and its position y · width + x as the bytes of a `u32`.
pub(super) fn max_pool<S: Stored<T>, T: Float>(
    input: &[S],
    [batch, height, width, channels]: [usize; 4],
    [vertical, horizontal]: &[Vec<Window>; 2],
) -> (Buffer<S>, Buffer<u8>) {
    let line = horizontal.len() * channels;
    let mut output = Buffer::recycled(batch * vertical.len() * line);
    let mut positions = Buffer::<u8>::recycled(output.len() * size_of::<u32>());
    let places = bytemuck::cast_slice_mut::<u8, u32>(&mut positions).chunks_mut(line.max(1));
    let mut lines: Vec<(&mut [S], &mut [u32])> = output.chunks_mut(line.max(1)).zip(places).collect();
    let lines_per_piece = (parallel::PIECE / line.max(1)).max(1);
    parallel::pieces_mut(&mut lines, lines_per_piece, |piece, lines| {
        let first = piece * lines_per_piece;
        for (index, (largest, positions)) in lines.iter_mut().enumerate() {
            let (image, y) = ((first + index) / vertical.len(), (first + index) % vertical.len());
            let image = &input[image * height * width * channels..][..height * width * channels];
            simd::dispatch(
                #[inline(always)]
                || {
                    let outputs = largest.chunks_mut(channels).zip(positions.chunks_mut(channels));
                    for ((largest, positions), x) in outputs.zip(horizontal) {
                        let lines = vertical[y].inside.clone();
                        let places = lines.flat_map(|y| x.inside.clone().map(move |x| y * width + x));
                        choose(image, places, largest, positions);
                    }
                },
            );
        }
    });
    (output, positions)
}

/// The largest values of each channel over `places`.
#[allow(clippy::eq_op, reason = "NaN is what differs from itself")]
#[inline(always)]
fn choose<S: Stored<T>, T: Float>(
    image: &[S],
    places: impl Iterator<Item = usize>,
    largest: &mut [S],
    positions: &mut [u32],
) {
    let channels = largest.len();
    for (number, place) in places.enumerate() {
        let values = &image[place * channels..][..channels];
        if number == 0 {
            largest.copy_from_slice(values);
            positions.fill(place as u32);
            continue;
        }
        for ((best, position), &value) in largest.iter_mut().zip(positions.iter_mut()).zip(values) {
            let better = value.load() > best.load() || value.load() != value.load();
            *best = if better { value } else { *best };
            *position = if better { place as u32 } else { *position };
        }
    }
}

pub(super) fn gather<S: Element>(
    source: &[S],
    positions: &[u32],
    inputs: usize,
    outputs: usize,
    channels: usize,
) -> Buffer<S> {
    let mut output = Buffer::recycled(positions.len());
    let row = channels.max(1);
    let rows_per_piece = (parallel::PIECE / row).max(1);
    parallel::pieces_mut(&mut output, rows_per_piece * row, |index, piece| {
        for (out_row, out) in piece.chunks_mut(row).enumerate() {
            let at = index * rows_per_piece + out_row;
            let image = &source[at / outputs * inputs * channels..][..inputs * channels];
            let positions = &positions[at * channels..][..channels];
            for (channel, (out, &position)) in out.iter_mut().zip(positions).enumerate() {
                *out = image[position as usize * channels + channel];
            }
        }
    });
    output
}

/// Images are independent, and each is summed in the order of the windows, in `T`.
pub(super) fn scatter<S: Stored<T>, T: Float>(
    source: &[S],
    positions: &[u32],
    inputs: usize,
    outputs: usize,
    channels: usize,
) -> Buffer<S> {
    let images = positions.len() / (outputs * channels).max(1);
    let mut output = Buffer::recycled(images * inputs * channels);
    parallel::pieces_mut(&mut output, inputs * channels, |image, out| {
        let windows = image * outputs * channels..(image + 1) * outputs * channels;
        let (source, positions) = (&source[windows.clone()], &positions[windows]);
        if S::DTYPE == T::DTYPE {
            out.fill(S::zeroed());
            return add_image::<S, T>(source, positions, channels, bytemuck::cast_slice_mut(out));
        }
        let mut sums = Buffer::<T>::zeroed(out.len());
        add_image(source, positions, channels, &mut sums);
        simd::dispatch(
            #[inline(always)]
            || out.iter_mut().zip(&*sums).for_each(|(out, &sum)| *out = S::store(sum)),
        );
    });
    output
}

fn add_image<S: Stored<T>, T: Float>(source: &[S], positions: &[u32], channels: usize, sums: &mut [T]) {
    for (values, positions) in source.chunks(channels).zip(positions.chunks(channels)) {
        for (channel, (&value, &position)) in values.iter().zip(positions).enumerate() {
            sums[position as usize * channels + channel] += value.load();
        }
    }
}
