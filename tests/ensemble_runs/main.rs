//! Runs of base classifiers: what they leave, how they stop, go on and are merged, and what a changed sample changes.

mod folders;
mod networks;
mod refusals;
mod theorem;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use gridgrad::data::{Dataset, InMemory};
use gridgrad::methods::finite_aggregation::learner::{BaseLearner, Member, NearestNeighbour, Trained, Training};
use gridgrad::methods::finite_aggregation::run::{Answers, Ensemble, Run, Settings, Shard, Sources};
use gridgrad::methods::finite_aggregation::{ContentHash, Spread, Votes};
use gridgrad::{Error, Result};

/// The digits that come with the crate as they were published: pixels from 0 to 16, in the order of the file.
fn digits(range: std::ops::Range<usize>) -> InMemory {
    let digits = smartcore::dataset::digits::load_dataset();
    let pixels = digits.data[64 * range.start..64 * range.end].iter().map(|&ink| ink as u8).collect();
    let labels = digits.target[range].iter().map(|&label| label as usize).collect();
    InMemory::new("digits", (0..10).map(|digit| digit.to_string()).collect(), [8, 8, 1], pixels, labels).unwrap()
}

fn settings(k: usize, d: usize) -> Settings {
    Settings {
        data: "digits".into(),
        image_size: None,
        train_fraction: None,
        limit_test: None,
        ensemble: Ensemble::FiniteAggregation { spread: Spread::new(k, d).unwrap(), hash: ContentHash::Fnv1a },
        seed: 0,
        keep_scores: true,
        keep_weights: false,
    }
}

/// A set in memory, for small runs: 300 digits to learn from, 20 held out.
struct Small {
    train: InMemory,
    test: InMemory,
}

impl Small {
    fn new() -> Self {
        Small { train: digits(0..300), test: digits(1700..1720) }
    }

    fn sources<'a>(&'a self, learner: &'a dyn BaseLearner) -> Sources<'a> {
        Sources { train: &self.train, test: &self.test, learner }
    }

    /// Trains a whole run in `folder`.
    fn run(&self, folder: &Path, settings: Settings) -> PathBuf {
        train(folder, settings, &self.sources(&NearestNeighbour))
    }
}

fn train(folder: &Path, settings: Settings, sources: &Sources<'_>) -> PathBuf {
    let mut run = Run::create(folder, settings, Shard::WHOLE, sources).unwrap();
    assert!(run.train(&AtomicBool::new(false), |_| Ok(())).unwrap());
    folder.to_owned()
}

/// Trains in groups of `group`, and fails in place of the group after `groups`, as a process that is killed.
struct Limited<'a> {
    inner: &'a dyn BaseLearner,
    group: usize,
    groups: std::sync::atomic::AtomicUsize,
}

impl Limited<'static> {
    fn new(group: usize, groups: usize) -> Self {
        Limited { inner: &NearestNeighbour, group, groups: groups.into() }
    }
}

impl BaseLearner for Limited<'_> {
    fn recipe(&self) -> serde_json::Value {
        self.inner.recipe()
    }

    fn backend(&self) -> String {
        self.inner.backend()
    }

    fn group_size(&self) -> usize {
        self.group
    }

    fn open<'a>(&'a self, train: &'a InMemory, test: &'a InMemory) -> Result<Box<dyn Training + 'a>> {
        Ok(Box::new(LimitedTraining { inner: self.inner.open(train, test)?, groups: &self.groups }))
    }
}

struct LimitedTraining<'a> {
    inner: Box<dyn Training + 'a>,
    groups: &'a std::sync::atomic::AtomicUsize,
}

impl Training for LimitedTraining<'_> {
    fn train_each(&self, members: &[Member<'_>], done: &mut dyn FnMut(usize, Trained) -> Result<()>) -> Result<()> {
        let left = self.groups.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |groups| groups.checked_sub(1));
        left.map_err(|_| Error::Training("killed".into()))?;
        self.inner.train_each(members, done)
    }
}

/// Every file below a folder with its content, sorted by name.
fn content(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(content(&path));
        } else {
            files.push((path.clone(), std::fs::read(path).unwrap()));
        }
    }
    files.sort();
    files
}

/// Checks that two folders have the same files with the same bytes.
fn assert_same(a: &Path, b: &Path) {
    let names = |folder: &Path| -> Vec<(PathBuf, Vec<u8>)> {
        content(folder).into_iter().map(|(path, bytes)| (path.strip_prefix(folder).unwrap().into(), bytes)).collect()
    };
    let (first, second) = (names(a), names(b));
    assert_eq!(
        first.iter().map(|file| &file.0).collect::<Vec<_>>(),
        second.iter().map(|file| &file.0).collect::<Vec<_>>()
    );
    for (a, b) in first.iter().zip(&second) {
        assert!(a.1 == b.1, "{} differs", a.0.display());
    }
}

/// `set` with its samples in the given order, which may leave some out and repeat others.
fn in_order(set: &InMemory, order: &[usize]) -> InMemory {
    let size = set.image_bytes();
    let pixels = order.iter().flat_map(|&index| &set.pixels()[index * size..][..size]).copied().collect();
    let labels = order.iter().map(|&index| set.labels()[index]).collect();
    InMemory::new(set.name(), set.class_names().to_vec(), set.shape(), pixels, labels).unwrap()
}

fn votes(answers: &Answers) -> &Votes {
    answers.table.votes.as_ref().unwrap()
}

/// Share of right answers over all pairs of a classifier and a held-out sample.
fn base_accuracy(answers: &Answers) -> f64 {
    answers.certify(&answers.method(0.001)).unwrap().base_accuracy.unwrap()
}
