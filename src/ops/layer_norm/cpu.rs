//! Each row is read from memory once and stays in the nearest cache for the passes over it.

use crate::cpu::lanes::{self, LANES};
use crate::cpu::{Float, parallel, simd};
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
        let [residue, squares] = deviations(row, center);
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

/// Σ (x − center) and Σ (x − center)². One loop for each step of a chunk: of a closure with both terms the compiler makes
/// scalars.
#[inline(always)]
fn deviations<T: Float>(row: &[T], center: T) -> [T; 2] {
    let (mut sums, mut squares) = ([T::ZERO; LANES], [T::ZERO; LANES]);
    let (chunks, tail) = row.as_chunks::<LANES>();
    for chunk in chunks {
        let mut deviations = [T::ZERO; LANES];
        for lane in 0..LANES {
            deviations[lane] = chunk[lane] - center;
        }
        for lane in 0..LANES {
            sums[lane] += deviations[lane];
        }
        for lane in 0..LANES {
            squares[lane] = deviations[lane].mul_add(deviations[lane], squares[lane]);
        }
    }
    let (mut sum, mut square) = (lanes::total(sums), lanes::total(squares));
    for &x in tail {
        sum += x - center;
        square = (x - center).mul_add(x - center, square);
    }
    [sum, square]
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
    let [sum, product] = scaled_gradient(row, x, dy, weight, dx);
    let scale = T::ONE / T::from_f64(x.len() as f64);
    let (mean, product) = (sum * scale, product * scale);
    for (dx, &x) in dx.iter_mut().zip(x) {
        *dx = row.rstd * (*dx - mean - row.normalise(x) * product);
    }
}

/// Writes γ, which waits in `dx` until the means are known; Σ γ and Σ γ x̂. One loop for each step, as in [`deviations`].
#[inline(always)]
fn scaled_gradient<T: Float>(row: Statistics<T>, x: &[T], dy: &[T], weight: &[T], dx: &mut [T]) -> [T; 2] {
    let (mut sums, mut products) = ([T::ZERO; LANES], [T::ZERO; LANES]);
    let ((x, x_tail), (dy, dy_tail)) = (x.as_chunks::<LANES>(), dy.as_chunks::<LANES>());
    let ((weight, weight_tail), (dx, dx_tail)) = (weight.as_chunks::<LANES>(), dx.as_chunks_mut::<LANES>());
    for ((x, dy), (weight, dx)) in x.iter().zip(dy).zip(weight.iter().zip(dx)) {
        let mut gamma = [T::ZERO; LANES];
        for lane in 0..LANES {
            gamma[lane] = dy[lane] * weight[lane];
        }
        *dx = gamma;
        for lane in 0..LANES {
            sums[lane] += gamma[lane];
        }
        for lane in 0..LANES {
            products[lane] = gamma[lane].mul_add(row.normalise(x[lane]), products[lane]);
        }
    }
    let (mut sum, mut product) = (lanes::total(sums), lanes::total(products));
    for ((&x, &dy), (&weight, dx)) in x_tail.iter().zip(dy_tail).zip(weight_tail.iter().zip(dx_tail)) {
        *dx = dy * weight;
        sum += *dx;
        product = dx.mul_add(row.normalise(x), product);
    }
    [sum, product]
}
