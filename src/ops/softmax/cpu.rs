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
            || {
                for (y, x) in piece.chunks_exact_mut(width).zip(input.chunks_exact(width)) {
                    match form {
                        Form::Probabilities => probabilities(x, y),
                        Form::Logarithms => logarithms(x, y),
                    }
                }
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

#[inline(always)]
fn probabilities<T: Float>(x: &[T], y: &mut [T]) {
    let largest = largest(x);
    y.iter_mut().zip(x).for_each(|(y, &x)| *y = (x - largest).exp());
    let [sum] = lanes::sum(
        y,
        #[inline(always)]
        |y| [y],
    );
    let scale = T::ONE / sum;
    y.iter_mut().for_each(|y| *y *= scale);
}

#[inline(always)]
fn logarithms<T: Float>(x: &[T], y: &mut [T]) {
    let largest = largest(x);
    let [sum] = lanes::sum(
        x,
        #[inline(always)]
        |x| [(x - largest).exp()],
    );
    let ln_sum = sum.ln();
    y.iter_mut().zip(x).for_each(|(y, &x)| *y = x - largest - ln_sum);
}

/// From the output y: y · (dy − Σ y dy) for probabilities, dy − eʸ Σ dy for logarithms.
pub(super) fn backward<T: Float>(form: Form, output: &[T], grad: &[T], width: usize) -> Buffer<T> {
    let mut input_gradient = Buffer::recycled(output.len());
    let piece_len = (parallel::PIECE / width.max(1)).max(1) * width;
    parallel::pieces_mut(&mut input_gradient, piece_len, |index, piece| {
        let at = index * piece_len;
        let rows = output[at..][..piece.len()].chunks_exact(width).zip(grad[at..].chunks_exact(width));
        simd::dispatch(
            #[inline(always)]
            || {
                for (dx, (y, dy)) in piece.chunks_exact_mut(width).zip(rows) {
                    let values = y.iter().zip(dy);
                    match form {
                        Form::Probabilities => {
                            let [sum] = lanes::zip_sum(
                                y,
                                dy,
                                #[inline(always)]
                                |y, dy| [y * dy],
                            );
                            dx.iter_mut().zip(values).for_each(|(dx, (&y, &dy))| *dx = y * (dy - sum));
                        }
                        Form::Logarithms => {
                            let [sum] = lanes::sum(
                                dy,
                                #[inline(always)]
                                |dy| [dy],
                            );
                            dx.iter_mut().zip(values).for_each(|(dx, (&y, &dy))| *dx = dy - y.exp() * sum);
                        }
                    }
                }
            },
        );
    });
    input_gradient
}
