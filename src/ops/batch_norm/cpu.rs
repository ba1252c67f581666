//! Loops over rows of channels.

use crate::cpu::{Float, Stored, parallel, simd};
use crate::tensor::Buffer;

/// Rows whose mean is taken before their squares are: few enough to be in the cache for the second look.
const BLOCK: usize = 32;

/// Mean, biased and unbiased variance of each channel.
///
/// Blocks of rows have exact statistics of their own and are merged by the rule of Chan, Golub and LeVeque (1983), so
/// a mean far from zero costs no precision, and the input is read once.
pub(super) fn statistics<S: Stored<T>, T: Float>(input: &[S], channels: usize) -> [Buffer<T>; 3] {
    const PARTS: usize = 64;
    /// Parts of fewer blocks would take as long to merge, one after the other, as to sum.
    const BLOCKS: usize = 4;
    let rows = input.len() / channels;
    let rows_per_part = rows.div_ceil(PARTS).next_multiple_of(BLOCK).max(BLOCKS * BLOCK);
    let mut moments = Buffer::zeroed(rows.div_ceil(rows_per_part) * 2 * channels);
    parallel::pieces_mut(&mut moments, 2 * channels, |part, moments| {
        let rows = part * rows_per_part..rows.min((part + 1) * rows_per_part);
        let mut block = Buffer::recycled(2 * channels);
        simd::dispatch(
            #[inline(always)]
            || {
                let mut count = 0;
                for values in input[rows.start * channels..rows.end * channels].chunks(BLOCK * channels) {
                    let block_rows = values.len() / channels;
                    block_moments(values, &mut block);
                    merge(moments, count, &block, block_rows);
                    count += block_rows;
                }
            },
        );
    });
    let (total, parts) = moments.split_at_mut(2 * channels);
    simd::dispatch(
        #[inline(always)]
        || {
            for (part, moments) in parts.chunks(2 * channels).enumerate() {
                let first = (part + 1) * rows_per_part;
                merge(total, first, moments, rows_per_part.min(rows - first));
            }
        },
    );
    let (mean, squares) = total.split_at(channels);
    let variance = |count: usize| Buffer::from_fn(channels, |c| squares[c] / T::from_f64(count as f64));
    [Buffer::copy_of(mean), variance(rows), variance(rows - 1)]
}

/// Means, and sums of squared distances from them, of each channel of some rows.
#[inline(always)]
fn block_moments<S: Stored<T>, T: Float>(values: &[S], moments: &mut [T]) {
    let (mean, squares) = moments.split_at_mut(moments.len() / 2);
    let channels = mean.len();
    mean.fill(T::ZERO);
    squares.fill(T::ZERO);
    for row in values.chunks_exact(channels) {
        mean.iter_mut().zip(row).for_each(|(sum, &value)| *sum += value.load());
    }
    let share = T::from_f64(channels as f64 / values.len() as f64);
    mean.iter_mut().for_each(|mean| *mean *= share);
    for row in values.chunks_exact(channels) {
        for ((square, &mean), &value) in squares.iter_mut().zip(&*mean).zip(row) {
            let distance = value.load() - mean;
            *square = distance.mul_add(distance, *square);
        }
    }
}

/// Adds the moments of `count` rows to those of `total_count`.
#[inline(always)]
fn merge<T: Float>(total: &mut [T], total_count: usize, moments: &[T], count: usize) {
    let share = T::from_f64(count as f64 / (total_count + count) as f64);
    let weight = T::from_f64(total_count as f64) * share;
    let (mean, squares) = total.split_at_mut(total.len() / 2);
    let (other_mean, other_squares) = moments.split_at(mean.len());
    for ((mean, square), (&other, &others)) in mean.iter_mut().zip(squares).zip(other_mean.iter().zip(other_squares)) {
        let distance = other - *mean;
        *mean = distance.mul_add(share, *mean);
        *square += others + distance * distance * weight;
    }
}

/// 1 / √(variance + eps)
pub(super) fn inverse_deviation<T: Float>(variance: &[T], eps: f64) -> Buffer<T> {
    Buffer::from_fn(variance.len(), |c| T::ONE / (variance[c] + T::from_f64(eps)).sqrt())
}

/// What becomes of each channel: (x − mean) · slope + bias.
pub(super) struct Affine<T> {
    mean: Buffer<T>,
    /// scale · weight
    slope: Buffer<T>,
    bias: Buffer<T>,
}

impl<T: Float> Affine<T> {
    /// With 1 for an absent weight and 0 for an absent bias.
    pub fn new(mean: &[T], scale: &[T], weight: Option<&[T]>, bias: Option<&[T]>) -> Self {
        let channels = mean.len();
        Affine {
            mean: Buffer::copy_of(mean),
            slope: Buffer::from_fn(channels, |c| weight.map_or(scale[c], |weight| scale[c] * weight[c])),
            bias: bias.map_or_else(|| Buffer::zeroed(channels), Buffer::copy_of),
        }
    }
}

fn rows_per_piece(channels: usize) -> usize {
    (parallel::PIECE / channels).max(1)
}

/// (x − mean) · slope + bias; with `RELU` its ReLU, which keeps NaN.
pub(super) fn apply<const RELU: bool, S: Stored<T>, T: Float>(input: &[S], affine: &Affine<T>) -> Buffer<S> {
    let channels = affine.mean.len();
    let mut output = Buffer::recycled(input.len());
    let piece_len = rows_per_piece(channels) * channels;
    parallel::pieces_mut(&mut output, piece_len, |index, piece| {
        let input = &input[index * piece_len..][..piece.len()];
        simd::dispatch(
            #[inline(always)]
            || {
                let mean = &affine.mean[..channels];
                let (slope, bias) = (&affine.slope[..channels], &affine.bias[..channels]);
                for (out, row) in piece.chunks_exact_mut(channels).zip(input.chunks_exact(channels)) {
                    let (out, row) = (&mut out[..channels], &row[..channels]);
                    for c in 0..channels {
                        let value = (row[c].load() - mean[c]).mul_add(slope[c], bias[c]);
                        out[c] = S::store(if RELU && value < T::ZERO { T::ZERO } else { value });
                    }
                }
            },
        );
    });
    output
}

/// Σ dy x̂ and Σ dy, with `RELU` over the rows where [`apply`] gave more than 0.
pub(super) fn parameter_gradients<const RELU: bool, S: Stored<T>, T: Float>(
    input: &[S],
    grad: &[S],
    scale: &[T],
    affine: &Affine<T>,
) -> [Buffer<T>; 2] {
    let channels = affine.mean.len();
    let rows = input.len() / channels;
    let sums = parallel::accumulate(rows, rows_per_piece(channels), 2 * channels, |rows, sums| {
        let (along, total) = sums.split_at_mut(channels);
        let range = rows.start * channels..rows.end * channels;
        simd::dispatch(
            #[inline(always)]
            || {
                let (input, grad) = (&input[range.clone()], &grad[range]);
                let (along, total) = (&mut along[..channels], &mut total[..channels]);
                let mean = &affine.mean[..channels];
                let (slope, bias) = (&affine.slope[..channels], &affine.bias[..channels]);
                for (row, grad) in input.chunks_exact(channels).zip(grad.chunks_exact(channels)) {
                    let (row, grad) = (&row[..channels], &grad[..channels]);
                    for c in 0..channels {
                        let (distance, grad) = (row[c].load() - mean[c], grad[c].load());
                        let passes = !RELU || distance.mul_add(slope[c], bias[c]) > T::ZERO;
                        let grad = if passes { grad } else { T::ZERO };
                        along[c] = distance.mul_add(grad, along[c]);
                        total[c] += grad;
                    }
                }
            },
        );
    });
    [Buffer::from_fn(channels, |c| sums[c] * scale[c]), Buffer::copy_of(&sums[channels..])]
}

/// slope · (dy − ⟨dy⟩ − x̂ ⟨dy x̂⟩), with `sums` = (Σ dy x̂, Σ dy); without them slope · dy. With `RELU` dy is 0 where
/// [`apply`] gave no more than 0.
pub(super) fn input_gradient<const RELU: bool, S: Stored<T>, T: Float>(
    input: &[S],
    grad: &[S],
    scale: &[T],
    affine: &Affine<T>,
    sums: Option<(&[T], &[T])>,
) -> Buffer<S> {
    let channels = affine.mean.len();
    let share = T::from_f64(channels as f64 / input.len().max(1) as f64);
    // dy − offset − (x − mean) · tilt
    let tilt = Buffer::from_fn(channels, |c| sums.map_or(T::ZERO, |(along, _)| along[c] * share * scale[c]));
    let offset = Buffer::from_fn(channels, |c| sums.map_or(T::ZERO, |(_, total)| total[c] * share));
    let mut output = Buffer::recycled(input.len());
    let piece_len = rows_per_piece(channels) * channels;
    parallel::pieces_mut(&mut output, piece_len, |index, piece| {
        let (input, grad) = (&input[index * piece_len..][..piece.len()], &grad[index * piece_len..][..piece.len()]);
        simd::dispatch(
            #[inline(always)]
            || {
                let mean = &affine.mean[..channels];
                let (slope, bias) = (&affine.slope[..channels], &affine.bias[..channels]);
                let (tilt, offset) = (&tilt[..channels], &offset[..channels]);
                let rows = input.chunks_exact(channels).zip(grad.chunks_exact(channels));
                for (out, (row, grad)) in piece.chunks_exact_mut(channels).zip(rows) {
                    let (out, row, grad) = (&mut out[..channels], &row[..channels], &grad[..channels]);
                    for c in 0..channels {
                        let (distance, grad) = (row[c].load() - mean[c], grad[c].load());
                        let passes = !RELU || distance.mul_add(slope[c], bias[c]) > T::ZERO;
                        let grad = if passes { grad } else { T::ZERO };
                        out[c] = S::store((grad - offset[c] - distance * tilt[c]) * slope[c]);
                    }
                }
            },
        );
    });
    output
}
