//! The input gradient where a group has few input channels: images, at the beginning of a network or the end of a
//! generator. A product with so few columns is slow, so the product is taken with all taps as columns, and its rows are
//! added to the places that they belong to. Every piece of the result does this for itself, and what falls outside of
//! it is left to its neighbour.

use super::Geometry;
use super::patches::PANEL_COLUMNS;
use crate::cpu::gemm::{Into, Matrix, Threads, gemm};
use crate::cpu::packed::start;
use crate::cpu::{Float, parallel, simd};
use crate::tensor::Buffer;

/// Whether this way is faster than the gathering one.
pub(super) fn pays(g: &Geometry) -> bool {
    const FEW: usize = 16;
    g.group_inputs() < FEW && g.group_outputs() > g.group_inputs()
}

/// From (out, in, tap) to (out, tap, in).
fn repack<T: Float>(g: &Geometry, weight: &[T]) -> Buffer<T> {
    let (taps, channels) = (g.taps(), g.group_inputs());
    let mut packed = Buffer::recycled(weight.len());
    for (weight, packed) in weight.chunks(taps * channels).zip(packed.chunks_mut(taps * channels)) {
        for (at, value) in packed.iter_mut().enumerate() {
            *value = weight[at % channels * taps + at / channels];
        }
    }
    packed
}

pub(super) fn input_gradient<T: Float>(g: &Geometry, grad: &[T], weight: &[T], bias: Option<&[T]>) -> Buffer<T> {
    const PIECES: usize = 16;
    let weight = repack(g, weight);
    let [height, width] = g.input;
    let line = width * g.in_channels;
    // Neighbouring pieces repeat the products of the windows that both see: a piece is an image, or several windows.
    let shared = (g.batch * height).div_ceil(PIECES).max(4 * g.kernel[0]);
    let lines = if g.batch >= PIECES { height } else { shared.min(height) }.max(1);
    let mut output = Buffer::recycled(g.batch * height * line);
    parallel::pieces_mut(&mut output, lines * line, |index, out| {
        if let Into::Overwrite = start(out, bias) {
            out.fill(T::ZERO);
        }
        // A piece that crosses from one image to the next is two bands.
        let (mut at, end) = (index * lines, index * lines + out.len() / line);
        let mut rest = out;
        while at < end {
            let (image, first) = (at / height, at % height);
            let last = height.min(first + end - at);
            let (band, behind) = rest.split_at_mut((last - first) * line);
            add_band(&Band { g, image, first, last }, grad, &weight, band);
            (rest, at) = (behind, at + last - first);
        }
    });
    output
}

/// Lines `first..last` of an image's input gradient.
struct Band<'a> {
    g: &'a Geometry,
    image: usize,
    first: usize,
    last: usize,
}

fn add_band<T: Float>(band: &Band<'_>, grad: &[T], weight: &[T], out: &mut [T]) {
    const ROWS: usize = 256;
    let Geometry { output: [height, width], out_channels, kernel, options, .. } = *band.g;
    let (group_inputs, group_outputs) = (band.g.group_inputs(), band.g.group_outputs());
    let reach = (kernel[0] - 1) * options.dilation[0];
    let from = (band.first + options.padding[0]).saturating_sub(reach).div_ceil(options.stride[0]);
    let to = height.min((band.last - 1 + options.padding[0]) / options.stride[0] + 1);
    let columns = kernel[1] * group_inputs;
    let kernel_lines = (PANEL_COLUMNS / columns).clamp(1, kernel[0]);
    let lines = (ROWS / width).clamp(1, height);
    let mut panel = Buffer::recycled(lines * width * kernel_lines * columns);
    for y in (from..to).step_by(lines) {
        let lines = lines.min(to - y);
        let grad = &grad[(band.image * height + y) * width * out_channels..][..lines * width * out_channels];
        for group in 0..options.groups {
            let weight = &weight[group * group_outputs * band.g.taps() * group_inputs..];
            let left = Matrix::strided(&grad[group * group_outputs..], lines * width, group_outputs, out_channels, 1);
            for i in (0..kernel[0]).step_by(kernel_lines) {
                let depth = kernel_lines.min(kernel[0] - i) * columns;
                let panel = &mut panel[..lines * width * depth];
                let right =
                    Matrix::strided(&weight[i * columns..], group_outputs, depth, band.g.taps() * group_inputs, 1);
                gemm(panel, depth, left, right, Into::Overwrite, Threads::One);
                add_panel(band, panel, depth, (y, i, group), out);
            }
        }
    }
}

/// Adds rows of (tap, channel), those of the output's lines from `y` and the kernel's lines from `i`, to a band.
fn add_panel<T: Float>(
    band: &Band<'_>,
    panel: &[T],
    depth: usize,
    (y, i, group): (usize, usize, usize),
    out: &mut [T],
) {
    let Geometry { input, output, in_channels, kernel, options, .. } = *band.g;
    let group_inputs = band.g.group_inputs();
    let columns = kernel[1] * group_inputs;
    // Neighbouring taps are neighbours in memory: one run per line, else one run per tap.
    let run = if options.dilation[1] == 1 && options.groups == 1 { kernel[1] } else { 1 };
    simd::dispatch(
        #[inline(always)]
        || {
            for (row, values) in panel.chunks_exact(depth).enumerate() {
                let (y, x) = (y + row / output[1], row % output[1]);
                for (line, values) in values.chunks_exact(columns).enumerate() {
                    let place = y * options.stride[0] + (i + line) * options.dilation[0];
                    let Some(place) = place.checked_sub(options.padding[0] + band.first) else { continue };
                    if place >= band.last - band.first {
                        continue;
                    }
                    for (number, values) in values.chunks_exact(run * group_inputs).enumerate() {
                        let x = x * options.stride[1] + number * options.dilation[1];
                        let skipped = options.padding[1].saturating_sub(x).min(run);
                        let x = (x + skipped).saturating_sub(options.padding[1]);
                        let taps = (run - skipped).min(input[1].saturating_sub(x));
                        if taps == 0 {
                            continue;
                        }
                        let at = (place * input[1] + x) * in_channels + group * group_inputs;
                        let values = &values[skipped * group_inputs..][..taps * group_inputs];
                        let sums = &mut out[at..at + values.len()];
                        sums.iter_mut().zip(values).for_each(|(sum, &value)| *sum += value);
                    }
                }
            }
        },
    );
}
