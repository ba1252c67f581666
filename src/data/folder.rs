//! Sets of image files, read when asked for: the ImageNet layout `train/<class>/*`, with `val` or `test` beside it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::in_memory::out_of_range;
use super::{Dataset, Image, Split, read};
use crate::{Error, Result};

const EXTENSIONS: [&str; 7] = ["jpg", "jpeg", "png", "ppm", "pgm", "pbm", "pnm"];

/// Labelled image files; all become RGB.
pub(super) struct ImageFiles {
    name: String,
    class_names: Vec<String>,
    files: Vec<(PathBuf, usize)>,
}

impl ImageFiles {
    /// Callers have checked that every label names a class.
    pub(super) fn new(name: &str, class_names: Vec<String>, files: Vec<(PathBuf, usize)>) -> Self {
        ImageFiles { name: name.to_string(), class_names, files }
    }
}

impl Dataset for ImageFiles {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> usize {
        self.files.len()
    }

    fn class_names(&self) -> &[String] {
        &self.class_names
    }

    fn channels(&self) -> usize {
        3
    }

    fn sample(&self, index: usize) -> Result<(Image, usize)> {
        let (path, label) = self.files.get(index).ok_or_else(|| out_of_range(self, index))?;
        Ok((Image::open(path)?.into_rgb(), *label))
    }
}

/// The folder of `split` in `root`, if there.
pub(super) fn part(root: &Path, split: Split) -> Option<PathBuf> {
    let names: &[&str] = if split == Split::Train { &["train"] } else { &["val", "test"] };
    names.iter().map(|name| root.join(name)).find(|path| path.is_dir())
}

/// The set in `root`. Classes are the folders of `train` in bytewise order; the held-out part must have the same.
pub(super) fn open(root: &Path, name: &str, split: Split) -> Result<ImageFiles> {
    let train = part(root, Split::Train).ok_or_else(|| Error::format(root, "lacks the folder `train`"))?;
    let classes = classes(&train)?;
    let chosen = match split {
        Split::Train => train,
        Split::Test => {
            let test = part(root, Split::Test).ok_or_else(|| Error::format(root, "lacks a folder `val` or `test`"))?;
            same_classes(&classes, &test)?;
            test
        }
    };
    let mut files = Vec::new();
    for (label, class) in classes.iter().enumerate() {
        let folder = chosen.join(class);
        let before = files.len();
        let entries = read::folder(&folder)?;
        files.extend(
            entries.into_iter().filter(|entry| !entry.is_folder && is_image(&entry.path)).map(|e| (e.path, label)),
        );
        if files.len() == before {
            return Err(Error::format(&folder, format!("no image in this class folder ({})", EXTENSIONS.join(", "))));
        }
    }
    let class_names = classes.iter().map(|class| class.to_string_lossy().into_owned()).collect();
    Ok(ImageFiles::new(name, class_names, files))
}

fn classes(folder: &Path) -> Result<Vec<OsString>> {
    let classes: Vec<_> = read::folder(folder)?.into_iter().filter(|entry| entry.is_folder).map(|e| e.name).collect();
    if classes.is_empty() {
        return Err(Error::format(folder, "no class folder in it, expected <class>/<image>"));
    }
    Ok(classes)
}

fn same_classes(train: &[OsString], test_folder: &Path) -> Result<()> {
    let test = classes(test_folder)?;
    let only_in = |a: &[OsString], b: &[OsString]| {
        let names: Vec<_> = a.iter().filter(|class| !b.contains(class)).take(4).map(|c| c.to_string_lossy()).collect();
        if names.is_empty() { "none".to_string() } else { names.join(", ") }
    };
    if train == test {
        return Ok(());
    }
    let reason = format!(
        "{} classes, `train` has {}; only here: {}; only in `train`: {}",
        test.len(),
        train.len(),
        only_in(&test, train),
        only_in(train, &test)
    );
    Err(Error::format(test_folder, reason))
}

fn is_image(path: &Path) -> bool {
    let extension = path.extension().and_then(|extension| extension.to_str());
    extension.is_some_and(|extension| EXTENSIONS.iter().any(|known| extension.eq_ignore_ascii_case(known)))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn write(root: &Path, file: &str) {
        let path = root.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, b"P5 2 1 255\n\x01\x02").unwrap();
    }

    #[test]
    fn classes_are_sorted_bytewise_and_grey_becomes_rgb() {
        let root = tempfile::tempdir().unwrap();
        for file in ["train/b/1.pgm", "train/B/1.PGM", "train/B/notes.txt", "train/a10/x.pgm", "train/a9/y.pgm"] {
            write(root.path(), file);
        }
        let set = open(root.path(), "set", Split::Train).unwrap();
        assert_eq!(set.class_names(), ["B", "a10", "a9", "b"]);
        assert_eq!(set.len(), 4);
        let (image, label) = set.sample(0).unwrap();
        assert_eq!((image.pixels(), label), (&[1, 1, 1, 2, 2, 2][..], 0));
        assert!(set.sample(4).is_err());
        assert!(open(root.path(), "set", Split::Test).is_err());
    }

    #[test]
    fn other_classes_in_the_held_out_part_are_an_error_that_names_them() {
        let root = tempfile::tempdir().unwrap();
        for file in ["train/cat/1.pgm", "train/dog/1.pgm", "val/cat/1.pgm", "val/emu/1.pgm"] {
            write(root.path(), file);
        }
        let message = open(root.path(), "set", Split::Test).err().unwrap().to_string();
        assert!(message.contains("emu") && message.contains("dog"), "{message}");
    }

    #[test]
    fn folders_without_classes_or_images_are_errors() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("train")).unwrap();
        assert!(open(root.path(), "set", Split::Train).err().unwrap().to_string().contains("no class folder"));
        fs::create_dir(root.path().join("train/cat")).unwrap();
        assert!(open(root.path(), "set", Split::Train).err().unwrap().to_string().contains("no image"));
    }
}
