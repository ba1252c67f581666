//! Runs: a folder in which base classifiers are trained, piece by piece, on one machine or many.
//!
//! A [`Run`] trains the classifiers of its [`Shard`] in groups. The files of a classifier are written whole as soon as it
//! is trained, and listed with their digests, after each group in the [`Manifest`], so that a run that is killed at any
//! point has lost the classifiers in work and nothing else; resumed, it ends with the same bytes as one that was never
//! stopped. [`merge`] makes one folder of the shards',
//! with the bytes that a single run would have left. [`Answers`] are what a certificate needs of them.
//!
//! ```
//! use std::sync::atomic::AtomicBool;
//! use gridgrad::data::{self, Split};
//! use gridgrad::methods::finite_aggregation::learner::NearestNeighbour;
//! use gridgrad::methods::finite_aggregation::run::{Answers, Ensemble, Run, Settings, Shard, Sources};
//! use gridgrad::methods::finite_aggregation::{ContentHash, Spread};
//!
//! let (train, test) = (data::open("builtin", Split::Train, None)?, data::open("builtin", Split::Test, None)?);
//! let settings = Settings {
//!     data: "builtin".into(),
//!     image_size: None,
//!     train_fraction: Some(0.1),
//!     limit_test: Some(10),
//!     ensemble: Ensemble::FiniteAggregation { spread: Spread::new(5, 2)?, hash: ContentHash::Fnv1a },
//!     seed: 0,
//!     keep_scores: true,
//!     keep_weights: false,
//! };
//! let folder = tempfile::tempdir().unwrap();
//! let sources = Sources { train: &*train, test: &*test, learner: &NearestNeighbour };
//! let mut run = Run::create(folder.path(), settings, Shard::WHOLE, &sources)?;
//! run.train(&AtomicBool::new(false), |_| Ok(()))?;
//! let answers = Answers::read(&[folder.path()])?;
//! let report = answers.certify(&answers.method(0.001))?;
//! assert_eq!((report.samples.len(), report.classifiers), (10, 10));
//! # Ok::<(), gridgrad::Error>(())
//! ```

mod answers;
mod files;
mod journal;
mod manifest;
mod samples;
mod settings;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

pub use answers::{Answers, merge};
pub use files::{votes_path, weights_path};
pub use manifest::{DataRecord, Identity, MANIFEST, Manifest, Record, TrainedRecord};
pub use settings::{Ensemble, Settings, Shard};

use self::samples::Samples;
use super::learner::{BaseLearner, Member, Training};
use crate::data::Dataset;
use crate::file::remove_unfinished;
use crate::train::config_differences;
use crate::{Error, Result};

/// What a run is trained from, beside its settings.
pub struct Sources<'a> {
    /// The training set, in any order.
    pub train: &'a dyn Dataset,
    /// The held-out set.
    pub test: &'a dyn Dataset,
    /// What trains the classifiers.
    pub learner: &'a dyn BaseLearner,
}

/// A folder in which classifiers are trained.
pub struct Run<'a> {
    folder: PathBuf,
    manifest: Manifest,
    samples: Samples,
    learner: &'a dyn BaseLearner,
}

impl<'a> Run<'a> {
    /// A new run in `folder`, which is made where it is missing.
    ///
    /// # Errors
    /// `Config` where the folder holds a run, there is no such shard, or settings and sets do not go together;
    /// `Argument` where there are fewer samples than buckets; `Io` where the system refuses.
    pub fn create(folder: &Path, settings: Settings, shard: Shard, sources: &Sources<'a>) -> Result<Self> {
        if folder.join(MANIFEST).exists() {
            return Err(Error::Config(format!("{} holds a run already", folder.display())));
        }
        settings.check()?;
        let range = shard.range(settings.ensemble.classifiers())?;
        let samples = Samples::new(&settings, sources.train, sources.test)?;
        let record = |classifier| {
            let subset = samples.of(classifier);
            let (seed, digest) = (settings.seed_of(classifier), samples.digest_of(&subset));
            Record { classifier, seed, samples: subset.len(), subset: digest, trained: None }
        };
        let classifiers = range.map(record).collect();
        let mut manifest = Manifest::new(identity(settings, &samples, sources), shard, classifiers);
        files::make_folders(folder, manifest.run.settings.keep_weights)?;
        manifest.write(folder)?;
        Ok(Run { folder: folder.to_owned(), manifest, samples, learner: sources.learner })
    }

    /// Goes on with the run in `folder`. Every file that it lists is checked; classifiers whose files are missing are
    /// trained again. No other process may train in the folder.
    ///
    /// # Errors
    /// `Config` where samples, recipe, backend, version or build differ from those that the run was started with, which lists
    /// the differences; `Format` where a file is damaged or of another run; `Io` where one cannot be read.
    pub fn resume(folder: &Path, sources: &Sources<'a>) -> Result<Self> {
        let mut manifest = Manifest::read(folder)?;
        let samples = Samples::new(&manifest.run.settings, sources.train, sources.test)?;
        let now = identity(manifest.run.settings.clone(), &samples, sources);
        let differences = identity_differences(&manifest.run, &now, folder)?;
        if !differences.is_empty() {
            let list: String = differences.iter().map(|line| format!("\n  {line}")).collect();
            return Err(Error::Config(format!("{} cannot go on as it was started:{list}", folder.display())));
        }
        recover(folder, &mut manifest)?;
        Ok(Run { folder: folder.to_owned(), manifest, samples, learner: sources.learner })
    }

    /// What the run is, and how far.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Trains the classifiers that are not trained yet, in groups of about the same size. `report` hears of each as soon as
    /// its files are written. Where `stop` is set, ends after the group. Returns whether all classifiers are trained.
    ///
    /// # Errors
    /// What the learner, the system or `report` say.
    pub fn train(&mut self, stop: &AtomicBool, mut report: impl FnMut(&Record) -> Result<()>) -> Result<bool> {
        let Run { folder, manifest, samples, learner } = self;
        let is_left = |&place: &usize| manifest.classifiers[place].trained.is_none();
        let mut left: Vec<usize> = (0..manifest.classifiers.len()).filter(is_left).collect();
        if left.is_empty() {
            return Ok(true);
        }
        // Classifiers of the same number of steps are computed together.
        left.sort_by_key(|&place| std::cmp::Reverse(manifest.classifiers[place].samples));
        let training = learner.open(&samples.train, &samples.test)?;
        for group in left.chunks(learner.group_size().max(1)) {
            if stop.load(Ordering::SeqCst) {
                return Ok(false);
            }
            train_group(folder, manifest, samples, (&*training, group), &mut report)?;
        }
        Ok(true)
    }
}

/// Trains the classifiers at the places `group` of the list.
fn train_group(
    folder: &Path,
    manifest: &mut Manifest,
    samples: &Samples,
    (training, group): (&dyn Training, &[usize]),
    report: &mut dyn FnMut(&Record) -> Result<()>,
) -> Result<()> {
    let numbers: Vec<usize> = group.iter().map(|&place| manifest.classifiers[place].classifier).collect();
    let subsets: Vec<Vec<usize>> = numbers.iter().map(|&classifier| samples.of(classifier)).collect();
    let member = |(&classifier, samples)| {
        let seed = manifest.run.settings.seed_of(classifier);
        Member { classifier, seed, samples }
    };
    let members: Vec<Member<'_>> = numbers.iter().zip(subsets.iter().map(Vec::as_slice)).map(member).collect();
    let shape = [samples.test.labels().len(), samples.test.classes()];
    let keep_scores = manifest.run.settings.keep_scores;
    let mut results = 0;
    training.train_each(&members, &mut |place, trained| {
        let record = &mut manifest.classifiers[group[place]];
        record.trained = Some(files::write(folder, record.classifier, trained, shape, keep_scores)?);
        journal::append(folder, record)?;
        results += 1;
        report(record)
    })?;
    if results != members.len() {
        let message = format!("got {results} results for {} classifiers", members.len());
        return Err(Error::shape("Training::train_each", message));
    }
    manifest.write(folder)?;
    journal::remove(folder)
}

/// What a killed process left: its journal goes into the manifest, files that it had not finished are removed, and
/// classifiers whose files are missing count as not trained.
fn recover(folder: &Path, manifest: &mut Manifest) -> Result<()> {
    let before = manifest.classifiers.clone();
    for finished in journal::read(folder)? {
        let as_listed = Record { trained: None, ..finished.clone() };
        if let Some(record) = manifest.classifiers.iter_mut().find(|record| **record == as_listed) {
            *record = finished;
        }
    }
    for record in &mut manifest.classifiers {
        match files::all_bytes(folder, record) {
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => record.trained = None,
            result => drop(result?),
        }
    }
    remove_unfinished(folder)?;
    files::FOLDERS.iter().try_for_each(|inner| remove_unfinished(&folder.join(inner)))?;
    files::make_folders(folder, manifest.run.settings.keep_weights)?;
    if manifest.classifiers != before {
        manifest.write(folder)?;
    }
    journal::remove(folder)
}

fn identity(settings: Settings, samples: &Samples, sources: &Sources<'_>) -> Identity {
    Identity {
        gridgrad: env!("CARGO_PKG_VERSION").into(),
        build: env!("GRIDGRAD_BUILD").into(),
        backend: sources.learner.backend(),
        settings,
        recipe: sources.learner.recipe(),
        data: DataRecord {
            classes: sources.train.class_names().to_vec(),
            shape: samples.train.shape(),
            train_samples: samples.train.labels().len(),
            train: samples.train_digest(),
            test: samples.test_digest(),
            test_labels: samples.test.labels().to_vec(),
        },
    }
}

/// Where two runs differ, a line for each place.
fn identity_differences(then: &Identity, now: &Identity, folder: &Path) -> Result<Vec<String>> {
    let json = |identity: &Identity| {
        let wrong = |error| Error::format(folder, format!("settings cannot be written as JSON: {error}"));
        serde_json::to_value(identity).map_err(wrong)
    };
    Ok(config_differences(&json(then)?, &json(now)?))
}
