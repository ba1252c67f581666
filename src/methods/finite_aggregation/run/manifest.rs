//! `manifest.json`: what a run is, and which of its files are whole.

use std::io::Write;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::ser::Formatter;

use super::settings::{Settings, Shard};
use crate::file::write_atomically;
use crate::sha256::hex_digest;
use crate::{Error, Result};

/// The name of the file in a run's folder.
pub const MANIFEST: &str = "manifest.json";
const FORMAT: &str = "gridgrad run of base classifiers, version 2";

/// All that a certificate rests on beside the classifiers' files, whose digests it has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    format: String,
    /// What the shards of a run have in common.
    pub run: Identity,
    /// Which part of the classifiers this folder has.
    pub shard: Shard,
    /// Those classifiers, in order.
    pub classifiers: Vec<Record>,
    /// SHA-256 of this file with an empty string in this place.
    digest: String,
}

/// What the shards of a run have in common.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// The version of the crate.
    pub gridgrad: String,
    /// What that build was compiled from: a hash over sources, kernels and the versions of dependencies. Builds that
    /// differ may round differently, and are not mixed.
    pub build: String,
    /// What the bits of a classifier depend on outside of its recipe: device and instruction set.
    pub backend: String,
    /// The settings of the run.
    pub settings: Settings,
    /// The recipe of the learner.
    pub recipe: Value,
    /// The samples.
    pub data: DataRecord,
}

/// The samples of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataRecord {
    /// Names of the classes.
    pub classes: Vec<String>,
    /// (height, width, channels) of every image.
    pub shape: [usize; 3],
    /// Number of training samples.
    pub train_samples: usize,
    /// SHA-256 of the training set, whatever its order.
    pub train: String,
    /// SHA-256 of the held-out set, in its order.
    pub test: String,
    /// Labels of the held-out set: the order of all tables' rows.
    pub test_labels: Vec<usize>,
}

/// A classifier of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Its number, which is the column of its votes.
    pub classifier: usize,
    /// What decided its first weights, order and augmentation.
    pub seed: u64,
    /// Number of samples that it is trained on.
    pub samples: usize,
    /// SHA-256 of those samples.
    pub subset: String,
    /// What its training left, once it has.
    pub trained: Option<TrainedRecord>,
}

/// What training left.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainedRecord {
    /// SHA-256 of the file with its votes.
    pub votes: String,
    /// SHA-256 of the file with its weights, where they are kept.
    pub weights: Option<String>,
    /// Mean of each channel that it normalises with.
    pub mean: Vec<f32>,
    /// Standard deviation of each channel that it normalises with.
    pub deviation: Vec<f32>,
    /// Its last epoch's mean loss, where that is a number.
    pub loss: Option<f32>,
}

impl Manifest {
    /// Of a run that has no trained classifier yet.
    pub(super) fn new(run: Identity, shard: Shard, classifiers: Vec<Record>) -> Self {
        Manifest { format: FORMAT.into(), run, shard, classifiers, digest: String::new() }
    }

    /// Whether all classifiers of this folder are trained.
    pub fn is_complete(&self) -> bool {
        self.classifiers.iter().all(|record| record.trained.is_some())
    }

    /// Writes the file, whole or not at all.
    ///
    /// # Errors
    /// `Io` where the system refuses.
    pub(super) fn write(&mut self, folder: &Path) -> Result<()> {
        let path = folder.join(MANIFEST);
        self.digest.clear();
        self.digest = hex_digest(self.text(&path)?.as_bytes());
        write_atomically(&path, self.text(&path)?.as_bytes())
    }

    /// Reads the manifest of the run in `folder`.
    ///
    /// # Errors
    /// `Io` where it cannot be read; `Format` where it is damaged, was changed by hand, or is of another version.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(MANIFEST);
        let text = std::fs::read_to_string(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::InvalidData => Error::format(&path, "damaged: not UTF-8"),
            _ => Error::io(&path, error),
        })?;
        let damaged = |error: serde_json::Error| Error::format(&path, format!("damaged or not a manifest: {error}"));
        let value: Value = serde_json::from_str(&text).map_err(damaged)?;
        if let Some(format) = value.get("format").filter(|format| *format != FORMAT) {
            return Err(Error::format(&path, format!("has format {format}, expected {FORMAT:?}")));
        }
        let manifest: Manifest = serde_json::from_str(&text).map_err(damaged)?;
        let empty = Manifest { digest: String::new(), ..manifest.clone() };
        let digest = hex_digest(empty.text(&path)?.as_bytes());
        if digest != manifest.digest || manifest.text(&path)? != text {
            return Err(Error::format(
                &path,
                "damaged, or changed by hand: its content has another digest than it says",
            ));
        }
        manifest.run.settings.check()?;
        Ok(manifest)
    }

    fn text(&self, path: &Path) -> Result<String> {
        let wrong = |error: &dyn std::fmt::Display| Error::format(path, format!("cannot be written as JSON: {error}"));
        let mut bytes = Vec::new();
        let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, Lines::default());
        self.serialize(&mut serializer).map_err(|error| wrong(&error))?;
        bytes.push(b'\n');
        String::from_utf8(bytes).map_err(|error| wrong(&error))
    }
}

/// JSON with a line for each key of the outer objects, and for each item of an outermost list.
#[derive(Default)]
struct Lines {
    /// For each object or list that is open, whether its items have lines of their own.
    open: Vec<bool>,
    /// Whether the outermost list is open.
    in_list: bool,
}

impl Lines {
    fn begin(&mut self, has_lines: bool) {
        let outer_has = self.open.last().is_none_or(|outer| *outer);
        self.open.push(has_lines && outer_has);
    }

    fn separate<W: ?Sized + Write>(&self, writer: &mut W, first: bool) -> std::io::Result<()> {
        match (self.open.last(), first) {
            (Some(true), true) => write!(writer, "\n{:1$}", "", 2 * self.open.len()),
            (Some(true), false) => write!(writer, ",\n{:1$}", "", 2 * self.open.len()),
            (_, true) => Ok(()),
            (_, false) => writer.write_all(b", "),
        }
    }

    fn end<W: ?Sized + Write>(&mut self, writer: &mut W, bracket: &str) -> std::io::Result<()> {
        match self.open.pop() {
            Some(true) => write!(writer, "\n{:1$}{bracket}", "", 2 * self.open.len()),
            _ => writer.write_all(bracket.as_bytes()),
        }
    }
}

impl Formatter for Lines {
    fn begin_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.begin(self.open.len() <= 2 && !self.in_list);
        writer.write_all(b"{")
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        self.separate(writer, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }

    fn end_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.end(writer, "}")
    }

    fn begin_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.begin(self.open.len() == 1);
        self.in_list |= self.open.len() == 2;
        writer.write_all(b"[")
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        self.separate(writer, first)
    }

    fn end_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.in_list &= self.open.len() != 2;
        self.end(writer, "]")
    }
}
