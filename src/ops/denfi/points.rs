//! Boundaries of cells, and the points of the map that they name.

use super::DenfiOptions;
use crate::cpu::Float;

/// Taps of a 3 × 3 kernel.
pub(super) const TAPS: usize = 9;

/// The largest logarithm of a distance.
pub(super) const LIMIT: f64 = 7.0;

/// A cell's box, seen from the cell.
pub(super) struct Boundary<T> {
    /// Metres to the sides: left, front, right, rear.
    pub sides: [T; 4],
    /// Of the heading.
    pub sine: T,
    pub cosine: T,
    /// The bin that the heading is in.
    pub bin: usize,
}

/// A NaN stays.
fn clamp<T: Float>(value: T, limit: f64) -> T {
    let limit = T::from_f64(limit);
    if value < -limit {
        -limit
    } else if value > limit {
        limit
    } else {
        value
    }
}

/// From a cell of the regression map, (4 + 2 bins).
pub(super) fn decode<T: Float>(raw: &[T], options: &DenfiOptions) -> Boundary<T> {
    let (scores, residuals) = raw[4..].split_at(options.bins);
    let bin = (1..options.bins).fold(0, |best, bin| if scores[bin] > scores[best] { bin } else { best });
    let residual = if options.clamp_residual { clamp(residuals[bin], 1.0) } else { residuals[bin] };
    let half_bin = T::from_f64(std::f64::consts::PI / options.bins as f64);
    let theta = (T::from_f64(2.0 * bin as f64) + residual) * half_bin;
    let sides = [raw[0], raw[1], raw[2], raw[3]].map(|side| clamp(side, LIMIT).exp());
    Boundary { sides, sine: theta.sin(), cosine: theta.cos(), bin }
}

/// Which corner, edge or centre a tap is: (across, along), each −1, 0 or 1.
pub(super) fn position_of_tap(tap: usize) -> [f64; 2] {
    [(tap / 3) as f64 - 1.0, (tap % 3) as f64 - 1.0]
}

impl<T: Float> Boundary<T> {
    /// Metres from the cell to a tap: along the heading, and to its left.
    pub(super) fn offset(&self, tap: usize, scale: f64) -> [T; 2] {
        let half = T::from_f64(0.5);
        let [alpha, beta] = position_of_tap(tap).map(|side| T::from_f64(side * scale));
        let [left, front, right, rear] = self.sides;
        [half * (front - rear) + half * beta * (front + rear), half * (left - right) + half * alpha * (left + right)]
    }

    /// Where tap `tap` of the cell (row, column) reads.
    pub(super) fn point(
        &self,
        cell: [usize; 2],
        tap: usize,
        extents: [usize; 2],
        options: &DenfiOptions,
    ) -> Option<Point<T>> {
        let [u, v] = self.offset(tap, options.scale);
        let [rows, columns] = options.cells_per_metre().map(T::from_f64);
        let down = (self.sine * u + self.cosine * v) * rows;
        let across = (self.cosine * u - self.sine * v) * columns;
        Point::at(cell, [down, across], extents)
    }
}

/// A place between cells of a map: whole and fractional parts of (row, column). The whole parts are from −1 on.
#[derive(Clone, Copy)]
pub(super) struct Point<T> {
    pub cell: [i64; 2],
    pub parts: [T; 2],
}

impl<T: Float> Point<T> {
    /// `cell` and an offset in cells from it; none where the bilinear weights of the map are all 0, that is outside of
    /// (−1, extent). What a NaN names has weights NaN at the map's first cell.
    pub(super) fn at(cell: [usize; 2], offset: [T; 2], extents: [usize; 2]) -> Option<Self> {
        let mut point = Point { cell: [0; 2], parts: offset };
        if offset.iter().any(|value| value.is_nan()) {
            return Some(Point { cell: [0; 2], parts: [T::from_f64(f64::NAN); 2] });
        }
        for axis in 0..2 {
            let whole = offset[axis].to_f64().floor();
            let base = cell[axis] as f64 + whole;
            let part = offset[axis] - T::from_f64(whole);
            if base < -1.0 || base >= extents[axis] as f64 || (base < 0.0 && part == T::ZERO) {
                return None;
            }
            (point.cell[axis], point.parts[axis]) = (base as i64, part);
        }
        Some(point)
    }

    /// The four neighbours in the order upper left, upper right, lower left, lower right: the cell within the image
    /// where the map has it, and its weight.
    pub(super) fn neighbours(&self, [height, width]: [usize; 2]) -> [Option<(usize, T)>; 4] {
        std::array::from_fn(|neighbour| {
            let [down, across] = [neighbour / 2, neighbour % 2];
            let row = usize::try_from(self.cell[0] + down as i64).ok().filter(|&row| row < height)?;
            let column = usize::try_from(self.cell[1] + across as i64).ok().filter(|&column| column < width)?;
            Some((row * width + column, self.weight(neighbour)))
        })
    }

    pub(super) fn weight(&self, neighbour: usize) -> T {
        let factor = |part: T, far: bool| if far { part } else { T::ONE - part };
        factor(self.parts[0], neighbour / 2 == 1) * factor(self.parts[1], neighbour % 2 == 1)
    }
}
