//! Loops over elements.

use super::{Binary, Unary};
use crate::cpu::{Float, Stored, parallel, simd};
use crate::ops::strided::{Axis, broadcast_strides, collapse};
use crate::tensor::{Buffer, Element, Shape};

/// Beyond ±LIMIT the logistic function and Φ are 0 or 1 in every compute type. Products with them are taken inside, so
/// that an infinity times 0 does not become NaN.
pub(super) const LIMIT: f64 = 1e4;

pub(super) fn unary<S: Stored<T>, T: Float>(function: Unary, input: &[S]) -> Buffer<S> {
    let mut output = Buffer::recycled(input.len());
    let constant = T::from_f64;
    // One loop per function, so that the choice is made outside of it.
    macro_rules! map {
        ($x:ident => $value:expr) => {
            parallel::map(
                input,
                &mut output,
                #[inline(always)]
                move |stored: S| {
                    let $x: T = stored.load();
                    S::store($value)
                },
            )
        };
    }
    match function {
        Unary::Neg => map!(x => -x),
        Unary::Abs => map!(x => x.abs()),
        Unary::Square => map!(x => x * x),
        Unary::Sqrt => map!(x => x.sqrt()),
        Unary::Recip => map!(x => T::ONE / x),
        Unary::Exp => map!(x => x.exp()),
        Unary::Ln => map!(x => x.ln()),
        Unary::Sin => map!(x => x.sin()),
        Unary::Cos => map!(x => x.cos()),
        Unary::Tanh => map!(x => x.tanh()),
        Unary::Sigmoid => map!(x => x.sigmoid()),
        Unary::Erf => map!(x => x.erf()),
        Unary::Relu => map!(x => x.nan_max(T::ZERO)),
        Unary::LeakyRelu(slope) => {
            let slope = constant(slope);
            map!(x => if x < T::ZERO { slope * x } else { x })
        }
        Unary::Silu => map!(x => x.nan_max(T::from_f64(-LIMIT)) * x.sigmoid()),
        Unary::Gelu => map!(x => scalar::gelu(x)),
        Unary::Softplus => map!(x => softplus(x)),
        Unary::Scale(factor) => {
            let factor = constant(factor);
            map!(x => x * factor)
        }
        Unary::Shift(offset) => {
            let offset = constant(offset);
            map!(x => x + offset)
        }
        Unary::Powf(power) => {
            let power = constant(power);
            map!(x => x.powf(power))
        }
        Unary::Clamp(low, high) => {
            let (low, high) = (constant(low), constant(high));
            map!(x => x.nan_max(low).nan_min(high))
        }
    }
    output
}

/// Functions that others apply to what they have just computed.
pub(crate) mod scalar {
    use super::{Float, LIMIT, limited};

    /// x Φ(x)
    #[inline(always)]
    pub(crate) fn gelu<T: Float>(x: T) -> T {
        x.nan_max(T::from_f64(-LIMIT)) * x.normal_cdf()
    }

    /// Φ(x) + x φ(x)
    #[inline(always)]
    pub(crate) fn gelu_derivative<T: Float>(x: T) -> T {
        let x = limited(x);
        let [cdf, pdf] = x.normal_cdf_and_pdf();
        x.mul_add(pdf, cdf)
    }
}

#[inline(always)]
fn limited<T: Float>(x: T) -> T {
    x.nan_max(T::from_f64(-LIMIT)).nan_min(T::from_f64(LIMIT))
}

/// max(x, 0) + ln(1 + e^−|x|), which does not overflow.
#[inline(always)]
fn softplus<T: Float>(x: T) -> T {
    let small = (-x.abs()).exp();
    let sum = T::ONE + small;
    // The quotient makes up for what the sum lost of the small term.
    let ln = if sum == T::ONE { small } else { sum.ln() * (small / (sum - T::ONE)) };
    x.nan_max(T::ZERO) + ln
}

/// grad · f′, with f′ at the saved input, or at the saved output where `derives_from_output`. Where the saved value is NaN,
/// so is the result.
pub(super) fn unary_backward<S: Stored<T>, T: Float>(function: Unary, saved: &[S], grad: &[S]) -> Buffer<S> {
    let mut output = Buffer::recycled(grad.len());
    let constant = T::from_f64;
    let (one, half, two) = (T::ONE, constant(0.5), constant(2.0));
    macro_rules! map {
        ($x:ident, $grad:ident => $value:expr) => {
            parallel::zip_map(
                saved,
                grad,
                &mut output,
                #[inline(always)]
                move |saved: S, grad: S| {
                    let ($x, $grad): (T, T) = (saved.load(), grad.load());
                    S::store($value)
                },
            )
        };
    }
    match function {
        Unary::Neg => map!(_x, grad => -grad),
        Unary::Abs => map!(x, grad => if x > T::ZERO { grad } else if x < T::ZERO { -grad } else { x * T::ZERO }),
        Unary::Square => map!(x, grad => two * x * grad),
        Unary::Sqrt => map!(y, grad => half * grad / y),
        Unary::Recip => map!(y, grad => -(y * y) * grad),
        Unary::Exp => map!(y, grad => y * grad),
        Unary::Ln => map!(x, grad => grad / x),
        Unary::Sin => map!(x, grad => x.cos() * grad),
        Unary::Cos => map!(x, grad => -x.sin() * grad),
        Unary::Tanh => map!(y, grad => (one - y * y) * grad),
        Unary::Sigmoid => map!(y, grad => y * (one - y) * grad),
        Unary::Erf => {
            let scale = constant(std::f64::consts::FRAC_2_SQRT_PI);
            map!(x, grad => scale * (-(x * x)).exp() * grad)
        }
        Unary::Relu => map!(x, grad => if x > T::ZERO { grad } else if x.is_nan() { x } else { T::ZERO }),
        Unary::LeakyRelu(slope) => {
            let slope = constant(slope);
            map!(x, grad => if x > T::ZERO { grad } else if x.is_nan() { x } else { slope * grad })
        }
        Unary::Silu => map!(x, grad => {
            let (x, sigmoid) = (limited(x), x.sigmoid());
            sigmoid * (T::ONE + x * (T::ONE - sigmoid)) * grad
        }),
        Unary::Gelu => map!(x, grad => scalar::gelu_derivative(x) * grad),
        Unary::Softplus => map!(x, grad => x.sigmoid() * grad),
        Unary::Scale(factor) => {
            let factor = constant(factor);
            map!(_x, grad => factor * grad)
        }
        Unary::Shift(_) => map!(_x, grad => grad),
        Unary::Powf(power) => {
            let (power, less) = (constant(power), constant(power - 1.0));
            map!(x, grad => power * x.powf(less) * grad)
        }
        Unary::Clamp(low, high) => {
            let (low, high) = (constant(low), constant(high));
            map!(x, grad => if x < low || x > high { T::ZERO } else if x.is_nan() { x } else { grad })
        }
    }
    output
}

pub(super) fn binary<S: Stored<T>, T: Float>(
    function: Binary,
    left: (&[S], &Shape),
    right: (&[S], &Shape),
    shape: &Shape,
) -> Buffer<S> {
    let mut output = Buffer::recycled(shape.elements());
    macro_rules! zip {
        ($a:ident, $b:ident => $value:expr) => {
            broadcast(
                left,
                right,
                shape,
                &mut output,
                #[inline(always)]
                move |a: S, b: S| {
                    let ($a, $b): (T, T) = (a.load(), b.load());
                    S::store($value)
                },
            )
        };
    }
    let indicator = |condition: bool| if condition { T::ONE } else { T::ZERO };
    match function {
        Binary::Add => zip!(a, b => a + b),
        Binary::Sub => zip!(a, b => a - b),
        Binary::Mul => zip!(a, b => a * b),
        Binary::Div => zip!(a, b => a / b),
        Binary::Maximum => zip!(a, b => a.nan_max(b)),
        Binary::Minimum => zip!(a, b => a.nan_min(b)),
        Binary::Greater => zip!(a, b => indicator(a > b)),
        Binary::Equal => zip!(a, b => indicator(a == b)),
    }
    output
}

/// Applies `f` over two operands broadcast to `shape`.
#[inline(always)]
fn broadcast<T: Element>(
    (left, left_shape): (&[T], &Shape),
    (right, right_shape): (&[T], &Shape),
    shape: &Shape,
    output: &mut [T],
    f: impl Fn(T, T) -> T + Copy + Sync + Send,
) {
    if output.is_empty() {
        return;
    }
    if left_shape == right_shape {
        return parallel::zip_map(left, right, output, f);
    }
    if let [b] = *right {
        return parallel::map(
            left,
            output,
            #[inline(always)]
            move |a| f(a, b),
        );
    }
    if let [a] = *left {
        return parallel::map(
            right,
            output,
            #[inline(always)]
            move |b| f(a, b),
        );
    }
    let axes = collapse(shape, [&broadcast_strides(left_shape, shape), &broadcast_strides(right_shape, shape)]);
    // There is at least one axis here: both operands being single elements was handled above.
    let Some((&Axis { extent: inner, steps }, outer)) = axes.split_last() else { return };
    let rows_per_piece = (parallel::PIECE / inner).max(1);
    parallel::pieces_mut(output, rows_per_piece * inner, |index, piece| {
        for (row, out) in piece.chunks_mut(inner).enumerate() {
            let (mut rest, mut at_left, mut at_right) = (index * rows_per_piece + row, 0, 0);
            for axis in outer.iter().rev() {
                let position = rest % axis.extent;
                rest /= axis.extent;
                at_left += position * axis.steps[0];
                at_right += position * axis.steps[1];
            }
            simd::dispatch(
                #[inline(always)]
                || match steps {
                    [1, 1] => {
                        let (left, right) = (&left[at_left..][..inner], &right[at_right..][..inner]);
                        for (out, (&a, &b)) in out.iter_mut().zip(left.iter().zip(right)) {
                            *out = f(a, b);
                        }
                    }
                    [1, _] => {
                        let b = right[at_right];
                        for (out, &a) in out.iter_mut().zip(&left[at_left..][..inner]) {
                            *out = f(a, b);
                        }
                    }
                    _ => {
                        let a = left[at_left];
                        for (out, &b) in out.iter_mut().zip(&right[at_right..][..inner]) {
                            *out = f(a, b);
                        }
                    }
                },
            );
        }
    });
}

pub(super) fn select<T: Float>(mask: &[T], on_true: &[T], on_false: &[T]) -> Buffer<T> {
    let mut output = Buffer::copy_of(on_false);
    parallel::pieces_mut(&mut output, parallel::PIECE, |index, piece| {
        let at = index * parallel::PIECE;
        let (mask, on_true) = (&mask[at..], &on_true[at..]);
        simd::dispatch(
            #[inline(always)]
            || {
                for (out, (&mask, &value)) in piece.iter_mut().zip(mask.iter().zip(on_true)) {
                    *out = if mask == T::ZERO { *out } else { value };
                }
            },
        );
    });
    output
}

pub(super) fn accumulate<S: Stored<T>, T: Float>(sum: &mut [S], addend: &[S]) {
    parallel::update(
        sum,
        addend,
        #[inline(always)]
        |sum, value| *sum = S::store(sum.load() + value.load()),
    );
}
