//! What a table of answers certifies, as numbers to print, save and plot.

use std::fmt;
use std::str::FromStr;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::certify::{self, BaggingOptions, Certificate, SinglePoison};
use super::{Scores, Spread, VoteFile, Votes};
use crate::{Error, Result};

const OP: &str = "certify";

/// How answers become certificates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method {
    /// Deep Partition Aggregation: [`certify::dpa`], for `d = 1`.
    Dpa,
    /// Finite Aggregation: [`certify::finite_aggregation`].
    FiniteAggregation,
    /// Finite Aggregation's coarse bound: [`certify::coarse`].
    Coarse,
    /// Run-off election from scores: [`certify::run_off_election`].
    RunOff,
    /// Enumeration for small ensembles: [`certify::exact`].
    Exact,
    /// Bagging: [`certify::bagging`]. The spread plays no part.
    Bagging(BaggingOptions),
    /// Hash bagging (Chen et al., section 9.4 of the specification), where each sample reaches at most `d` of `k·d`
    /// classifiers, whichever: the margin over `2·d`, as [`certify::coarse`].
    HashBagging,
    /// The limit of a large spreading degree: [`certify::infinite_estimate`]. No certificate.
    InfiniteEstimate,
    /// The limit's certificate from independent random training sets: [`certify::infinite_bound`], which fails with the
    /// given probability.
    InfiniteBound {
        /// Probability that any certificate of the table is wrong.
        alpha: f64,
    },
}

impl Method {
    /// The method's name on the command line and in reports.
    pub fn name(&self) -> &'static str {
        match self {
            Method::Dpa => "dpa",
            Method::FiniteAggregation => "fa",
            Method::Coarse => "coarse",
            Method::RunOff => "fa-roe",
            Method::Exact => "exact",
            Method::Bagging(_) => "bagging",
            Method::HashBagging => "hash-bagging",
            Method::InfiniteEstimate => "infinite-estimate",
            Method::InfiniteBound { .. } => "infinite-bound",
        }
    }

    /// What the radius promises.
    pub fn guarantee(&self) -> Guarantee {
        match self {
            Method::Bagging(BaggingOptions { alpha, .. }) | Method::InfiniteBound { alpha } => {
                Guarantee::Probabilistic { alpha: *alpha }
            }
            Method::InfiniteEstimate => Guarantee::None,
            _ => Guarantee::Deterministic,
        }
    }

    /// True where column `i` of the table must be classifier `i` of a spread.
    pub fn follows_spread(&self) -> bool {
        self.guarantee() == Guarantee::Deterministic
    }
}

/// How sure a radius is.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Guarantee {
    /// It holds for every attack of that size.
    Deterministic,
    /// All radii of the table hold together, but for the given probability over the draw of the training sets.
    Probabilistic {
        /// Probability of a wrong one.
        alpha: f64,
    },
    /// It is an estimate.
    None,
}

impl fmt::Display for Guarantee {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Guarantee::Deterministic => f.write_str("deterministic, against inserted and deleted samples"),
            Guarantee::Probabilistic { alpha } => {
                write!(f, "with probability {}, over the draw of subsets", 1.0 - alpha)
            }
            Guarantee::None => f.write_str("none: an estimate"),
        }
    }
}

/// What [`Report::certified_fraction`] counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FractionOf {
    /// Samples whose answer is their label, and is certified.
    Labels,
    /// Samples whose answer is certified, right or wrong: there are no labels.
    Predictions,
}

/// One sample's part of a [`Report`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SampleReport {
    /// The ensemble's class; `None` where it abstains.
    pub prediction: Option<usize>,
    /// The radius of that answer; -1 for an abstention.
    pub radius: i64,
    /// Whether the answer is the label; `None` without labels.
    pub correct: Option<bool>,
}

/// What an ensemble certifies. Shares are from 0 to 1; what needs labels is `None` without them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`Method::name`].
    pub method: String,
    /// What the radii promise.
    pub guarantee: Guarantee,
    /// The spread, where the certificate follows it.
    pub spread: Option<Spread>,
    /// Inverse sensitivity: that of the spread, or of random subsets, each sample in one with probability `1/k`. `None`
    /// for bagging.
    pub k: Option<usize>,
    /// Samples that each classifier drew; `None` for anything but bagging.
    pub subset_size: Option<usize>,
    /// Number of classifiers.
    pub classifiers: usize,
    /// How many versions of each classifier were added up, as DPA* does; `None` where there was one.
    pub versions: Option<usize>,
    /// Number of classes.
    pub classes: usize,
    /// Share of samples that the ensemble classifies right.
    pub clean_accuracy: Option<f64>,
    /// Share of pairs of sample and classifier that are right.
    pub base_accuracy: Option<f64>,
    /// The largest size at which at least half of the samples are certified; `None` where no size is.
    pub median_radius: Option<usize>,
    /// How many sizes, 0 included, have at least half of the samples certified: one more than the median radius. This is
    /// what the published scripts print as "robustness certificate".
    pub sizes_with_half_certified: Option<usize>,
    /// The most correct answers that a single poisoned sample can change, all at once; for votes by plurality.
    pub single_poison: Option<SinglePoison>,
    /// Whether there were labels for `certified_fraction`.
    pub certified_fraction_of: FractionOf,
    /// Share of samples that are classified right with a radius of `m` or more, for `m` from 0 to the largest radius, or
    /// to [`MAX_SIZE`](Report::MAX_SIZE) where that is less. Without labels it is `stable_fraction`.
    pub certified_fraction: Vec<f64>,
    /// Share of samples with a radius of `m` or more, right or wrong, for the same `m`.
    pub stable_fraction: Vec<f64>,
    /// Every sample, in the order of the table.
    pub samples: Vec<SampleReport>,
}

/// Certifies a table: the way from answers to a [`Report`].
///
/// Methods other than [`Method::RunOff`] take the votes, or where there are only scores, each classifier's best class.
///
/// # Errors
/// `Argument` where the table lacks what the method needs, its parts do not go together, or [`Method::Dpa`] is asked for
/// with `d > 1`; `Shape` where the columns are not the spread's classifiers; and as the functions of [`certify`](mod@certify).
///
/// ```
/// use gridgrad::methods::finite_aggregation::{Method, Spread, VoteFile, Votes, certify_table};
/// let votes = Votes::new(2, 3, 2, vec![0, 0, 0, 1, 0, 1])?;
/// let table = VoteFile { votes: Some(votes), labels: Some(vec![0, 0]), ..VoteFile::default() };
/// let report = certify_table(&table, &Spread::new(3, 1)?, &Method::Dpa)?;
/// assert_eq!(report.certified_fraction, [0.5, 0.5]);
/// # Ok::<(), gridgrad::Error>(())
/// ```
pub fn certify_table(table: &VoteFile, spread: &Spread, method: &Method) -> Result<Report> {
    table.check().map_err(|reason| Error::argument(OP, format!("the table {reason}")))?;
    if let Method::RunOff = method {
        let scores = table.scores.as_ref().ok_or_else(|| {
            Error::argument(OP, "fa-roe needs scores (samples, classifiers, classes), the table has votes alone")
        })?;
        let certificates = certify::run_off_election(scores, spread)?.into_iter().map(Some).collect();
        return report(table, &votes_of(table, scores)?, spread, method, certificates);
    }
    match (&table.votes, &table.scores) {
        (Some(votes), _) => certify_votes(table, votes, spread, method),
        (None, Some(scores)) => certify_votes(table, &Votes::from_scores(scores)?, spread, method),
        (None, None) => Err(Error::argument(OP, "the table has neither votes nor scores")),
    }
}

fn votes_of(table: &VoteFile, scores: &Scores) -> Result<Votes> {
    table.votes.clone().map_or_else(|| Votes::from_scores(scores), Ok)
}

fn certify_votes(table: &VoteFile, votes: &Votes, spread: &Spread, method: &Method) -> Result<Report> {
    let certain = |certificates: Vec<Certificate>| certificates.into_iter().map(Some).collect();
    let certificates = match method {
        Method::Dpa if spread.d() != 1 => {
            let message =
                format!("dpa is the case d = 1, got d = {}; use fa, or coarse for DPA's argument", spread.d());
            return Err(Error::argument(OP, message));
        }
        // One and the same for d = 1, where this checks the number of columns.
        Method::Dpa | Method::Coarse | Method::HashBagging => certain(certify::coarse(votes, spread)?),
        Method::FiniteAggregation | Method::RunOff => certain(certify::finite_aggregation(votes, spread)?),
        Method::Exact => certain(certify::exact(votes, spread)?),
        Method::Bagging(options) => certify::bagging(votes, options)?,
        Method::InfiniteEstimate => certain(certify::infinite_estimate(votes, spread.k())?),
        Method::InfiniteBound { alpha } => certify::infinite_bound(votes, spread.k(), *alpha)?,
    };
    report(table, votes, spread, method, certificates)
}

fn report(
    table: &VoteFile,
    votes: &Votes,
    spread: &Spread,
    method: &Method,
    certificates: Vec<Option<Certificate>>,
) -> Result<Report> {
    let labels = table.labels.as_deref();
    let sample = |(index, certificate): (usize, &Option<Certificate>)| SampleReport {
        prediction: certificate.map(|certificate| certificate.prediction),
        radius: certificate.map_or(-1, |certificate| certificate.radius as i64),
        correct: labels.map(|labels| certificate.is_some_and(|certificate| certificate.prediction == labels[index])),
    };
    let samples: Vec<SampleReport> = certificates.iter().enumerate().map(sample).collect();
    let largest = samples.iter().map(|sample| sample.radius).fold(0, i64::max);
    let sizes = usize::try_from(largest).unwrap_or(0).min(Report::MAX_SIZE) + 1;
    let stable = at_least(&samples, sizes, |_| true);
    let certified = labels.map(|_| at_least(&samples, sizes, |sample| sample.correct == Some(true)));
    let half = labels.map(|_| sizes_with_half(&samples));
    let share = |count: usize| count as f64 / samples.len() as f64;
    let by_plurality = method.follows_spread() && *method != Method::RunOff;
    let single_poison = match labels {
        Some(labels) if by_plurality => Some(certify::single_poison(votes, spread, labels)?),
        _ => None,
    };
    let right = |sample: &&SampleReport| sample.correct == Some(true);
    let subset_size = match method {
        Method::Bagging(options) => Some(options.subset_size),
        _ => None,
    };
    Ok(Report {
        method: method.name().into(),
        guarantee: method.guarantee(),
        spread: method.follows_spread().then(|| spread.clone()),
        k: subset_size.is_none().then_some(spread.k()),
        subset_size,
        classifiers: votes.classifiers(),
        versions: None,
        classes: votes.classes(),
        clean_accuracy: labels.map(|_| share(samples.iter().filter(right).count())),
        base_accuracy: labels.map(|labels| base_accuracy(votes, labels)),
        median_radius: half.and_then(|sizes| sizes.checked_sub(1)),
        sizes_with_half_certified: half,
        single_poison,
        certified_fraction_of: labels.map_or(FractionOf::Predictions, |_| FractionOf::Labels),
        certified_fraction: certified.as_ref().unwrap_or(&stable).iter().copied().map(share).collect(),
        stable_fraction: stable.into_iter().map(share).collect(),
        samples,
    })
}

/// For each size from 0 to `sizes - 1`, the number of chosen samples with that radius or more.
fn at_least(samples: &[SampleReport], sizes: usize, chosen: impl Fn(&SampleReport) -> bool) -> Vec<usize> {
    let mut counts = vec![0; sizes];
    for sample in samples.iter().filter(|sample| chosen(sample)) {
        if let Ok(radius) = usize::try_from(sample.radius) {
            counts[radius.min(sizes - 1)] += 1;
        }
    }
    for size in (1..counts.len()).rev() {
        counts[size - 1] += counts[size];
    }
    counts
}

/// How many sizes, from 0 on, have at least half of the samples right with such a radius or more.
fn sizes_with_half(samples: &[SampleReport]) -> usize {
    let right = samples.iter().filter(|sample| sample.correct == Some(true));
    let mut radii: Vec<i64> = right.map(|sample| sample.radius).collect();
    radii.sort_unstable_by(|a, b| b.cmp(a));
    let weakest = radii.get(samples.len().div_ceil(2).saturating_sub(1));
    weakest.map_or(0, |&radius| usize::try_from(radius).map_or(0, |radius| radius.saturating_add(1)))
}

/// Share of pairs of sample and classifier that are right. There is at least one of each.
fn base_accuracy(votes: &Votes, labels: &[usize]) -> f64 {
    let right = |(sample, &label): (usize, &usize)| {
        votes.of_sample(sample).iter().filter(|&&vote| usize::from(vote) == label).count()
    };
    let right: usize = labels.par_iter().enumerate().map(right).sum();
    right as f64 / (labels.len() as f64 * votes.classifiers() as f64)
}

impl Report {
    /// The largest size of the curves: they are no longer, however large a radius is. Radii of samples and
    /// [`fraction`](Report::fraction) have no such bound.
    pub const MAX_SIZE: usize = 100_000;

    /// The certified fraction at `size`, or without labels the share of stable answers; 0 beyond the largest radius.
    pub fn fraction(&self, size: usize) -> f64 {
        let counts = |sample: &&SampleReport| {
            sample.correct != Some(false) && usize::try_from(sample.radius).is_ok_and(|radius| radius >= size)
        };
        self.samples.iter().filter(counts).count() as f64 / self.samples.len().max(1) as f64
    }

    /// The largest size at which any answer is certified: the end of the curve, where that is no longer than
    /// [`MAX_SIZE`](Report::MAX_SIZE).
    pub fn largest_radius(&self) -> usize {
        self.samples.iter().filter_map(|sample| usize::try_from(sample.radius).ok()).max().unwrap_or(0)
    }

    /// The curves as CSV: a line for each size.
    pub fn to_csv(&self) -> String {
        let mut csv = "size,certified_fraction,stable_fraction\n".to_owned();
        for (size, (certified, stable)) in self.certified_fraction.iter().zip(&self.stable_fraction).enumerate() {
            csv += &format!("{size},{certified},{stable}\n");
        }
        csv
    }

    /// The report as JSON.
    ///
    /// # Errors
    /// None that a report of [`certify_table`] causes; `Config` where its numbers are not finite.
    pub fn to_json(&self) -> Result<String> {
        let text = serde_json::to_string(self);
        Ok(text.map_err(|error| Error::Config(format!("a report cannot be written as JSON: {error}")))? + "\n")
    }

    /// What the curve of this report is called beside others: the method and what it depends on, which is `k` and `d` for
    /// a spread, and else the number of classifiers with what says how large their subsets are.
    pub fn title(&self) -> String {
        let method = if self.method == "coarse" { "coarse bound" } else { &self.method };
        let classifiers = self.classifiers;
        let of = match (&self.spread, self.k, self.subset_size) {
            (Some(spread), ..) => format!("k = {}, d = {}", spread.k(), spread.d()),
            (None, Some(k), _) => format!("k = {k}, {classifiers} classifiers"),
            (None, None, Some(size)) => format!("{classifiers} classifiers of {size} samples"),
            (None, None, None) => format!("{classifiers} classifiers"),
        };
        let versions = self.versions.map_or_else(String::new, |versions| format!(", {versions} versions"));
        format!("{method}, {of}{versions}")
    }
}

impl FromStr for Report {
    type Err = Error;

    fn from_str(json: &str) -> Result<Self> {
        let report: Report =
            serde_json::from_str(json).map_err(|error| Error::Config(format!("not a report of certify: {error}")))?;
        if report.certified_fraction.is_empty() {
            return Err(Error::Config("not a report of certify: it has no certified fraction".into()));
        }
        let is_share = |share: &f64| (0.0..=1.0).contains(share);
        if !report.certified_fraction.iter().chain(&report.stable_fraction).all(is_share) {
            return Err(Error::Config("not a report of certify: a fraction is not between 0 and 1".into()));
        }
        Ok(report)
    }
}
