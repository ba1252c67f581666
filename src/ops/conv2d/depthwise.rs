//! Convolutions of every channel by itself: channels are the vector lanes, no matrix product is involved.

use super::Geometry;
use crate::cpu::{Float, parallel, simd};
use crate::tensor::Buffer;

/// For each position of a result along one axis, the source positions that it reads and the taps that they meet.
struct Reads(Vec<Vec<Read>>);

#[derive(Clone, Copy)]
struct Read {
    source: usize,
    tap: usize,
}

/// All (output position, tap, input position) of one axis that meet inside the input.
fn meetings(g: &Geometry, axis: usize) -> impl Iterator<Item = (usize, usize, usize)> + '_ {
    let (stride, padding, dilation) = (g.options.stride[axis], g.options.padding[axis], g.options.dilation[axis]);
    let taps = move |output: usize| (0..g.kernel[axis]).map(move |tap| (output, tap));
    (0..g.output[axis]).flat_map(taps).filter_map(move |(output, tap)| {
        let input = (output * stride + tap * dilation).checked_sub(padding)?;
        (input < g.input[axis]).then_some((output, tap, input))
    })
}

fn forward_reads(g: &Geometry, axis: usize) -> Reads {
    let mut reads = vec![Vec::new(); g.output[axis]];
    meetings(g, axis).for_each(|(output, tap, input)| reads[output].push(Read { source: input, tap }));
    Reads(reads)
}

fn backward_reads(g: &Geometry, axis: usize) -> Reads {
    let mut reads = vec![Vec::new(); g.input[axis]];
    meetings(g, axis).for_each(|(output, tap, input)| reads[input].push(Read { source: output, tap }));
    Reads(reads)
}

/// The transpose of a row-major matrix.
fn transposed<T: Float>(matrix: &[T], rows: usize, columns: usize) -> Buffer<T> {
    Buffer::from_fn(matrix.len(), |i| matrix[i % rows * columns + i / rows])
}

pub(super) fn output<T: Float>(g: &Geometry, input: &[T], weight: &[T], bias: Option<&[T]>) -> Buffer<T> {
    gather(g, input, g.input, weight, bias, &[forward_reads(g, 0), forward_reads(g, 1)])
}

pub(super) fn input_gradient<T: Float>(g: &Geometry, grad: &[T], weight: &[T], bias: Option<&[T]>) -> Buffer<T> {
    gather(g, grad, g.output, weight, bias, &[backward_reads(g, 0), backward_reads(g, 1)])
}

/// Calls a generic function for blocks of 32, then 8, then single channels.
macro_rules! for_channel_blocks {
    ($channels:expr, $first:ident => $function:ident($($argument:expr),*)) => {{
        let mut $first = 0;
        while $first + 32 <= $channels {
            $function::<T, 32>($($argument),*);
            $first += 32;
        }
        while $first + 8 <= $channels {
            $function::<T, 8>($($argument),*);
            $first += 8;
        }
        while $first < $channels {
            $function::<T, 1>($($argument),*);
            $first += 1;
        }
    }};
}

/// Each position of the result is the sum of its reads, weighted.
fn gather<T: Float>(
    g: &Geometry,
    source: &[T],
    extents: [usize; 2],
    weight: &[T],
    bias: Option<&[T]>,
    [ys, xs]: &[Reads; 2],
) -> Buffer<T> {
    let channels = g.in_channels;
    let weight = transposed(weight, channels, g.taps());
    let (height, width) = (ys.0.len(), xs.0.len());
    let mut output = Buffer::recycled(g.batch * height * width * channels);
    parallel::pieces_mut(&mut output, width * channels, |line, out| {
        let image = &source[line / height * extents[0] * extents[1] * channels..];
        let ys = &ys.0[line % height];
        simd::dispatch(
            #[inline(always)]
            || {
                for (xs, out) in xs.0.iter().zip(out.chunks_mut(channels)) {
                    let window = Window { ys, xs, width: extents[1], kernel_width: g.kernel[1], channels };
                    for_channel_blocks!(channels, at => gather_block(&window, image, &weight, bias, at, out));
                }
            },
        );
    });
    output
}

/// What one position reads.
struct Window<'a> {
    ys: &'a [Read],
    xs: &'a [Read],
    width: usize,
    kernel_width: usize,
    channels: usize,
}

#[inline(always)]
fn gather_block<T: Float, const N: usize>(
    window: &Window<'_>,
    source: &[T],
    weight: &[T],
    bias: Option<&[T]>,
    channel: usize,
    out: &mut [T],
) {
    let mut sums = [T::ZERO; N];
    if let Some(bias) = bias {
        sums.copy_from_slice(&bias[channel..channel + N]);
    }
    for y in window.ys {
        for x in window.xs {
            let place = (y.source * window.width + x.source) * window.channels + channel;
            let tap = (y.tap * window.kernel_width + x.tap) * window.channels + channel;
            add_product(&mut sums, &source[place..], &weight[tap..]);
        }
    }
    out[channel..channel + N].copy_from_slice(&sums);
}

/// `sums[i] += left[i] · right[i]`.
#[inline(always)]
fn add_product<T: Float, const N: usize>(sums: &mut [T; N], left: &[T], right: &[T]) {
    let (left, right) = (&left[..N], &right[..N]);
    *sums = std::array::from_fn(
        #[inline(always)]
        |lane| left[lane].mul_add(right[lane], sums[lane]),
    );
}

pub(super) fn weight_gradient<T: Float>(g: &Geometry, input: &[T], grad: &[T]) -> Buffer<T> {
    let (channels, taps) = (g.in_channels, g.taps());
    let ys = forward_reads(g, 0);
    // For each horizontal tap, the (output position, input position) pairs that it joins.
    let mut pairs = vec![Vec::new(); g.kernel[1]];
    meetings(g, 1).for_each(|(output, tap, input)| pairs[tap].push((output * channels, input * channels)));
    let line_work = g.output[1] * channels * taps;
    let grain = (1 << 16) / line_work.max(1);
    let sums = parallel::accumulate(g.batch * g.output[0], grain, taps * channels, |lines, sums| {
        for line in lines {
            let (image, y) = (line / g.output[0], line % g.output[0]);
            let grad = &grad[line * g.output[1] * channels..][..g.output[1] * channels];
            for y in &ys.0[y] {
                let line = g.input[1] * channels;
                let input = &input[(image * g.input[0] + y.source) * line..][..line];
                let sums = &mut sums[y.tap * g.kernel[1] * channels..][..g.kernel[1] * channels];
                simd::dispatch(
                    #[inline(always)]
                    || {
                        for (pairs, sums) in pairs.iter().zip(sums.chunks_mut(channels)) {
                            for_channel_blocks!(channels, at => weight_block(pairs, input, grad, at, sums));
                        }
                    },
                );
            }
        }
    });
    transposed(&sums, taps, channels)
}

#[inline(always)]
fn weight_block<T: Float, const N: usize>(
    pairs: &[(usize, usize)],
    input: &[T],
    grad: &[T],
    channel: usize,
    out: &mut [T],
) {
    let mut sums = [T::ZERO; N];
    sums.copy_from_slice(&out[channel..channel + N]);
    for &(output, place) in pairs {
        add_product(&mut sums, &input[place + channel..], &grad[output + channel..]);
    }
    out[channel..channel + N].copy_from_slice(&sums);
}
