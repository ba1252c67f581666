//! Image by image. A cell is summed row by row, so that long sums stay accurate.

use std::ops::Range;

use super::Problem;
use crate::cpu::{Float, parallel, simd};
use crate::tensor::Buffer;

/// Positions of cell `cell` of `cells` along an extent.
fn positions(extent: usize, cells: usize, cell: usize) -> Range<usize> {
    cell * extent / cells..((cell + 1) * extent).div_ceil(cells)
}

/// Cells that hold a position.
fn cells_with(extent: usize, cells: usize, at: usize) -> Range<usize> {
    at * cells / extent..((at + 1) * cells - 1) / extent + 1
}

/// The means of one image, (height, width, channels).
fn pool_image<T: Float>(image: &[T], [height, width, channels]: [usize; 3], cells: usize, features: &mut [T]) {
    let mut of_row = vec![T::ZERO; channels];
    for (cell, sums) in features.chunks_exact_mut(channels.max(1)).enumerate() {
        let (rows, columns) = (positions(height, cells, cell / cells), positions(width, cells, cell % cells));
        let share = T::ONE / T::from_f64((rows.len() * columns.len()) as f64);
        simd::dispatch(
            #[inline(always)]
            || {
                sums.fill(T::ZERO);
                for row in rows {
                    of_row.fill(T::ZERO);
                    let line = &image[(row * width + columns.start) * channels..][..columns.len() * channels];
                    for values in line.chunks_exact(channels) {
                        for (sum, &value) in of_row.iter_mut().zip(values) {
                            *sum += value;
                        }
                    }
                    for (sum, &value) in sums.iter_mut().zip(&of_row) {
                        *sum += value;
                    }
                }
                for sum in sums {
                    *sum *= share;
                }
            },
        );
    }
}

pub(super) fn forward<T: Float>(problem: &Problem, maps: &[impl AsRef<[T]> + Sync]) -> Buffer<T> {
    let mut features = Buffer::recycled(problem.batch * problem.features());
    parallel::pieces_mut(&mut features, problem.features(), |image, features| {
        for (number, (&shape, map)) in problem.maps.iter().zip(maps).enumerate() {
            let size: usize = shape.iter().product();
            let own = &mut features[problem.first(number)..][..problem.width(number)];
            pool_image(&map.as_ref()[image * size..][..size], shape, problem.cells, own);
        }
    });
    features
}

/// The gradient of map `number` from that of the features.
pub(super) fn backward<T: Float>(problem: &Problem, number: usize, grad: &[T]) -> Buffer<T> {
    let [height, width, channels] = problem.maps[number];
    let mut gradient = Buffer::zeroed(problem.batch * height * width * channels);
    parallel::pieces_mut(&mut gradient, width * channels, |line, gradient| {
        let grad = &grad[line / height * problem.features() + problem.first(number)..][..problem.width(number)];
        for (column, gradient) in gradient.chunks_exact_mut(channels).enumerate() {
            for a in cells_with(height, problem.cells, line % height) {
                for b in cells_with(width, problem.cells, column) {
                    let size = positions(height, problem.cells, a).len() * positions(width, problem.cells, b).len();
                    let share = T::ONE / T::from_f64(size as f64);
                    let own = &grad[(a * problem.cells + b) * channels..][..channels];
                    gradient.iter_mut().zip(own).for_each(|(sum, &value)| *sum += share * value);
                }
            }
        }
    });
    gradient
}

/// relu(a + b); a NaN stays.
pub(super) fn add_relu<T: Float>(a: &[T], b: &[T]) -> Buffer<T> {
    let mut output = Buffer::recycled(a.len());
    parallel::zip_map(
        a,
        b,
        &mut output,
        #[inline(always)]
        |a, b| if a + b <= T::ZERO { T::ZERO } else { a + b },
    );
    output
}

/// `grad` where the output is positive.
pub(super) fn mask<T: Float>(output: &[T], grad: &[T]) -> Buffer<T> {
    let mut gradient = Buffer::recycled(grad.len());
    parallel::zip_map(
        output,
        grad,
        &mut gradient,
        #[inline(always)]
        |output, grad| if output > T::ZERO { grad } else { T::ZERO },
    );
    gradient
}
