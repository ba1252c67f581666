//! The exact radius of a plurality vote, by enumeration.

use rayon::prelude::*;

use super::super::{Spread, Votes};
use super::{Certificate, check_votes, margin, others, plurality};
use crate::{Error, Result};

/// Most classifiers that [`exact`] takes: it looks at all sets of buckets.
pub const MAX_EXACT: usize = 20;

/// The largest radius that can be certified when all is known of poisoned classifiers is that they may answer anything:
/// over all sets of buckets, with a classifier that several of them feed counted once (section 9.5 of the
/// specification). To measure [`finite_aggregation`](super::finite_aggregation()) by; time and memory grow as `2^n`.
///
/// # Errors
/// `Shape` where the votes are not those of the spread's classifiers, `Argument` where `n` is above [`MAX_EXACT`].
pub fn exact(votes: &Votes, spread: &Spread) -> Result<Vec<Certificate>> {
    check_votes("exact", votes, spread)?;
    if spread.n() > MAX_EXACT {
        let message = format!("got k·d = {} classifiers, expected at most {MAX_EXACT}: it tries all sets", spread.n());
        return Err(Error::argument("exact", message));
    }
    let reached = reached_by_sets(spread);
    let certify = |sample| {
        let (counts, row) = (votes.counts(sample), votes.of_sample(sample));
        let prediction = plurality(&counts);
        let mask = |class| (0..row.len()).filter(|&i| usize::from(row[i]) == class).fold(0u32, |mask, i| mask | 1 << i);
        let own = mask(prediction);
        let rivals: Vec<(u32, u32)> = others(counts.len(), prediction)
            .map(|class| (mask(class), margin(&counts, prediction, class) as u32))
            .collect();
        let loses = |&reached: &u32| {
            let damage =
                |theirs: u32| reached.count_ones() + (reached & own).count_ones() - (reached & theirs).count_ones();
            rivals.iter().any(|&(theirs, margin)| damage(theirs) > margin)
        };
        let losing = (0..reached.len()).filter(|&set| loses(&reached[set])).map(|set| set.count_ones() as usize).min();
        Certificate { prediction, radius: losing.map_or(spread.n(), |buckets| buckets - 1) }
    };
    Ok((0..votes.samples()).into_par_iter().map(certify).collect())
}

/// For each set of buckets, a bit for each, the set of classifiers that they feed.
fn reached_by_sets(spread: &Spread) -> Vec<u32> {
    let windows: Vec<u32> =
        (0..spread.n()).map(|bucket| spread.classifiers_of(bucket).fold(0, |mask, i| mask | 1 << i)).collect();
    let mut reached = vec![0u32; 1 << spread.n()];
    for set in 1..reached.len() {
        reached[set] = reached[set & (set - 1)] | windows[set.trailing_zeros() as usize];
    }
    reached
}
