//! Labelled image sets, augmentation and batches.
//!
//! [`open`] reads a set, [`AugmentConfig`] says what is done to its images, and a [`Loader`] turns both into
//! channels-last batches of bytes with their normalisation, or of normalised floats ([`Pixels`]). Every random choice
//! is a function of seed, epoch and sample index, so batches are the same bits for any number of worker threads, and
//! an epoch can be resumed in its middle.
//!
//! ```
//! use std::sync::Arc;
//! use gridgrad::data::{self, AugmentConfig, Loader, LoaderConfig, Split};
//!
//! let digits: Arc<dyn data::Dataset> = Arc::from(data::open("builtin", Split::Train, None)?);
//! let config = LoaderConfig { batch_size: 32, augment: AugmentConfig::digits(), ..LoaderConfig::default() };
//! let loader = Loader::new(digits, config)?;
//! for batch in loader.epoch(0, 0).take(2) {
//!     let batch = batch?;
//!     assert_eq!(batch.floats().len(), 32 * batch.height * batch.width * batch.channels);
//! }
//! # Ok::<(), gridgrad::Error>(())
//! ```

pub mod augment;
mod builtin;
mod folder;
mod gtsrb;
mod idx;
mod image;
mod in_memory;
mod layout;
mod loader;
mod pixels;
mod read;
mod records;

pub use augment::AugmentConfig;
pub use image::Image;
pub use in_memory::InMemory;
pub use layout::{KNOWN_SETS, open};
pub use loader::{Batch, Epoch, Loader, LoaderConfig};
pub use pixels::{ByteTable, Pixels};

use crate::Result;

/// Which part of a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// Samples to learn from.
    Train,
    /// Samples held out; `val` or `test` in image folders.
    Test,
}

/// A finite set of labelled images with a fixed order.
pub trait Dataset: Send + Sync {
    /// What the set is called in logs and errors.
    fn name(&self) -> &str;

    /// Number of samples.
    fn len(&self) -> usize;

    /// True where there is no sample.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Class names; a label is an index into this list.
    fn class_names(&self) -> &[String];

    /// Channels of every image: 1 (grey) or 3 (RGB).
    fn channels(&self) -> usize;

    /// The image at `index` and its label.
    ///
    /// # Errors
    /// [`Argument`](crate::Error::Argument) where `index` is not below [`len`](Dataset::len); `Io` or `Format` where
    /// the file behind the sample cannot be read.
    fn sample(&self, index: usize) -> Result<(Image, usize)>;
}
