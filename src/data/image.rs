//! Eight-bit images and their decoding.

use std::io::Cursor;
use std::path::Path;

use ::image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};

use super::read;
use crate::{Error, Result};

/// Longest side of an image that is decoded, in pixels.
const MAX_SIDE: u32 = 32_768;
/// Most bytes that decoding one image may take.
const MAX_DECODED: u64 = 512 << 20;
/// Most bytes of an image file.
const MAX_FILE: u64 = 256 << 20;
/// No format packs more than this many pixel bytes into one file byte (a JPEG of DC-only blocks comes to 1,536), so a
/// header that claims more is wrong, and is refused before memory is set aside for it.
const MAX_EXPANSION: u64 = 2048;

/// An image of 8-bit samples: (height, width, channels), channels last, 1 (grey) or 3 (RGB) of them.
///
/// ```
/// use gridgrad::data::Image;
/// let image = Image::new(1, 2, 3, vec![255, 0, 0, 0, 0, 255])?; // a red pixel and a blue one
/// assert_eq!((image.height(), image.width(), image.clone().into_grey().channels()), (1, 2, 1));
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    pub(super) height: usize,
    pub(super) width: usize,
    pub(super) channels: usize,
    pub(super) pixels: Vec<u8>,
}

impl Image {
    /// An image of `height` × `width` × `channels` samples in row-major, channels-last order.
    ///
    /// # Errors
    /// `Shape` where a side is zero, `channels` is neither 1 nor 3, or `pixels` has another length.
    pub fn new(height: usize, width: usize, channels: usize, pixels: Vec<u8>) -> Result<Self> {
        let expected = height.checked_mul(width).and_then(|area| area.checked_mul(channels));
        if height == 0 || width == 0 || !matches!(channels, 1 | 3) || expected != Some(pixels.len()) {
            return Err(Error::shape(
                "Image::new",
                format!(
                    "got {} bytes for {height}×{width}×{channels}, expected sides of at least 1, 1 or 3 channels and \
                     one byte a sample",
                    pixels.len()
                ),
            ));
        }
        Ok(Image { height, width, channels, pixels })
    }

    /// An image of one colour; callers pass sides of at least 1 and 1 or 3 channels.
    pub(super) fn filled(height: usize, width: usize, channels: usize, value: u8) -> Self {
        Image { height, width, channels, pixels: vec![value; height * width * channels] }
    }

    /// Rows.
    pub fn height(&self) -> usize {
        self.height
    }

    /// Columns.
    pub fn width(&self) -> usize {
        self.width
    }

    /// 1 (grey) or 3 (RGB).
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// The samples, row by row, channels last.
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    /// The samples of row `y`.
    pub(super) fn row(&self, y: usize) -> &[u8] {
        let stride = self.width * self.channels;
        &self.pixels[y * stride..(y + 1) * stride]
    }

    /// This image in RGB: grey is repeated.
    #[must_use]
    pub fn into_rgb(self) -> Self {
        if self.channels == 3 {
            return self;
        }
        let pixels = self.pixels.iter().flat_map(|&grey| [grey; 3]).collect();
        Image { channels: 3, pixels, ..self }
    }

    /// This image in grey: luma of ITU-R BT.601.
    #[must_use]
    pub fn into_grey(self) -> Self {
        if self.channels == 1 {
            return self;
        }
        let pixels = self.pixels.chunks_exact(3).map(luma).collect();
        Image { channels: 1, pixels, ..self }
    }

    /// Decodes a JPEG, PNG or PNM file held in `bytes`, into grey or RGB as the file has it. `path` names it in errors.
    ///
    /// # Errors
    /// `Format` where the file is of another kind, damaged or truncated, has a side of zero or above 32,768, or claims
    /// more pixels than its length can hold.
    pub fn decode(bytes: &[u8], path: &Path) -> Result<Self> {
        let damaged = |error: ::image::ImageError| Error::format(path, format!("image cannot be decoded: {error}"));
        let mut reader =
            ImageReader::new(Cursor::new(bytes)).with_guessed_format().map_err(|error| Error::io(path, error))?;
        let format = reader.format().ok_or_else(|| Error::format(path, "neither a JPEG, a PNG nor a PNM image"))?;
        if format == ImageFormat::Jpeg && !jpeg_is_complete(bytes) {
            return Err(Error::format_at(path, bytes.len() as u64, "JPEG is truncated: no end-of-image marker"));
        }
        let mut limits = Limits::no_limits();
        limits.max_image_width = Some(MAX_SIDE);
        limits.max_image_height = Some(MAX_SIDE);
        limits.max_alloc = Some(MAX_DECODED);
        reader.limits(limits);
        let decoder = reader.into_decoder().map_err(damaged)?;
        let (width, height) = decoder.dimensions();
        let claimed = decoder.total_bytes();
        if width == 0 || height == 0 || width > MAX_SIDE || height > MAX_SIDE || claimed > MAX_DECODED {
            return Err(Error::format(
                path,
                format!("image is {height}×{width}, expected sides of 1 to {MAX_SIDE} and at most 512 MiB"),
            ));
        }
        if claimed > (bytes.len() as u64).saturating_mul(MAX_EXPANSION) {
            return Err(Error::format(
                path,
                format!("image header claims {height}×{width}, more than {} bytes can hold", bytes.len()),
            ));
        }
        let decoded = DynamicImage::from_decoder(decoder).map_err(damaged)?;
        let (height, width) = (height as usize, width as usize);
        if decoded.color().has_color() {
            Image::new(height, width, 3, decoded.into_rgb8().into_raw())
        } else {
            Image::new(height, width, 1, decoded.into_luma8().into_raw())
        }
    }

    /// Reads and decodes the file at `path`.
    ///
    /// # Errors
    /// As [`decode`](Image::decode); `Io` where the file cannot be read.
    pub fn open(path: &Path) -> Result<Self> {
        Image::decode(&read::file(path, MAX_FILE)?, path)
    }
}

/// Luma of one RGB pixel, ITU-R BT.601 in 16-bit fixed point.
pub(super) fn luma(rgb: &[u8]) -> u8 {
    let [r, g, b] = [rgb[0], rgb[1], rgb[2]].map(u32::from);
    ((r * 19_595 + g * 38_470 + b * 7_471 + 0x8000) >> 16) as u8
}

/// True where the file has its end-of-image marker behind the start of its first scan. The decoder itself fills what is
/// missing with grey, which would train a model on damaged pictures unnoticed.
fn jpeg_is_complete(bytes: &[u8]) -> bool {
    let mut at = 2; // behind the start-of-image marker
    // Segments are walked, not searched, as a thumbnail inside one has markers of its own.
    while let Some(&[0xFF, marker, high, low]) = bytes.get(at..at + 4).and_then(|b| b.first_chunk()) {
        if marker == 0xFF {
            at += 1; // fill byte
            continue;
        }
        at += 2 + usize::from(u16::from_be_bytes([high, low]));
        if marker == 0xDA {
            // Entropy-coded data never holds this pair: there an FF is followed by a zero or a restart marker.
            return bytes.get(at..).is_some_and(|scan| scan.windows(2).any(|pair| pair == [0xFF, 0xD9]));
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encode(format: ImageFormat, grey: bool) -> Vec<u8> {
        let mut file = Cursor::new(Vec::new());
        if grey {
            let image = ::image::GrayImage::from_fn(20, 12, |x, y| ::image::Luma([(x * 9 + y) as u8]));
            image.write_to(&mut file, format).unwrap();
        } else {
            let image = ::image::RgbImage::from_fn(20, 12, |x, y| ::image::Rgb([x as u8 * 9, y as u8 * 20, 70]));
            image.write_to(&mut file, format).unwrap();
        }
        file.into_inner()
    }

    #[test]
    fn decodes_each_format_in_grey_and_colour() {
        for format in [ImageFormat::Jpeg, ImageFormat::Png, ImageFormat::Pnm] {
            let grey = Image::decode(&encode(format, true), Path::new("grey")).unwrap();
            assert_eq!((grey.height, grey.width, grey.channels), (12, 20, 1));
            let colour = Image::decode(&encode(format, false), Path::new("colour")).unwrap();
            assert_eq!((colour.height, colour.width, colour.channels), (12, 20, 3));
            if format != ImageFormat::Jpeg {
                assert_eq!(grey.row(3)[5], 48);
                assert_eq!(colour.row(3)[15..18], [45, 60, 70]);
            }
        }
    }

    #[test]
    fn every_truncation_is_an_error_that_names_the_file() {
        for format in [ImageFormat::Jpeg, ImageFormat::Png, ImageFormat::Pnm] {
            let file = encode(format, false);
            for cut in 0..file.len() - 1 {
                // A PNG is whole once its data chunk is; only the 12 bytes of the empty end chunk may lack.
                if format == ImageFormat::Png && cut + 12 >= file.len() {
                    continue;
                }
                match Image::decode(&file[..cut], Path::new("cut.img")) {
                    Err(Error::Format { path, .. }) => assert_eq!(path, Path::new("cut.img")),
                    other => panic!("{format:?} cut at {cut} of {}: {other:?}", file.len()),
                }
            }
        }
    }

    #[test]
    fn headers_that_claim_too_much_are_refused_before_allocation() {
        for header in ["P6 0 3 255\n", "P6 30000 30000 255\nxyz", "P6 4000000000 2 255\n", "P5 60000 60000 255\n"] {
            let result = Image::decode(header.as_bytes(), Path::new("giant.ppm"));
            assert!(matches!(result, Err(Error::Format { .. })), "{header:?}: {result:?}");
        }
        let mut png = encode(ImageFormat::Png, true);
        png[16..24].copy_from_slice(&[0, 0, 0x70, 0, 0, 0, 0x70, 0]);
        assert!(matches!(Image::decode(&png, Path::new("giant.png")), Err(Error::Format { .. })));
    }

    #[test]
    fn grey_and_rgb_convert_both_ways() {
        let grey = Image::new(1, 2, 1, vec![7, 200]).unwrap();
        let rgb = grey.clone().into_rgb();
        assert_eq!(rgb.pixels(), [7, 7, 7, 200, 200, 200]);
        assert_eq!(rgb.into_grey(), grey);
        assert_eq!(luma(&[255, 0, 0]), 76);
        assert!(Image::new(1, 2, 2, vec![0; 4]).is_err());
        assert!(Image::new(usize::MAX, 2, 3, vec![0; 4]).is_err());
    }
}
