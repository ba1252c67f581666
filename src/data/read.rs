//! Reading files and folders within bounds.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// The whole file at `path`, which may have `limit` bytes at most.
pub(super) fn file(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(|error| Error::io(path, error))?;
    let metadata = file.metadata().map_err(|error| Error::io(path, error))?;
    if !metadata.is_file() {
        return Err(Error::format(path, "not a file"));
    }
    let mut bytes = Vec::new();
    // The length may have changed since, so the read itself is bounded too.
    file.take(limit + 1).read_to_end(&mut bytes).map_err(|error| Error::io(path, error))?;
    if bytes.len() as u64 > limit {
        return Err(Error::format_at(path, limit, format!("file is larger than the {limit} bytes that are read")));
    }
    Ok(bytes)
}

/// The UTF-8 text at `path`, at most 64 MiB.
pub(super) fn text(path: &Path) -> Result<String> {
    String::from_utf8(file(path, 64 << 20)?).map_err(|error| {
        Error::format_at(path, error.utf8_error().valid_up_to() as u64, "text is not valid UTF-8".to_string())
    })
}

/// The non-empty lines of a list of names; `count` of them must be there.
pub(super) fn names(path: &Path, count: usize) -> Result<Vec<String>> {
    let names: Vec<String> = text(path)?.lines().map(str::trim).filter(|l| !l.is_empty()).map(String::from).collect();
    if names.len() != count {
        return Err(Error::format(path, format!("got {} names, expected {count}", names.len())));
    }
    Ok(names)
}

/// One entry of a folder.
pub(super) struct Entry {
    pub name: OsString,
    pub path: PathBuf,
    pub is_folder: bool,
}

/// The entries of the folder at `path` that are not hidden, in bytewise order of their names.
pub(super) fn folder(path: &Path) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    for entry in fs::read_dir(path).map_err(|error| Error::io(path, error))? {
        let entry = entry.map_err(|error| Error::io(path, error))?;
        let name = entry.file_name();
        if name.as_encoded_bytes().starts_with(b".") {
            continue;
        }
        let path = entry.path();
        // Follows links, unlike the entry's own metadata.
        let is_folder = fs::metadata(&path).map_err(|error| Error::io(&path, error))?.is_dir();
        entries.push(Entry { name, path, is_folder });
    }
    entries.sort_by(|a, b| a.name.as_encoded_bytes().cmp(b.name.as_encoded_bytes()));
    Ok(entries)
}

/// The last component of `path`, for naming a set.
pub(super) fn stem(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_beyond_the_limit_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("five");
        fs::write(&path, b"12345").unwrap();
        assert_eq!(file(&path, 5).unwrap(), b"12345");
        assert!(matches!(file(&path, 4), Err(Error::Format { offset: Some(4), .. })));
        assert!(matches!(file(&folder.path().join("absent"), 4), Err(Error::Io { .. })));
        assert!(file(folder.path(), 4).is_err());
    }

    #[test]
    fn folders_are_listed_bytewise_without_hidden_entries() {
        let root = tempfile::tempdir().unwrap();
        for name in ["b", "a10", "a9", ".hidden", "B"] {
            fs::create_dir(root.path().join(name)).unwrap();
        }
        let names: Vec<_> = folder(root.path()).unwrap().into_iter().map(|entry| entry.name).collect();
        assert_eq!(names, ["B", "a10", "a9", "b"]);
    }
}
