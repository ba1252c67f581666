//! The limit of Finite Aggregation for a large spreading degree (section 3.4 of the specification).
//!
//! With `k` fixed and `d` growing, whether a sample is in the training set of a classifier becomes an independent draw
//! of probability `1/k`. The ensemble's votes become the distribution of one classifier's vote over such random
//! training sets, of which a table of `M` classifiers, each on its own random set, is a sample.

use rayon::prelude::*;

use super::super::Votes;
use super::bagging::{bounds_of_sample, check_alpha};
use super::{Certificate, margin, others, plurality};
use crate::{Error, Result};

/// **An estimate, not a certificate**: the radius `⌊k·g / (1 + g)⌋` that the infinite ensemble would have if its vote
/// shares were those of the table, with the gap `g` between the shares of winner and runner-up, and if whether a single
/// sample is in the training set did not shift them. It tells what a larger `d` could bring; DPA has `⌊k·g / 2⌋`.
///
/// For a table of [`finite_aggregation`](super::finite_aggregation()), whose training sets overlap by the spread, the
/// same figure is where its radius is headed as `d` grows.
///
/// # Errors
/// `Argument` where `k` is 0.
pub fn infinite_estimate(votes: &Votes, k: usize) -> Result<Vec<Certificate>> {
    check_k("infinite_estimate", k)?;
    let estimate = |sample| {
        let counts = votes.counts(sample);
        let prediction = plurality(&counts);
        let least = others(counts.len(), prediction).map(|class| margin(&counts, prediction, class)).min();
        let radius = |least: usize| {
            let (numerator, denominator) = (k as u128 * least as u128, (votes.classifiers() + least) as u128);
            // At most k/2.
            (numerator / denominator) as usize
        };
        Certificate { prediction, radius: least.map_or(k, radius) }
    };
    Ok((0..votes.samples()).into_par_iter().map(estimate).collect())
}

/// Certificates of the infinite ensemble from a sample of its classifiers: all of them together are right with
/// probability `1 - alpha` over the draw of the training sets. `None` is an abstention, where the classifiers disagree
/// too much to tell which class wins.
///
/// Draw the random sets for `D` and a poisoned `D'` together, so that common samples are kept in both or in neither.
/// None of `m` samples in which they differ is kept with probability `q = (1 - 1/k)^m`, and then both classifiers are
/// the same. So no class gains or loses more than `1 - q`, and the answer stands while `p - p' > 2·(1 - q)`, with
/// Clopper-Pearson bounds for the shares `p` of the winner and `p'` of any other class, as [`bagging`](super::bagging())
/// has them. That uses nothing about single samples, hence is well below [`infinite_estimate`].
///
/// The classifiers must be on independent random sets, with every sample kept with probability `1/k`; those of a
/// [`Spread`](super::super::Spread) are not.
///
/// # Errors
/// `Argument` where `k` is 0 or `alpha` is not between 0 and 1.
pub fn infinite_bound(votes: &Votes, k: usize, alpha: f64) -> Result<Vec<Option<Certificate>>> {
    check_k("infinite_bound", k)?;
    check_alpha("infinite_bound", alpha)?;
    let certify = |sample| {
        let (prediction, winner, runner_up) = bounds_of_sample(votes, sample, alpha);
        let gap = winner - runner_up;
        (gap > 0.0).then(|| Certificate { prediction, radius: largest_attack(gap, k) })
    };
    Ok((0..votes.samples()).into_par_iter().map(certify).collect())
}

/// The largest `m` with `2·(1 - (1 - 1/k)^m) < gap`, for a gap above 0 and up to 1.
fn largest_attack(gap: f64, k: usize) -> usize {
    let keeps_none = |m: usize| m as f64 * (-1.0 / k as f64).ln_1p();
    let holds = |m: usize| m == 0 || -2.0 * keeps_none(m).exp_m1() < gap;
    let (mut certified, mut broken) = (0, k);
    // 2·(1 - (1 - 1/k)^k) is above 1, so k samples are too many.
    while broken - certified > 1 {
        let middle = certified + (broken - certified) / 2;
        if holds(middle) { certified = middle } else { broken = middle }
    }
    certified
}

fn check_k(op: &'static str, k: usize) -> Result<()> {
    if k == 0 {
        return Err(Error::argument(op, "got k = 0, expected at least 1"));
    }
    Ok(())
}
