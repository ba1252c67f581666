//! From tables of answers to certified radii.
//!
//! Every function here is for each sample by itself and in integers, but for the probabilities of [`bagging`] and
//! [`infinite_bound`]. A radius is that of the ensemble's own answer: no attack of that size changes it, whatever the
//! classifiers answer that it reaches.

mod bagging;
mod beta;
mod exact;
mod infinite;
mod plurality;
mod run_off;
#[cfg(test)]
mod tests;
mod windows;

pub use bagging::{BaggingOptions, MAX_TRAIN_SIZE, bagging, bagging_radius, proportion_bounds};
pub use exact::{MAX_EXACT, exact};
pub use infinite::{infinite_bound, infinite_estimate};
pub use plurality::{SinglePoison, coarse, dpa, finite_aggregation, single_poison};
pub use run_off::run_off_election;

use super::{Scores, Spread, Votes};
use crate::{Error, Result};

/// What an ensemble answers, and the size of attack up to which it keeps to that.
///
/// ```
/// use gridgrad::methods::finite_aggregation::{Votes, certify};
/// let votes = Votes::new(1, 5, 3, vec![0, 0, 0, 1, 2])?;
/// let certificate = certify::dpa(&votes)[0];
/// assert_eq!((certificate.prediction, certificate.radius), (0, 1));
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// The ensemble's class.
    pub prediction: usize,
    /// Buckets that an attacker may fill at will. As one inserted or deleted sample reaches one bucket, also the size
    /// of the symmetric difference between the training sets.
    pub radius: usize,
}

impl Certificate {
    /// Labels that may be flipped: a sample with another label stays in its bucket, so one flip counts once.
    pub fn label_flips(&self) -> usize {
        self.radius
    }

    /// Samples whose images may be edited: each can leave one bucket and enter another.
    pub fn edits(&self) -> usize {
        self.radius / 2
    }
}

/// The class with the most votes; the smaller one of equals.
fn plurality(counts: &[usize]) -> usize {
    (1..counts.len()).fold(0, |best, class| if counts[class] > counts[best] { class } else { best })
}

/// Votes that `challenger` may gain on the plurality class `winner` before it wins: `N_c - N_c' - [c' < c]`.
fn margin(counts: &[usize], winner: usize, challenger: usize) -> usize {
    counts[winner] - counts[challenger] - usize::from(challenger < winner)
}

/// All classes but `class`.
fn others(classes: usize, class: usize) -> impl Iterator<Item = usize> + Clone {
    (0..classes).filter(move |&other| other != class)
}

fn check_votes(op: &'static str, votes: &Votes, spread: &Spread) -> Result<()> {
    check_classifiers(op, votes.classifiers(), spread)
}

fn check_scores(op: &'static str, scores: &Scores, spread: &Spread) -> Result<()> {
    check_classifiers(op, scores.classifiers(), spread)
}

fn check_classifiers(op: &'static str, classifiers: usize, spread: &Spread) -> Result<()> {
    if classifiers != spread.n() {
        let (k, d, n) = (spread.k(), spread.d(), spread.n());
        return Err(Error::shape(
            op,
            format!("got answers of {classifiers} classifiers, expected k·d = {k}·{d} = {n}"),
        ));
    }
    Ok(())
}
