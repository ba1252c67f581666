//! The compute types of the CPU: `f32`, and `f64` for references and gradient checks.

use std::ops::{Add, AddAssign, Div, DivAssign, Mul, MulAssign, Neg, Sub, SubAssign};

use super::Factor;
use crate::tensor::Element;

mod sealed {
    /// Keeps `Float` to the two types that the matrix products know.
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
}

/// A type that CPU ops compute in. The functions of `f32` are branch-free polynomials that vectorise inside
/// [`simd::dispatch`](super::simd::dispatch), accurate to a few units in the last place; those of `f64` are exact to
/// rounding and make no claim to speed.
pub trait Float:
    sealed::Sealed
    + Factor<Sum = Self>
    + Element
    + PartialOrd
    + Default
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + SubAssign
    + MulAssign
    + DivAssign
    + std::iter::Sum
{
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// −∞, the identity of the maximum.
    const NEG_INFINITY: Self;
    /// `self * a + b`, rounded once.
    fn mul_add(self, a: Self, b: Self) -> Self;
    /// eˣ.
    fn exp(self) -> Self;
    /// Natural logarithm.
    fn ln(self) -> Self;
    /// Square root.
    fn sqrt(self) -> Self;
    /// |x|.
    fn abs(self) -> Self;
    /// Hyperbolic tangent.
    fn tanh(self) -> Self;
    /// Error function 2/√π ∫₀ˣ exp(−t²) dt.
    fn erf(self) -> Self;
    /// Sine, of radians.
    fn sin(self) -> Self;
    /// Cosine, of radians.
    fn cos(self) -> Self;
    /// xᵖ.
    fn powf(self, power: Self) -> Self;
    /// Whether this is no number.
    #[inline(always)]
    #[allow(clippy::eq_op, reason = "only a NaN differs from itself")]
    fn is_nan(self) -> bool {
        self != self
    }
    /// The larger one; NaN if either is NaN, so that a NaN is never hidden.
    #[inline(always)]
    fn nan_max(self, other: Self) -> Self {
        if (self < other) | other.is_nan() { other } else { self }
    }
    /// The smaller one; NaN if either is NaN.
    #[inline(always)]
    fn nan_min(self, other: Self) -> Self {
        if (self > other) | other.is_nan() { other } else { self }
    }
    /// eˣ for x ≤ 0 in fewer steps, with 0 where `f32` has no normal number for it.
    #[inline(always)]
    fn exp_negative(self) -> Self {
        self.exp()
    }
    /// 1 / (1 + e⁻ˣ).
    #[inline(always)]
    fn sigmoid(self) -> Self {
        Self::ONE / (Self::ONE + (-self).exp())
    }
    /// Φ(x), the distribution function of the standard normal.
    #[inline(always)]
    fn normal_cdf(self) -> Self {
        let half = Self::from_f64(0.5);
        half.mul_add((self * Self::from_f64(std::f64::consts::FRAC_1_SQRT_2)).erf(), half)
    }
    /// φ(x), the density of the standard normal.
    #[inline(always)]
    fn normal_pdf(self) -> Self {
        (self * self * Self::from_f64(-0.5)).exp() * Self::from_f64(INVERSE_SQRT_TAU)
    }
    /// Φ(x) and φ(x), which share an exponential.
    #[inline(always)]
    fn normal_cdf_and_pdf(self) -> [Self; 2] {
        [self.normal_cdf(), self.normal_pdf()]
    }
}

/// 1 / √(2π)
const INVERSE_SQRT_TAU: f64 = 0.398_942_280_401_432_7;

/// Evaluates a polynomial, highest coefficient first, by Horner's rule.
#[inline(always)]
fn horner<const N: usize>(x: f32, coefficients: [f32; N]) -> f32 {
    let mut value = coefficients[0];
    for &coefficient in &coefficients[1..] {
        value = value.mul_add(x, coefficient);
    }
    value
}

/// x = n ln 2 + r with |r| ≤ ln 2 / 2; exp(r) = 1 + r + r² p(r), p fitted to 3.3e-9.
#[inline(always)]
fn exp_f32(x: f32) -> f32 {
    // Adding and subtracting 1.5 · 2²³ rounds to the nearest integer and leaves it in the low mantissa bits.
    const ROUND: f32 = 12_582_912.0;
    // The clamp keeps NaN: both comparisons are false for it.
    let x = if x < -104.0 { -104.0 } else { x };
    let x = if x > 88.9 { 88.9 } else { x };
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-0.693_145_75, x);
    let r = n.mul_add(-1.428_606_8e-6, r);
    let p = horner(r, [1.381_314_2e-3, 8.369_419e-3, 4.166_845_7e-2, 1.666_651_5e-1, 0.5]);
    let e = (r * r).mul_add(p, r) + 1.0;
    // Two factors, since 2ⁿ alone leaves the range at both ends (subnormal results, and overflow to infinity).
    let n = (shifted.to_bits() as i32) - (ROUND.to_bits() as i32);
    let half = n >> 1;
    let power = |n: i32| f32::from_bits(((n + 127) << 23) as u32);
    e * power(half) * power(n - half)
}

/// Φ(x) and φ(x): with e = exp(−x²/2), φ = e / √(2π), and Φ(−|x|) = e m(|x|), where the polynomial m is fitted to
/// exp(x²/2) Φ(−x), which falls slowly, such that e m is off by no more than 1.7e-8.
#[inline(always)]
fn normal_f32(x: f32) -> [f32; 2] {
    let magnitude = x.abs();
    let e = exp_negative_f32(magnitude * magnitude * -0.5);
    // Beyond, e m is less than 3e-7.
    let t = if magnitude > 5.0 { 5.0 } else { magnitude };
    let m = horner(
        t,
        [
            -3.214_042e-7,
            7.815_431e-6,
            -8.559_338e-5,
            5.671_674e-4,
            -2.599_232_6e-3,
            9.018_813e-3,
            -2.548_722_6e-2,
            6.193_361_4e-2,
            -1.328_092_7e-1,
            2.499_732e-1,
            -3.989_406_5e-1,
            0.5,
        ],
    );
    let tail = e * m;
    [if x < 0.0 { tail } else { 1.0 - tail }, e * INVERSE_SQRT_TAU as f32]
}

/// Added to a number, leaves it rounded in the lowest bits of the sum.
pub(super) const EXP_NEGATIVE_ROUND: f32 = 12_582_912.0;
/// What f32's log₂ e leaves of it.
pub(super) const LOG2_E_REST: f32 = 1.925_963e-8;
/// 2ʳ for |r| ≤ ½, the highest power first.
pub(super) const POWER_OF_TWO: [f32; 7] =
    [1.534_581_4e-4, 1.339_993_2e-3, 9.618_489e-3, 5.550_328_6e-2, 2.402_264_6e-1, std::f32::consts::LN_2, 1.0];

/// exp(x) for x ≤ 0, with 0 for what is not a normal number: x = (n + r) ln 2 with |r| ≤ ½, and a polynomial for 2ʳ.
#[inline(always)]
fn exp_negative_f32(x: f32) -> f32 {
    const ROUND: f32 = EXP_NEGATIVE_ROUND;
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let r = x.mul_add(LOG2_E_REST, x.mul_add(std::f32::consts::LOG2_E, ROUND - shifted));
    let p = horner(r, POWER_OF_TWO);
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let value = p * f32::from_bits((n.wrapping_add(127) << 23) as u32);
    // NaN is not less than anything, and stays.
    if x < -87.0 { 0.0 } else { value }
}

/// An odd polynomial up to 1; 1 − exp(q(x)) above, with q fitted to ln erfc.
#[inline(always)]
fn erf_f32(x: f32) -> f32 {
    let magnitude = x.abs();
    let small = x * horner(
        x * x,
        [
            7.853_858e-5,
            -8.010_192_5e-4,
            5.188_327_6e-3,
            -2.685_381_2e-2,
            1.128_358_5e-1,
            -3.761_262_6e-1,
            std::f32::consts::FRAC_2_SQRT_PI,
        ],
    );
    // erf is 1 to f32 rounding from 3.92 on; the clamp keeps the polynomial inside its interval.
    let t = if magnitude > 4.0 { 4.0 } else { magnitude };
    let q = horner(
        t,
        [
            -2.144_559_2e-5,
            4.385_302e-4,
            -4.190_857e-3,
            2.517_181_2e-2,
            -1.083_615_6e-1,
            -6.332_724e-1,
            -1.129_552,
            1.824_604_8e-4,
        ],
    );
    let large = (1.0 - exp_f32(q)).copysign(x);
    if magnitude < 1.0 { small } else { large }
}

/// An odd polynomial up to 0.625; 1 − 2 / (exp(2x) + 1) above.
#[inline(always)]
fn tanh_f32(x: f32) -> f32 {
    let magnitude = x.abs();
    let square = x * x;
    let small =
        x * horner(square, [-5.659_985e-3, 2.059_098_4e-2, -5.372_106_7e-2, 1.333_112_8e-1, -3.333_326e-1, 1.0]);
    let large = (1.0 - 2.0 / (exp_f32(2.0 * magnitude) + 1.0)).copysign(x);
    if magnitude < 0.625 { small } else { large }
}

/// x = 2ᵉ m with m in [√½, √2); ln m = 2 atanh((m − 1) / (m + 1)) by its series.
#[inline(always)]
fn ln_f32(x: f32) -> f32 {
    let subnormal = x < f32::MIN_POSITIVE;
    let scaled = if subnormal { x * 8_388_608.0 } else { x };
    let bits = scaled.to_bits() as i32;
    // Offsetting by the bits of √½ makes the exponent field change at √½ instead of 1.
    let offset = bits.wrapping_sub(0x3f35_04f3);
    let exponent = (offset >> 23) as f32 - if subnormal { 23.0 } else { 0.0 };
    let m = f32::from_bits((bits.wrapping_sub(offset & (0xff80_0000_u32 as i32))) as u32);
    let f = m - 1.0;
    let s = f / (2.0 + f);
    let square = s * s;
    let series = square * horner(square, [0.222_222_22, 0.285_714_3, 0.4, 0.666_666_7]);
    let half_square = 0.5 * f * f;
    // ln m = f − (f²/2 − s (f²/2 + series)), which loses nothing where m is near 1.
    let ln_m = f - (half_square - s * (half_square + series));
    let value = exponent.mul_add(0.693_145_75, exponent.mul_add(1.428_606_8e-6, ln_m));
    let value = if x == 0.0 { f32::NEG_INFINITY } else { value };
    let value = if x < 0.0 { f32::NAN } else { value };
    if x < f32::INFINITY { value } else { x }
}

impl Float for f32 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const NEG_INFINITY: Self = f32::NEG_INFINITY;
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        f32::mul_add(self, a, b)
    }
    #[inline(always)]
    fn exp(self) -> Self {
        exp_f32(self)
    }
    #[inline(always)]
    fn ln(self) -> Self {
        ln_f32(self)
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        f32::sqrt(self)
    }
    #[inline(always)]
    fn abs(self) -> Self {
        f32::abs(self)
    }
    #[inline(always)]
    fn exp_negative(self) -> Self {
        exp_negative_f32(self)
    }
    #[inline(always)]
    fn normal_cdf(self) -> Self {
        normal_f32(self)[0]
    }
    #[inline(always)]
    fn normal_pdf(self) -> Self {
        normal_f32(self)[1]
    }
    #[inline(always)]
    fn normal_cdf_and_pdf(self) -> [Self; 2] {
        normal_f32(self)
    }
    #[inline(always)]
    fn tanh(self) -> Self {
        tanh_f32(self)
    }
    #[inline(always)]
    fn erf(self) -> Self {
        erf_f32(self)
    }
    #[inline(always)]
    fn sin(self) -> Self {
        f32::sin(self)
    }
    #[inline(always)]
    fn cos(self) -> Self {
        f32::cos(self)
    }
    #[inline(always)]
    fn powf(self, power: Self) -> Self {
        f32::powf(self, power)
    }
}

impl Float for f64 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const NEG_INFINITY: Self = f64::NEG_INFINITY;
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        f64::mul_add(self, a, b)
    }
    #[inline(always)]
    fn exp(self) -> Self {
        f64::exp(self)
    }
    #[inline(always)]
    fn ln(self) -> Self {
        f64::ln(self)
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        f64::sqrt(self)
    }
    #[inline(always)]
    fn abs(self) -> Self {
        f64::abs(self)
    }
    #[inline(always)]
    fn tanh(self) -> Self {
        f64::tanh(self)
    }
    #[inline(always)]
    fn erf(self) -> Self {
        libm::erf(self)
    }
    #[inline(always)]
    fn sin(self) -> Self {
        f64::sin(self)
    }
    #[inline(always)]
    fn cos(self) -> Self {
        f64::cos(self)
    }
    #[inline(always)]
    fn powf(self, power: Self) -> Self {
        f64::powf(self, power)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Largest error in units of the last place of the true value, over bit patterns spread across all finite floats.
    fn worst_ulp(approximate: fn(f32) -> f32, exact: fn(f64) -> f64, low: f32, high: f32) -> (f64, f32) {
        let mut worst = (0.0, 0.0);
        for bits in (0..=u32::MAX).step_by(1499) {
            let x = f32::from_bits(bits);
            if !(low..=high).contains(&x) {
                continue;
            }
            let truth = exact(f64::from(x));
            let rounded = truth as f32;
            let got = approximate(x);
            if !rounded.is_finite() {
                assert_eq!(got, rounded, "at {x}");
                continue;
            }
            let ulp = f64::from(f32::from_bits(rounded.abs().to_bits() + 1)) - f64::from(rounded.abs());
            let error = (f64::from(got) - truth).abs() / ulp;
            if error.is_nan() || error > worst.0 {
                worst = (error, x);
            }
        }
        worst
    }

    #[test]
    fn f32_functions_are_accurate_over_the_whole_range() {
        let all = f32::MAX;
        for (name, limit, (error, at)) in [
            ("exp", 2.0, worst_ulp(exp_f32, f64::exp, -all, all)),
            ("exp of negative numbers", 2.0, worst_ulp(exp_negative_f32, f64::exp, -87.0, 0.0)),
            ("erf", 3.0, worst_ulp(erf_f32, libm::erf, -all, all)),
            ("tanh", 3.0, worst_ulp(tanh_f32, f64::tanh, -all, all)),
            ("ln", 2.0, worst_ulp(ln_f32, f64::ln, 0.0, all)),
        ] {
            println!("{name}: {error:.2} ulp at {at:e}");
            assert!(error < limit, "{name} is off by {error} ulp at {at:e}");
        }
    }

    #[test]
    fn the_normal_distribution_is_accurate_over_the_whole_range() {
        let mut worst = [0.0; 3];
        for bits in (0..=u32::MAX).step_by(1499) {
            let x = f32::from_bits(bits);
            if !x.is_finite() {
                continue;
            }
            let wide = f64::from(x);
            let [cdf, pdf] = normal_f32(x).map(f64::from);
            let exact = [wide.normal_cdf(), wide.normal_pdf()];
            let below = 0.5 * libm::erfc(-wide / 2f64.sqrt());
            let errors = [(cdf - exact[0]).abs(), (pdf - exact[1]).abs(), (cdf - below).abs() / below];
            worst[0] = f64::max(worst[0], errors[0]);
            worst[1] = f64::max(worst[1], errors[1]);
            if x > -3.0 {
                worst[2] = f64::max(worst[2], errors[2]);
            }
        }
        println!("Φ: {:.1e}, φ: {:.1e}, relative error of Φ above −3: {:.1e}", worst[0], worst[1], worst[2]);
        assert!(worst[0] < 1.2e-7 && worst[1] < 7e-8 && worst[2] < 3e-5);
        assert!(normal_f32(f32::NAN).iter().all(|value| value.is_nan()));
        assert_eq!([normal_f32(f32::INFINITY), normal_f32(f32::NEG_INFINITY)], [[1.0, 0.0], [0.0, 0.0]]);
    }

    #[test]
    fn special_values_stay_special() {
        for function in [exp_f32, erf_f32, tanh_f32, ln_f32] {
            assert!(function(f32::NAN).is_nan());
        }
        assert_eq!((exp_f32(f32::INFINITY), exp_f32(f32::NEG_INFINITY)), (f32::INFINITY, 0.0));
        assert_eq!((ln_f32(0.0), ln_f32(f32::INFINITY)), (f32::NEG_INFINITY, f32::INFINITY));
        assert!(ln_f32(-1.0).is_nan());
        assert_eq!((erf_f32(50.0), tanh_f32(-50.0)), (1.0, -1.0));
        for (a, b) in [(f32::NAN, 1.0), (1.0, f32::NAN)] {
            assert!(a.nan_max(b).is_nan() && a.nan_min(b).is_nan());
        }
        assert_eq!((1f32.nan_max(2.0), 1f32.nan_min(2.0)), (2.0, 1.0));
    }
}
