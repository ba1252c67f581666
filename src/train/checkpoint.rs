//! A training run in one file, from which it goes on as if it had never stopped.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::metrics::{EpochMetrics, RunningMeans};
use super::precision::LossScale;
use crate::nn::StateDict;
use crate::nn::state_dict::{self, Metadata};
use crate::{Device, Error, Result};

/// The key of the file's metadata that makes it a checkpoint. There is no other, so equal runs write equal bytes.
const KEY: &str = "gridgrad.checkpoint";
const FORMAT_VERSION: u64 = 1;
const OPTIMIZER: &str = "optimizer.";
const EMA: &str = "ema.";

/// How far a training run is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// Steps of the optimizer done.
    pub step: usize,
    /// Epochs done.
    pub epoch: usize,
    /// Batches of the present epoch done.
    pub batch: usize,
    /// Batches that make an epoch.
    pub batches_per_epoch: usize,
    /// The seed of everything random in training.
    pub seed: u64,
    /// The effective configuration.
    pub config: Value,
    /// Highest accuracy on held-out samples so far, 0 to 1.
    pub best_accuracy: Option<f64>,
    /// What the finished epochs measured.
    pub history: Vec<EpochMetrics>,
    /// What the present epoch has measured so far.
    pub running: RunningMeans,
    /// Where the loss is scaled: by how much.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<LossScale>,
}

/// The content of a checkpoint file: safetensors with the model's weights under their plain names, so that the file
/// can be loaded as weights, the optimizer's tensors below `optimizer.` and averages below `ema.`.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// How far the run is.
    pub progress: Progress,
    /// The model's weights and statistics.
    pub model: StateDict,
    /// What the optimizer remembers.
    pub optimizer: StateDict,
    /// Averages of the weights, where they are kept.
    pub ema: Option<StateDict>,
}

/// The file's metadata.
#[derive(Serialize, Deserialize)]
struct Header {
    format_version: u64,
    crc32: String,
    has_ema: bool,
    progress: Progress,
}

impl Checkpoint {
    /// Writes the file, whole or not at all.
    ///
    /// # Errors
    /// `Io` where the system refuses; an existing file is then untouched. `Config` where a model's name begins like
    /// those of the optimizer or the averages.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        if let Some(name) = self.model.keys().find(|name| name.starts_with(OPTIMIZER) || name.starts_with(EMA)) {
            let message = format!("a checkpoint has no place for a parameter named {name}: the prefix is taken");
            return Err(Error::Config(message));
        }
        let mut tensors = self.model.clone();
        let prefixed = |prefix: &'static str, state: &StateDict| {
            state.clone().into_iter().map(move |(name, tensor)| (format!("{prefix}{name}"), tensor))
        };
        tensors.extend(prefixed(OPTIMIZER, &self.optimizer));
        tensors.extend(self.ema.iter().flat_map(|ema| prefixed(EMA, ema)));
        let has_ema = self.ema.is_some();
        let header = Header {
            format_version: FORMAT_VERSION,
            crc32: checksum(&self.progress, &tensors, path)?,
            has_ema,
            progress: self.progress.clone(),
        };
        let metadata = Metadata::from([(KEY.to_owned(), json(&header, path)?)]);
        state_dict::write(path, &tensors, metadata)
    }

    /// Reads a file.
    ///
    /// # Errors
    /// `Io` where it cannot be read; `Format` where it is no checkpoint, has another format version, or a single bit
    /// of it is not what was written.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(|error| Error::io(path, error))?;
        Self::parse(&bytes, path)
    }

    fn parse(bytes: &[u8], path: &Path) -> Result<Self> {
        let (tensors, metadata) = state_dict::parse(bytes, path)?;
        let Some(text) = metadata.get(KEY) else {
            return Err(Error::format(path, "holds tensors, but no state of training: not a checkpoint"));
        };
        Self::from_parts(tensors, text, path)
    }

    fn from_parts(mut tensors: StateDict, text: &str, path: &Path) -> Result<Self> {
        let damaged = |error: serde_json::Error| Error::format(path, format!("damaged checkpoint: {error}"));
        let value: Value = serde_json::from_str(text).map_err(damaged)?;
        match value.get("format_version").and_then(Value::as_u64) {
            Some(FORMAT_VERSION) => {}
            got => {
                let got = got.map_or("none".to_owned(), |version| version.to_string());
                let message = format!("checkpoint of format version {got}, expected {FORMAT_VERSION}");
                return Err(Error::format(path, message));
            }
        }
        let header: Header = serde_json::from_value(value).map_err(damaged)?;
        let actual = checksum(&header.progress, &tensors, path)?;
        // The text too must be what would be written: a flipped bit can leave its meaning.
        if header.crc32 != actual || json(&header, path)? != text {
            let message = format!("damaged checkpoint: its checksum is {actual}, it says {}", header.crc32);
            return Err(Error::format(path, message));
        }
        let mut take = |prefix: &str| -> StateDict {
            tensors
                .extract_if(.., |name, _| name.starts_with(prefix))
                .map(|(name, tensor)| (name[prefix.len()..].to_owned(), tensor))
                .collect()
        };
        let (optimizer, ema) = (take(OPTIMIZER), take(EMA));
        Ok(Checkpoint { progress: header.progress, model: tensors, optimizer, ema: header.has_ema.then_some(ema) })
    }
}

/// Reads the weights of a model from a checkpoint, averaged ones where it keeps them, or from any other safetensors
/// file.
///
/// # Errors
/// `Io` where the file cannot be read, `Format` where it is damaged.
pub fn read_weights(path: impl AsRef<Path>) -> Result<StateDict> {
    let path = path.as_ref();
    let (tensors, metadata) = state_dict::read(path)?;
    match metadata.get(KEY) {
        None => Ok(tensors),
        Some(text) => {
            let checkpoint = Checkpoint::from_parts(tensors, text, path)?;
            Ok(checkpoint.ema.unwrap_or(checkpoint.model))
        }
    }
}

fn json(value: &impl Serialize, path: &Path) -> Result<String> {
    serde_json::to_string(value).map_err(|error| Error::format(path, format!("cannot be written: {error}")))
}

/// CRC-32 over everything: safetensors files have no checksum of their own.
fn checksum(progress: &Progress, tensors: &StateDict, path: &Path) -> Result<String> {
    let mut crc = flate2::Crc::new();
    // Written and read back, floating-point numbers are the same bits, so the text is the same too.
    crc.update(json(progress, path)?.as_bytes());
    for (name, tensor) in tensors {
        crc.update(format!("{name} {} {}", tensor.dtype(), tensor.shape()).as_bytes());
        crc.update(tensor.to_device(Device::Cpu)?.raw_bytes()?);
    }
    Ok(format!("{:08x}", crc.sum()))
}

/// Where two configurations differ, a line for each place: `train.epochs: 300, now 200`.
pub fn config_differences(then: &Value, now: &Value) -> Vec<String> {
    let mut found = Vec::new();
    compare("", Some(then), Some(now), &mut found);
    found
}

fn compare(place: &str, then: Option<&Value>, now: Option<&Value>, found: &mut Vec<String>) {
    match (then, now) {
        (Some(Value::Object(a)), Some(Value::Object(b))) => {
            let new_keys = b.keys().filter(|key| !a.contains_key(*key));
            for key in a.keys().chain(new_keys) {
                let place = if place.is_empty() { key.clone() } else { format!("{place}.{key}") };
                compare(&place, a.get(key), b.get(key), found);
            }
        }
        (then, now) if then == now => {}
        (then, now) => {
            let show = |value: Option<&Value>| value.map_or("absent".to_owned(), Value::to_string);
            found.push(format!("{place}: {}, now {}", show(then), show(now)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Philox;
    use crate::train::Evaluation;
    use crate::{DType, Tensor};
    use proptest::prelude::*;
    use serde_json::json;

    fn checkpoint(numbers: [f64; 4]) -> Checkpoint {
        let tensor = |seed| Tensor::randn([3, 5], DType::F32, Philox::new(seed)).unwrap();
        let state = |name: &str, seed| StateDict::from([(name.to_owned(), tensor(seed))]);
        let held_out = Some(Evaluation { samples: 9, loss: numbers[0], top1: numbers[1], top5: 1.0 });
        let history = vec![EpochMetrics { epoch: 1, step: 7, train_loss: numbers[2], train_accuracy: 0.5, held_out }];
        Checkpoint {
            progress: Progress {
                step: 12,
                epoch: 1,
                batch: 5,
                batches_per_epoch: 7,
                seed: u64::MAX,
                config: json!({"train": {"epochs": 3, "lr": 1e-5}}),
                best_accuracy: Some(numbers[1]),
                history,
                running: RunningMeans { samples: 40, loss: numbers[3], correct: 30, among_five: 39 },
                loss_scale: Some(LossScale { scale: 512.0, good_steps: 3 }),
            },
            model: state("fc.weight", 1),
            optimizer: state("fc.weight.exp_avg", 2),
            ema: Some(state("fc.weight", 3)),
        }
    }

    fn same(a: &StateDict, b: &StateDict) -> bool {
        a.len() == b.len()
            && a.iter().zip(b).all(|((n, t), (m, u))| n == m && t.raw_bytes().unwrap() == u.raw_bytes().unwrap())
    }

    proptest! {
        #[test]
        fn files_round_trip_to_the_bit(numbers in prop::array::uniform4(prop::num::f64::NORMAL | prop::num::f64::ZERO)) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("last.safetensors");
            let written = checkpoint(numbers);
            written.write(&path).unwrap();
            let read = Checkpoint::read(&path).unwrap();
            prop_assert_eq!(&read.progress, &written.progress);
            prop_assert!(same(&read.model, &written.model) && same(&read.optimizer, &written.optimizer));
            prop_assert!(same(&read.ema.unwrap(), written.ema.as_ref().unwrap()));
            prop_assert!(same(&read_weights(&path).unwrap(), written.ema.as_ref().unwrap()));
        }
    }

    #[test]
    fn every_flipped_bit_and_every_shorter_file_is_an_error_that_names_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("last.safetensors");
        checkpoint([0.1, 0.25, 1.0 / 3.0, 7e-300]).write(&path).unwrap();
        let sound = std::fs::read(&path).unwrap();
        assert!(Checkpoint::parse(&sound, &path).is_ok());
        let expect_error = |bytes: &[u8], what: String| {
            let message = Checkpoint::parse(bytes, &path).expect_err(&what).to_string();
            assert!(message.contains("last.safetensors"), "{what}: {message}");
        };
        (0..sound.len()).for_each(|len| expect_error(&sound[..len], format!("{len} bytes")));
        for bit in 0..8 * sound.len() {
            let mut bytes = sound.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            expect_error(&bytes, format!("bit {bit}"));
        }
    }

    #[test]
    fn other_files_and_versions_are_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file.safetensors");
        let weights = checkpoint([0.0; 4]).model;
        state_dict::write(&path, &weights, Metadata::new()).unwrap();
        let message = Checkpoint::read(&path).unwrap_err().to_string();
        assert!(message.contains("file.safetensors") && message.contains("not a checkpoint"), "{message}");
        assert!(same(&read_weights(&path).unwrap(), &weights));
        let later = Metadata::from([(KEY.to_owned(), r#"{"format_version":2,"news":1}"#.to_owned())]);
        state_dict::write(&path, &weights, later).unwrap();
        let message = Checkpoint::read(&path).unwrap_err().to_string();
        assert!(message.contains("file.safetensors: checkpoint of format version 2, expected 1"), "{message}");
        let taken = Checkpoint { model: checkpoint([0.0; 4]).optimizer, ..checkpoint([0.0; 4]) };
        assert!(taken.write(&path).is_ok());
        let taken = Checkpoint { model: StateDict::from([("ema.x".into(), Tensor::scalar(0f32))]), ..taken };
        assert!(taken.write(&path).unwrap_err().to_string().contains("ema.x"));
    }

    #[test]
    fn differences_are_listed_by_place() {
        let then = json!({"train": {"epochs": 3, "lr": 0.1}, "model": "tiny", "old": 1});
        let now = json!({"train": {"epochs": 4, "lr": 0.1}, "model": "tiny", "new": [1]});
        let expected = ["train.epochs: 3, now 4", "old: 1, now absent", "new: absent, now [1]"];
        assert_eq!(config_differences(&then, &now), expected);
        assert!(config_differences(&then, &then).is_empty());
    }
}
