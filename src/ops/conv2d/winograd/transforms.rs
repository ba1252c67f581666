//! The transforms of minimal filtering, a square of vectors at a time: each is one of a line, along the columns and then
//! along the rows.

use pulp::Simd;

/// `line` as an array whose length has another name.
#[allow(clippy::manual_memcpy, reason = "a call for a copy would take the line out of its registers")]
#[inline(always)]
fn sized<V: Copy, const N: usize, const P: usize>(line: [V; N]) -> [V; P] {
    let mut values = [line[0]; P];
    for i in 0..P {
        values[i] = line[i];
    }
    values
}

/// Bᵀ x.
#[inline(always)]
fn input_line<S: Simd, const T: usize, const P: usize>(simd: S, x: [S::f32s; T]) -> [S::f32s; P] {
    let (add, sub) = (|a, b| simd.add_f32s(a, b), |a, b| simd.sub_f32s(a, b));
    if P == 7 {
        let (odd, even) = (add(x[1], x[3]), add(x[2], x[4]));
        let (first, second) = (sub(x[1], x[3]), sub(x[4], x[2]));
        let imaginary = sub(sub(x[2], x[4]), first);
        let ends = [sub(x[0], x[4]), sub(x[5], x[1])];
        return sized([ends[0], add(even, odd), sub(even, odd), sub(second, first), imaginary, first, ends[1]]);
    }
    // The powers of x repeat after six steps, and after three but for the sign.
    let (p, d) =
        ([add(x[1], x[4]), add(x[2], x[5]), add(x[3], x[6])], [sub(x[4], x[1]), sub(x[5], x[2]), sub(x[6], x[3])]);
    let (more, less) = (simd.splat_f32s(3.0), simd.splat_f32s(-3.0));
    let (sum, alternating) = (add(add(p[0], p[1]), p[2]), add(sub(d[0], d[1]), d[2]));
    sized([
        sub(x[0], x[6]),
        sum,
        alternating,
        simd.mul_add_f32s(less, p[1], sum),
        simd.mul_add_f32s(less, p[2], sum),
        simd.mul_add_f32s(less, p[0], sum),
        simd.mul_add_f32s(more, d[1], alternating),
        simd.mul_add_f32s(less, d[2], alternating),
        simd.mul_add_f32s(less, d[0], alternating),
        sub(x[7], x[1]),
    ])
}

/// A y: the remainders of N values.
#[inline(always)]
fn spread_line<S: Simd, const N: usize, const P: usize>(simd: S, y: [S::f32s; N]) -> [S::f32s; P] {
    let (add, sub) = (|a, b| simd.add_f32s(a, b), |a, b| simd.sub_f32s(a, b));
    let mut sums = [y[0], y[1]];
    for i in 2..N {
        sums[i % 2] = add(sums[i % 2], y[i]);
    }
    let (plus, minus) = (add(sums[0], sums[1]), sub(sums[0], sums[1]));
    if P == 7 {
        let mut remainder = [y[0], y[1]];
        for i in 2..N {
            let value = remainder[i % 2];
            remainder[i % 2] = if i % 4 < 2 { add(value, y[i]) } else { sub(value, y[i]) };
        }
        let [real, imaginary] = remainder;
        return sized([y[0], plus, minus, real, imaginary, add(real, imaginary), y[N - 1]]);
    }
    // x² + x + 1, where x³ = 1, and x² − x + 1, where x³ = −1.
    let (mut first, mut second) = ([sub(y[0], y[2]), sub(y[1], y[2])], [sub(y[0], y[2]), add(y[1], y[2])]);
    for i in 3..N {
        first[i - 3] = add(first[i - 3], y[i]);
        second[i - 3] = sub(second[i - 3], y[i]);
    }
    let ([a, b], [c, d]) = (first, second);
    sized([y[0], plus, minus, a, b, sub(a, b), c, d, add(c, d), y[N - 1]])
}

/// Aᵀ z, N values.
#[inline(always)]
fn collect_line<S: Simd, const N: usize, const P: usize>(simd: S, z: [S::f32s; P]) -> [S::f32s; N] {
    let (add, sub) = (|a, b| simd.add_f32s(a, b), |a, b| simd.sub_f32s(a, b));
    let (even, odd) = (add(z[1], z[2]), sub(z[1], z[2]));
    let all = if P == 7 {
        let (real, imaginary) = (add(z[3], z[5]), add(z[4], z[5]));
        [add(even, real), add(odd, imaginary), sub(even, real), sub(odd, imaginary), add(even, real)]
    } else {
        let (a, b, c, d) = (add(z[3], z[5]), sub(z[4], z[5]), add(z[6], z[8]), add(z[7], z[8]));
        let third = add(sub(even, add(a, b)), sub(d, c));
        [add(even, add(a, c)), add(odd, add(b, d)), third, add(odd, sub(a, c)), add(even, sub(b, d))]
    };
    let mut y: [_; N] = sized(all);
    y[0] = add(y[0], z[0]);
    y[N - 1] = add(y[N - 1], z[P - 1]);
    y
}

/// The diagonal of S.
#[inline(always)]
fn scale<const P: usize>(point: usize) -> f32 {
    match point {
        _ if point == 0 || point == P - 1 => 1.0,
        _ if P == 10 => 1.0 / 6.0,
        1 | 2 => 0.25,
        _ => 0.5,
    }
}

/// `line` along the columns, then along the rows: `value` gives the element of a row and a column, `sink` takes that of the
/// result. Columns are kept in `scratch`, whose contents are of no matter: not to be written twice.
#[allow(clippy::needless_range_loop, reason = "iterators of arrays would take vectors out of their registers")]
#[inline(always)]
fn both_ways<V: Copy, const FROM: usize, const TO: usize>(
    scratch: &mut Scratch<V, FROM, TO>,
    value: impl Fn(usize, usize) -> V,
    line: impl Fn([V; FROM]) -> [V; TO],
    mut sink: impl FnMut(usize, usize, V),
) {
    for x in 0..FROM {
        let mut column = [value(0, x); FROM];
        for y in 1..FROM {
            column[y] = value(y, x);
        }
        let transformed = line(column);
        for i in 0..TO {
            scratch[i][x] = transformed[i];
        }
    }
    for i in 0..TO {
        let transformed = line(scratch[i]);
        for j in 0..TO {
            sink(i, j, transformed[j]);
        }
    }
}

/// Room for what a transform has done along the columns.
pub(super) type Scratch<V, const FROM: usize, const TO: usize> = [[V; FROM]; TO];

/// Bᵀ x B.
#[inline(always)]
pub(super) fn input_square<S: Simd, const T: usize, const P: usize>(
    simd: S,
    scratch: &mut Scratch<S::f32s, T, P>,
    value: impl Fn(usize, usize) -> S::f32s,
    sink: impl FnMut(usize, usize, S::f32s),
) {
    both_ways(
        scratch,
        value,
        #[inline(always)]
        |line| input_line(simd, line),
        sink,
    );
}

/// A y Aᵀ.
#[inline(always)]
pub(super) fn spread_square<S: Simd, const N: usize, const P: usize>(
    simd: S,
    scratch: &mut Scratch<S::f32s, N, P>,
    value: impl Fn(usize, usize) -> S::f32s,
    sink: impl FnMut(usize, usize, S::f32s),
) {
    both_ways(
        scratch,
        value,
        #[inline(always)]
        |line| spread_line(simd, line),
        sink,
    );
}

/// Aᵀ z A.
#[inline(always)]
pub(super) fn collect_square<S: Simd, const N: usize, const P: usize>(
    simd: S,
    scratch: &mut Scratch<S::f32s, P, N>,
    value: impl Fn(usize, usize) -> S::f32s,
    sink: impl FnMut(usize, usize, S::f32s),
) {
    both_ways(
        scratch,
        value,
        #[inline(always)]
        |line| collect_line(simd, line),
        sink,
    );
}

/// An element of S z S, where `value` is that of z.
#[inline(always)]
pub(super) fn scaled<S: Simd, const P: usize>(simd: S, [i, j]: [usize; 2], value: S::f32s) -> S::f32s {
    simd.mul_f32s(value, simd.splat_f32s(scale::<P>(i) * scale::<P>(j)))
}
