//! What the processor can do at most.

use std::hint::black_box;
use std::time::Instant;

use pulp::{Simd, WithSimd};

use super::simd;

/// Operations per second of `f32` multiply-adds (two each) in registers, of all threads together: the limit that
/// matrix products are measured against. Takes a fraction of a second.
///
/// Every thread counts the median of its own bursts, which are shorter than the time that a system gives to one thread
/// before it turns to another: so the limit is hardly lower on a busy machine.
pub fn peak_flops() -> f64 {
    const BURSTS: usize = 65;
    const STEPS: usize = 50_000;
    let rates = rayon::broadcast(|_| {
        let mut rates = [0.0; BURSTS];
        for rate in &mut rates {
            let start = Instant::now();
            let work = simd::with_vectors(Chains { steps: STEPS });
            *rate = work as f64 / start.elapsed().as_secs_f64();
        }
        rates.sort_by(f64::total_cmp);
        rates[BURSTS / 2]
    });
    rates.iter().sum()
}

/// Independent chains of multiply-adds: enough to hide the latency of one behind the others, few enough for the
/// registers. Gives the number of operations.
struct Chains {
    steps: usize,
}

impl WithSimd for Chains {
    type Output = usize;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> usize {
        const CHAINS: usize = 12;
        let (factor, term) = (simd.splat_f32s(black_box(0.5)), simd.splat_f32s(black_box(0.25)));
        let mut values = [simd.splat_f32s(1.0); CHAINS];
        for _ in 0..self.steps {
            for value in &mut values {
                *value = simd.mul_add_f32s(*value, factor, term);
            }
        }
        black_box(values);
        2 * CHAINS * S::F32_LANES * self.steps
    }
}
