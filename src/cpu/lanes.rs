//! Reductions of one row: independent partial results that fill vector registers, combined in a fixed order.

use super::Float;

/// Partial results per row: one AVX-512 register of `f32`.
const LANES: usize = 16;

/// Component-wise sum of `terms(a)` over a row. For use inside [`simd::dispatch`](super::simd::dispatch).
#[inline(always)]
pub fn sum<T: Float, const N: usize>(row: &[T], terms: impl Fn(T) -> [T; N]) -> [T; N] {
    let mut lanes = [[T::ZERO; LANES]; N];
    let (chunks, tail) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            let values = terms(chunk[lane]);
            (0..N).for_each(|n| lanes[n][lane] += values[n]);
        }
    }
    for (lane, &a) in tail.iter().enumerate() {
        let values = terms(a);
        (0..N).for_each(|n| lanes[n][lane] += values[n]);
    }
    lanes.map(
        #[inline(always)]
        |lanes| halve(lanes, |a, b| a + b),
    )
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
            (0..N).for_each(|n| lanes[n][lane] += values[n]);
        }
    }
    for (lane, (&a, &b)) in left_tail.iter().zip(right_tail).enumerate() {
        let values = terms(a, b);
        (0..N).for_each(|n| lanes[n][lane] += values[n]);
    }
    lanes.map(
        #[inline(always)]
        |lanes| halve(lanes, |a, b| a + b),
    )
}

/// Folds a row with an associative, commutative `combine` whose neutral element is `start`.
#[inline(always)]
pub fn fold<T: Float>(row: &[T], start: T, combine: impl Fn(T, T) -> T) -> T {
    let mut lanes = [start; LANES];
    let (chunks, tail) = row.as_chunks::<LANES>();
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(lane, &value)| *lane = combine(*lane, value));
    }
    lanes.iter_mut().zip(tail).for_each(|(lane, &value)| *lane = combine(*lane, value));
    halve(lanes, combine)
}

#[inline(always)]
fn halve<T: Float>(mut lanes: [T; LANES], combine: impl Fn(T, T) -> T) -> T {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = combine(lanes[lane], lanes[lane + width]);
        }
        width /= 2;
    }
    lanes[0]
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
