//! Rows of cells in parallel; channels in vectors. The input's gradient is gathered: taps are sorted by the cell that
//! they read, so that each cell adds up its own, in order.

use super::DenfiOptions;
use super::points::{Boundary, LIMIT, Point, TAPS, decode, position_of_tap};
use crate::cpu::{Float, lanes, parallel, simd};
use crate::tensor::Buffer;

/// Extents and options of one convolution.
#[derive(Clone, Copy)]
pub(super) struct Problem {
    pub batch: usize,
    pub height: usize,
    pub width: usize,
    pub channels: usize,
    pub options: DenfiOptions,
}

impl Problem {
    pub fn cells(&self) -> usize {
        self.batch * self.height * self.width
    }

    /// Values of a cell of the regression map.
    pub fn outputs(&self) -> usize {
        4 + 2 * self.options.bins
    }

    fn extents(&self) -> [usize; 2] {
        [self.height, self.width]
    }

    /// First cell of the image that has a cell.
    fn image(&self, cell: usize) -> usize {
        let cells = self.height * self.width;
        cell / cells * cells
    }

    fn boundary<T: Float>(&self, raw: &[T], cell: usize) -> Boundary<T> {
        decode(&raw[cell * self.outputs()..][..self.outputs()], &self.options)
    }

    fn point<T: Float>(&self, boundary: &Boundary<T>, cell: usize, tap: usize) -> Option<Point<T>> {
        let within = cell - self.image(cell);
        boundary.point([within / self.width, within % self.width], tap, self.extents(), &self.options)
    }

    /// Calls `body(tap, cell that is read, weight)` for all that a cell reads with a weight other than 0.
    #[inline(always)]
    fn each_read<T: Float>(&self, raw: &[T], cell: usize, mut body: impl FnMut(usize, usize, T)) {
        let boundary = self.boundary(raw, cell);
        for tap in 0..TAPS {
            let Some(point) = self.point(&boundary, cell, tap) else { continue };
            for (pixel, weight) in point.neighbours(self.extents()).into_iter().flatten() {
                if weight != T::ZERO {
                    body(tap, self.image(cell) + pixel, weight);
                }
            }
        }
    }
}

/// (channels, taps) to (taps, channels).
fn by_tap<T: Float>(weight: &[T], channels: usize) -> Buffer<T> {
    Buffer::from_fn(weight.len(), |i| weight[i % channels * TAPS + i / channels])
}

/// sums += factor · a · b.
#[inline(always)]
fn add_products<T: Float>(sums: &mut [T], factor: T, a: &[T], b: &[T]) {
    for (sum, (&a, &b)) in sums.iter_mut().zip(a.iter().zip(b)) {
        *sum = (factor * a).mul_add(b, *sum);
    }
}

pub(super) fn forward<T: Float>(problem: &Problem, input: &[T], raw: &[T], weight: &[T]) -> Buffer<T> {
    let Problem { width, channels, .. } = *problem;
    let weight = by_tap(weight, channels);
    let mut output = Buffer::zeroed(problem.cells() * channels);
    parallel::pieces_mut(&mut output, width * channels, |line, output| {
        simd::dispatch(
            #[inline(always)]
            || {
                for (column, sums) in output.chunks_exact_mut(channels).enumerate() {
                    problem.each_read(
                        raw,
                        line * width + column,
                        #[inline(always)]
                        |tap, read, factor| {
                            add_products(
                                sums,
                                factor,
                                &input[read * channels..][..channels],
                                &weight[tap * channels..][..channels],
                            );
                        },
                    );
                }
            },
        );
    });
    output
}

/// Taps, sorted by their upper left neighbour; in order where it is the same.
struct Readers<T> {
    /// Where those of each neighbour begin among `readers`. Neighbours have rows and columns from −1 on.
    starts: Vec<usize>,
    readers: Vec<usize>,
    /// For each tap of each cell; `None` outside of the map.
    points: Vec<Option<Point<T>>>,
}

impl<T: Float> Readers<T> {
    fn sorted(problem: &Problem, raw: &[T]) -> Self {
        let mut points = vec![None; problem.cells() * TAPS];
        parallel::pieces_mut(&mut points, problem.width * TAPS, |line, points| {
            for (column, points) in points.chunks_exact_mut(TAPS).enumerate() {
                let cell = line * problem.width + column;
                let boundary = problem.boundary(raw, cell);
                for (tap, point) in points.iter_mut().enumerate() {
                    *point = problem.point(&boundary, cell, tap);
                }
            }
        });
        let key = |(reader, point): (usize, &Option<Point<T>>)| {
            let [row, column] = (*point)?.cell;
            Some((reader, Self::key(problem, reader / TAPS, [(row + 1) as usize, (column + 1) as usize])))
        };
        let mut starts = vec![0; problem.batch * (problem.height + 1) * (problem.width + 1) + 1];
        points.iter().enumerate().filter_map(key).for_each(|(_, key)| starts[key + 1] += 1);
        (1..starts.len()).for_each(|key| starts[key] += starts[key - 1]);
        let (mut next, mut readers) = (starts.clone(), vec![0; starts.last().copied().unwrap_or(0)]);
        for (reader, key) in points.iter().enumerate().filter_map(key) {
            readers[next[key]] = reader;
            next[key] += 1;
        }
        Readers { starts, readers, points }
    }

    /// The number of a neighbour of the image that has `cell`: (row + 1, column + 1).
    fn key(problem: &Problem, cell: usize, [row, column]: [usize; 2]) -> usize {
        (cell / (problem.height * problem.width) * (problem.height + 1) + row) * (problem.width + 1) + column
    }
}

pub(super) fn input_gradient<T: Float>(problem: &Problem, raw: &[T], weight: &[T], grad: &[T]) -> Buffer<T> {
    let Problem { height, width, channels, .. } = *problem;
    let (weight, sorted) = (by_tap(weight, channels), Readers::sorted(problem, raw));
    let mut gradient = Buffer::zeroed(problem.cells() * channels);
    parallel::pieces_mut(&mut gradient, width * channels, |line, gradient| {
        simd::dispatch(
            #[inline(always)]
            || {
                for (column, sums) in gradient.chunks_exact_mut(channels).enumerate() {
                    for neighbour in 0..4 {
                        let place = [line % height + 1 - neighbour / 2, column + 1 - neighbour % 2];
                        let key = Readers::<T>::key(problem, line * width, place);
                        for &reader in &sorted.readers[sorted.starts[key]..sorted.starts[key + 1]] {
                            let Some(point) = sorted.points[reader] else { continue };
                            let (factor, tap) = (point.weight(neighbour), reader % TAPS);
                            if factor != T::ZERO {
                                let grad = &grad[reader / TAPS * channels..][..channels];
                                add_products(sums, factor, grad, &weight[tap * channels..][..channels]);
                            }
                        }
                    }
                }
            },
        );
    });
    gradient
}

pub(super) fn weight_gradient<T: Float>(problem: &Problem, input: &[T], raw: &[T], grad: &[T]) -> Buffer<T> {
    let channels = problem.channels;
    let grain = (1 << 16) / (TAPS * channels).max(1);
    let sums = parallel::accumulate(problem.cells(), grain, TAPS * channels, |cells, sums| {
        simd::dispatch(
            #[inline(always)]
            || {
                for cell in cells {
                    let grad = &grad[cell * channels..][..channels];
                    problem.each_read(
                        raw,
                        cell,
                        #[inline(always)]
                        |tap, read, factor| {
                            let input = &input[read * channels..][..channels];
                            add_products(&mut sums[tap * channels..][..channels], factor, input, grad);
                        },
                    );
                }
            },
        );
    });
    Buffer::from_fn(sums.len(), |i| sums[i % TAPS * channels + i / TAPS])
}

/// The gradient of the regression map.
pub(super) fn boundary_gradient<T: Float>(
    problem: &Problem,
    input: &[T],
    raw: &[T],
    weight: &[T],
    grad: &[T],
) -> Buffer<T> {
    let Problem { width, channels, .. } = *problem;
    let (weight, outputs) = (by_tap(weight, channels), problem.outputs());
    let mut gradient = Buffer::zeroed(problem.cells() * outputs);
    parallel::pieces_mut(&mut gradient, width * outputs, |line, gradient| {
        let mut products = vec![T::ZERO; channels];
        for (column, gradient) in gradient.chunks_exact_mut(outputs).enumerate() {
            let cell = line * width + column;
            let boundary = problem.boundary(raw, cell);
            // By the sides, then by the heading.
            let mut sums = [T::ZERO; 5];
            for tap in 0..TAPS {
                let Some(point) = problem.point(&boundary, cell, tap) else { continue };
                let grad = &grad[cell * channels..][..channels];
                for (product, (&grad, &weight)) in products.iter_mut().zip(grad.iter().zip(&weight[tap * channels..])) {
                    *product = grad * weight;
                }
                let slopes = slopes(problem, &point, &input[problem.image(cell) * channels..], &products);
                add_tap(&mut sums, &boundary, tap, slopes, &problem.options);
            }
            chain(gradient, &raw[cell * outputs..][..outputs], &boundary, sums, &problem.options);
        }
    });
    gradient
}

/// Σ over channels of `products` times the derivatives of the sample by row and column.
fn slopes<T: Float>(problem: &Problem, point: &Point<T>, image: &[T], products: &[T]) -> [T; 2] {
    let dot = |read: Option<(usize, T)>| {
        let Some((pixel, _)) = read else { return T::ZERO };
        let values = &image[pixel * products.len()..][..products.len()];
        let [sum] = simd::dispatch(
            #[inline(always)]
            || {
                lanes::zip_sum(
                    products,
                    values,
                    #[inline(always)]
                    |a, b| [a * b],
                )
            },
        );
        sum
    };
    let [upper_left, upper_right, lower_left, lower_right] = point.neighbours(problem.extents()).map(dot);
    let [down, across] = point.parts;
    [
        (T::ONE - across) * (lower_left - upper_left) + across * (lower_right - upper_right),
        (T::ONE - down) * (upper_right - upper_left) + down * (lower_right - lower_left),
    ]
}

/// Adds what one tap gives to the gradients of (left, front, right, rear, heading).
fn add_tap<T: Float>(sums: &mut [T; 5], boundary: &Boundary<T>, tap: usize, slopes: [T; 2], options: &DenfiOptions) {
    let [rows, columns] = options.cells_per_metre().map(T::from_f64);
    let (down, across) = (slopes[0] * rows, slopes[1] * columns);
    let (sine, cosine, half) = (boundary.sine, boundary.cosine, T::from_f64(0.5));
    let (along, left) = (across * cosine + down * sine, down * cosine - across * sine);
    let [alpha, beta] = position_of_tap(tap).map(|side| T::from_f64(side * options.scale));
    let [u, v] = boundary.offset(tap, options.scale);
    sums[0] += left * half * (T::ONE + alpha);
    sums[1] += along * half * (T::ONE + beta);
    sums[2] -= left * half * (T::ONE - alpha);
    sums[3] -= along * half * (T::ONE - beta);
    sums[4] += down * (cosine * u - sine * v) - across * (sine * u + cosine * v);
}

/// From the gradients of sides and heading to those of the cell's raw values, which are 0 now. Nothing comes through
/// where a clamp holds.
fn chain<T: Float>(gradient: &mut [T], raw: &[T], boundary: &Boundary<T>, sums: [T; 5], options: &DenfiOptions) {
    let held = |value: T, limit: f64| value.abs() > T::from_f64(limit);
    for side in 0..4 {
        gradient[side] = if held(raw[side], LIMIT) { T::ZERO } else { sums[side] * boundary.sides[side] };
    }
    let residual = 4 + options.bins + boundary.bin;
    let clamped = options.clamp_residual && held(raw[residual], 1.0);
    let half_bin = T::from_f64(std::f64::consts::PI / options.bins as f64);
    gradient[residual] = if clamped { T::ZERO } else { sums[4] * half_bin };
}
