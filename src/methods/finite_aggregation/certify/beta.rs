//! The regularised incomplete beta function, and bounds on a proportion from it.

/// More terms than counts of millions need: they grow with the square root.
const MAX_TERMS: usize = 100_000;
const TINY: f64 = 1e-300;

/// `I_x(a, b)` for positive `a` and `b`, by the continued fraction that converges fast below the mean (DLMF 8.17.22),
/// and by symmetry above.
pub(super) fn regularised_incomplete_beta(x: f64, a: f64, b: f64) -> f64 {
    if x <= 0.0 {
        return 0.0;
    }
    if x >= 1.0 {
        return 1.0;
    }
    let log_front = libm::lgamma(a + b) - libm::lgamma(a) - libm::lgamma(b) + a * x.ln() + b * (-x).ln_1p();
    if x <= (a + 1.0) / (a + b + 2.0) {
        log_front.exp() / (a * fraction(x, a, b))
    } else {
        1.0 - log_front.exp() / (b * fraction(1.0 - x, b, a))
    }
}

/// The continued fraction `1 + d_1/(1 + d_2/(1 + …))`, by Lentz's method.
fn fraction(x: f64, a: f64, b: f64) -> f64 {
    let away_from_zero = |value: f64| if value.abs() < TINY { TINY } else { value };
    let (mut value, mut numerator, mut denominator) = (1.0, 1.0, 0.0);
    for term in 1..MAX_TERMS {
        let m = (term / 2) as f64;
        let factor = if term % 2 == 0 {
            m * (b - m) * x / ((a + 2.0 * m - 1.0) * (a + 2.0 * m))
        } else {
            -(a + m) * (a + b + m) * x / ((a + 2.0 * m) * (a + 2.0 * m + 1.0))
        };
        denominator = 1.0 / away_from_zero(1.0 + factor * denominator);
        numerator = away_from_zero(1.0 + factor / numerator);
        value *= numerator * denominator;
        if (numerator * denominator - 1.0).abs() < 1e-15 {
            break;
        }
    }
    value
}

/// The lower Clopper-Pearson bound on a proportion of which `count` of `trials` were seen: the largest `p` at which that
/// many or more have a probability of at most `alpha`.
pub(super) fn lower_bound(count: usize, trials: usize, alpha: f64) -> f64 {
    if count == 0 {
        return 0.0;
    }
    let (a, b) = (count as f64, (trials - count + 1) as f64);
    let (mut low, mut high) = (0.0, 1.0);
    loop {
        let middle = 0.5 * (low + high);
        if middle <= low || middle >= high {
            // Neighbours: the one that is sure to be no larger than the bound.
            return low;
        }
        if regularised_incomplete_beta(middle, a, b) <= alpha { low = middle } else { high = middle }
    }
}

/// The upper bound, likewise.
pub(super) fn upper_bound(count: usize, trials: usize, alpha: f64) -> f64 {
    1.0 - lower_bound(trials - count, trials, alpha)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pr[X >= count] of a binomial, summed term by term.
    fn tail(count: usize, trials: usize, p: f64) -> f64 {
        let log_choose = |k: usize| -> f64 { (0..k).map(|i| ((trials - i) as f64 / (k - i) as f64).ln()).sum() };
        (count..=trials).map(|k| (log_choose(k) + k as f64 * p.ln() + (trials - k) as f64 * (-p).ln_1p()).exp()).sum()
    }

    #[test]
    fn closed_forms_and_binomial_tails() {
        for x in [1e-9, 0.1, 0.5, 0.83, 0.999_999] {
            let beta = regularised_incomplete_beta;
            approx::assert_relative_eq!(beta(x, 1.0, 1.0), x, max_relative = 1e-13);
            approx::assert_relative_eq!(beta(x, 3.0, 1.0), x.powi(3), max_relative = 1e-13);
            approx::assert_relative_eq!(beta(x, 2.0, 2.0), x * x * (3.0 - 2.0 * x), max_relative = 1e-13);
            let arcsine = 2.0 / std::f64::consts::PI * x.sqrt().asin();
            approx::assert_relative_eq!(beta(x, 0.5, 0.5), arcsine, max_relative = 1e-12);
        }
        for (count, trials, p) in [(1, 10, 0.03), (7, 10, 0.4), (90, 100, 0.8), (3, 1000, 0.01), (980, 1000, 0.95)] {
            let (a, b) = (count as f64, (trials - count + 1) as f64);
            approx::assert_relative_eq!(
                regularised_incomplete_beta(p, a, b),
                tail(count, trials, p),
                max_relative = 1e-10
            );
        }
    }

    #[test]
    fn bounds_meet_their_level_and_their_closed_forms() {
        for (trials, alpha) in [(10, 0.05), (1000, 1e-3), (1000, 1e-8), (19_200, 1e-6)] {
            assert_eq!(lower_bound(0, trials, alpha), 0.0);
            assert_eq!(upper_bound(trials, trials, alpha), 1.0);
            let root = alpha.powf(1.0 / trials as f64);
            approx::assert_relative_eq!(lower_bound(trials, trials, alpha), root, max_relative = 1e-10);
            approx::assert_relative_eq!(upper_bound(0, trials, alpha), 1.0 - root, max_relative = 1e-8);
        }
        for count in [1, 40, 500, 999] {
            approx::assert_relative_eq!(tail(count, 1000, lower_bound(count, 1000, 1e-3)), 1e-3, max_relative = 1e-8);
            let fewer = 1.0 - tail(count + 1, 1000, upper_bound(count, 1000, 1e-3));
            approx::assert_relative_eq!(fewer, 1e-3, max_relative = 1e-6);
        }
    }
}
