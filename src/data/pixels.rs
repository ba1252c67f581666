//! The images of a batch, as bytes or as floats.

use std::borrow::Cow;
use std::sync::Arc;

use crate::{Error, Result, ops};

/// Values of a byte.
const ROW: usize = 256;

/// Channels-last images of one size: (batch, height, width, channels).
///
/// ```
/// use gridgrad::data::Pixels;
/// use gridgrad::data::augment::Normalise;
/// let table = Normalise::new(&[0.5], &[0.25]).table(1);
/// let pixels = Pixels::Bytes { values: vec![0, 255], table };
/// assert_eq!(*pixels.floats(), [-2.0, 2.0]);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub enum Pixels {
    /// Bytes, and what they stand for: a quarter of the memory, and of the way to a GPU.
    /// [`ops::look_up_bytes`] makes numbers of them there.
    Bytes {
        /// The pixels.
        values: Vec<u8>,
        /// The normalised value of each.
        table: ByteTable,
    },
    /// Normalised, where what was done to the images left no bytes.
    Floats(Vec<f32>),
}

impl Pixels {
    /// Number of values.
    pub fn len(&self) -> usize {
        match self {
            Pixels::Bytes { values, .. } => values.len(),
            Pixels::Floats(values) => values.len(),
        }
    }

    /// True where there is no value.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether they are bytes.
    pub fn is_bytes(&self) -> bool {
        matches!(self, Pixels::Bytes { .. })
    }

    /// The normalised values.
    pub fn floats(&self) -> Cow<'_, [f32]> {
        match self {
            Pixels::Bytes { values, table } => Cow::Owned(table.look_up(values)),
            Pixels::Floats(values) => Cow::Borrowed(values),
        }
    }

    /// The normalised values.
    pub fn into_floats(self) -> Vec<f32> {
        match self {
            Pixels::Bytes { values, table } => table.look_up(&values),
            Pixels::Floats(values) => values,
        }
    }
}

/// The normalised value of every byte, for each channel: (channels, 256). Clones share memory.
#[derive(Clone, Debug, PartialEq)]
pub struct ByteTable(Arc<[f32]>);

impl ByteTable {
    /// From (channels, 256) values.
    ///
    /// # Errors
    /// `Shape` where there is no channel, or one has not 256 values.
    pub fn new(values: &[f32]) -> Result<Self> {
        if values.is_empty() || !values.len().is_multiple_of(ROW) {
            let reason = format!("got {} values, expected {ROW} for each of at least one channel", values.len());
            return Err(Error::shape("ByteTable", reason));
        }
        Ok(ByteTable(values.into()))
    }

    /// From a row for each of at least one channel.
    pub(super) fn of_rows(rows: &[[f32; ROW]]) -> Self {
        ByteTable(rows.as_flattened().into())
    }

    /// Number of channels.
    pub fn channels(&self) -> usize {
        self.0.len() / ROW
    }

    /// (channels, 256)
    pub fn values(&self) -> &[f32] {
        &self.0
    }

    /// Writes the values of `pixels`, (…, channels), to `out`, of the same length.
    pub(super) fn write(&self, pixels: &[u8], out: &mut [f32]) {
        ops::look_up(out, pixels, &self.0);
    }

    fn look_up(&self, pixels: &[u8]) -> Vec<f32> {
        let mut floats = vec![0.0; pixels.len()];
        self.write(pixels, &mut floats);
        floats
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_floats_are_the_same_values() {
        for channels in [1, 2, 3, 5] {
            let values: Vec<f32> = (0..channels * ROW).map(|i| (i as f32).sin()).collect();
            let table = ByteTable::new(&values).unwrap();
            assert_eq!((table.channels(), table.values()), (channels, &*values));
            let bytes: Vec<u8> = (0..7 * channels).map(|i| (i * 91 % 256) as u8).collect();
            let expected: Vec<f32> =
                bytes.iter().enumerate().map(|(i, &byte)| values[i % channels * ROW + usize::from(byte)]).collect();
            let pixels = Pixels::Bytes { values: bytes, table };
            assert_eq!((pixels.len(), pixels.is_empty(), pixels.is_bytes()), (expected.len(), false, true));
            assert_eq!(*pixels.floats(), expected);
            let floats = Pixels::Floats(pixels.into_floats());
            assert!(!floats.is_bytes() && *floats.floats() == *expected);
        }
    }

    #[test]
    fn tables_that_are_not_whole_rows_are_refused() {
        for len in [0, 1, 255, 257, 700] {
            assert!(matches!(ByteTable::new(&vec![0.0; len]), Err(Error::Shape { .. })), "{len}");
        }
        let empty = Pixels::Bytes { values: Vec::new(), table: ByteTable::new(&[0.0; ROW]).unwrap() };
        assert!(empty.is_empty() && empty.floats().is_empty());
    }
}
