//! Bagging, the probabilistic baseline (Jia, Cao and Gong, AAAI 2021).

use rayon::prelude::*;

use super::super::Votes;
use super::beta::{lower_bound, upper_bound};
use super::{Certificate, others, plurality};
use crate::{Error, Result};

/// Room for the rounding of the radius condition: far above its error, far below what moves a radius that is not on the
/// edge already.
const SLACK: f64 = 1e-12;

/// How the classifiers of a bagging ensemble were trained, and how sure its certificates are to be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BaggingOptions {
    /// Samples that each classifier was trained on, drawn with replacement.
    pub subset_size: usize,
    /// Samples of the whole training set.
    pub train_size: usize,
    /// Probability that any certificate of the whole table is wrong: the published setup has 0.001.
    pub alpha: f64,
}

/// The most samples of a training set of [`bagging`]: radii stay within what the rounding of its condition can tell.
pub const MAX_TRAIN_SIZE: usize = 100_000_000;

/// Certificates of bagging: each holds against inserting, deleting or changing `radius` samples, and all of them
/// together are right with probability `1 - alpha` over the draw of the subsets. `None` is an abstention, where the
/// classifiers disagree too much to tell which class wins.
///
/// Votes must come from classifiers on independent random subsets; those of a [`Spread`](super::super::Spread) are not.
///
/// # Errors
/// `Argument` where `subset_size` or `train_size` is 0, `train_size` is above [`MAX_TRAIN_SIZE`], or `alpha` is not between 0 and 1.
pub fn bagging(votes: &Votes, options: &BaggingOptions) -> Result<Vec<Option<Certificate>>> {
    let &BaggingOptions { subset_size, train_size, alpha } = options;
    if subset_size == 0 || train_size == 0 {
        let message = format!("got subsets of {subset_size} of {train_size} samples, expected at least 1");
        return Err(Error::argument("bagging", message));
    }
    if train_size > MAX_TRAIN_SIZE {
        let message = format!("got a training set of {train_size} samples, expected at most {MAX_TRAIN_SIZE}");
        return Err(Error::argument("bagging", message));
    }
    check_alpha("bagging", alpha)?;
    let certify = |sample| {
        let (prediction, winner, runner_up) = bounds_of_sample(votes, sample, alpha);
        let radius = bagging_radius(winner, runner_up, subset_size, train_size)?;
        Some(Certificate { prediction, radius })
    };
    Ok((0..votes.samples()).into_par_iter().map(certify).collect())
}

pub(super) fn check_alpha(op: &'static str, alpha: f64) -> Result<()> {
    if alpha > 0.0 && alpha < 1.0 {
        return Ok(());
    }
    Err(Error::argument(op, format!("got alpha = {alpha}, expected a probability above 0 and below 1")))
}

/// The plurality class, a lower bound on the probability that a random classifier votes for it, and an upper bound on
/// that of any other class. Over the whole table all of these hold with probability `1 - alpha`.
pub(super) fn bounds_of_sample(votes: &Votes, sample: usize, alpha: f64) -> (usize, f64, f64) {
    let counts = votes.counts(sample);
    let prediction = plurality(&counts);
    let runner_up = others(counts.len(), prediction).map(|class| counts[class]).max();
    let level = alpha / (votes.samples() as f64 * counts.len() as f64);
    let (winner, other) = proportion_bounds(counts[prediction], runner_up, votes.classifiers(), level);
    (prediction, winner, other)
}

/// One-sided Clopper-Pearson bounds, each at level `alpha`: from below on the proportion of which `winner` of `trials`
/// were seen, from above on that of `runner_up`, which is also no more than what the first leaves. Where there is no
/// runner-up its bound is 0.
///
/// Counts above `trials` are taken as `trials`.
pub fn proportion_bounds(winner: usize, runner_up: Option<usize>, trials: usize, alpha: f64) -> (f64, f64) {
    let low = lower_bound(winner.min(trials), trials, alpha);
    let high = runner_up.map_or(0.0, |count| upper_bound(count.min(trials), trials, alpha).min(1.0 - low));
    (low, high)
}

/// The certified radius of bagging, from a lower bound on the probability of the top class and an upper bound on that
/// of any other: the largest `r` such that, for every size `N'` that `r` poisoned samples can bring about,
/// `(N'/N)^s - 2·((max(N, N') - r)/N)^s + 1 - winner + runner_up < 0` with `s` samples in a subset (section 9.3 of the
/// specification). `None` where the winner's bound is not above the other's.
///
/// ```
/// use gridgrad::methods::finite_aggregation::certify::bagging_radius;
/// assert_eq!(bagging_radius(0.9, 0.1, 100, 60_000), Some(305));
/// assert_eq!(bagging_radius(0.4, 0.6, 100, 60_000), None);
/// ```
pub fn bagging_radius(winner: f64, runner_up: f64, subset_size: usize, train_size: usize) -> Option<usize> {
    if winner <= runner_up || winner.is_nan() || runner_up.is_nan() {
        return None;
    }
    let holds = |radius| worst_case(radius, subset_size as f64, train_size as f64) < winner - runner_up;
    // The worst case grows with the radius; all samples deleted is too many.
    let (mut certified, mut broken) = (0, train_size);
    while broken - certified > 1 {
        let middle = certified + (broken - certified) / 2;
        if holds(middle as f64) { certified = middle } else { broken = middle }
    }
    Some(certified)
}

/// The largest of `(N'/N)^s - 2·((max(N, N') - r)/N)^s + 1` over `N' = N - r ..= N + r`.
fn worst_case(radius: f64, subset_size: f64, train_size: f64) -> f64 {
    let value = |size: f64| {
        let (whole, kept) = (subset_size * (size / train_size).ln(), subset_size * ((size - radius) / train_size).ln());
        // As a product, since both powers may be beyond what a number holds.
        let share = 1.0 - 2.0 * (kept - whole).exp();
        let scale = whole.exp();
        if share == 0.0 { 1.0 } else { scale * share + 1.0 + SLACK * scale.max(1.0) }
    };
    // Below N the value grows with N'; above, this is where its derivative is 0.
    let extremum = radius / (1.0 - 0.5f64.powf(1.0 / (subset_size - 1.0)));
    let inside = extremum.clamp(train_size, train_size + radius);
    [train_size, inside.floor(), inside.ceil(), train_size + radius].into_iter().map(value).fold(f64::MIN, f64::max)
}
