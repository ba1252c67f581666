//! Certificates of the plurality vote: Deep Partition Aggregation and Finite Aggregation.

use rayon::prelude::*;

use super::super::{Spread, Votes};
use super::windows::Windows;
use super::{Certificate, check_votes, margin, others, plurality};
use crate::{Error, Result};

/// Deep Partition Aggregation, or `d = 1`: one poisoned sample changes one vote, and that moves a margin by 2 at most.
/// The radius is half the least margin, and no larger one could hold (Levine and Feizi 2021).
///
/// Where there is but one class the radius is the number of classifiers.
pub fn dpa(votes: &Votes) -> Vec<Certificate> {
    by_least_margin(votes, 2)
}

/// Finite Aggregation without a look at which votes a bucket reaches: half the least margin, over `d`. Never above
/// [`finite_aggregation`].
///
/// # Errors
/// `Shape` where the votes are not those of the spread's classifiers.
pub fn coarse(votes: &Votes, spread: &Spread) -> Result<Vec<Certificate>> {
    check_votes("coarse", votes, spread)?;
    Ok(by_least_margin(votes, 2 * spread.d()))
}

fn by_least_margin(votes: &Votes, per_bucket: usize) -> Vec<Certificate> {
    let certify = |sample| {
        let counts = votes.counts(sample);
        let prediction = plurality(&counts);
        let least = others(counts.len(), prediction).map(|class| margin(&counts, prediction, class)).min();
        Certificate { prediction, radius: least.map_or(votes.classifiers(), |least| least / per_bucket) }
    };
    (0..votes.samples()).into_par_iter().map(certify).collect()
}

/// Finite Aggregation (section 3.2 of the specification, from Wang, Levine and Feizi 2022).
///
/// Bucket `h` moves the margin between the winner `c` and a challenger `c'` by at most
/// `Δ_h = Σ 1 + [f_i = c] - [f_i = c']` over the classifiers `i` that it feeds. The radius is the largest number of
/// buckets whose largest `Δ_h` together do not exceed the margin, for the challenger where that is least. As a
/// classifier that two buckets feed is counted twice, [`exact`](super::exact()) may be larger for `d > 1`. For `d = 1`
/// this is [`dpa`]; where there is but one class the radius is the number of classifiers.
///
/// Time is `n·d` byte additions for each challenger that could be the one that binds, mostly one or two.
///
/// # Errors
/// `Shape` where the votes are not those of the spread's classifiers.
///
/// ```
/// use gridgrad::methods::finite_aggregation::{Spread, Votes, certify};
/// // No bucket feeds two of the four classifiers that vote for class 0.
/// let spread = Spread::with_offsets(4, 2, vec![0, 1])?;
/// let votes = Votes::new(1, 8, 5, vec![0, 1, 0, 2, 0, 3, 0, 4])?;
/// assert_eq!(certify::finite_aggregation(&votes, &spread)?[0].radius, 1);
/// assert_eq!(certify::coarse(&votes, &spread)?[0].radius, 0);
/// # Ok::<(), gridgrad::Error>(())
/// ```
pub fn finite_aggregation(votes: &Votes, spread: &Spread) -> Result<Vec<Certificate>> {
    check_votes("finite_aggregation", votes, spread)?;
    let certify = |windows: &mut Windows, sample| {
        let (counts, row) = (votes.counts(sample), votes.of_sample(sample));
        let prediction = plurality(&counts);
        let mut challengers: Vec<(usize, usize)> =
            others(counts.len(), prediction).map(|class| (margin(&counts, prediction, class), class)).collect();
        challengers.sort_unstable();
        let mut radius = spread.n();
        for (margin, challenger) in challengers {
            // The coarse radius of this one, and so of all that follow, is no less: they cannot bind.
            if margin / (2 * spread.d()) >= radius {
                break;
            }
            // Over the margin the challenger wins. All buckets together always get there.
            let losing = windows.fewest(margin + 1, weights(row, prediction, challenger));
            radius = radius.min(losing.map_or(spread.n(), |buckets| buckets - 1));
        }
        Certificate { prediction, radius }
    };
    Ok((0..votes.samples()).into_par_iter().map_init(|| Windows::new(spread), certify).collect())
}

/// `1 + [f_i = c] - [f_i = c']` for each classifier. An abstention counts as a third class.
fn weights(votes: &[u16], winner: usize, challenger: usize) -> impl Iterator<Item = u8> + '_ {
    let (winner, challenger) = (winner as u16, challenger as u16);
    votes.iter().map(move |&vote| 1 + u8::from(vote == winner) - u8::from(vote == challenger))
}

/// What one poisoned sample can do to a whole set of test samples at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SinglePoison {
    /// The bucket that does most harm, the first of equals.
    pub bucket: usize,
    /// Test samples that are classified right and can be lost through that bucket.
    pub lost: usize,
}

/// The most samples that one bucket can turn from right to wrong, all at the same time: the collective certificate for
/// attacks of size 1, exact as long as poisoned classifiers may answer anything (section 8 of the specification).
///
/// # Errors
/// `Shape` where the votes are not those of the spread's classifiers, or there is not one label for each sample.
pub fn single_poison(votes: &Votes, spread: &Spread, labels: &[usize]) -> Result<SinglePoison> {
    check_votes("single_poison", votes, spread)?;
    if labels.len() != votes.samples() {
        let message = format!("got {} labels for {} samples", labels.len(), votes.samples());
        return Err(Error::shape("single_poison", message));
    }
    let sum = |mut left: Vec<usize>, right: Vec<usize>| {
        left.iter_mut().zip(right).for_each(|(left, right)| *left += right);
        left
    };
    let harm = (0..votes.samples()).into_par_iter().fold(
        || Harm::new(spread),
        |mut harm, sample| {
            harm.add(votes, sample, labels[sample]);
            harm
        },
    );
    let lost = harm.map(|harm| harm.lost).reduce(|| vec![0; spread.n()], sum);
    let bucket = plurality(&lost);
    Ok(SinglePoison { bucket, lost: lost[bucket] })
}

/// For each bucket the samples that it can turn from right to wrong.
struct Harm<'a> {
    windows: Windows<'a>,
    lost: Vec<usize>,
    /// Whether a bucket can turn the sample at hand.
    turned: Vec<bool>,
}

impl<'a> Harm<'a> {
    fn new(spread: &'a Spread) -> Self {
        Harm { windows: Windows::new(spread), lost: vec![0; spread.n()], turned: vec![false; spread.n()] }
    }

    fn add(&mut self, votes: &Votes, sample: usize, label: usize) {
        let counts = votes.counts(sample);
        if plurality(&counts) != label {
            return;
        }
        let per_bucket = 2 * self.windows.spread().d();
        for challenger in others(counts.len(), label) {
            let margin = margin(&counts, label, challenger);
            if margin < per_bucket {
                let weights = weights(votes.of_sample(sample), label, challenger);
                self.windows.reaching(margin + 1, weights, |bucket| self.turned[bucket] = true);
            }
        }
        for (lost, turned) in self.lost.iter_mut().zip(&mut self.turned) {
            *lost += usize::from(std::mem::take(turned));
        }
    }
}
