//! Which bucket of samples feeds which classifiers.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use super::mersenne_twister::MersenneTwister;
use crate::{Error, Result};

const OP: &str = "Spread";
/// Most classifiers of an ensemble: far more than anyone trains, and few enough that no index overflows.
pub const MAX_CLASSIFIERS: usize = 1 << 24;
/// Seed of the published offsets.
const SEED: u32 = 1_000_000_207;

/// The inverse sensitivity `k`, the spreading degree `d`, and the set of `d` offsets: bucket `j` of the `n = k·d`
/// buckets feeds the classifiers `(j + r) mod n`, one for each offset `r` (section 3.1 of the paper).
///
/// ```
/// use gridgrad::methods::finite_aggregation::Spread;
/// let spread = Spread::new(3, 2)?;
/// assert_eq!((spread.n(), spread.offsets()), (6, &[2, 0][..]));
/// assert_eq!(spread.classifiers_of(5).collect::<Vec<_>>(), [1, 5]);
/// assert_eq!(spread.buckets_of(1).collect::<Vec<_>>(), [5, 1]);
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Fields")]
pub struct Spread {
    k: usize,
    d: usize,
    offsets: Vec<usize>,
}

/// A spread as a file has it, not checked yet.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Fields {
    k: usize,
    d: usize,
    offsets: Vec<usize>,
}

impl TryFrom<Fields> for Spread {
    type Error = Error;

    fn try_from(fields: Fields) -> Result<Self> {
        Spread::with_offsets(fields.k, fields.d, fields.offsets)
    }
}

impl Spread {
    /// The spread with the published offsets: `d` draws from `0..k·d` without replacement by MT19937, seeded with
    /// 1000000207.
    ///
    /// # Errors
    /// `Argument` where `k` or `d` is 0 or `k·d` is above [`MAX_CLASSIFIERS`].
    pub fn new(k: usize, d: usize) -> Result<Self> {
        let n = count(k, d)?;
        Ok(Spread { k, d, offsets: published_offsets(n, d) })
    }

    /// The spread with other offsets. Any set is sound, as long as it was chosen without looking at data.
    ///
    /// # Errors
    /// As [`new`](Spread::new), and where there are not `d` offsets, or they are not distinct and below `k·d`.
    pub fn with_offsets(k: usize, d: usize, offsets: Vec<usize>) -> Result<Self> {
        let n = count(k, d)?;
        if offsets.len() != d {
            return Err(Error::argument(OP, format!("got {} offsets, expected d = {d}", offsets.len())));
        }
        if let Some(offset) = offsets.iter().find(|offset| **offset >= n) {
            return Err(Error::argument(OP, format!("got offset {offset}, expected one below k·d = {n}")));
        }
        let mut seen = HashSet::new();
        if let Some(offset) = offsets.iter().find(|offset| !seen.insert(**offset)) {
            return Err(Error::argument(OP, format!("got offset {offset} twice, expected distinct ones")));
        }
        Ok(Spread { k, d, offsets })
    }

    /// Inverse sensitivity: one poisoned sample touches at most one in `k` votes.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Spreading degree: classifiers that a sample is in the training set of.
    pub fn d(&self) -> usize {
        self.d
    }

    /// Number of buckets, and of classifiers: `k·d`.
    pub fn n(&self) -> usize {
        self.k * self.d
    }

    /// The `d` offsets, as drawn.
    pub fn offsets(&self) -> &[usize] {
        &self.offsets
    }

    /// The `d` classifiers that `bucket` feeds, in the order of the offsets. Buckets count modulo `n`.
    pub fn classifiers_of(&self, bucket: usize) -> impl Iterator<Item = usize> + '_ {
        let (n, bucket) = (self.n(), bucket % self.n());
        self.offsets.iter().map(move |offset| (bucket + offset) % n)
    }

    /// The `d` buckets that `classifier` is trained on, in the order of the offsets. Classifiers count modulo `n`.
    pub fn buckets_of(&self, classifier: usize) -> impl Iterator<Item = usize> + '_ {
        let (n, classifier) = (self.n(), classifier % self.n());
        self.offsets.iter().map(move |offset| (classifier + n - offset) % n)
    }
}

/// `k·d`, if both are at least 1 and it is no more than an ensemble may have.
fn count(k: usize, d: usize) -> Result<usize> {
    if k == 0 || d == 0 {
        return Err(Error::argument(OP, format!("got k = {k} and d = {d}, expected both to be at least 1")));
    }
    k.checked_mul(d).filter(|n| *n <= MAX_CLASSIFIERS).ok_or_else(|| {
        Error::argument(OP, format!("got k = {k} and d = {d}, expected a product of at most {MAX_CLASSIFIERS}"))
    })
}

/// The sampling of the published scripts: from a pool where that is small beside the set of values drawn so far, else
/// by drawing again (section 6 of the specification). `n` is at most [`MAX_CLASSIFIERS`].
fn published_offsets(n: usize, d: usize) -> Vec<usize> {
    let mut generator = MersenneTwister::from_word(SEED);
    let mut below = |bound: usize| generator.below(bound as u32) as usize;
    let mut pool_up_to = 21;
    if d > 5 {
        let mut power = 1;
        while power < 3 * d {
            power *= 4;
        }
        pool_up_to += power;
    }
    if n <= pool_up_to {
        let mut pool: Vec<usize> = (0..n).collect();
        return (0..d).map(|_| pool.swap_remove(below(pool.len()))).collect();
    }
    let (mut drawn, mut seen) = (Vec::with_capacity(d), HashSet::new());
    while drawn.len() < d {
        let offset = below(n);
        if seen.insert(offset) {
            drawn.push(offset);
        }
    }
    drawn
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_are_the_published_ones() {
        for (k, offset) in [(50, 22), (100, 45), (250, 90), (400, 181), (1000, 363), (1200, 727), (3000, 1455)] {
            assert_eq!(Spread::new(k, 1).unwrap().offsets(), [offset]);
        }
        let published: [(usize, &[usize]); 9] = [
            (6, &[2, 0]),
            (20, &[11, 2, 15, 1]),
            (100, &[45, 11, 61, 4]),
            (150, &[90, 22, 123]),
            (800, &[363, 90, 492, 37, 157, 206, 304, 284, 280, 323, 331, 509, 536, 777, 102, 110]),
            (1600, &[727, 180, 985, 75, 315, 412, 609, 569, 560, 646, 662, 1018, 1073, 1554, 205, 221]),
            (2000, &[727, 180, 985, 1941, 75, 315, 412, 609]),
            (4000, &[1455, 360, 1970, 3882, 150, 630, 825, 1218, 3975, 1138, 1121, 1293, 1325, 3296, 3917, 2036]),
            (
                19200,
                &[
                    11644, 2883, 15765, 1201, 5044, 6601, 9751, 9107, 8975, 10350, 10602, 16289, 17176, 3286, 3546,
                    16008,
                ],
            ),
        ];
        for (n, offsets) in published {
            assert_eq!(Spread::new(n / offsets.len(), offsets.len()).unwrap().offsets(), offsets, "n = {n}");
        }
    }

    #[test]
    fn every_bucket_feeds_d_classifiers_and_every_classifier_has_d_buckets() {
        for (k, d) in [(1, 1), (1, 5), (7, 1), (3, 4), (5, 16), (1, 30), (2, 7)] {
            let spread = Spread::new(k, d).unwrap();
            let mut fed = vec![0; spread.n()];
            for bucket in 0..spread.n() {
                for classifier in spread.classifiers_of(bucket) {
                    fed[classifier] += 1;
                    assert!(spread.buckets_of(classifier).any(|b| b == bucket));
                }
                assert_eq!(spread.classifiers_of(bucket).collect::<HashSet<_>>().len(), d);
            }
            assert!(fed.iter().all(|&count| count == d), "{k} {d}: {fed:?}");
        }
    }

    #[test]
    fn what_cannot_be_spread_is_refused() {
        let message = |result: Result<Spread>| result.unwrap_err().to_string();
        for (k, d) in [(0, 1), (1, 0), (0, 0), (usize::MAX, 2), (1 << 24, 2), (2, 1 << 60)] {
            let text = message(Spread::new(k, d));
            assert!(text.contains(&format!("k = {k} and d = {d}")), "{text}");
            assert_eq!(text, message(Spread::with_offsets(k, d, vec![0; 1])));
        }
        assert!(message(Spread::with_offsets(3, 2, vec![1])).contains("got 1 offsets"));
        assert!(message(Spread::with_offsets(3, 2, vec![1, 6])).contains("offset 6"));
        assert!(message(Spread::with_offsets(3, 2, vec![1, 1])).contains("twice"));
    }

    #[test]
    fn a_file_is_checked_as_arguments_are() {
        let spread = Spread::new(5, 4).unwrap();
        let text = serde_json::to_string(&spread).unwrap();
        assert_eq!(text, r#"{"k":5,"d":4,"offsets":[11,2,15,1]}"#);
        assert_eq!(serde_json::from_str::<Spread>(&text).unwrap(), spread);
        let twice = r#"{"k":5,"d":2,"offsets":[1,1]}"#;
        assert!(serde_json::from_str::<Spread>(twice).unwrap_err().to_string().contains("twice"));
    }
}
