//! Certified defence against data poisoning: Finite Aggregation (Wang, Levine and Feizi, ICML 2022) and its relatives.
//!
//! The attacker chooses up to `m` samples to insert into the training set or to delete from it. Training on disjoint or
//! overlapping parts and letting the classifiers vote bounds how many votes those samples can change, and so how large
//! `m` must be to change the answer. That bound, the radius, holds for every attack of that size.
//!
//! 1. A [`Spread`] has `k` and `d`: the samples fall into `n = k·d` buckets by a [`ContentHash`], each bucket feeds `d`
//!    of `n` classifiers. `d = 1` is Deep Partition Aggregation (Levine and Feizi, ICLR 2021).
//! 2. [`Partition`] has the samples of each classifier, in an order that depends on their content alone.
//! 3. A [`learner`] makes classifiers of them, and a [`run`] keeps what was trained, on one machine or many.
//! 4. The classifiers' answers are [`Votes`], or [`Scores`] where run-off election is to follow.
//! 5. [`certify`] turns them into radii, and [`certify_table`] into a [`Report`].
//!
//! ```
//! use gridgrad::data::{self, Split};
//! use gridgrad::methods::finite_aggregation::{ContentHash, Partition, Spread};
//!
//! let digits = data::open("builtin", Split::Train, None)?;
//! let spread = Spread::new(25, 4)?;
//! let partition = Partition::new(&*digits, ContentHash::Fnv1a, &spread)?;
//! let samples: usize = (0..spread.n()).map(|classifier| partition.samples_of(classifier).len()).sum();
//! assert_eq!(samples, 4 * digits.len());
//! # Ok::<(), gridgrad::Error>(())
//! ```

pub mod certify;
mod hash;
pub mod learner;
mod mersenne_twister;
mod partition;
mod report;
pub mod run;
mod spread;
mod vote_file;
mod votes;

pub use hash::ContentHash;
pub use partition::Partition;
pub use report::{FractionOf, Guarantee, Method, Report, SampleReport, certify_table};
pub use spread::{MAX_CLASSIFIERS, Spread};
pub use vote_file::VoteFile;
pub use votes::{ScoreValues, Scores, Votes};
