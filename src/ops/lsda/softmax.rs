//! The softmax of rows of scores, whole vectors wide, in scratch near the core. `f32` in explicit vectors: compiled from plain
//! loops, reductions of rows this short take twice as long as their exponentials.

use pulp::{Simd, WithSimd};

use crate::cpu::block_gemm::{load, store};
use crate::cpu::vector_math::exp_negative;
use crate::cpu::{Float, simd};
use crate::tensor::DType;

/// Turns rows of scores, `width` elements each, into exp(score − the row's largest), and writes what they sum up to.
#[inline(never)]
pub(super) fn exponentials<T: Float>(scores: &mut [T], width: usize, sums: &mut [T]) {
    if T::DTYPE == DType::F32 {
        let (scores, sums) = (bytemuck::cast_slice_mut(scores), bytemuck::cast_slice_mut(sums));
        return simd::with_vectors(Exponentials { scores, width, sums });
    }
    for (row, sum) in scores.chunks_exact_mut(width).zip(sums) {
        *sum = row_exponentials(row);
    }
}

/// Turns rows of scores into probabilities P, and gradients dP of these into those of the scores,
/// P ∘ (dP − rowsum(P ∘ dP)).
#[inline(never)]
pub(super) fn gradients<T: Float>(scores: &mut [T], grads: &mut [T], width: usize) {
    if T::DTYPE == DType::F32 {
        let (scores, grads) = (bytemuck::cast_slice_mut(scores), bytemuck::cast_slice_mut(grads));
        return simd::with_vectors(Gradients { scores, grads, width });
    }
    for (row, grads) in scores.chunks_exact_mut(width).zip(grads.chunks_exact_mut(width)) {
        let share = T::ONE / row_exponentials(row);
        row.iter_mut().for_each(|probability| *probability *= share);
        let dot = row.iter().zip(&*grads).fold(T::ZERO, |dot, (&p, &grad)| p.mul_add(grad, dot));
        row.iter().zip(grads).for_each(|(&p, grad)| *grad = p * (*grad - dot));
    }
}

fn row_exponentials<T: Float>(row: &mut [T]) -> T {
    let largest = row.iter().fold(T::NEG_INFINITY, |largest, &score| largest.nan_max(score));
    row.iter_mut().for_each(|score| *score = (*score - largest).exp_negative());
    row.iter().fold(T::ZERO, |sum, &value| sum + value)
}

/// As [`row_exponentials`]. A NaN need not be the largest: the sum carries it on.
#[inline(always)]
fn row_exponentials_in_vectors<S: Simd>(simd: S, row: &mut [f32]) -> f32 {
    let mut largest = simd.splat_f32s(f32::NEG_INFINITY);
    for at in (0..row.len()).step_by(S::F32_LANES) {
        largest = simd.max_f32s(largest, load::<S>(row, at));
    }
    let largest = simd.splat_f32s(simd.reduce_max_f32s(largest));
    let mut sum = simd.splat_f32s(0.0);
    for at in (0..row.len()).step_by(S::F32_LANES) {
        let value = exp_negative(simd, simd.sub_f32s(load::<S>(row, at), largest));
        sum = simd.add_f32s(sum, value);
        store::<S>(row, at, value);
    }
    simd.reduce_sum_f32s(sum)
}

struct Exponentials<'a> {
    scores: &'a mut [f32],
    width: usize,
    sums: &'a mut [f32],
}

impl WithSimd for Exponentials<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for (row, sum) in self.scores.chunks_exact_mut(self.width).zip(self.sums) {
            *sum = row_exponentials_in_vectors(simd, row);
        }
    }
}

struct Gradients<'a> {
    scores: &'a mut [f32],
    grads: &'a mut [f32],
    width: usize,
}

impl WithSimd for Gradients<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let rows = self.scores.chunks_exact_mut(self.width).zip(self.grads.chunks_exact_mut(self.width));
        for (row, grads) in rows {
            let share = simd.splat_f32s(1.0 / row_exponentials_in_vectors(simd, row));
            let mut dots = simd.splat_f32s(0.0);
            for at in (0..row.len()).step_by(S::F32_LANES) {
                let probability = simd.mul_f32s(load::<S>(row, at), share);
                dots = simd.mul_add_e_f32s(probability, load::<S>(grads, at), dots);
                store::<S>(row, at, probability);
            }
            let dot = simd.splat_f32s(simd.reduce_sum_f32s(dots));
            for at in (0..row.len()).step_by(S::F32_LANES) {
                let grad = simd.mul_f32s(load::<S>(row, at), simd.sub_f32s(load::<S>(grads, at), dot));
                store::<S>(grads, at, grad);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Philox;

    const WIDTH: usize = 48;

    fn rows<T: Float>(seed: u64, padding: f64) -> Vec<T> {
        let value = |i: usize| if i % WIDTH < 37 { 3.0 * Philox::new(seed).normal(i as u64) } else { padding };
        (0..5 * WIDTH).map(|i| T::from_f64(value(i))).collect()
    }

    #[test]
    fn vectors_agree_with_loops() {
        let (mut scores, mut sums) = (rows::<f32>(1, f64::NEG_INFINITY), [0.0f32; 5]);
        let (mut exact, mut exact_sums) = (rows::<f64>(1, f64::NEG_INFINITY), [0.0f64; 5]);
        exponentials(&mut scores, WIDTH, &mut sums);
        exponentials(&mut exact, WIDTH, &mut exact_sums);
        let close = |got: &[f32], exact: &[f64]| {
            got.iter().zip(exact).all(|(got, exact)| (f64::from(*got) - exact).abs() <= 2e-6 * exact.abs().max(1e-3))
        };
        assert!(close(&scores, &exact) && close(&sums, &exact_sums));
        assert!(scores.chunks(WIDTH).all(|row| row[37..].iter().all(|&padding| padding == 0.0)));

        let (mut scores, mut grads) = (rows::<f32>(1, f64::NEG_INFINITY), rows::<f32>(2, 0.0));
        let (mut exact, mut exact_grads) = (rows::<f64>(1, f64::NEG_INFINITY), rows::<f64>(2, 0.0));
        gradients(&mut scores, &mut grads, WIDTH);
        gradients(&mut exact, &mut exact_grads, WIDTH);
        assert!(close(&scores, &exact));
        assert!(grads.iter().zip(&exact_grads).all(|(got, exact)| (f64::from(*got) - exact).abs() < 1e-5));
    }

    #[test]
    fn a_row_with_a_nan_becomes_nan() {
        let (mut scores, mut sums) = (vec![0.5f32; 2 * WIDTH], [0.0; 2]);
        scores[WIDTH + 3] = f32::NAN;
        exponentials(&mut scores, WIDTH, &mut sums);
        assert!(sums[0] == WIDTH as f32 && sums[1].is_nan());
    }
}
