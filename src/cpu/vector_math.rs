//! Functions of `f32` on explicit vectors, for loops that the compiler would not keep in registers.

use pulp::Simd;

use super::float::{EXP_NEGATIVE_ROUND, LOG2_E_REST, POWER_OF_TWO};

/// The bits of [`Float::exp_negative`](super::Float::exp_negative): eˣ for x ≤ 0, NaN for NaN.
#[inline(always)]
pub(crate) fn exp_negative<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let round = simd.splat_f32s(EXP_NEGATIVE_ROUND);
    let log2_e = simd.splat_f32s(std::f32::consts::LOG2_E);
    let shifted = simd.mul_add_f32s(x, log2_e, round);
    let rest = simd.mul_add_f32s(x, log2_e, simd.sub_f32s(round, shifted));
    let r = simd.mul_add_f32s(x, simd.splat_f32s(LOG2_E_REST), rest);
    let mut power = simd.splat_f32s(POWER_OF_TWO[0]);
    for coefficient in &POWER_OF_TWO[1..] {
        power = simd.mul_add_f32s(power, r, simd.splat_f32s(*coefficient));
    }
    // The lowest bits of `shifted` are n, and become the exponent.
    let exponent = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(23));
    let two_to_n = simd.transmute_f32s_u32s(simd.add_u32s(exponent, simd.splat_u32s(127 << 23)));
    let normal = simd.mul_f32s(power, two_to_n);
    let zero = simd.splat_f32s(0.0);
    simd.select_f32s(simd.less_than_f32s(x, simd.splat_f32s(-87.0)), zero, normal)
}

#[cfg(test)]
mod tests {
    use pulp::WithSimd;

    use super::*;
    use crate::cpu::block_gemm::{load, store};
    use crate::cpu::{Float, simd};

    struct Exponentials<'a>(&'a mut [f32]);

    impl WithSimd for Exponentials<'_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            for at in (0..self.0.len()).step_by(S::F32_LANES) {
                let x = load::<S>(self.0, at);
                store::<S>(self.0, at, exp_negative(simd, x));
            }
        }
    }

    #[test]
    fn exponentials_have_the_bits_of_the_scalar_ones() {
        let mut x: Vec<f32> = (0..1 << 16).map(|i| -(i as f32) * 0.0015).collect();
        x.extend([-0.0, -1e-30, -86.999_99, -87.0, -87.000_01, -1e30, f32::NEG_INFINITY, f32::NAN]);
        x.resize(x.len().next_multiple_of(16), -1.0);
        let expected: Vec<f32> = x.iter().map(|x| x.exp_negative()).collect();
        let mut wide = x.clone();
        simd::with_vectors(Exponentials(&mut wide));
        pulp::Simd::vectorize(pulp::Scalar128b, Exponentials(&mut x));
        for ((expected, wide), narrow) in expected.iter().zip(&wide).zip(&x) {
            for got in [wide, narrow] {
                assert!(expected.to_bits() == got.to_bits() || expected.is_nan() && got.is_nan(), "{expected} {got}");
            }
        }
    }
}
