//! Runs: a folder in which base classifiers are trained, piece by piece, on one machine or many.
//!
//! A [`Run`] trains the classifiers of its [`Shard`] in groups. Files are written whole and then listed in the
//! [`Manifest`] with their digests, so that a run that is killed at any point has lost the unfinished group and nothing
//! else; resumed, it ends with the same bytes as one that was never stopped. [`merge`] makes one folder of the shards',
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
use super::learner::{BaseLearner, Member};
use crate::data::Dataset;
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
        let keeps_weights = manifest.run.settings.keep_weights;
        for inner in files::FOLDERS.into_iter().take(1 + usize::from(keeps_weights)) {
            let inner = folder.join(inner);
            std::fs::create_dir_all(&inner).map_err(|error| Error::io(inner, error))?;
        }
        manifest.write(folder)?;
        Ok(Run { folder: folder.to_owned(), manifest, samples, learner: sources.learner })
    }

    /// Goes on with the run in `folder`. Every file that it lists is checked.
    ///
    /// # Errors
    /// `Config` where samples, recipe, backend or version differ from those that the run was started with, which lists
    /// the differences; `Format` where a file is damaged or of another run; `Io` where one cannot be read.
    pub fn resume(folder: &Path, sources: &Sources<'a>) -> Result<Self> {
        let manifest = Manifest::read(folder)?;
        let samples = Samples::new(&manifest.run.settings, sources.train, sources.test)?;
        let now = identity(manifest.run.settings.clone(), &samples, sources);
        let differences = identity_differences(&manifest.run, &now, folder)?;
        if !differences.is_empty() {
            let list: String = differences.iter().map(|line| format!("\n  {line}")).collect();
            return Err(Error::Config(format!("{} cannot go on as it was started:{list}", folder.display())));
        }
        for record in &manifest.classifiers {
            files::all_bytes(folder, record)?;
        }
        Ok(Run { folder: folder.to_owned(), manifest, samples, learner: sources.learner })
    }

    /// What the run is, and how far.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Trains the classifiers that are not trained yet, in groups. After each group `report` hears of its records.
    /// Where `stop` is set, ends after the group. Returns whether all classifiers are trained.
    ///
    /// # Errors
    /// What the learner, the system or `report` say.
    pub fn train(&mut self, stop: &AtomicBool, mut report: impl FnMut(&[Record]) -> Result<()>) -> Result<bool> {
        let first_untrained = |manifest: &Manifest| manifest.classifiers.iter().position(|one| one.trained.is_none());
        while let Some(first) = first_untrained(&self.manifest) {
            if stop.load(Ordering::SeqCst) {
                return Ok(false);
            }
            let group = self.train_group(first)?;
            report(&self.manifest.classifiers[group])?;
        }
        Ok(true)
    }

    /// Trains untrained classifiers from place `first` in the list on, up to a trained one or as many as the learner likes.
    fn train_group(&mut self, first: usize) -> Result<std::ops::Range<usize>> {
        let records = &mut self.manifest.classifiers;
        let len = records[first..].iter().take(self.learner.group_size().max(1)).take_while(|r| r.trained.is_none());
        let group = first..first + len.count();
        let subsets: Vec<Vec<usize>> =
            records[group.clone()].iter().map(|record| self.samples.of(record.classifier)).collect();
        let member = |(record, samples): (&Record, _)| {
            let Record { classifier, seed, .. } = *record;
            Member { classifier, seed, samples }
        };
        let slices = subsets.iter().map(Vec::as_slice);
        let members: Vec<Member<'_>> = records[group.clone()].iter().zip(slices).map(member).collect();
        let trained = self.learner.train(&members, &self.samples.train, &self.samples.test)?;
        if trained.len() != members.len() {
            let message = format!("got {} results for {} classifiers", trained.len(), members.len());
            return Err(Error::shape("BaseLearner::train", message));
        }
        let shape = [self.samples.test.labels().len(), self.samples.test.classes()];
        let keep_scores = self.manifest.run.settings.keep_scores;
        for (record, trained) in records[group.clone()].iter_mut().zip(trained) {
            record.trained = Some(files::write(&self.folder, record.classifier, trained, shape, keep_scores)?);
        }
        self.manifest.write(&self.folder)?;
        Ok(group)
    }
}

fn identity(settings: Settings, samples: &Samples, sources: &Sources<'_>) -> Identity {
    Identity {
        gridgrad: env!("CARGO_PKG_VERSION").into(),
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
