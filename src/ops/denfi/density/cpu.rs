//! Box by box.

use super::super::points::{Point, TAPS, position_of_tap};
use super::Problem;
use crate::cpu::{Float, parallel};
use crate::tensor::Buffer;

/// Values of a box, and of its result.
const BOX: usize = 7;
const RESULTS: usize = 3;
/// Boxes of a piece.
const GRAIN: usize = 256;

struct Box<T> {
    centre: [T; 2],
    /// Half the extents across and along.
    half: [T; 2],
    sine: T,
    cosine: T,
}

impl<T: Float> Box<T> {
    fn new(values: &[T]) -> Self {
        let half = T::from_f64(0.5);
        let (sine, cosine) = (values[6].sin(), values[6].cos());
        Box { centre: [values[0], values[1]], half: [half * values[4], half * values[3]], sine, cosine }
    }

    /// From the centre to a tap, along x and y.
    fn arm(&self, tap: usize) -> [T; 2] {
        let [alpha, beta] = position_of_tap(tap).map(T::from_f64);
        let (u, v) = (beta * self.half[1], alpha * self.half[0]);
        [self.cosine * u - self.sine * v, self.sine * u + self.cosine * v]
    }
}

/// ln(1 + N) at the four neighbours of a tap, 0 outside of the map.
struct Reading<T> {
    point: Point<T>,
    rho: [T; 4],
}

impl<T: Float> Reading<T> {
    fn new(problem: &Problem, counts: &[i64], place: &Box<T>, tap: usize) -> Option<Self> {
        let (arm, half) = (place.arm(tap), T::from_f64(0.5));
        let [rows, columns] = problem.cells_per_metre().map(T::from_f64);
        let [x0, y0] = [problem.range.x[0], problem.range.y[0]].map(T::from_f64);
        let down = (place.centre[1] + arm[1] - y0) * rows - half;
        let across = (place.centre[0] + arm[0] - x0) * columns - half;
        let extents = [problem.height, problem.width];
        let point = Point::at([0, 0], [down, across], extents)?;
        let rho = point.neighbours(extents).map(|neighbour| match neighbour {
            Some((pixel, _)) if counts[pixel] < 0 => T::from_f64(f64::NAN),
            Some((pixel, _)) => T::from_f64((counts[pixel] as f64).ln_1p()),
            None => T::ZERO,
        });
        Some(Reading { point, rho })
    }

    fn value(&self) -> T {
        let term = |n: usize| (self.point.weight(n) != T::ZERO).then(|| self.point.weight(n) * self.rho[n]);
        (0..4).filter_map(term).sum()
    }

    /// By row and by column.
    fn slopes(&self) -> [T; 2] {
        let [upper_left, upper_right, lower_left, lower_right] = self.rho;
        let [down, across] = self.point.parts;
        [
            (T::ONE - across) * (lower_left - upper_left) + across * (lower_right - upper_right),
            (T::ONE - down) * (upper_right - upper_left) + down * (lower_right - lower_left),
        ]
    }
}

fn image<'a>(problem: &Problem, counts: &'a [i64], number: usize) -> &'a [i64] {
    let cells = problem.height * problem.width;
    &counts[number / problem.boxes * cells..][..cells]
}

pub(super) fn forward<T: Float>(problem: &Problem, boxes: &[T], counts: &[i64]) -> Buffer<T> {
    let mut output = Buffer::recycled(problem.batch * problem.boxes * RESULTS);
    parallel::pieces_mut(&mut output, GRAIN * RESULTS, |piece, output| {
        for (number, output) in (piece * GRAIN..).zip(output.chunks_exact_mut(RESULTS)) {
            let counts = image(problem, counts, number);
            let place = Box::new(&boxes[number * BOX..][..BOX]);
            let value = |tap| Reading::new(problem, counts, &place, tap).map_or(T::ZERO, |reading| reading.value());
            let centre = value(TAPS / 2);
            let edges: T = (0..TAPS).filter(|&tap| tap != TAPS / 2).map(value).sum();
            let boundary = edges * T::from_f64(0.125);
            output.copy_from_slice(&[boundary, centre, boundary - centre]);
        }
    });
    output
}

pub(super) fn backward<T: Float>(problem: &Problem, boxes: &[T], counts: &[i64], grad: &[T]) -> Buffer<T> {
    let mut gradient = Buffer::recycled(boxes.len());
    let [rows, columns] = problem.cells_per_metre().map(T::from_f64);
    parallel::pieces_mut(&mut gradient, GRAIN * BOX, |piece, gradient| {
        for (number, gradient) in (piece * GRAIN..).zip(gradient.chunks_exact_mut(BOX)) {
            let counts = image(problem, counts, number);
            let place = Box::new(&boxes[number * BOX..][..BOX]);
            let grad = &grad[number * RESULTS..][..RESULTS];
            let (edge, middle) = ((grad[0] + grad[2]) * T::from_f64(0.125), grad[1] - grad[2]);
            gradient.fill(T::ZERO);
            for tap in 0..TAPS {
                let Some(reading) = Reading::new(problem, counts, &place, tap) else { continue };
                let factor = if tap == TAPS / 2 { middle } else { edge };
                let [by_row, by_column] = reading.slopes();
                let (by_x, by_y) = (factor * columns * by_column, factor * rows * by_row);
                let (arm, half) = (place.arm(tap), position_of_tap(tap).map(|side| T::from_f64(0.5 * side)));
                gradient[0] += by_x;
                gradient[1] += by_y;
                gradient[3] += (by_x * place.cosine + by_y * place.sine) * half[1];
                gradient[4] += (by_y * place.cosine - by_x * place.sine) * half[0];
                gradient[6] += by_y * arm[0] - by_x * arm[1];
            }
        }
    });
    gradient
}
