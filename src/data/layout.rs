//! Finding a set by name or folder.

use std::path::{Path, PathBuf};

use super::records::{self, Kind};
use super::{Dataset, Split, builtin, folder, gtsrb, idx, read};
use crate::{Error, Result};

/// The sets that [`open`] knows by name.
pub const KNOWN_SETS: [&str; 6] = ["builtin", "mnist", "cifar10", "cifar100", "gtsrb", "imagenette"];

/// Environment variable with the folder that named sets are looked for in.
const ROOT_VARIABLE: &str = "GRIDGRAD_DATA";

const LAYOUTS: &str = "IDX files (train-images-idx3-ubyte, …), CIFAR-10 (data_batch_1.bin, …), CIFAR-100 or GTSRB records \
                       (train.bin, test.bin), GTSRB (Final_Training, Final_Test), image folders (train/<class>/*, with \
                       val or test)";

enum Layout {
    Idx,
    Records(Kind),
    Gtsrb,
    Folders,
}

/// Opens one part of a set.
///
/// `spec` is one of [`KNOWN_SETS`] or a folder whose layout is recognised: MNIST's IDX files, CIFAR-10 or CIFAR-100
/// binaries, GTSRB as published or as 32×32 records, or image folders as ImageNet has them. Named sets other than
/// `builtin` lie under `root`, or where that is `None` under the folder that the environment variable `GRIDGRAD_DATA`
/// names: `mnist`, `cifar10`, `cifar100`, `gtsrb`, `imagenette224` (or `imagenette`, `imagenette2` and its `-320` and
/// `-160`). GTSRB's 32×32 records are preferred where both forms are there.
///
/// Records and IDX files are read whole; image files are only listed, and decoded when a sample is asked for.
///
/// # Errors
/// `Config` where `spec` is neither a known name nor a folder, or the root is not known; `Format` where the folder is
/// empty or of no known layout, or a file in it is damaged; `Io` where the system refuses a file.
pub fn open(spec: &str, split: Split, root: Option<&Path>) -> Result<Box<dyn Dataset>> {
    if spec == "builtin" {
        return Ok(Box::new(builtin::open(split)?));
    }
    let (folder, name) = if KNOWN_SETS.contains(&spec) {
        (known_folder(spec, root)?, spec.to_string())
    } else {
        let folder = PathBuf::from(spec);
        if !folder.is_dir() {
            let known = KNOWN_SETS.join(", ");
            return Err(Error::Config(format!("data set {spec:?} is neither a folder nor one of {known}")));
        }
        let name = read::stem(&folder);
        (folder, name)
    };
    let (folder, layout) = detect(&folder)?;
    Ok(match layout {
        Layout::Idx => Box::new(idx::open(&folder, &name, split)?),
        Layout::Records(kind) => Box::new(records::open(&folder, &name, kind, split)?),
        Layout::Gtsrb => Box::new(gtsrb::open(&folder, &name, split)?),
        Layout::Folders => Box::new(folder::open(&folder, &name, split)?),
    })
}

fn known_folder(name: &str, root: Option<&Path>) -> Result<PathBuf> {
    let root = match root {
        Some(root) => root.to_path_buf(),
        None => std::env::var_os(ROOT_VARIABLE).map(PathBuf::from).ok_or_else(|| {
            Error::Config(format!(
                "data set {name:?} needs a root folder: set {ROOT_VARIABLE} to the one that holds it"
            ))
        })?,
    };
    let folders: &[&str] = match name {
        "imagenette" => &["imagenette224", "imagenette", "imagenette2", "imagenette2-320", "imagenette2-160"],
        "cifar10" => &["cifar10", "cifar-10-batches-bin"],
        "cifar100" => &["cifar100", "cifar-100-binary"],
        "gtsrb" => &["gtsrb", "gtsrb32", "GTSRB"],
        _ => &["mnist", "MNIST"],
    };
    let found = folders.iter().map(|folder| root.join(folder)).find(|path| path.is_dir());
    found.ok_or_else(|| {
        Error::Config(format!("data set {name:?}: {} has no folder {}", root.display(), folders.join(" or ")))
    })
}

/// The layout of `folder`, or of the one folder inside it that archives of these sets unpack to.
fn detect(folder: &Path) -> Result<(PathBuf, Layout)> {
    if read::folder(folder)?.is_empty() {
        return Err(Error::format(folder, "the folder is empty"));
    }
    let inner = ["cifar-10-batches-bin", "cifar-100-binary", "gtsrb32", "GTSRB", "raw"];
    let candidates = std::iter::once(folder.to_path_buf()).chain(inner.iter().map(|name| folder.join(name)));
    for candidate in candidates.filter(|path| path.is_dir()) {
        if let Some(layout) = layout_of(&candidate)? {
            return Ok((candidate, layout));
        }
    }
    Err(Error::format(folder, format!("unknown layout; known are {LAYOUTS}")))
}

fn layout_of(folder: &Path) -> Result<Option<Layout>> {
    let splits = [Split::Train, Split::Test];
    if splits.iter().any(|split| [true, false].iter().any(|images| idx::find(folder, *split, *images).is_some())) {
        return Ok(Some(Layout::Idx));
    }
    if let Some(kind) = records::detect(folder)? {
        return Ok(Some(Layout::Records(kind)));
    }
    if ["Final_Training", "Final_Test"].iter().any(|name| folder.join(name).is_dir()) {
        return Ok(Some(Layout::Gtsrb));
    }
    Ok(splits.iter().any(|split| folder::part(folder, *split).is_some()).then_some(Layout::Folders))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(spec: &str, root: Option<&Path>) -> String {
        open(spec, Split::Train, root).err().unwrap().to_string()
    }

    #[test]
    fn errors_say_what_is_known() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().to_str().unwrap();
        assert!(message(path, None).contains("empty"));
        std::fs::write(root.path().join("readme.txt"), "hello").unwrap();
        assert!(message(path, None).contains("CIFAR-100"));
        assert!(message("no such folder", None).contains("builtin, mnist"));
        assert!(message("gtsrb", Some(root.path())).contains("gtsrb32"));
    }

    #[test]
    fn known_names_resolve_under_the_root_and_unpacked_archives_are_entered() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("cifar10/cifar-10-batches-bin");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("test_batch.bin"), vec![0; 3073]).unwrap();
        let set = open("cifar10", Split::Test, Some(root.path())).unwrap();
        assert_eq!((set.name(), set.len(), set.channels()), ("cifar10", 1, 3));
    }
}
