//! Crops and the horizontal flip.

use super::resize::{Interpolation, Region, resize, resize_region};
use crate::data::Image;
use crate::random::Draws;
use crate::{Error, Result};

/// The part of `image` from (`top`, `left`); callers have checked that it lies inside.
pub(super) fn cut(image: &Image, top: usize, left: usize, height: usize, width: usize) -> Image {
    let channels = image.channels;
    let mut pixels = Vec::with_capacity(height * width * channels);
    for y in top..top + height {
        pixels.extend_from_slice(&image.row(y)[left * channels..(left + width) * channels]);
    }
    Image { height, width, channels, pixels }
}

/// The middle `height` × `width` pixels of `image` (torchvision's `CenterCrop`).
///
/// # Errors
/// `Argument` where the crop is empty or larger than the image.
pub fn centre_crop(image: &Image, height: usize, width: usize) -> Result<Image> {
    if !(1..=image.height).contains(&height) || !(1..=image.width).contains(&width) {
        let reason = format!("got a crop of {height}×{width} from an image of {}×{}", image.height, image.width);
        return Err(Error::argument("centre_crop", reason));
    }
    Ok(cut(image, margin(image.height, height), margin(image.width, width), height, width))
}

fn margin(side: usize, crop: usize) -> usize {
    ((side - crop) as f64 / 2.0).round_ties_even() as usize
}

/// Scales the shorter side of `image` to `shorter` pixels and cuts the middle `size` × `size` (torchvision's `Resize`
/// and `CenterCrop`, the usual preparation for a test). What is cut away is never made, so a long thin image costs no
/// more than a square one.
///
/// # Errors
/// `Argument` where `size` is zero or above `shorter`.
pub fn resize_and_centre_crop(
    image: &Image,
    shorter: usize,
    size: usize,
    interpolation: Interpolation,
) -> Result<Image> {
    if !(1..=shorter).contains(&size) {
        let reason = format!("got a crop of {size} from a shorter side of {shorter}");
        return Err(Error::argument("resize_and_centre_crop", reason));
    }
    let short = image.height.min(image.width);
    // Start and extent of the crop along a side, in pixels of the image.
    let span = |side: usize| {
        let scaled = (shorter as f64 * side as f64 / short as f64) as usize;
        let scale = side as f64 / scaled as f64;
        (margin(scaled, size) as f64 * scale, size as f64 * scale)
    };
    let ((top, height), (left, width)) = (span(image.height), span(image.width));
    resize_region(image, Region { top, left, height, width }, size, size, interpolation)
}

/// A random part of `image`, scaled to `size` × `size` (torchvision's `RandomResizedCrop`, after Szegedy et al. 2015).
///
/// The part's area is a share of the image's drawn uniformly from `scale`, its width by its height drawn uniformly on a
/// log scale from `ratio`. After ten parts that do not fit, the middle is taken, cut to the nearest allowed ratio.
///
/// # Errors
/// `Argument` where `size` is zero or above [`MAX_SIDE`](super::resize::MAX_SIDE).
pub fn random_resized_crop(
    image: &Image,
    size: usize,
    scale: [f64; 2],
    ratio: [f64; 2],
    interpolation: Interpolation,
    draws: &mut Draws,
) -> Result<Image> {
    let [top, left, height, width] = random_part(image.height, image.width, scale, ratio, draws);
    // Cut first: pixels outside the part must not bleed into it.
    resize(&cut(image, top, left, height, width), size, size, interpolation)
}

/// Top, left, height and width of a random part.
fn random_part(height: usize, width: usize, scale: [f64; 2], ratio: [f64; 2], draws: &mut Draws) -> [usize; 4] {
    let area = height as f64 * width as f64;
    for _ in 0..10 {
        let target = area * draws.range(scale[0], scale[1]);
        let aspect = draws.range(ratio[0].ln(), ratio[1].ln()).exp();
        let part_width = (target * aspect).sqrt().round() as usize;
        let part_height = (target / aspect).sqrt().round() as usize;
        if (1..=width).contains(&part_width) && (1..=height).contains(&part_height) {
            let top = draws.below(height - part_height + 1);
            let left = draws.below(width - part_width + 1);
            return [top, left, part_height, part_width];
        }
    }
    let aspect = (width as f64 / height as f64).clamp(ratio[0], ratio[1]);
    let part_height = ((width as f64 / aspect).round() as usize).clamp(1, height);
    let part_width = ((height as f64 * aspect).round() as usize).clamp(1, width);
    [(height - part_height) / 2, (width - part_width) / 2, part_height, part_width]
}

/// `image` with `padding` black pixels on every side, cut back to its size at a random place (He et al. 2016, for
/// CIFAR).
pub fn random_padded_crop(image: &Image, padding: usize, draws: &mut Draws) -> Image {
    let (down, right) = (draws.below(2 * padding + 1), draws.below(2 * padding + 1));
    let channels = image.channels;
    let mut shifted = Image::filled(image.height, image.width, channels, 0);
    // Output (y, x) shows input (y + down - padding, x + right - padding).
    let first_x = padding.saturating_sub(right);
    let source_x = right.saturating_sub(padding);
    let count = image.width.saturating_sub(first_x.max(source_x)) * channels;
    for y in 0..image.height {
        let Some(source_y) = (y + down).checked_sub(padding).filter(|source| *source < image.height) else { continue };
        if count > 0 {
            let to = (y * image.width + first_x) * channels;
            let from = source_x * channels;
            shifted.pixels[to..to + count].copy_from_slice(&image.row(source_y)[from..from + count]);
        }
    }
    shifted
}

/// Mirrors `image`, left to right.
pub fn flip_horizontal(image: &mut Image) {
    let (width, channels) = (image.width, image.channels);
    for row in image.pixels.chunks_exact_mut(width * channels) {
        for x in 0..width / 2 {
            for channel in 0..channels {
                row.swap(x * channels + channel, (width - 1 - x) * channels + channel);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Philox;

    fn ramp(height: usize, width: usize) -> Image {
        Image::new(height, width, 1, (0..height * width).map(|i| i as u8).collect()).unwrap()
    }

    #[test]
    fn the_centre_is_cut_from_the_middle() {
        assert_eq!(centre_crop(&ramp(3, 5), 1, 3).unwrap().pixels(), [6, 7, 8]);
        assert!(centre_crop(&ramp(3, 5), 4, 3).is_err());
        assert!(centre_crop(&ramp(3, 5), 0, 3).is_err());
        assert_eq!(resize_and_centre_crop(&ramp(4, 6), 4, 2, Interpolation::Bicubic).unwrap().pixels(), [8, 9, 14, 15]);
        assert!(resize_and_centre_crop(&ramp(4, 6), 4, 5, Interpolation::Bicubic).is_err());
    }

    #[test]
    fn resize_and_centre_crop_is_resize_then_centre_crop() {
        let image = ramp(30, 41);
        let resized = resize(&image, 16, 21, Interpolation::Bilinear).unwrap();
        let expected = centre_crop(&resized, 14, 14).unwrap();
        assert_eq!(resize_and_centre_crop(&image, 16, 14, Interpolation::Bilinear).unwrap(), expected);
        let thin = Image::filled(1, 30_000, 3, 9);
        assert_eq!(
            resize_and_centre_crop(&thin, 256, 224, Interpolation::Bicubic).unwrap(),
            Image::filled(224, 224, 3, 9)
        );
    }

    #[test]
    fn random_parts_have_the_area_and_ratio_asked_for() {
        let mut draws = Philox::new(1).draws();
        let (mut area, count) = (0.0, 4000);
        for _ in 0..count {
            let [top, left, height, width] = random_part(300, 400, [0.2, 0.6], [0.75, 4.0 / 3.0], &mut draws);
            assert!(top + height <= 300 && left + width <= 400);
            let ratio = width as f64 / height as f64;
            assert!((0.73..1.37).contains(&ratio), "{ratio}");
            let share = (height * width) as f64 / 120_000.0;
            assert!((0.19..0.61).contains(&share), "{share}");
            area += share / f64::from(count);
        }
        assert!((area - 0.4).abs() < 0.01, "{area}");
    }

    #[test]
    fn a_part_that_cannot_fit_is_replaced_by_the_middle() {
        let part = random_part(10, 1000, [0.9, 1.0], [0.75, 4.0 / 3.0], &mut Philox::new(2).draws());
        assert_eq!(part, [0, (1000 - 13) / 2, 10, 13]);
        let part = random_part(1, 1, [0.001, 0.002], [5.0, 6.0], &mut Philox::new(2).draws());
        assert_eq!(part, [0, 0, 1, 1]);
    }

    #[test]
    fn padded_crops_shift_by_up_to_the_padding() {
        let image = ramp(3, 3);
        let mut seen = std::collections::BTreeSet::new();
        let mut draws = Philox::new(3).draws();
        for _ in 0..400 {
            let shifted = random_padded_crop(&image, 1, &mut draws);
            // Pixel 4 is the centre; it stays in view.
            let at = shifted.pixels.iter().position(|&sample| sample == 4).unwrap() as isize;
            let (dy, dx) = (at / 3 - 1, at % 3 - 1);
            for (i, &sample) in shifted.pixels.iter().enumerate() {
                let (y, x) = (i as isize / 3 - dy, i as isize % 3 - dx);
                let inside = (0..3).contains(&y) && (0..3).contains(&x);
                assert_eq!(sample, if inside { (y * 3 + x) as u8 } else { 0 });
            }
            seen.insert((dy, dx));
        }
        assert_eq!(seen.len(), 9);
        assert_eq!(random_padded_crop(&image, 0, &mut draws), image);
        assert_eq!(random_padded_crop(&image, 100, &mut draws).pixels.len(), 9);
    }

    #[test]
    fn two_flips_are_none() {
        let image = Image::new(2, 3, 3, (0..18).collect()).unwrap();
        let mut flipped = image.clone();
        flip_horizontal(&mut flipped);
        assert_eq!(flipped.pixels()[..9], [6, 7, 8, 3, 4, 5, 0, 1, 2]);
        flip_horizontal(&mut flipped);
        assert_eq!(flipped, image);
    }
}
