//! Tables in safetensors files.

use std::path::Path;

use rayon::prelude::*;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use super::{ScoreValues, Scores, Votes};
use crate::file::write_atomically;
use crate::{Error, Result};

/// Answers of an ensemble as a file holds them. Tensors of the file:
///
/// - `votes`: integers (samples, classifiers), 0 to `classes - 1`, or `classes` for an abstention;
/// - `scores`: integers or floats (samples, classifiers, classes), larger is better;
/// - `offsets`: `d` integers, those of the [`Spread`](super::Spread);
/// - `labels`: integers (samples).
///
/// There must be votes or scores; other tensors are ignored.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct VoteFile {
    /// One class for each sample and classifier.
    pub votes: Option<Votes>,
    /// One score for each sample, classifier and class.
    pub scores: Option<Scores>,
    /// The offsets of the spread that the classifiers were trained with.
    pub offsets: Option<Vec<usize>>,
    /// The true class of each sample.
    pub labels: Option<Vec<usize>>,
}

impl VoteFile {
    /// Reads a file. Where `num_classes` is `None`, there are as many classes as scores have, or else as many as the
    /// largest label or vote asks for, but at least 2; no vote is an abstention then.
    ///
    /// # Errors
    /// `Io` where the file cannot be read, `Format` where it is damaged or holds neither votes nor scores, where a
    /// tensor has another shape or type than it must, or votes and labels are not in range.
    pub fn read(path: impl AsRef<Path>, num_classes: Option<usize>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(|error| Error::io(path, error))?;
        VoteFile::parse(&bytes, path, num_classes)
    }

    /// Reads the content of a file; `path` is for errors.
    ///
    /// # Errors
    /// As [`read`](VoteFile::read).
    pub fn parse(bytes: &[u8], path: &Path, num_classes: Option<usize>) -> Result<Self> {
        let damaged = |error| Error::format(path, format!("not a safetensors file: {error}"));
        let file = SafeTensors::deserialize(bytes).map_err(damaged)?;
        let names = file.names();
        let named = |name| file.tensor(name).ok().map(|view| Named { name, view, path });
        let (votes, scores) = (named("votes"), named("scores"));
        if votes.is_none() && scores.is_none() {
            let found = if names.is_empty() { "nothing".to_owned() } else { names.join(", ") };
            return Err(Error::format(path, format!("holds {found}, expected a tensor votes or scores")));
        }
        let scores = scores.map(|scores| scores.scores(num_classes)).transpose()?;
        let labels = named("labels").map(|labels| labels.indices()).transpose()?;
        let votes = match votes {
            Some(votes) => {
                let known = num_classes.or(scores.as_ref().map(Scores::classes));
                Some(votes.votes(known, labels.iter().flatten().copied().max())?)
            }
            None => None,
        };
        let offsets = named("offsets").map(|offsets| offsets.indices()).transpose()?;
        let file = VoteFile { votes, scores, offsets, labels };
        file.check().map_err(|reason| Error::format(path, reason))?;
        Ok(file)
    }

    /// Number of samples.
    pub fn samples(&self) -> usize {
        let of_scores = || self.scores.as_ref().map(Scores::samples);
        self.votes.as_ref().map(Votes::samples).or_else(of_scores).unwrap_or(0)
    }

    /// Number of classifiers.
    pub fn classifiers(&self) -> usize {
        let of_scores = || self.scores.as_ref().map(Scores::classifiers);
        self.votes.as_ref().map(Votes::classifiers).or_else(of_scores).unwrap_or(0)
    }

    /// Number of classes.
    pub fn classes(&self) -> usize {
        let of_scores = || self.scores.as_ref().map(Scores::classes);
        self.votes.as_ref().map(Votes::classes).or_else(of_scores).unwrap_or(0)
    }

    /// Checks that the parts go together, and says what does not.
    pub(super) fn check(&self) -> std::result::Result<(), String> {
        if let (Some(votes), Some(scores)) = (&self.votes, &self.scores) {
            let of_votes = [votes.samples(), votes.classifiers(), votes.classes()];
            let of_scores = [scores.samples(), scores.classifiers(), scores.classes()];
            if of_votes != of_scores {
                return Err(format!(
                    "votes are for {of_votes:?} samples, classifiers, classes, scores for {of_scores:?}"
                ));
            }
        }
        if self.samples() == 0 {
            return Err("has no samples".into());
        }
        let Some(labels) = &self.labels else { return Ok(()) };
        if labels.len() != self.samples() {
            return Err(format!("has {} labels for {} samples", labels.len(), self.samples()));
        }
        match labels.iter().position(|&label| label >= self.classes()) {
            Some(at) => Err(format!("sample {at} has label {}, expected one below {}", labels[at], self.classes())),
            None => Ok(()),
        }
    }

    /// Writes the file, whole or not at all. Votes take one byte each where classes allow.
    ///
    /// # Errors
    /// `Format` where the parts do not go together, `Io` where the system refuses.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        self.check().map_err(|reason| Error::format(path, reason))?;
        let mut tensors: Vec<(&str, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
        if let Some(votes) = &self.votes {
            let (dtype, data) = if votes.classes() <= usize::from(u8::MAX) {
                (Dtype::U8, votes.values().par_iter().map(|&vote| vote as u8).collect())
            } else {
                (Dtype::U16, votes.values().iter().flat_map(|vote| vote.to_le_bytes()).collect())
            };
            tensors.push(("votes", dtype, vec![votes.samples(), votes.classifiers()], data));
        }
        if let Some(scores) = &self.scores {
            let (dtype, data) = match scores.values() {
                ScoreValues::F32(values) => (Dtype::F32, values.iter().flat_map(|v| v.to_le_bytes()).collect()),
                ScoreValues::F64(values) => (Dtype::F64, values.iter().flat_map(|v| v.to_le_bytes()).collect()),
                ScoreValues::I64(values) => (Dtype::I64, values.iter().flat_map(|v| v.to_le_bytes()).collect()),
            };
            tensors.push(("scores", dtype, vec![scores.samples(), scores.classifiers(), scores.classes()], data));
        }
        for (name, indices) in [("offsets", &self.offsets), ("labels", &self.labels)] {
            if let Some(indices) = indices {
                let data = indices.iter().flat_map(|&index| (index as u64).to_le_bytes()).collect();
                tensors.push((name, Dtype::I64, vec![indices.len()], data));
            }
        }
        let unwritable = |error| Error::format(path, format!("cannot be written as safetensors: {error}"));
        let views = tensors.iter().map(|(name, dtype, shape, data)| {
            Ok((*name, TensorView::new(*dtype, shape.clone(), data).map_err(unwritable)?))
        });
        let bytes = safetensors::serialize(views.collect::<Result<Vec<_>>>()?, None).map_err(unwritable)?;
        write_atomically(path, &bytes)
    }
}

/// A tensor of a file, with what errors about it name.
struct Named<'a> {
    name: &'static str,
    view: TensorView<'a>,
    path: &'a Path,
}

impl Named<'_> {
    fn refuse<T>(&self, reason: String) -> Result<T> {
        Err(Error::format(self.path, format!("{}: {reason}", self.name)))
    }

    fn extents<const RANK: usize>(&self, axes: &str) -> Result<[usize; RANK]> {
        match <[usize; RANK]>::try_from(self.view.shape()) {
            Ok(extents) => Ok(extents),
            Err(_) => self.refuse(format!("has shape {:?}, expected {axes}", self.view.shape())),
        }
    }

    fn votes(&self, classes: Option<usize>, largest_label: Option<usize>) -> Result<Votes> {
        let [samples, classifiers] = self.extents("(samples, classifiers)")?;
        let largest = usize::from(u16::MAX);
        let classes = match classes {
            Some(classes) => classes,
            None => {
                let values =
                    self.integers(|value| usize::try_from(value).ok().filter(|&vote| vote < largest), largest)?;
                (values.into_par_iter().max().max(largest_label).unwrap_or(0) + 1).max(2)
            }
        };
        let convert = |value| u16::try_from(value).ok().filter(|&vote| usize::from(vote) <= classes);
        let values = self.integers(convert, classes.saturating_add(1))?;
        Votes::new(samples, classifiers, classes, values).map_err(|error| Error::format(self.path, error.to_string()))
    }

    /// A list of indices.
    fn indices(&self) -> Result<Vec<usize>> {
        let [_] = self.extents("one axis")?;
        self.integers(|value| u32::try_from(value).ok().map(|index| index as usize), u32::MAX as usize)
    }

    fn scores(&self, num_classes: Option<usize>) -> Result<Scores> {
        let [samples, classifiers, classes] = self.extents("(samples, classifiers, classes)")?;
        if let Some(expected) = num_classes.filter(|&expected| expected != classes) {
            return self.refuse(format!("has {classes} classes, expected {expected}"));
        }
        let data = self.view.data();
        let values = match self.view.dtype() {
            Dtype::F16 => ScoreValues::F32(decode(data, |bytes| half::f16::from_le_bytes(bytes).to_f32())),
            Dtype::BF16 => ScoreValues::F32(decode(data, |bytes| half::bf16::from_le_bytes(bytes).to_f32())),
            Dtype::F32 => ScoreValues::F32(decode(data, f32::from_le_bytes)),
            Dtype::F64 => ScoreValues::F64(decode(data, f64::from_le_bytes)),
            _ => ScoreValues::I64(self.integers(|value| i64::try_from(value).ok(), i64::MAX as usize)?),
        };
        let scores = Scores::new(samples, classifiers, classes, values);
        scores.map_err(|error| Error::format(self.path, error.to_string()))
    }

    /// The values of a tensor of any integer type, each through `convert`; what that refuses is an error, which says
    /// that values must be below `bound`.
    fn integers<T: Send + Copy>(&self, convert: impl Fn(i128) -> Option<T> + Sync, bound: usize) -> Result<Vec<T>> {
        let data = self.view.data();
        let values: Vec<Option<T>> = match self.view.dtype() {
            Dtype::U8 => decode(data, |bytes| convert(u8::from_le_bytes(bytes).into())),
            Dtype::I8 => decode(data, |bytes| convert(i8::from_le_bytes(bytes).into())),
            Dtype::U16 => decode(data, |bytes| convert(u16::from_le_bytes(bytes).into())),
            Dtype::I16 => decode(data, |bytes| convert(i16::from_le_bytes(bytes).into())),
            Dtype::U32 => decode(data, |bytes| convert(u32::from_le_bytes(bytes).into())),
            Dtype::I32 => decode(data, |bytes| convert(i32::from_le_bytes(bytes).into())),
            Dtype::U64 => decode(data, |bytes| convert(u64::from_le_bytes(bytes).into())),
            Dtype::I64 => decode(data, |bytes| convert(i64::from_le_bytes(bytes).into())),
            other => return self.refuse(format!("has dtype {other:?}, expected integers")),
        };
        let index = values.iter().position(Option::is_none);
        match index {
            None => Ok(values.into_iter().flatten().collect()),
            Some(index) => {
                self.refuse(format!("value {} at index {index} is not in 0 to {}", self.value(index), bound - 1))
            }
        }
    }

    /// The integer at `index`, for errors.
    fn value(&self, index: usize) -> i128 {
        let size = self.view.dtype().bitsize() / 8;
        let bytes = &self.view.data()[index * size..(index + 1) * size];
        let negative = matches!(self.view.dtype(), Dtype::I8 | Dtype::I16 | Dtype::I32 | Dtype::I64)
            && bytes.last().is_some_and(|&byte| byte >= 0x80);
        let mut wide = [if negative { 0xff } else { 0 }; 16];
        wide[..size].copy_from_slice(bytes);
        i128::from_le_bytes(wide)
    }
}

/// Little-endian numbers of `SIZE` bytes each.
fn decode<T: Send, const SIZE: usize>(data: &[u8], number: impl Fn([u8; SIZE]) -> T + Sync) -> Vec<T> {
    data.as_chunks::<SIZE>().0.par_iter().map(|&bytes| number(bytes)).collect()
}
