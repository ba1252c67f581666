//! Resizing by separable convolution, antialiased: where the image shrinks, the kernel grows with it, as in Pillow.

use crate::data::Image;
use crate::{Error, Result};

/// How samples between pixels are found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Interpolation {
    /// Triangle kernel, support of 1 pixel.
    Bilinear,
    /// Cubic convolution (Keys 1981) with a = -0.5, support of 2 pixels.
    #[default]
    Bicubic,
}

impl Interpolation {
    fn support(self) -> f64 {
        match self {
            Interpolation::Bilinear => 1.0,
            Interpolation::Bicubic => 2.0,
        }
    }

    fn kernel(self, x: f64) -> f64 {
        const A: f64 = -0.5;
        let x = x.abs();
        match self {
            Interpolation::Bilinear => (1.0 - x).max(0.0),
            Interpolation::Bicubic if x < 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
            Interpolation::Bicubic if x < 2.0 => A * (((x - 5.0) * x + 8.0) * x - 4.0),
            Interpolation::Bicubic => 0.0,
        }
    }
}

/// A rectangle of an image, in pixels; sides need not lie on pixel borders.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Region {
    /// Upper side.
    pub top: f64,
    /// Left side.
    pub left: f64,
    /// Extent downwards, above 0.
    pub height: f64,
    /// Extent to the right, above 0.
    pub width: f64,
}

/// Longest side that [`resize`] makes, in pixels.
pub const MAX_SIDE: usize = 16_384;

/// `image` scaled to `height` × `width`.
///
/// # Errors
/// `Argument` where a side is zero or above [`MAX_SIDE`].
pub fn resize(image: &Image, height: usize, width: usize, interpolation: Interpolation) -> Result<Image> {
    let whole = Region { top: 0.0, left: 0.0, height: image.height as f64, width: image.width as f64 };
    resize_region(image, whole, height, width, interpolation)
}

/// The `region` of `image`, scaled to `height` × `width`. Pixels around the region take part where the kernel reaches
/// them, so resizing and then cropping can be done in one step, without making the part that is cropped away.
///
/// # Errors
/// `Argument` where a side is zero or above [`MAX_SIDE`], or the region is empty or leaves the image.
pub fn resize_region(
    image: &Image,
    region: Region,
    height: usize,
    width: usize,
    interpolation: Interpolation,
) -> Result<Image> {
    let sides = 1..=MAX_SIDE;
    if !sides.contains(&height) || !sides.contains(&width) {
        return Err(Error::argument("resize", format!("got {height}×{width}, expected sides of 1 to {MAX_SIDE}")));
    }
    // Sums of rounded parts may pass the border by a hair.
    let inside =
        |start: f64, extent: f64, side: usize| start >= -1e-6 && extent > 0.0 && start + extent <= side as f64 + 1e-6;
    if !inside(region.top, region.height, image.height) || !inside(region.left, region.width, image.width) {
        let reason = format!("{region:?} is not inside the image of {}×{}", image.height, image.width);
        return Err(Error::argument("resize", reason));
    }
    let is_whole_pixels = [region.top, region.left].iter().all(|start| start.fract() == 0.0);
    if is_whole_pixels && region.height == height as f64 && region.width == width as f64 {
        return Ok(super::crop::cut(image, region.top as usize, region.left as usize, height, width));
    }
    Ok(match image.channels {
        1 => resample::<1>(image, region, height, width, interpolation),
        _ => resample::<3>(image, region, height, width, interpolation),
    })
}

/// Bits behind the point of a weight. Weights stay below 2 in magnitude, samples below 2⁸: sums fit in 32 bits.
const WEIGHT_BITS: u32 = 22;

/// The kernel's weights for every output position along one axis.
struct Taps {
    /// First input position of each output position.
    first: Vec<usize>,
    /// End of each output position's weights in `weights`.
    end: Vec<usize>,
    weights: Vec<i32>,
}

impl Taps {
    fn new(side: usize, start: f64, extent: f64, count: usize, interpolation: Interpolation) -> Self {
        let scale = extent / count as f64;
        let stretch = scale.max(1.0);
        let support = interpolation.support() * stretch;
        let mut taps = Taps { first: Vec::with_capacity(count), end: Vec::with_capacity(count), weights: Vec::new() };
        let mut weights = Vec::new();
        for position in 0..count {
            let centre = start + (position as f64 + 0.5) * scale;
            // The support always holds the pixel under its centre, so there is at least one.
            let first = ((centre - support + 0.5).max(0.0) as usize).min(side - 1);
            let last = ((centre + support + 0.5) as usize).clamp(first + 1, side);
            weights.clear();
            weights.extend((first..last).map(|x| interpolation.kernel((x as f64 + 0.5 - centre) / stretch)));
            let unit = f64::from(1 << WEIGHT_BITS) / weights.iter().sum::<f64>();
            taps.weights.extend(weights.iter().map(|weight| (weight * unit).round() as i32));
            taps.first.push(first);
            taps.end.push(taps.weights.len());
        }
        taps
    }

    /// First input position and weights, for every output position.
    fn iter(&self) -> impl Iterator<Item = (usize, &[i32])> {
        let starts = std::iter::once(0).chain(self.end.iter().copied());
        starts.zip(&self.end).zip(&self.first).map(|((start, &end), &first)| (first, &self.weights[start..end]))
    }

    /// The input positions that any output position needs.
    fn reach(&self) -> (usize, usize) {
        let last = self.iter().map(|(first, weights)| first + weights.len()).max().unwrap_or(0);
        (self.first.iter().copied().min().unwrap_or(0), last)
    }
}

fn round(sum: i32) -> u8 {
    (sum >> WEIGHT_BITS).clamp(0, 255) as u8
}

const HALF: i32 = 1 << (WEIGHT_BITS - 1);

fn resample<const C: usize>(
    image: &Image,
    region: Region,
    height: usize,
    width: usize,
    interpolation: Interpolation,
) -> Image {
    let across = Taps::new(image.width, region.left, region.width, width, interpolation);
    let down = Taps::new(image.height, region.top, region.height, height, interpolation);
    let (top, bottom) = down.reach();
    let stride = width * C;
    let mut narrow = Vec::with_capacity((bottom - top) * stride);
    for y in top..bottom {
        let row = image.row(y);
        for (first, weights) in across.iter() {
            let mut sums = [HALF; C];
            for (pixel, &weight) in row[first * C..(first + weights.len()) * C].chunks_exact(C).zip(weights) {
                for (sum, &sample) in sums.iter_mut().zip(pixel) {
                    *sum += i32::from(sample) * weight;
                }
            }
            narrow.extend(sums.map(round));
        }
    }
    let mut pixels = Vec::with_capacity(height * stride);
    let mut sums = vec![HALF; stride];
    for (first, weights) in down.iter() {
        sums.fill(HALF);
        for (y, &weight) in (first - top..).zip(weights) {
            for (sum, &sample) in sums.iter_mut().zip(&narrow[y * stride..(y + 1) * stride]) {
                *sum += i32::from(sample) * weight;
            }
        }
        pixels.extend(sums.iter().map(|&sum| round(sum)));
    }
    Image { height, width, channels: C, pixels }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: [Interpolation; 2] = [Interpolation::Bilinear, Interpolation::Bicubic];

    fn row(pixels: &[u8]) -> Image {
        Image::new(1, pixels.len(), 1, pixels.to_vec()).unwrap()
    }

    fn noise(height: usize, width: usize, channels: usize) -> Image {
        let stream = crate::random::Philox::new(5);
        let pixels = (0..height * width * channels).map(|i| stream.bits(i as u64) as u8).collect();
        Image::new(height, width, channels, pixels).unwrap()
    }

    #[test]
    fn bilinear_matches_a_calculation_by_hand() {
        // Twice as wide: centres fall a quarter pixel beside the old ones.
        let wide = resize(&row(&[0, 100, 200]), 1, 6, Interpolation::Bilinear).unwrap();
        assert_eq!(wide.pixels(), [0, 25, 75, 125, 175, 200]);
        // Half as wide: the triangle spans 4 pixels with weights 1:3:3:1 (over 8), at the border 3:3:1 (over 7).
        let narrow = resize(&row(&[0, 80, 160, 240, 8, 88]), 1, 3, Interpolation::Bilinear).unwrap();
        let expected = [(3.0 * 80.0 + 160.0) / 7.0, (80.0 + 480.0 + 720.0 + 8.0) / 8.0, (240.0 + 24.0 + 264.0) / 7.0];
        assert_eq!(narrow.pixels(), expected.map(|v: f64| v.round() as u8));
    }

    #[test]
    fn bicubic_matches_a_calculation_by_hand() {
        // Offsets of 1.75, 0.75, 0.25 and 1.25 pixels: -0.0234375, 0.2265625, 0.8671875, -0.0703125.
        let wide = resize(&row(&[10, 20, 100, 30, 0]), 1, 10, Interpolation::Bicubic).unwrap();
        let expected = -0.0234375 * 10.0 + 0.2265625 * 20.0 + 0.8671875 * 100.0 - 0.0703125 * 30.0;
        assert_eq!(wide.pixels()[4], f64::round(expected) as u8);
    }

    #[test]
    fn a_constant_stays_constant_and_the_same_size_the_same_image() {
        for interpolation in BOTH {
            for (height, width) in [(1, 1), (7, 300), (64, 3), (31, 31)] {
                let flat = resize(&Image::filled(31, 47, 3, 201), height, width, interpolation).unwrap();
                assert!(flat.pixels().iter().all(|&sample| sample == 201), "{interpolation:?} {height}×{width}");
            }
            let image = noise(9, 14, 3);
            assert_eq!(resize(&image, 9, 14, interpolation).unwrap(), image);
        }
    }

    #[test]
    fn rows_and_columns_are_treated_alike() {
        let image = noise(12, 20, 1);
        let transpose = |image: &Image| {
            let pixels = (0..image.width).flat_map(|x| (0..image.height).map(move |y| image.row(y)[x])).collect();
            Image::new(image.width, image.height, 1, pixels).unwrap()
        };
        for interpolation in BOTH {
            let straight = resize(&image, 5, 31, interpolation).unwrap();
            let turned = transpose(&resize(&transpose(&image), 31, 5, interpolation).unwrap());
            let largest = straight.pixels.iter().zip(&turned.pixels).map(|(a, b)| a.abs_diff(*b)).max();
            // The order of the two passes decides how the step between them rounds.
            assert!(largest <= Some(2), "{interpolation:?}: {largest:?}");
        }
    }

    #[test]
    fn a_region_is_what_resizing_and_cropping_gives() {
        let image = noise(40, 60, 3);
        let whole = resize(&image, 20, 30, Interpolation::Bicubic).unwrap();
        let region = Region { top: 8.0, left: 12.0, height: 24.0, width: 32.0 };
        let part = resize_region(&image, region, 12, 16, Interpolation::Bicubic).unwrap();
        assert_eq!(part, super::super::crop::cut(&whole, 4, 6, 12, 16));
    }

    #[test]
    fn impossible_sizes_and_regions_are_errors() {
        let image = noise(4, 4, 1);
        assert!(resize(&image, 0, 4, Interpolation::Bicubic).is_err());
        assert!(resize(&image, 4, MAX_SIDE + 1, Interpolation::Bicubic).is_err());
        for (top, height) in [(-1.0, 2.0), (3.0, 2.0), (0.0, 0.0), (f64::NAN, 1.0)] {
            let region = Region { top, left: 0.0, height, width: 4.0 };
            assert!(resize_region(&image, region, 2, 2, Interpolation::Bilinear).is_err(), "{region:?}");
        }
    }
}
