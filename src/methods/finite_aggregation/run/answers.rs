//! What the trained classifiers answered, from one folder or several shards.

use std::path::Path;

use rayon::prelude::*;

use super::super::{Scores, Votes};
use super::files;
use super::identity_differences;
use super::manifest::{Identity, MANIFEST, Manifest, Record};
use super::settings::Shard;
use crate::file::write_atomically;
use crate::{Error, Result};

/// The answers of all classifiers of a run: column `i` is classifier `i`.
pub struct Answers {
    /// What the run is.
    pub run: Identity,
    /// The classifiers, in order.
    pub classifiers: Vec<Record>,
    /// (held-out samples, classifiers).
    pub votes: Votes,
    /// (held-out samples, classifiers, classes), where they were kept.
    pub scores: Option<Scores>,
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
        let (samples, classes) = (run.data.test_labels.len(), run.data.classes.len());
        let read = |(folder, record): &(&Path, Record)| match &record.trained {
            Some(trained) => files::read(folder, record.classifier, trained, [samples, classes]),
            None => Err(untrained(folder, record)),
        };
        let answers = shards.classifiers.par_iter().map(read).collect::<Result<Vec<_>>>()?;
        let (votes, scores): (Vec<_>, Vec<_>) = answers.into_iter().map(|one| (one.votes, one.scores)).unzip();
        let scores = scores.into_iter().collect::<Option<Vec<_>>>();
        Ok(Answers {
            run,
            classifiers: shards.classifiers.into_iter().map(|(_, record)| record).collect(),
            votes: Votes::from_columns(classes, &votes)?,
            scores: scores.map(|scores| Scores::from_columns(classes, &scores)).transpose()?,
        })
    }

    /// Share of right answers over all pairs of a classifier and a held-out sample, 0 to 1.
    pub fn base_accuracy(&self) -> f64 {
        let labels = &self.run.data.test_labels;
        let right =
            |sample: usize| self.votes.of_sample(sample).iter().filter(move |v| usize::from(**v) == labels[sample]);
        let right: usize = (0..labels.len()).map(|sample| right(sample).count()).sum();
        right as f64 / (labels.len() * self.votes.classifiers()).max(1) as f64
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
    for inner in files::FOLDERS.into_iter().take(1 + usize::from(shards.run.settings.keep_weights)) {
        let inner = folder.join(inner);
        std::fs::create_dir_all(&inner).map_err(|error| Error::io(inner, error))?;
    }
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
                Some((first, identity)) => same_run((first, identity), (folder, &manifest.run))?,
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

fn same_run((first, a): (&Path, &Identity), (second, b): (&Path, &Identity)) -> Result<()> {
    let differences = identity_differences(a, b, second)?;
    if differences.is_empty() {
        return Ok(());
    }
    let list: String = differences.iter().map(|line| format!("\n  {line}")).collect();
    let message = format!("{} and {} are not shards of one run:{list}", first.display(), second.display());
    Err(Error::Config(message))
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
