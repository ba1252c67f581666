//! The transforms of minimal filtering, a square of vectors at a time: each is one of a line, along the columns and then
//! along the rows.

use pulp::Simd;

use super::{POINTS, SCALE, Square, TILE};

/// Bᵀ x.
#[inline(always)]
fn input_line<S: Simd>(simd: S, x: [S::f32s; TILE]) -> [S::f32s; POINTS] {
    let (add, sub) = (|a, b| simd.add_f32s(a, b), |a, b| simd.sub_f32s(a, b));
    let (odd, even) = (add(x[1], x[3]), add(x[2], x[4]));
    let (first, second) = (sub(x[1], x[3]), sub(x[4], x[2]));
    let (negative, rest) = (sub(x[2], x[4]), first);
    [sub(x[0], x[4]), add(even, odd), sub(even, odd), sub(second, first), sub(negative, rest), first, sub(x[5], x[1])]
}

/// A y: the remainders of N values.
#[inline(always)]
fn spread_line<S: Simd, const N: usize>(simd: S, y: [S::f32s; N]) -> [S::f32s; POINTS] {
    let (add, sub) = (|a, b| simd.add_f32s(a, b), |a, b| simd.sub_f32s(a, b));
    let (mut sums, mut remainders) = ([y[0], y[1]], [y[0], y[1]]);
    for (i, &value) in y.iter().enumerate().skip(2) {
        let parity = i % 2;
        sums[parity] = add(sums[parity], value);
        remainders[parity] = if i % 4 < 2 { add(remainders[parity], value) } else { sub(remainders[parity], value) };
    }
    let ([even, odd], [real, imaginary]) = (sums, remainders);
    [y[0], add(even, odd), sub(even, odd), real, imaginary, add(real, imaginary), y[N - 1]]
}

/// Aᵀ z, N values.
#[inline(always)]
fn collect_line<S: Simd, const N: usize>(simd: S, z: [S::f32s; POINTS]) -> [S::f32s; N] {
    let (add, sub) = (|a, b| simd.add_f32s(a, b), |a, b| simd.sub_f32s(a, b));
    let (even, odd) = (add(z[1], z[2]), sub(z[1], z[2]));
    let (real, imaginary) = (add(z[3], z[5]), add(z[4], z[5]));
    let mut y = [z[0]; N];
    for (i, value) in y.iter_mut().enumerate() {
        *value = match i % 4 {
            0 => add(even, real),
            1 => add(odd, imaginary),
            2 => sub(even, real),
            _ => sub(odd, imaginary),
        };
    }
    y[0] = add(y[0], z[0]);
    y[N - 1] = add(y[N - 1], z[6]);
    y
}

/// `line` along the columns, then along the rows.
#[inline(always)]
fn both_ways<V: Copy, const FROM: usize, const TO: usize>(
    values: &Square<V, FROM>,
    zero: V,
    line: impl Fn([V; FROM]) -> [V; TO],
) -> Square<V, TO> {
    let mut columns = [[zero; FROM]; TO];
    for x in 0..FROM {
        let mut column = [zero; FROM];
        for y in 0..FROM {
            column[y] = values[y][x];
        }
        let transformed = line(column);
        for i in 0..TO {
            columns[i][x] = transformed[i];
        }
    }
    let mut square = [[zero; TO]; TO];
    for i in 0..TO {
        square[i] = line(columns[i]);
    }
    square
}

/// Bᵀ x B.
#[inline(always)]
pub(super) fn input_square<S: Simd>(simd: S, values: &Square<S::f32s, TILE>) -> Square<S::f32s, POINTS> {
    both_ways(
        values,
        simd.splat_f32s(0.0),
        #[inline(always)]
        |line| input_line(simd, line),
    )
}

/// A y Aᵀ.
#[inline(always)]
pub(super) fn spread_square<S: Simd, const N: usize>(simd: S, values: &Square<S::f32s, N>) -> Square<S::f32s, POINTS> {
    both_ways(
        values,
        simd.splat_f32s(0.0),
        #[inline(always)]
        |line| spread_line(simd, line),
    )
}

/// Aᵀ z A.
#[inline(always)]
pub(super) fn collect_square<S: Simd, const N: usize>(simd: S, square: &Square<S::f32s, POINTS>) -> Square<S::f32s, N> {
    both_ways(
        square,
        simd.splat_f32s(0.0),
        #[inline(always)]
        |line| collect_line(simd, line),
    )
}

/// S z S.
#[inline(always)]
pub(super) fn scale_square<S: Simd>(simd: S, square: &mut Square<S::f32s, POINTS>) {
    for i in 0..POINTS {
        for j in 0..POINTS {
            square[i][j] = simd.mul_f32s(square[i][j], simd.splat_f32s(SCALE[i] * SCALE[j]));
        }
    }
}
