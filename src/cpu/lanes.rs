//! Reductions of one row: independent partial results that fill vector registers, combined in a fixed order. The tail
//! that fills none comes last; spread over the partial results, it would keep them out of registers.

use super::Float;

/// Partial results per row: one AVX-512 register of `f32`.
pub const LANES: usize = 16;

/// Component-wise sum of `terms(a)` over a row. For use inside [`simd::dispatch`](super::simd::dispatch).
#[inline(always)]
pub fn sum<T: Float, const N: usize>(row: &[T], terms: impl Fn(T) -> [T; N]) -> [T; N] {
    let mut lanes = [[T::ZERO; LANES]; N];
    let (chunks, tail) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            let values = terms(chunk[lane]);
            for n in 0..N {
                lanes[n][lane] += values[n];
            }
        }
    }
    let mut totals = totals(lanes);
    for &a in tail {
        let values = terms(a);
        for n in 0..N {
            totals[n] += values[n];
        }
    }
    totals
}

/// Component-wise sum of `terms(a, b)` over two rows of one length.
#[inline(always)]
pub fn zip_sum<T: Float, const N: usize>(left: &[T], right: &[T], terms: impl Fn(T, T) -> [T; N]) -> [T; N] {
    let mut lanes = [[T::ZERO; LANES]; N];
    let (left, left_tail) = left.as_chunks::<LANES>();
    let (right, right_tail) = right.as_chunks::<LANES>();
    for (left, right) in left.iter().zip(right) {
        for lane in 0..LANES {
            let values = terms(left[lane], right[lane]);
            for n in 0..N {
                lanes[n][lane] += values[n];
            }
        }
    }
    let mut totals = totals(lanes);
    for (&a, &b) in left_tail.iter().zip(right_tail) {
        let values = terms(a, b);
        for n in 0..N {
            totals[n] += values[n];
        }
    }
    totals
}

/// Folds a row with an associative, commutative `combine` whose neutral element is `start`.
#[inline(always)]
pub fn fold<T: Float>(row: &[T], start: T, combine: impl Fn(T, T) -> T) -> T {
    let mut lanes = [start; LANES];
    let (chunks, tail) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = combine(*lane, value);
        }
    }
    let mut total = halve(lanes, &combine);
    for &value in tail {
        total = combine(total, value);
    }
    total
}

#[inline(always)]
fn totals<T: Float, const N: usize>(lanes: [[T; LANES]; N]) -> [T; N] {
    let mut totals = [T::ZERO; N];
    for n in 0..N {
        totals[n] = total(lanes[n]);
    }
    totals
}

/// The sum of partial sums.
#[inline(always)]
pub fn total<T: Float>(lanes: [T; LANES]) -> T {
    halve(
        lanes,
        #[inline(always)]
        |a, b| a + b,
    )
}

/// Combines upper and lower halves until one value is left; written out, since a loop over widths stays a loop.
#[inline(always)]
fn halve<T: Float>(lanes: [T; LANES], combine: impl Fn(T, T) -> T) -> T {
    let (mut eight, mut four) = ([T::ZERO; 8], [T::ZERO; 4]);
    for lane in 0..8 {
        eight[lane] = combine(lanes[lane], lanes[lane + 8]);
    }
    for lane in 0..4 {
        four[lane] = combine(eight[lane], eight[lane + 4]);
    }
    combine(combine(four[0], four[2]), combine(four[1], four[3]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_counts_once_at_any_length() {
        for len in [0, 1, 15, 16, 17, 31, 32, 33, 100] {
            let row: Vec<f64> = (1..=len).map(|i| i as f64).collect();
            let total = (len * (len + 1) / 2) as f64;
            assert_eq!(sum(&row, |a| [a, 2.0 * a]), [total, 2.0 * total]);
            let squares: f64 = row.iter().map(|v| v * v).sum();
            assert_eq!(zip_sum(&row, &row, |a, b| [a * b]), [squares]);
            assert_eq!(fold(&row, 0.0, |a, b| if a < b { b } else { a }), len as f64);
        }
    }
}
