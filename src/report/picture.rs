//! Pixels inside an SVG: PNG in a base64 data URI.

use std::borrow::Cow;

use image::codecs::png::PngEncoder;
use image::imageops::{self, FilterType};
use image::{ExtendedColorType, ImageEncoder, RgbImage};

use super::svg::number;
use crate::{Error, Result};

/// Pictures are embedded with at most this many pixels a side: twice the size at which they are shown.
const MAX_SIDE: u32 = 320;
/// Below this many pixels a side, pixels are drawn as squares instead of a blur.
const TINY_SIDE: u32 = 96;
/// Tiny pictures are enlarged to about this many pixels a side: not every viewer heeds `image-rendering`.
const ENLARGED_SIDE: u32 = 256;

/// A borrowed picture, channels last: (height, width, channels).
#[derive(Clone, Copy, Debug)]
pub struct ImageView<'a> {
    /// Rows of pixels.
    pub height: usize,
    /// Columns of pixels.
    pub width: usize,
    /// 1 for grey, 3 for red, green, blue.
    pub channels: usize,
    /// `height × width × channels` values, 0 for black to 255 for full light.
    pub pixels: &'a [u8],
}

impl ImageView<'_> {
    /// The picture as red, green, blue, made small enough to embed.
    pub(super) fn to_rgb(self, op: &'static str) -> Result<RgbImage> {
        let ImageView { height, width, channels, pixels } = self;
        let refuse = || {
            let got = pixels.len();
            Error::argument(
                op,
                format!(
                    "got an image of {height}×{width}×{channels} with {got} values, expected \
                     height × width × channels values, not empty, of 1 or 3 channels"
                ),
            )
        };
        let size = height.checked_mul(width).and_then(|n| n.checked_mul(channels));
        if size != Some(pixels.len()) || pixels.is_empty() || !matches!(channels, 1 | 3) {
            return Err(refuse());
        }
        let rgb = if channels == 3 { pixels.to_vec() } else { pixels.iter().flat_map(|&v| [v; 3]).collect() };
        let (Ok(width), Ok(height)) = (u32::try_from(width), u32::try_from(height)) else { return Err(refuse()) };
        let image = RgbImage::from_raw(width, height, rgb).ok_or_else(refuse)?;
        let scale = f64::from(MAX_SIDE) / f64::from(width.max(height));
        if scale >= 1.0 {
            return Ok(image);
        }
        let shrink = |side: u32| ((f64::from(side) * scale).round() as u32).max(1);
        Ok(imageops::resize(&image, shrink(width), shrink(height), FilterType::Triangle))
    }
}

/// Pixels to embed: interleaved rows of 3 (colour) or 4 (colour, opacity) bytes each.
pub(super) struct Raster<'a> {
    pub width: u32,
    pub height: u32,
    pub pixels: Cow<'a, [u8]>,
    pub kind: ExtendedColorType,
}

impl<'a> From<&'a RgbImage> for Raster<'a> {
    fn from(image: &'a RgbImage) -> Self {
        let pixels = Cow::Borrowed(image.as_raw().as_slice());
        Raster { width: image.width(), height: image.height(), pixels, kind: ExtendedColorType::Rgb8 }
    }
}

impl Raster<'_> {
    /// Each pixel as a square of `times` × `times`.
    fn enlarged(&self, times: usize) -> Cow<'_, [u8]> {
        if times == 1 {
            return Cow::Borrowed(&self.pixels);
        }
        let depth = usize::from(self.kind.channel_count());
        let rows = self.pixels.chunks_exact(depth * self.width as usize);
        let widen = |row: &[u8]| row.chunks_exact(depth).flat_map(|pixel| pixel.repeat(times)).collect::<Vec<u8>>();
        Cow::Owned(rows.flat_map(|row| widen(row).repeat(times)).collect())
    }

    /// An `<image>` element that fills the given box; `attributes` holds further ones.
    pub fn element(&self, op: &'static str, [x, y, width, height]: [f64; 4], attributes: &str) -> Result<String> {
        let side = self.width.max(self.height);
        let (tiny, times) = match side < TINY_SIDE {
            true => (r#" style="image-rendering:pixelated""#, ENLARGED_SIDE.div_ceil(side.max(1))),
            false => ("", 1),
        };
        let mut png = Vec::new();
        PngEncoder::new(&mut png)
            .write_image(&self.enlarged(times as usize), self.width * times, self.height * times, self.kind)
            .map_err(|e| Error::argument(op, format!("cannot encode the picture: {e}")))?;
        let [x, y, width, height] = [x, y, width, height].map(number);
        let uri = format!("data:image/png;base64,{}", base64(&png));
        Ok(format!(
            r#"<image x="{x}" y="{y}" width="{width}" height="{height}" preserveAspectRatio="none"{tiny}{attributes} xlink:href="{uri}"/>"#
        ))
    }
}

/// Width and height of the largest box of the picture's proportions inside a square of `side`; slivers get 4 pixels.
pub(super) fn fit_in_square(width: u32, height: u32, side: f64) -> (f64, f64) {
    let scale = side / f64::from(width.max(height));
    ((f64::from(width) * scale).max(4.0), (f64::from(height) * scale).max(4.0))
}

/// RFC 4648 base64, with padding.
pub(super) fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let bits = chunk.iter().fold(0, |bits, &b| bits << 8 | u32::from(b)) << (8 * (3 - chunk.len()));
        for place in 0..4 {
            let digit = (bits >> (18 - 6 * place)) as usize & 63;
            out.push(if place <= chunk.len() { char::from(ALPHABET[digit]) } else { '=' });
        }
    }
    out
}
