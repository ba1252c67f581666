//! The binary records of CIFAR (Krizhevsky 2009): label bytes, then 32×32 RGB as three planes. GTSRB comes in the same
//! form where it was scaled down to 32×32 (`train.bin`, `test.bin`, one label byte).

use std::path::{Path, PathBuf};

use super::{InMemory, Split, gtsrb, read};
use crate::{Error, Result};

const SIDE: usize = 32;
const PIXELS: usize = SIDE * SIDE * 3;
/// Most bytes of one file.
const MAX_FILE: u64 = 4 << 30;

const CIFAR10_NAMES: [&str; 10] =
    ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"];

/// Which sets come as records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// `data_batch_N.bin` and `test_batch.bin`.
    Cifar10,
    /// A coarse and a fine label; the fine one is used.
    Cifar100,
    /// Traffic signs.
    Gtsrb,
}

impl Kind {
    fn classes(self) -> usize {
        match self {
            Kind::Cifar10 => 10,
            Kind::Cifar100 => 100,
            Kind::Gtsrb => gtsrb::CLASS_NAMES.len(),
        }
    }

    fn label_bytes(self) -> usize {
        if self == Kind::Cifar100 { 2 } else { 1 }
    }

    /// Reads class names where the folder has them.
    fn class_names(self, folder: &Path) -> Result<Vec<String>> {
        let owned = |names: &[&str]| names.iter().map(|name| name.to_string()).collect();
        let (file, known): (_, Vec<String>) = match self {
            Kind::Gtsrb => return Ok(owned(&gtsrb::CLASS_NAMES)),
            Kind::Cifar10 => (folder.join("batches.meta.txt"), owned(&CIFAR10_NAMES)),
            Kind::Cifar100 => (folder.join("fine_label_names.txt"), (0..100).map(|c| c.to_string()).collect()),
        };
        if file.is_file() { read::names(&file, self.classes()) } else { Ok(known) }
    }

    fn files(self, folder: &Path, split: Split) -> Vec<PathBuf> {
        let names: &[&str] = match (self, split) {
            (Kind::Cifar10, Split::Train) => {
                &["data_batch_1.bin", "data_batch_2.bin", "data_batch_3.bin", "data_batch_4.bin", "data_batch_5.bin"]
            }
            (Kind::Cifar10, Split::Test) => &["test_batch.bin"],
            (_, Split::Train) => &["train.bin"],
            (_, Split::Test) => &["test.bin"],
        };
        names.iter().map(|name| folder.join(name)).filter(|path| path.is_file()).collect()
    }
}

/// The kind of records in `folder`, if it holds any.
pub(super) fn detect(folder: &Path) -> Result<Option<Kind>> {
    let has = |kind: Kind| [Split::Train, Split::Test].iter().flat_map(|split| kind.files(folder, *split)).next();
    if has(Kind::Cifar10).is_some() {
        return Ok(Some(Kind::Cifar10));
    }
    let Some(file) = has(Kind::Gtsrb) else { return Ok(None) };
    if folder.join("fine_label_names.txt").is_file() {
        return Ok(Some(Kind::Cifar100));
    }
    if folder.join("train_names.txt").is_file() || folder.join("test_names.txt").is_file() {
        return Ok(Some(Kind::Gtsrb));
    }
    let length = file.metadata().map_err(|error| Error::io(&file, error))?.len();
    let fits = |kind: Kind| length > 0 && length.is_multiple_of((PIXELS + kind.label_bytes()) as u64);
    match (fits(Kind::Gtsrb), fits(Kind::Cifar100)) {
        (true, false) => Ok(Some(Kind::Gtsrb)),
        (false, true) => Ok(Some(Kind::Cifar100)),
        _ => Err(Error::format(
            &file,
            format!("{length} bytes are neither records of {} (GTSRB) nor of {} (CIFAR-100)", PIXELS + 1, PIXELS + 2),
        )),
    }
}

/// The set in `folder`. CIFAR-10 takes those of the five training batches that are there.
pub(super) fn open(folder: &Path, name: &str, kind: Kind, split: Split) -> Result<InMemory> {
    let files = kind.files(folder, split);
    if files.is_empty() {
        return Err(Error::format(folder, format!("{kind:?} records without a file for {split:?}")));
    }
    let (mut pixels, mut labels) = (Vec::new(), Vec::new());
    for path in &files {
        parse(&read::file(path, MAX_FILE)?, path, kind, &mut pixels, &mut labels)?;
    }
    let listing = folder.join(if split == Split::Train { "train_names.txt" } else { "test_names.txt" });
    if kind == Kind::Gtsrb && listing.is_file() {
        read::names(&listing, labels.len())?;
    }
    InMemory::new(name, kind.class_names(folder)?, [SIDE, SIDE, 3], pixels, labels)
}

/// Appends the records of one file, its planes interleaved.
fn parse(bytes: &[u8], path: &Path, kind: Kind, pixels: &mut Vec<u8>, labels: &mut Vec<usize>) -> Result<()> {
    let label_bytes = kind.label_bytes();
    let record_size = PIXELS + label_bytes;
    let whole = bytes.len() / record_size;
    if whole * record_size != bytes.len() || whole == 0 {
        let reason = format!(
            "truncated: {whole} whole records of {record_size} bytes, then {} bytes",
            bytes.len() % record_size
        );
        return Err(Error::format_at(path, bytes.len() as u64, reason));
    }
    pixels.reserve(whole * PIXELS);
    for (index, record) in bytes.chunks_exact(record_size).enumerate() {
        let label = usize::from(record[label_bytes - 1]);
        if label >= kind.classes() {
            let at = (index * record_size + label_bytes - 1) as u64;
            let reason = format!("record {index} has label {label}, expected one below {}", kind.classes());
            return Err(Error::format_at(path, at, reason));
        }
        labels.push(label);
        let (red, rest) = record[label_bytes..].split_at(SIDE * SIDE);
        let (green, blue) = rest.split_at(SIDE * SIDE);
        pixels.extend(red.iter().zip(green).zip(blue).flat_map(|((&r, &g), &b)| [r, g, b]));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::Dataset;
    use super::*;

    fn record(kind: Kind, label: u8) -> Vec<u8> {
        let mut record = vec![label; kind.label_bytes()];
        for plane in [10u8, 20, 30] {
            record.extend((0..SIDE * SIDE).map(|i| plane + (i % 7) as u8));
        }
        record
    }

    #[test]
    fn planes_are_interleaved_and_batches_joined() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("data_batch_1.bin"), record(Kind::Cifar10, 3)).unwrap();
        std::fs::write(folder.path().join("data_batch_4.bin"), record(Kind::Cifar10, 9)).unwrap();
        assert_eq!(detect(folder.path()).unwrap(), Some(Kind::Cifar10));
        let set = open(folder.path(), "cifar10", Kind::Cifar10, Split::Train).unwrap();
        let (image, label) = set.sample(1).unwrap();
        assert_eq!((set.len(), label, set.class_names()[label].as_str()), (2, 9, "truck"));
        assert_eq!(image.pixels()[..6], [10, 20, 30, 11, 21, 31]);
        assert!(open(folder.path(), "cifar10", Kind::Cifar10, Split::Test).is_err());
    }

    #[test]
    fn two_sets_with_the_same_file_names_are_told_apart() {
        for kind in [Kind::Cifar100, Kind::Gtsrb] {
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join("train.bin"), record(kind, 42)).unwrap();
            assert_eq!(detect(folder.path()).unwrap(), Some(kind));
            std::fs::write(folder.path().join("train.bin"), b"neither").unwrap();
            assert!(detect(folder.path()).is_err());
        }
    }

    #[test]
    fn damage_is_located() {
        let (mut pixels, mut labels) = (Vec::new(), Vec::new());
        let mut read = |bytes: &[u8]| match parse(bytes, Path::new("x"), Kind::Cifar10, &mut pixels, &mut labels) {
            Err(Error::Format { offset, .. }) => offset,
            other => panic!("{other:?}"),
        };
        let two = [record(Kind::Cifar10, 0), record(Kind::Cifar10, 10)].concat();
        assert_eq!(read(&two), Some(3073));
        assert_eq!(read(&two[..5000]), Some(5000));
        assert_eq!(read(&[]), Some(0));
    }

    #[test]
    fn a_listing_of_another_length_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("test.bin"), record(Kind::Gtsrb, 1)).unwrap();
        std::fs::write(folder.path().join("test_names.txt"), "a.ppm\nb.ppm\n").unwrap();
        assert!(open(folder.path(), "gtsrb", Kind::Gtsrb, Split::Test).is_err());
    }
}
