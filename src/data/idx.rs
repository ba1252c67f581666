//! MNIST's IDX files (LeCun and Cortes), plain or gzipped: a big-endian magic, one 32-bit size a dimension, then bytes.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::bufread::MultiGzDecoder;

use super::{InMemory, Split};
use crate::{Error, Result};

const IMAGES_MAGIC: u32 = 0x0000_0803;
const LABELS_MAGIC: u32 = 0x0000_0801;
const CLASSES: usize = 10;
/// Longest side of an image, in pixels.
const MAX_SIDE: u64 = 4096;
/// Most bytes of one file's content.
const MAX_CONTENT: u64 = 1 << 30;

/// The images (or labels) file of `split` in `folder`, under any of the names in use.
pub(super) fn find(folder: &Path, split: Split, images: bool) -> Option<PathBuf> {
    let part = if split == Split::Train { "train" } else { "t10k" };
    let kind = if images { ["images-idx3", "images.idx3"] } else { ["labels-idx1", "labels.idx1"] };
    let names = kind.iter().flat_map(|kind| ["", ".gz"].map(|end| format!("{part}-{kind}-ubyte{end}")));
    names.map(|name| folder.join(name)).find(|path| path.is_file())
}

/// The set in `folder`.
pub(super) fn open(folder: &Path, name: &str, split: Split) -> Result<InMemory> {
    let part = if split == Split::Train { "train" } else { "t10k" };
    let file = |images: bool, expected: &str| {
        find(folder, split, images)
            .ok_or_else(|| Error::format(folder, format!("lacks {part}-{expected}-ubyte, plain or with .gz")))
    };
    let (images_path, labels_path) = (file(true, "images-idx3")?, file(false, "labels-idx1")?);
    let ([count, height, width], pixels) = read::<3>(&images_path, IMAGES_MAGIC)?;
    let ([label_count], labels) = read::<1>(&labels_path, LABELS_MAGIC)?;
    if label_count != count {
        return Err(Error::format(
            &labels_path,
            format!("got {label_count} labels, expected one for each of {count} images"),
        ));
    }
    if let Some((index, label)) = labels.iter().enumerate().find(|(_, label)| usize::from(**label) >= CLASSES) {
        return Err(Error::format_at(
            &labels_path,
            8 + index as u64,
            format!("label {label}, expected one below {CLASSES}"),
        ));
    }
    let names = (0..CLASSES).map(|digit| digit.to_string()).collect();
    InMemory::new(name, names, [height, width, 1], pixels, labels.into_iter().map(usize::from).collect())
}

/// Sizes and content of the file at `path`. Offsets in errors count decompressed bytes.
fn read<const DIMS: usize>(path: &Path, magic: u32) -> Result<([usize; DIMS], Vec<u8>)> {
    let file = File::open(path).map_err(|error| Error::io(path, error))?;
    let file = BufReader::new(file);
    if path.extension().is_some_and(|extension| extension == "gz") {
        parse(MultiGzDecoder::new(file), path, magic)
    } else {
        parse(file, path, magic)
    }
}

fn parse<const DIMS: usize>(mut reader: impl Read, path: &Path, magic: u32) -> Result<([usize; DIMS], Vec<u8>)> {
    let header_size = 4 + 4 * DIMS as u64;
    let header = take(&mut reader, path, header_size)?;
    if (header.len() as u64) < header_size {
        let reason = format!("truncated: got {} bytes of the {header_size} of an IDX header", header.len());
        return Err(Error::format_at(path, header.len() as u64, reason));
    }
    let word = |i: usize| u32::from_be_bytes([header[i], header[i + 1], header[i + 2], header[i + 3]]);
    if word(0) != magic {
        let reason = format!("IDX magic is {:#010x}, expected {magic:#010x}", word(0));
        return Err(Error::format_at(path, 0, reason));
    }
    let sizes: [u64; DIMS] = std::array::from_fn(|i| u64::from(word(4 + 4 * i)));
    if sizes[0] == 0 || sizes[1..].iter().any(|side| !(1..=MAX_SIDE).contains(side)) {
        let reason = format!("sizes {sizes:?}, expected at least 1 sample with sides of 1 to {MAX_SIDE}");
        return Err(Error::format_at(path, 4, reason));
    }
    // Three 32-bit sizes, two of them at most 4096: the product fits in 64 bits.
    let size = sizes.iter().product::<u64>();
    if size > MAX_CONTENT {
        let reason = format!("sizes {sizes:?} make {size} bytes, at most {MAX_CONTENT} are read");
        return Err(Error::format_at(path, 4, reason));
    }
    // The buffer grows with what is really there, one byte further than it should go.
    let content = take(&mut reader, path, size + 1)?;
    let end = header_size + content.len() as u64;
    if (content.len() as u64) < size {
        let reason = format!("truncated: got {} bytes of content, expected {size} for {sizes:?}", content.len());
        return Err(Error::format_at(path, end, reason));
    }
    if content.len() as u64 > size {
        return Err(Error::format_at(path, end - 1, format!("trailing bytes behind the content of {sizes:?}")));
    }
    Ok((sizes.map(|side| side as usize), content))
}

/// Up to `limit` bytes; fewer where the file ends before.
fn take(reader: &mut impl Read, path: &Path, limit: u64) -> Result<Vec<u8>> {
    use std::io::ErrorKind::{InvalidData, InvalidInput, UnexpectedEof};
    let mut bytes = Vec::new();
    reader.by_ref().take(limit).read_to_end(&mut bytes).map_err(|error| match error.kind() {
        InvalidData | InvalidInput | UnexpectedEof => Error::format(path, format!("gzip stream is damaged: {error}")),
        _ => Error::io(path, error),
    })?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_images(bytes: &[u8]) -> Result<([usize; 3], Vec<u8>)> {
        parse::<3>(bytes, Path::new("images"), IMAGES_MAGIC)
    }

    fn images() -> Vec<u8> {
        let mut file = vec![0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 3];
        file.extend(0..12);
        file
    }

    #[test]
    fn reads_sizes_and_content() {
        assert_eq!(parse_images(&images()).unwrap(), ([2, 2, 3], (0..12).collect()));
    }

    #[test]
    fn says_where_a_file_is_wrong() {
        let file = images();
        let offset = |bytes: &[u8]| match parse_images(bytes) {
            Err(Error::Format { offset, .. }) => offset,
            other => panic!("{other:?}"),
        };
        assert_eq!(offset(&file[..10]), Some(10));
        assert_eq!(offset(&file[..20]), Some(20));
        assert_eq!(offset(&[&file[..], &[9, 9]].concat()), Some(28));
        for (at, expected) in [(2, 0), (4, 16 + 12), (8, 4), (12, 4)] {
            let mut flipped = file.clone();
            flipped[at] ^= 1;
            assert_eq!(offset(&flipped), Some(expected), "byte {at}");
        }
    }
}
