//! What the trained classifiers answered, from one folder or several shards.

use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::super::certify::BaggingOptions;
use super::super::{Method, Report, Scores, Spread, VoteFile, Votes, certify_table};
use super::files;
use super::identity_differences;
use super::manifest::{Identity, MANIFEST, Manifest, Record};
use super::settings::{Ensemble, Settings, Shard};
use crate::file::write_atomically;
use crate::{Error, Result};

/// The answers of all classifiers of a run: column `i` is classifier `i`.
pub struct Answers {
    /// What the run is.
    pub run: Identity,
    /// The classifiers, in order.
    pub classifiers: Vec<Record>,
    /// Votes of all classifiers on the held-out samples, offsets and labels. Scores, which take as much room for each
    /// class, are read where a method needs them.
    pub table: VoteFile,
    /// The folder of each classifier.
    folders: Vec<PathBuf>,
    /// Runs of the same classifiers with other seeds, whose scores are added.
    other_versions: Vec<Answers>,
}

impl Answers {
    /// Reads the answers of a run from its folder, or from those of its shards in any order. Every file is compared with
    /// its digest.
    ///
    /// # Errors
    /// `Config` where the folders are of different runs, or classifiers are missing, not trained or there twice; `Format`
    /// where a file is damaged or of another run; `Io` where one cannot be read.
    pub fn read<P: AsRef<Path>>(folders: &[P]) -> Result<Self> {
        let shards = Shards::read(folders)?;
        let run = shards.run.clone();
        let samples = run.data.test_labels.len();
        let read = |(folder, record): &(&Path, Record)| files::read_votes(folder, record, samples);
        let votes = shards.classifiers.par_iter().map(read).collect::<Result<Vec<_>>>()?;
        let offsets = match &run.settings.ensemble {
            Ensemble::FiniteAggregation { spread, .. } => Some(spread.offsets().to_vec()),
            Ensemble::Bagging { .. } | Ensemble::RandomSubsets { .. } => None,
        };
        let table = VoteFile {
            votes: Some(Votes::from_columns(run.data.classes.len(), &votes)?),
            scores: None,
            offsets,
            labels: Some(run.data.test_labels.clone()),
        };
        let (folders, classifiers) =
            shards.classifiers.into_iter().map(|(folder, record)| (folder.to_owned(), record)).unzip();
        Ok(Answers { run, classifiers, table, folders, other_versions: Vec::new() })
    }

    /// Boosted DPA (DPA*, Rezaei et al., ICML 2023): the folders are of whole runs that differ in their seed alone, and
    /// the sum of a classifier's scores over them counts as one classifier's. It depends on that classifier's buckets as
    /// each of its versions does, so that every certificate of a spread holds for the sums, for `d > 1` as well. Scores
    /// are added in the order of the seeds; [`run`](Answers::run) is the run with the smallest.
    ///
    /// # Errors
    /// As [`read`](Answers::read) for each folder; `Config` where there are fewer than two, runs differ in more than their
    /// seed or not in that, kept votes alone, or are of an ensemble whose subsets the seed decides.
    pub fn boosted<P: AsRef<Path>>(folders: &[P]) -> Result<Self> {
        if folders.len() < 2 {
            let message = format!("got {} runs to boost, expected two or more with different seeds", folders.len());
            return Err(Error::Config(message));
        }
        let read = |folder: &P| Ok((folder.as_ref().to_owned(), Answers::read(&[folder])?));
        let mut versions = folders.iter().map(read).collect::<Result<Vec<(PathBuf, Answers)>>>()?;
        versions.sort_by_key(|(_, answers)| answers.run.settings.seed);
        for [(one, a), (other, b)] in versions.array_windows() {
            check_versions((one, &a.run), (other, &b.run))?;
        }
        let (folder, mut first) = versions.remove(0);
        if !first.run.settings.keep_scores {
            let message = format!("boosting adds scores, and {} kept votes alone", folder.display());
            return Err(Error::Config(message));
        }
        first.other_versions = versions.into_iter().map(|(_, answers)| answers).collect();
        first.table.votes = Some(Votes::from_scores(&first.scores()?)?);
        Ok(first)
    }

    /// How many versions of each classifier there are: 1, but for [`boosted`](Answers::boosted) answers.
    pub fn versions(&self) -> usize {
        1 + self.other_versions.len()
    }

    /// Reads the scores of all classifiers, comparing every file with its digest again. Those of versions are added.
    ///
    /// # Errors
    /// `Config` where the run kept votes alone; as [`read`](Answers::read).
    pub fn scores(&self) -> Result<Scores> {
        let mut sum = self.own_scores()?;
        for version in &self.other_versions {
            sum.add(&version.own_scores()?)?;
        }
        Ok(sum)
    }

    fn own_scores(&self) -> Result<Scores> {
        if !self.run.settings.keep_scores {
            return Err(Error::Config("run-off election needs scores, and this run kept votes alone".into()));
        }
        let shape = [self.run.data.test_labels.len(), self.run.data.classes.len()];
        let files = self.folders.par_iter().zip(&self.classifiers);
        let columns = files.map(|(folder, record)| files::read_scores(folder, record, shape));
        Scores::from_columns(shape[1], &columns.collect::<Result<Vec<_>>>()?)
    }

    /// The method that an ensemble of this kind was made for. `alpha` is the probability with which that of bagging or of
    /// random subsets may fail.
    pub fn method(&self, alpha: f64) -> Method {
        match &self.run.settings.ensemble {
            Ensemble::FiniteAggregation { spread, .. } if spread.d() == 1 => Method::Dpa,
            Ensemble::FiniteAggregation { .. } => Method::FiniteAggregation,
            Ensemble::Bagging { samples, .. } => Method::Bagging(BaggingOptions {
                subset_size: *samples,
                train_size: self.run.data.train_samples,
                alpha,
            }),
            Ensemble::RandomSubsets { .. } => Method::InfiniteBound { alpha },
        }
    }

    /// Certifies the answers.
    ///
    /// # Errors
    /// `Config` where the certificate of `method` does not hold for classifiers that were trained in this way, or needs
    /// scores that were not kept; and as [`certify_table`].
    pub fn certify(&self, method: &Method) -> Result<Report> {
        let versions = Some(self.versions()).filter(|&versions| versions > 1);
        Ok(Report { versions, ..self.report(method)? })
    }

    fn report(&self, method: &Method) -> Result<Report> {
        let refuse = |message: String| Err(Error::Config(message));
        match &self.run.settings.ensemble {
            Ensemble::FiniteAggregation { spread, .. } => match method {
                Method::Bagging(_) | Method::InfiniteBound { .. } => refuse(format!(
                    "{} is for classifiers with independent random training sets; this run has those of Finite Aggregation",
                    method.name()
                )),
                Method::RunOff => {
                    let table = VoteFile { scores: Some(self.scores()?), ..self.table.clone() };
                    certify_table(&table, spread, method)
                }
                _ => certify_table(&self.table, spread, method),
            },
            Ensemble::Bagging { classifiers, .. } => match method {
                Method::Bagging(_) => certify_table(&self.table, &Spread::new(*classifiers, 1)?, method),
                _ => refuse(format!("this run is of bagging, whose classifiers {} does not certify", method.name())),
            },
            Ensemble::RandomSubsets { k, .. } => match method {
                Method::InfiniteBound { .. } | Method::InfiniteEstimate => {
                    certify_table(&self.table, &Spread::new(*k, 1)?, method)
                }
                _ => refuse(format!("this run is of random subsets, which {} does not certify", method.name())),
            },
        }
    }
}

/// Makes one run of its shards in `folder`, with the bytes that a single run would have left.
///
/// # Errors
/// As [`Answers::read`]; `Config` where `folder` holds a run already; `Io` where the system refuses.
pub fn merge<P: AsRef<Path>>(folders: &[P], folder: &Path) -> Result<Manifest> {
    if folder.join(MANIFEST).exists() {
        return Err(Error::Config(format!("{} holds a run already", folder.display())));
    }
    let shards = Shards::read(folders)?;
    files::make_folders(folder, shards.run.settings.keep_weights)?;
    for (from, record) in &shards.classifiers {
        for (name, bytes) in files::all_bytes(from, record)? {
            write_atomically(folder.join(name), &bytes)?;
        }
    }
    let records = shards.classifiers.into_iter().map(|(_, record)| record).collect();
    let mut manifest = Manifest::new(shards.run, Shard::WHOLE, records);
    manifest.write(folder)?;
    Ok(manifest)
}

/// All classifiers of a run, each trained, in order, with the folder that it is in.
struct Shards<'a> {
    run: Identity,
    classifiers: Vec<(&'a Path, Record)>,
}

impl<'a> Shards<'a> {
    fn read<P: AsRef<Path>>(folders: &'a [P]) -> Result<Self> {
        let mut run: Option<(&Path, Identity)> = None;
        let mut classifiers: Vec<(&Path, Record)> = Vec::new();
        for folder in folders.iter().map(AsRef::as_ref) {
            let manifest = Manifest::read(folder)?;
            match &run {
                None => run = Some((folder, manifest.run)),
                Some((first, identity)) => same_run("shards", (first, identity), (folder, &manifest.run))?,
            }
            classifiers.extend(manifest.classifiers.into_iter().map(|record| (folder, record)));
        }
        let Some((_, run)) = run else {
            return Err(Error::Config("got no run, expected at least one folder".into()));
        };
        classifiers.sort_by_key(|(_, record)| record.classifier);
        check_cover(&classifiers, run.settings.ensemble.classifiers())?;
        Ok(Shards { run, classifiers })
    }
}

/// `what` they are to be of one run, for errors.
fn same_run(what: &str, (first, a): (&Path, &Identity), (second, b): (&Path, &Identity)) -> Result<()> {
    let differences = identity_differences(a, b, second)?;
    if differences.is_empty() {
        return Ok(());
    }
    let list: String = differences.iter().map(|line| format!("\n  {line}")).collect();
    let message = format!("{} and {} are not {what} of one run:{list}", first.display(), second.display());
    Err(Error::Config(message))
}

/// Checks that two runs, sorted by seed, are versions of one and the same spread's classifiers.
fn check_versions((one, a): (&Path, &Identity), (other, b): (&Path, &Identity)) -> Result<()> {
    if !matches!(a.settings.ensemble, Ensemble::FiniteAggregation { .. }) {
        let message = format!(
            "{} is not of Deep Partition or Finite Aggregation: its seed decides the subsets, so that runs with other seeds \
             are no versions of it",
            one.display()
        );
        return Err(Error::Config(message));
    }
    if a.settings.seed == b.settings.seed {
        let (one, other, seed) = (one.display(), other.display(), a.settings.seed);
        return Err(Error::Config(format!("{one} and {other} both have the seed {seed}, expected different ones")));
    }
    let same_seed = Settings { seed: a.settings.seed, ..b.settings.clone() };
    same_run("versions", (one, a), (other, &Identity { settings: same_seed, ..b.clone() }))
}

/// Checks that each of `expected` classifiers is there once, and trained. `classifiers` are sorted.
fn check_cover(classifiers: &[(&Path, Record)], expected: usize) -> Result<()> {
    if let Some([(one, record), (other, _)]) =
        classifiers.array_windows().find(|[a, b]| a.1.classifier == b.1.classifier)
    {
        let message =
            format!("classifier {} is both in {} and in {}", record.classifier, one.display(), other.display());
        return Err(Error::Config(message));
    }
    let is_there = |classifier: &usize| classifiers.binary_search_by_key(classifier, |(_, r)| r.classifier).is_ok();
    let missing: Vec<usize> = (0..expected).filter(|classifier| !is_there(classifier)).collect();
    if let (Some(first), Some(last)) = (missing.first(), missing.last()) {
        let message = format!(
            "{} of {expected} classifiers are missing, from {first} to {last}: give the folders of all shards",
            missing.len()
        );
        return Err(Error::Config(message));
    }
    if classifiers.len() != expected {
        let (folder, record) = &classifiers[classifiers.len() - 1];
        let message = format!("lists classifier {} of {expected}", record.classifier);
        return Err(Error::format(folder.join(MANIFEST), message));
    }
    match classifiers.iter().find(|(_, record)| record.trained.is_none()) {
        Some((folder, record)) => Err(untrained(folder, record)),
        None => Ok(()),
    }
}

fn untrained(folder: &Path, record: &Record) -> Error {
    let folder = folder.display();
    Error::Config(format!(
        "classifier {} of {folder} is not trained yet; go on with --resume {folder}",
        record.classifier
    ))
}
