//! Rows of logits, each in the nearest cache for the passes over it.

use super::Form;
use crate::cpu::{Float, lanes, parallel, simd};
use crate::tensor::Buffer;

pub(super) fn forward<T: Float>(form: Form, input: &[T], width: usize) -> Buffer<T> {
    let mut output = Buffer::recycled(input.len());
    let piece_len = (parallel::PIECE / width.max(1)).max(1) * width;
    parallel::pieces_mut(&mut output, piece_len, |index, piece| {
        let input = &input[index * piece_len..][..piece.len()];
        simd::dispatch(
            #[inline(always)]
            || match form {
                Form::Probabilities => probabilities(input, piece, width),
                Form::Logarithms => logarithms(input, piece, width),
            },
        );
    });
    output
}

/// The largest value, or any where there is a NaN: the sum of exponentials carries that on.
#[inline(always)]
pub(crate) fn largest<T: Float>(row: &[T]) -> T {
    lanes::fold(
        row,
        T::NEG_INFINITY,
        #[inline(always)]
        |best, value| if value > best { value } else { best },
    )
}

/// y = exp(x − the row's largest), in one loop over all rows: a loop per row would leave many of them a remainder that
/// fills no register.
#[inline(always)]
fn shifted_exp<T: Float>(x: &[T], y: &mut [T], width: usize) {
    for (y, x) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
        let largest = largest(x);
        for (y, &x) in y.iter_mut().zip(x) {
            *y = x - largest;
        }
    }
    for y in y {
        *y = y.exp();
    }
}

#[inline(always)]
fn sum<T: Float>(row: &[T]) -> T {
    let [sum] = lanes::sum(
        row,
        #[inline(always)]
        |value| [value],
    );
    sum
}

#[inline(always)]
fn probabilities<T: Float>(x: &[T], y: &mut [T], width: usize) {
    shifted_exp(x, y, width);
    for y in y.chunks_exact_mut(width) {
        let scale = T::ONE / sum(y);
        for y in y {
            *y *= scale;
        }
    }
}

#[inline(always)]
fn logarithms<T: Float>(x: &[T], y: &mut [T], width: usize) {
    shifted_exp(x, y, width);
    for (y, x) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
        let (largest, ln_sum) = (largest(x), sum(y).ln());
        for (y, &x) in y.iter_mut().zip(x) {
            *y = x - largest - ln_sum;
        }
    }
}

/// From the output y: y · (dy − Σ y dy) for probabilities, dy − eʸ Σ dy for logarithms.
pub(super) fn backward<T: Float>(form: Form, output: &[T], grad: &[T], width: usize) -> Buffer<T> {
    let mut input_gradient = Buffer::recycled(output.len());
    let piece_len = (parallel::PIECE / width.max(1)).max(1) * width;
    parallel::pieces_mut(&mut input_gradient, piece_len, |index, piece| {
        let at = index * piece_len;
        let (y, dy) = (&output[at..][..piece.len()], &grad[at..][..piece.len()]);
        simd::dispatch(
            #[inline(always)]
            || match form {
                Form::Probabilities => probabilities_backward(y, dy, piece, width),
                Form::Logarithms => logarithms_backward(y, dy, piece, width),
            },
        );
    });
    input_gradient
}

#[inline(always)]
fn probabilities_backward<T: Float>(y: &[T], dy: &[T], dx: &mut [T], width: usize) {
    let rows = y.chunks_exact(width).zip(dy.chunks_exact(width));
    for (dx, (y, dy)) in dx.chunks_exact_mut(width).zip(rows) {
        let [product] = lanes::zip_sum(
            y,
            dy,
            #[inline(always)]
            |y, dy| [y * dy],
        );
        for (dx, (&y, &dy)) in dx.iter_mut().zip(y.iter().zip(dy)) {
            *dx = y * (dy - product);
        }
    }
}

#[inline(always)]
fn logarithms_backward<T: Float>(y: &[T], dy: &[T], dx: &mut [T], width: usize) {
    for (dx, &y) in dx.iter_mut().zip(y) {
        *dx = y.exp();
    }
    for (dx, dy) in dx.chunks_exact_mut(width).zip(dy.chunks_exact(width)) {
        let sum = sum(dy);
        for (dx, &dy) in dx.iter_mut().zip(dy) {
            *dx = dy - *dx * sum;
        }
    }
}
