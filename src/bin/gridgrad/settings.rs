//! What a training run is made of: a TOML file, with flags over it.

use std::path::Path;

use gridgrad::data::AugmentConfig;
use gridgrad::models::CrossFormerConfig;
use gridgrad::train::TrainConfig;
use gridgrad::{Error, Result};
use serde::{Deserialize, Serialize};

/// The effective configuration of a run, saved beside it as `config.toml`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// A known set or a folder.
    pub data: String,
    pub batch_size: usize,
    /// Threads that decode and augment.
    pub workers: usize,
    pub train: TrainConfig,
    pub model: CrossFormerConfig,
    pub augment: AugmentConfig,
}

/// A configuration file: what it leaves out is chosen by the data and the model.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct File {
    pub data: Option<String>,
    pub batch_size: Option<usize>,
    pub workers: Option<usize>,
    pub train: Option<TrainConfig>,
    pub model: Option<toml::Table>,
    pub augment: Option<AugmentConfig>,
}

/// Reads a TOML file.
pub fn read<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T> {
    let text = std::fs::read_to_string(path).map_err(|error| Error::io(path, error))?;
    toml::from_str(&text).map_err(|error| Error::format(path, error.to_string().trim_end().to_owned()))
}

impl Settings {
    /// Writes the settings as TOML.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = toml::to_string(self).map_err(|error| Error::format(path, format!("cannot be written: {error}")))?;
        gridgrad::file::write_atomically(path, text.as_bytes())
    }
}
