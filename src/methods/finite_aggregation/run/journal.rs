//! `finished.jsonl`: classifiers that are trained, and not in the manifest yet.
//!
//! The manifest is written after each group, since writing it costs as much as it is long. In between, a line here keeps
//! each classifier whose files are whole. A line begins with the digest of the rest: one that a kill cut short is told
//! apart, and ends the list.

use std::io::Write;
use std::path::Path;

use super::manifest::Record;
use crate::sha256::hex_digest;
use crate::{Error, Result};

/// The name of the file in a run's folder.
pub(super) const JOURNAL: &str = "finished.jsonl";

/// Adds a record.
pub(super) fn append(folder: &Path, record: &Record) -> Result<()> {
    let path = folder.join(JOURNAL);
    let wrong = |error| Error::format(&path, format!("cannot be written as JSON: {error}"));
    let text = serde_json::to_string(record).map_err(wrong)?;
    let line = format!("{} {text}\n", hex_digest(text.as_bytes()));
    let io = |error| Error::io(&path, error);
    let mut file = std::fs::OpenOptions::new().create(true).append(true).open(&path).map_err(io)?;
    file.write_all(line.as_bytes()).map_err(io)?;
    file.sync_all().map_err(io)
}

/// The records, up to the first line that is not whole; none where there is no file.
pub(super) fn read(folder: &Path) -> Result<Vec<Record>> {
    let path = folder.join(JOURNAL);
    let bytes = match std::fs::read(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        bytes => bytes.map_err(|error| Error::io(&path, error))?,
    };
    let text = String::from_utf8_lossy(&bytes);
    let record = |line: &str| {
        let (digest, text) = line.split_once(' ')?;
        (hex_digest(text.as_bytes()) == digest).then(|| serde_json::from_str(text).ok())?
    };
    Ok(text.lines().map_while(record).collect())
}

/// Removes the file, once the manifest has its records.
pub(super) fn remove(folder: &Path) -> Result<()> {
    let path = folder.join(JOURNAL);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path, error)),
        _ => Ok(()),
    }
}
