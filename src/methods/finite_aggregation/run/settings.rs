//! What a run is made of.

use serde::{Deserialize, Serialize};

use super::super::{ContentHash, MAX_CLASSIFIERS, Spread};
use crate::{Error, Result};

/// Which samples each classifier is trained on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Ensemble {
    /// Finite Aggregation; with `d = 1` Deep Partition Aggregation.
    FiniteAggregation {
        /// `k`, `d` and the offsets.
        spread: Spread,
        /// What sends a sample to its bucket.
        hash: ContentHash,
    },
    /// Bagging (Jia et al., AAAI 2021): every classifier draws its samples with replacement.
    Bagging {
        /// Number of classifiers.
        classifiers: usize,
        /// Draws of each classifier.
        samples: usize,
    },
    /// The limit of Finite Aggregation for a large `d`, in samples of its classifiers: each keeps every sample with
    /// probability `1/k`, whatever the others do. A sample's bytes and the run's seed decide, so that a sample that is
    /// added or removed changes only the classifiers that keep it.
    RandomSubsets {
        /// Inverse of the probability.
        k: usize,
        /// Number of classifiers.
        classifiers: usize,
    },
}

impl Ensemble {
    /// Number of classifiers.
    pub fn classifiers(&self) -> usize {
        match self {
            Ensemble::FiniteAggregation { spread, .. } => spread.n(),
            Ensemble::Bagging { classifiers, .. } | Ensemble::RandomSubsets { classifiers, .. } => *classifiers,
        }
    }

    /// Most draws of a classifier of bagging, whose subset is in memory while it is trained.
    const MAX_DRAWS: usize = 1 << 24;
    /// Most draws of all classifiers together: days of hashing.
    const MAX_ALL_DRAWS: usize = 1 << 36;

    /// # Errors
    /// `Config` where there is no classifier or one without a draw, or too many of either. (A [`Spread`] was checked when
    /// it was built.)
    pub(super) fn check(&self) -> Result<()> {
        match self {
            Ensemble::Bagging { classifiers, samples } if *classifiers == 0 || *samples == 0 => {
                let message = format!(
                    "bagging of {classifiers} classifiers with {samples} samples each: expected at least 1 and 1"
                );
                Err(Error::Config(message))
            }
            Ensemble::Bagging { classifiers, samples }
                if *classifiers > MAX_CLASSIFIERS
                    || *samples > Self::MAX_DRAWS
                    || classifiers.saturating_mul(*samples) > Self::MAX_ALL_DRAWS =>
            {
                let message = format!(
                    "bagging of {classifiers} classifiers with {samples} samples each: expected at most \
                     {MAX_CLASSIFIERS} and {}, and a product of at most {}",
                    Self::MAX_DRAWS,
                    Self::MAX_ALL_DRAWS
                );
                Err(Error::Config(message))
            }
            Ensemble::RandomSubsets { k, classifiers }
                if !(1..=MAX_CLASSIFIERS).contains(k) || !(1..=MAX_CLASSIFIERS).contains(classifiers) =>
            {
                let message = format!(
                    "random subsets with k = {k} for {classifiers} classifiers: expected both to be 1 to {MAX_CLASSIFIERS}"
                );
                Err(Error::Config(message))
            }
            _ => Ok(()),
        }
    }
}

/// Settings of a run, beside the learner's recipe: what its shards have in common, and its files depend on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// A known set or a folder, for [`data::open`](crate::data::open).
    pub data: String,
    /// Side in pixels to which images are resized. Where absent, all become as large as the held-out images are, or,
    /// where these differ in size, [`SIDE`](Settings::SIDE) × [`SIDE`](Settings::SIDE). Training images play no part in it.
    pub image_size: Option<usize>,
    /// Expected fraction of the training images that take part, above 0 and at most 1; all where absent. Each image's
    /// bytes decide for it, so that no image depends on another.
    pub train_fraction: Option<f64>,
    /// How many of the held-out images take part, if not all: a draw of places in the file that never changes.
    pub limit_test: Option<usize>,
    /// Which samples each classifier is trained on.
    pub ensemble: Ensemble,
    /// Classifier `i` has the seed `seed + i`. Draws of bagging and random subsets depend on it as well.
    pub seed: u64,
    /// Whether scores of all classes are kept, which run-off election needs, or votes alone.
    pub keep_scores: bool,
    /// Whether weights are kept.
    pub keep_weights: bool,
}

impl Settings {
    /// Side to which images of different sizes are resized: that of the published setup for GTSRB.
    pub const SIDE: usize = 48;

    /// # Errors
    /// `Config` where the fraction of training images or the ensemble is out of range.
    pub(super) fn check(&self) -> Result<()> {
        if let Some(fraction) = self.train_fraction.filter(|fraction| !(*fraction > 0.0 && *fraction <= 1.0)) {
            let message = format!("got a train fraction of {fraction}, expected one above 0 and at most 1");
            return Err(Error::Config(message));
        }
        self.ensemble.check()
    }

    /// The seed of a classifier.
    pub fn seed_of(&self, classifier: usize) -> u64 {
        self.seed.wrapping_add(classifier as u64)
    }
}

/// A contiguous part of the classifiers: number `index`, from 1, of `count`.
///
/// ```
/// use gridgrad::methods::finite_aggregation::run::Shard;
/// let shard: Shard = "2/3".parse()?;
/// assert_eq!(shard.range(10)?, 3..6);
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shard {
    /// Which part, from 1.
    pub index: usize,
    /// Number of parts.
    pub count: usize,
}

impl Shard {
    /// All classifiers.
    pub const WHOLE: Shard = Shard { index: 1, count: 1 };

    /// The part of `classifiers`.
    ///
    /// # Errors
    /// `Config` where there is no such part, or fewer classifiers than parts.
    pub fn range(self, classifiers: usize) -> Result<std::ops::Range<usize>> {
        let Shard { index, count } = self;
        if index == 0 || index > count {
            return Err(Error::Config(format!("shard {self}: expected one from 1/{count} to {count}/{count}")));
        }
        if count > classifiers {
            return Err(Error::Config(format!("shard {self}: there are only {classifiers} classifiers")));
        }
        let border = |index: usize| (index as u128 * classifiers as u128 / count as u128) as usize;
        Ok(border(index - 1)..border(index))
    }
}

impl std::fmt::Display for Shard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.index, self.count)
    }
}

impl std::str::FromStr for Shard {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let numbers = text.split_once('/').and_then(|(index, count)| Some((index.parse().ok()?, count.parse().ok()?)));
        match numbers {
            Some((index, count)) if (1..=count).contains(&index) => Ok(Shard { index, count }),
            _ => Err(Error::Config(format!("shard {text:?}: expected i/n with i from 1 to n, such as 2/8"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_cover_all_classifiers_once() {
        for (classifiers, count) in [(1, 1), (10, 3), (7, 7), (100, 16)] {
            let ranges: Vec<_> = (1..=count).map(|index| Shard { index, count }.range(classifiers).unwrap()).collect();
            assert!(ranges.iter().all(|range| !range.is_empty()));
            assert!(ranges.into_iter().flatten().eq(0..classifiers));
        }
        assert!("3/2".parse::<Shard>().is_err() && "0/2".parse::<Shard>().is_err() && "2".parse::<Shard>().is_err());
        assert!(Shard { index: 1, count: 3 }.range(2).unwrap_err().to_string().contains("only 2 classifiers"));
    }
}
