//! Sets that are held in memory.

use super::{Dataset, Image};
use crate::{Error, Result};

/// A set of images of one size, held in memory.
///
/// ```
/// use gridgrad::data::{Dataset, InMemory};
/// let classes = vec!["dark".to_owned(), "light".to_owned()];
/// let set = InMemory::new("shades", classes, [2, 2, 1], vec![0, 1, 2, 3, 252, 253, 254, 255], vec![0, 1])?;
/// assert_eq!((set.len(), set.sample(1)?.1), (2, 1));
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct InMemory {
    name: String,
    class_names: Vec<String>,
    height: usize,
    width: usize,
    channels: usize,
    pixels: Vec<u8>,
    labels: Vec<usize>,
}

impl InMemory {
    /// A set of `labels.len()` images; `shape` is (height, width, channels) and `pixels` holds the images one after
    /// another, each row-major and channels last.
    ///
    /// # Errors
    /// `Shape` where `shape` and the two buffers do not go together, `Argument` where a label names no class.
    pub fn new(
        name: impl Into<String>,
        class_names: Vec<String>,
        shape: [usize; 3],
        pixels: Vec<u8>,
        labels: Vec<usize>,
    ) -> Result<Self> {
        let [height, width, channels] = shape;
        let expected = shape.iter().try_fold(labels.len(), |size, &side| size.checked_mul(side));
        if height == 0 || width == 0 || !matches!(channels, 1 | 3) || expected != Some(pixels.len()) {
            return Err(Error::shape(
                "InMemory::new",
                format!(
                    "got {} labels and {} bytes for images of {height}×{width}×{channels}, expected one byte a sample \
                     and 1 or 3 channels",
                    labels.len(),
                    pixels.len()
                ),
            ));
        }
        if let Some((index, label)) = labels.iter().enumerate().find(|(_, label)| **label >= class_names.len()) {
            return Err(Error::argument(
                "InMemory::new",
                format!("sample {index} has label {label}, expected one below {}", class_names.len()),
            ));
        }
        Ok(InMemory { name: name.into(), class_names, height, width, channels, pixels, labels })
    }

    /// (height, width, channels) of every image.
    pub fn shape(&self) -> [usize; 3] {
        [self.height, self.width, self.channels]
    }

    /// Bytes of an image.
    pub fn image_bytes(&self) -> usize {
        self.height * self.width * self.channels
    }

    /// All images, (samples, height, width, channels).
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    /// The label of every image.
    pub fn labels(&self) -> &[usize] {
        &self.labels
    }

    /// Number of classes.
    pub fn classes(&self) -> usize {
        self.class_names.len()
    }
}

impl Dataset for InMemory {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> usize {
        self.labels.len()
    }

    fn class_names(&self) -> &[String] {
        &self.class_names
    }

    fn channels(&self) -> usize {
        self.channels
    }

    fn sample(&self, index: usize) -> Result<(Image, usize)> {
        let label = *self.labels.get(index).ok_or_else(|| out_of_range(self, index))?;
        let size = self.image_bytes();
        let pixels = self.pixels[index * size..(index + 1) * size].to_vec();
        Ok((Image { height: self.height, width: self.width, channels: self.channels, pixels }, label))
    }
}

/// The error of a sample index beyond the end of `dataset`.
pub(super) fn out_of_range(dataset: &dyn Dataset, index: usize) -> Error {
    Error::argument("Dataset::sample", format!("{} has {} samples, got index {index}", dataset.name(), dataset.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serves_what_it_was_given_and_refuses_what_does_not_fit() {
        let names = || vec!["a".to_string(), "b".to_string()];
        let set = InMemory::new("two", names(), [1, 2, 1], vec![1, 2, 3, 4], vec![1, 0]).unwrap();
        let (image, label) = set.sample(1).unwrap();
        assert_eq!((image.pixels(), label), (&[3, 4][..], 0));
        assert!(matches!(set.sample(2), Err(Error::Argument { .. })));
        assert!(InMemory::new("short", names(), [1, 2, 1], vec![1, 2, 3], vec![1, 0]).is_err());
        assert!(InMemory::new("huge", names(), [usize::MAX, 2, 1], vec![1, 2, 3], vec![1, 0]).is_err());
        assert!(InMemory::new("label", names(), [1, 1, 1], vec![1, 2], vec![1, 2]).is_err());
    }
}
