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

/// A configuration file: what it leaves out is chosen by the data and the model, single keys of `[train]` included.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct File {
    pub data: Option<String>,
    pub batch_size: Option<usize>,
    pub workers: Option<usize>,
    pub train: Option<toml::Table>,
    pub model: Option<toml::Table>,
    pub augment: Option<AugmentConfig>,
}

/// Reads a TOML file.
pub fn read<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T> {
    let text = std::fs::read_to_string(path).map_err(|error| Error::io(path, error))?;
    parse(&text, path)
}

/// Reads the content of a TOML file; `path` is for errors.
fn parse<T: for<'de> Deserialize<'de>>(text: &str, path: &Path) -> Result<T> {
    toml::from_str(text).map_err(|error| {
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
        let line = before.matches('\n').count() + 1;
        let column = before.chars().rev().take_while(|&character| character != '\n').count() + 1;
        let reason = error.message().replace('\n', ", ");
        Error::format(path, format!("line {line}, column {column}: {reason}"))
    })
}

impl Settings {
    /// Writes the settings as TOML.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = toml::to_string(self).map_err(|error| Error::format(path, format!("cannot be written: {error}")))?;
        gridgrad::file::write_atomically(path, text.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sound() -> String {
        let settings = Settings {
            data: "builtin".into(),
            batch_size: 32,
            workers: 1,
            train: TrainConfig::crossformer(1024),
            model: CrossFormerConfig::named("++small", 10).unwrap(),
            augment: AugmentConfig::imagenet(),
        };
        let text = toml::to_string(&settings).unwrap();
        assert_eq!(parse::<Settings>(&text, Path::new("config.toml")).unwrap(), settings);
        text
    }

    /// Settings, or an error of one line that names the file.
    fn survives(text: &str) -> std::result::Result<(), TestCaseError> {
        let path = Path::new("config.toml");
        let errors = [parse::<Settings>(text, path).err(), parse::<File>(text, path).err()];
        for message in errors.into_iter().flatten().map(|error| error.to_string()) {
            prop_assert!(message.starts_with("config.toml: line ") && message.lines().count() == 1, "{}", message);
        }
        Ok(())
    }

    #[test]
    fn an_error_says_where() {
        let message =
            parse::<File>("data = 'builtin'\n  batchsize = 3\n", Path::new("c.toml")).unwrap_err().to_string();
        assert!(message.starts_with("c.toml: line 2, column 3: unknown field `batchsize`"), "{message}");
    }

    proptest! {
        #[test]
        fn any_text_is_settings_or_an_error(text in any::<String>()) {
            survives(&text)?;
        }

        #[test]
        fn a_changed_value_is_settings_or_an_error(
            line in any::<prop::sample::Index>(),
            value in prop_oneof![
                any::<i64>().prop_map(|n| n.to_string()),
                any::<f64>().prop_map(|x| format!("{x:?}")),
                "[\\PC\n]{0,8}",
                prop::collection::vec(0usize..9, 0..20).prop_map(|list| format!("{list:?}")),
                Just("nan".to_owned()), Just("''".to_owned()), Just("{}".to_owned()), Just("true".to_owned()),
            ],
        ) {
            let mut lines: Vec<String> = sound().lines().map(str::to_owned).collect();
            let line = line.index(lines.len());
            let key = lines[line].split_once('=').map_or("x", |(key, _)| key).to_owned();
            lines[line] = format!("{key} = {value}");
            survives(&lines.join("\n"))?;
        }

        #[test]
        fn a_piece_cut_out_is_settings_or_an_error(start in any::<prop::sample::Index>(), len in 0usize..200) {
            let text = sound();
            let start = start.index(text.len());
            survives(&format!("{}{}", &text[..start], &text[(start + len).min(text.len())..]))?;
        }
    }
}
