//! Files that are written whole or not at all.

use std::io::{ErrorKind, Write};
use std::path::Path;

use crate::{Error, Result};

/// How the names of files begin that are being written.
const UNFINISHED: &str = ".gridgrad-unfinished-";

/// Replaces the file at `path` by `bytes` in one step: readers see the old content or the new, never a part.
///
/// # Errors
/// Where the system refuses; an existing file is then untouched.
///
/// ```
/// let folder = tempfile::tempdir().unwrap();
/// gridgrad::file::write_atomically(folder.path().join("notes.txt"), b"whole")?;
/// # Ok::<(), gridgrad::Error>(())
/// ```
pub fn write_atomically(path: impl AsRef<Path>, bytes: &[u8]) -> Result<()> {
    let path = path.as_ref();
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let io = |error| Error::io(path, error);
    let mut builder = tempfile::Builder::new();
    builder.prefix(UNFINISHED);
    // As any new file: temporary ones would be the owner's alone.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(folder).map_err(io)?;
    file.write_all(bytes).map_err(io)?;
    file.as_file().sync_all().map_err(io)?;
    file.persist(path).map_err(|error| io(error.error))?;
    sync_folder(folder).map_err(io)
}

/// Waits until the names in `folder` are on the disk: a new file may otherwise be gone after a power failure. Where a
/// system or a file system knows no such thing, there is nothing to wait for.
fn sync_folder(folder: &Path) -> std::io::Result<()> {
    if !cfg!(unix) {
        return Ok(());
    }
    // A folder in which one may write but not read cannot be opened.
    let Ok(folder) = std::fs::File::open(folder) else { return Ok(()) };
    match folder.sync_all() {
        Err(error) if !matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => Err(error),
        _ => Ok(()),
    }
}

/// Removes what killed calls of [`write_atomically`] left in `folder`. A folder that is missing has nothing.
///
/// # Errors
/// Where the system refuses.
pub(crate) fn remove_unfinished(folder: &Path) -> Result<()> {
    let entries = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(|error| Error::io(folder, error))?,
    };
    for entry in entries {
        let entry = entry.map_err(|error| Error::io(folder, error))?;
        if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
            std::fs::remove_file(entry.path()).map_err(|error| Error::io(entry.path(), error))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_that_fails_leaves_the_old_file() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("no-such-folder").join("file");
        assert!(write_atomically(&missing, b"x").is_err());
        let path = folder.path().join("file");
        write_atomically(&path, b"old").unwrap();
        write_atomically(&path, b"new").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        std::fs::write(folder.path().join(format!("{UNFINISHED}x7")), b"half").unwrap();
        remove_unfinished(folder.path()).unwrap();
        remove_unfinished(&folder.path().join("absent")).unwrap();
        let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(left, [path]);
    }
}
