//! Each row is read from memory once and stays in the nearest cache for the passes over it.

use crate::cpu::{Float, lanes, parallel, simd};
use crate::tensor::Buffer;

/// What the backward needs of a row: x̂ = (x − center) · rstd + offset.
///
/// `center` is the mean rounded to the compute type. Its rounding error, which is no longer small where the mean is
/// much larger than the deviation, is made up for by `offset`.
#[derive(Clone, Copy)]
struct Statistics<T> {
    center: T,
    offset: T,
    rstd: T,
}

/// Numbers per row in the saved statistics.
pub(super) const SAVED: usize = 3;

impl<T: Float> Statistics<T> {
    #[inline(always)]
    fn of(row: &[T], eps: T) -> Self {
        let scale = T::ONE / T::from_f64(row.len() as f64);
        let [sum] = lanes::sum(
            row,
            #[inline(always)]
            |x| [x],
        );
        let center = sum * scale;
        let [residue, squares] = lanes::sum(
            row,
            #[inline(always)]
            |x| [x - center, (x - center) * (x - center)],
        );
        let residue = residue * scale;
        // Rounding must not turn the variance of a constant row negative.
        let variance = (squares * scale - residue * residue).nan_max(T::ZERO);
        let rstd = T::ONE / (variance + eps).sqrt();
        Statistics { center, offset: -residue * rstd, rstd }
    }

    #[inline(always)]
    fn load(saved: &[T]) -> Self {
        Statistics { center: saved[0], offset: saved[1], rstd: saved[2] }
    }

    #[inline(always)]
    fn store(self, saved: &mut [T]) {
        saved.copy_from_slice(&[self.center, self.offset, self.rstd]);
    }

    #[inline(always)]
    fn normalise(self, x: T) -> T {
        (x - self.center).mul_add(self.rstd, self.offset)
    }
}

/// The output, and the statistics that [`backward`] reads.
pub(super) fn forward<T: Float>(input: &[T], weight: &[T], bias: &[T], eps: f64) -> (Buffer<T>, Buffer<T>) {
    let eps = T::from_f64(eps);
    let width = weight.len().max(1);
    let rows = input.len() / width;
    let mut output = Buffer::recycled(input.len());
    let mut statistics = Buffer::recycled(rows * SAVED);
    let rows_per_piece = (parallel::PIECE / width).max(1);
    parallel::pieces_mut2(
        (&mut output, rows_per_piece * width),
        (&mut statistics, rows_per_piece * SAVED),
        |index, output, statistics| {
            let input = &input[index * rows_per_piece * width..][..output.len()];
            simd::dispatch(
                #[inline(always)]
                || forward_rows(input, weight, bias, eps, output, statistics),
            );
        },
    );
    (output, statistics)
}

#[inline(always)]
pub(super) fn forward_rows<T: Float>(
    input: &[T],
    weight: &[T],
    bias: &[T],
    eps: T,
    output: &mut [T],
    statistics: &mut [T],
) {
    let width = weight.len().max(1);
    let rows = input.chunks_exact(width).zip(output.chunks_exact_mut(width));
    for ((x, y), saved) in rows.zip(statistics.chunks_exact_mut(SAVED)) {
        let row = Statistics::of(x, eps);
        row.store(saved);
        let parameters = weight.iter().zip(bias);
        for ((y, &x), (&weight, &bias)) in y.iter_mut().zip(x).zip(parameters) {
            *y = row.normalise(x).mul_add(weight, bias);
        }
    }
}

/// Gradients of the input, where wanted, and of weight and bias, one after the other in one buffer.
///
/// With γ = dy · w: dx = rstd · (γ − mean γ − x̂ · mean(γ x̂)), dw = Σ dy · x̂ and db = Σ dy over the rows.
pub(super) fn backward<T: Float>(
    input: &[T],
    weight: &[T],
    statistics: &[T],
    grad: &[T],
    input_wanted: bool,
) -> (Option<Buffer<T>>, Buffer<T>) {
    let width = weight.len().max(1);
    let grain = (4 * parallel::PIECE / width).max(1);
    let body = |range: std::ops::Range<usize>, dx: Option<&mut [T]>, sums: &mut [T]| {
        let rows = Rows {
            input: &input[range.start * width..range.end * width],
            grad: &grad[range.start * width..range.end * width],
            statistics: &statistics[range.start * SAVED..range.end * SAVED],
            weight,
        };
        simd::dispatch(
            #[inline(always)]
            || rows.backward(dx, sums),
        );
    };
    if input_wanted {
        let mut dx = Buffer::recycled(input.len());
        let sums = parallel::accumulate_writing(&mut dx, width, grain, 2 * weight.len(), |range, dx, sums| {
            body(range, Some(dx), sums);
        });
        (Some(dx), sums)
    } else {
        let count = input.len() / width;
        (None, parallel::accumulate(count, grain, 2 * weight.len(), |range, sums| body(range, None, sums)))
    }
}

/// Consecutive rows of the backward's operands.
pub(super) struct Rows<'a, T> {
    pub input: &'a [T],
    pub grad: &'a [T],
    pub statistics: &'a [T],
    pub weight: &'a [T],
}

impl<T: Float> Rows<'_, T> {
    #[inline(always)]
    pub fn backward(&self, mut dx: Option<&mut [T]>, sums: &mut [T]) {
        let width = self.weight.len();
        let (dw, db) = sums.split_at_mut(width);
        let rows = self.input.chunks_exact(width).zip(self.grad.chunks_exact(width));
        for (index, ((x, dy), saved)) in rows.zip(self.statistics.chunks_exact(SAVED)).enumerate() {
            let row = Statistics::load(saved);
            for ((dw, db), (&x, &dy)) in dw.iter_mut().zip(db.iter_mut()).zip(x.iter().zip(dy)) {
                *dw = dy.mul_add(row.normalise(x), *dw);
                *db += dy;
            }
            if let Some(dx) = &mut dx {
                input_gradient(row, x, dy, self.weight, &mut dx[index * width..][..width]);
            }
        }
    }
}

#[inline(always)]
fn input_gradient<T: Float>(row: Statistics<T>, x: &[T], dy: &[T], weight: &[T], dx: &mut [T]) {
    // γ waits in the output row until the means are known.
    for (dx, (&dy, &weight)) in dx.iter_mut().zip(dy.iter().zip(weight)) {
        *dx = dy * weight;
    }
    let [sum, product] = lanes::zip_sum(
        dx,
        x,
        #[inline(always)]
        |gamma, x| [gamma, gamma * row.normalise(x)],
    );
    let scale = T::ONE / T::from_f64(x.len() as f64);
    let (mean, product) = (sum * scale, product * scale);
    for (dx, &x) in dx.iter_mut().zip(x) {
        *dx = row.rstd * (*dx - mean - row.normalise(x) * product);
    }
}
