//! The files of a run: one with the votes of each classifier and, where they are kept, one with its weights.

use std::path::{Path, PathBuf};

use super::manifest::{Record, TrainedRecord};
use crate::file::write_atomically;
use crate::methods::finite_aggregation::learner::{Trained, vote};
use crate::nn::state_dict::{self, Metadata, StateDict};
use crate::sha256::hex_digest;
use crate::{Error, Result, Tensor};

/// The folders inside a run's folder.
pub(super) const FOLDERS: [&str; 2] = ["votes", "weights"];

/// Makes those folders, that of weights only where they are kept.
pub(super) fn make_folders(folder: &Path, keep_weights: bool) -> Result<()> {
    FOLDERS.into_iter().take(1 + usize::from(keep_weights)).try_for_each(|inner| {
        let inner = folder.join(inner);
        std::fs::create_dir_all(&inner).map_err(|error| Error::io(inner, error))
    })
}

/// Where the votes of `classifier` are.
pub fn votes_path(folder: &Path, classifier: usize) -> PathBuf {
    folder.join(FOLDERS[0]).join(format!("{classifier:06}.safetensors"))
}

/// Where the weights of `classifier` are, if they are kept.
pub fn weights_path(folder: &Path, classifier: usize) -> PathBuf {
    folder.join(FOLDERS[1]).join(format!("{classifier:06}.safetensors"))
}

/// Writes what training left, each file whole or not at all, and returns what the manifest says of it.
pub(super) fn write(
    folder: &Path,
    classifier: usize,
    trained: Trained,
    [samples, classes]: [usize; 2],
    keep_scores: bool,
) -> Result<TrainedRecord> {
    if trained.scores.len() != samples * classes {
        let message = format!(
            "classifier {classifier}: got {} scores for {samples} held-out images and {classes} classes",
            trained.scores.len()
        );
        return Err(Error::shape("BaseLearner::train", message));
    }
    let votes: Vec<i64> = trained.scores.chunks(classes).map(|scores| vote(scores) as i64).collect();
    let mut tensors = StateDict::new();
    let is_small = classes <= 256;
    let votes = match is_small {
        true => Tensor::new(&votes.iter().map(|&vote| vote as u8).collect::<Vec<_>>(), [samples])?,
        false => Tensor::new(&votes, [samples])?,
    };
    tensors.insert("votes".into(), votes);
    if keep_scores {
        tensors.insert("scores".into(), Tensor::new(&trained.scores, [samples, classes])?);
    }
    let weights = trained.weights.map(|weights| write_tensors(&weights_path(folder, classifier), &weights));
    Ok(TrainedRecord {
        weights: weights.transpose()?,
        votes: write_tensors(&votes_path(folder, classifier), &tensors)?,
        mean: trained.mean,
        deviation: trained.deviation,
        loss: Some(trained.loss).filter(|loss| loss.is_finite()),
    })
}

fn write_tensors(path: &Path, tensors: &StateDict) -> Result<String> {
    let bytes = state_dict::to_bytes(path, tensors, Metadata::new())?;
    write_atomically(path, &bytes)?;
    Ok(hex_digest(&bytes))
}

/// The bytes of the file at `path`, which must have `digest`.
fn sound_bytes(path: &Path, digest: &str) -> Result<Vec<u8>> {
    let bytes = std::fs::read(path).map_err(|error| Error::io(path, error))?;
    let got = hex_digest(&bytes);
    if got != digest {
        let message = format!(
            "damaged, or of another run: its SHA-256 is {}…, the manifest has {}…",
            &got[..12],
            digest.get(..12).unwrap_or(digest)
        );
        return Err(Error::format(path, message));
    }
    Ok(bytes)
}

/// The bytes of all files of a trained classifier, checked, with their places in a run's folder.
pub(super) fn all_bytes(folder: &Path, record: &Record) -> Result<Vec<(PathBuf, Vec<u8>)>> {
    let Some(trained) = &record.trained else { return Ok(Vec::new()) };
    let votes = (votes_path(Path::new(""), record.classifier), &trained.votes);
    let weights = trained.weights.as_ref().map(|digest| (weights_path(Path::new(""), record.classifier), digest));
    let files = std::iter::once(votes).chain(weights);
    files.map(|(path, digest)| Ok((path.clone(), sound_bytes(&folder.join(&path), digest)?))).collect()
}

/// Reads the votes of a trained classifier, one class for each held-out sample.
pub(super) fn read_votes(folder: &Path, record: &Record, samples: usize) -> Result<Vec<u16>> {
    let votes = read_tensor(folder, record, "votes", &[samples])?.to_f64_vec()?;
    let is_class = |vote: &f64| vote.fract() == 0.0 && (0.0..=f64::from(u16::MAX)).contains(vote);
    if let Some(vote) = votes.iter().find(|vote| !is_class(vote)) {
        let path = votes_path(folder, record.classifier);
        return Err(Error::format(path, format!("votes have the value {vote}, expected a class")));
    }
    Ok(votes.into_iter().map(|vote| vote as u16).collect())
}

/// Reads the scores of a trained classifier, (samples, classes).
pub(super) fn read_scores(folder: &Path, record: &Record, shape: [usize; 2]) -> Result<Vec<f32>> {
    read_tensor(folder, record, "scores", &shape)?.to_vec::<f32>()
}

/// Reads what is called `name` in the file of a trained classifier.
fn read_tensor(folder: &Path, record: &Record, name: &str, shape: &[usize]) -> Result<Tensor> {
    let path = votes_path(folder, record.classifier);
    let Some(trained) = &record.trained else {
        return Err(Error::format(path, "is of a classifier that is not trained yet"));
    };
    let (mut tensors, _) = state_dict::parse(&sound_bytes(&path, &trained.votes)?, &path)?;
    match tensors.remove(name) {
        Some(tensor) if **tensor.shape() == *shape => Ok(tensor),
        Some(tensor) => Err(Error::format(&path, format!("{name} have shape {}, expected {shape:?}", tensor.shape()))),
        None => Err(Error::format(&path, format!("has no {name}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The digest tells what is damaged, but not what was written wrong.
    #[test]
    fn votes_that_are_no_class_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        make_folders(folder.path(), false).unwrap();
        let written = |votes: Tensor| {
            let votes =
                write_tensors(&votes_path(folder.path(), 3), &StateDict::from([("votes".into(), votes)])).unwrap();
            let trained = TrainedRecord { votes, weights: None, mean: vec![], deviation: vec![], loss: None };
            let record = Record { classifier: 3, seed: 0, samples: 1, subset: "".into(), trained: Some(trained) };
            read_votes(folder.path(), &record, 2).map_err(|error| error.to_string())
        };
        assert_eq!(written(Tensor::new(&[0i64, 65_535], [2]).unwrap()), Ok(vec![0, 65_535]));
        for (votes, wrong) in [([0i64, -1], "value -1"), ([65_536, 0], "value 65536")] {
            let error = written(Tensor::new(&votes, [2]).unwrap()).unwrap_err();
            assert!(error.contains("000003.safetensors") && error.contains(wrong), "{error}");
        }
        for wrong in [0.5f32, f32::NAN] {
            assert!(written(Tensor::new(&[0.0, wrong], [2]).unwrap()).unwrap_err().contains("expected a class"));
        }
    }
}
