//! Changes of colour and tone, in place. Each does what Pillow's `ImageOps` or `ImageEnhance` does under its name.

use serde::{Deserialize, Serialize};

use crate::data::Image;
use crate::data::image::luma;
use crate::random::Draws;

/// Replaces every sample by its entry in `table`.
fn look_up(image: &mut Image, table: &[u8; 256]) {
    for sample in &mut image.pixels {
        *sample = table[usize::from(*sample)];
    }
}

/// Replaces the samples of every channel by a table made from that channel's histogram.
fn look_up_by_histogram(image: &mut Image, table: impl Fn(&[usize; 256]) -> Option<[u8; 256]>) {
    for channel in 0..image.channels {
        let mut histogram = [0; 256];
        for &sample in image.pixels.iter().skip(channel).step_by(image.channels) {
            histogram[usize::from(sample)] += 1;
        }
        if let Some(table) = table(&histogram) {
            for sample in image.pixels.iter_mut().skip(channel).step_by(image.channels) {
                *sample = table[usize::from(*sample)];
            }
        }
    }
}

/// Stretches each channel so that its darkest sample becomes 0 and its brightest 255.
pub fn auto_contrast(image: &mut Image) {
    look_up_by_histogram(image, |histogram| {
        let darkest = histogram.iter().position(|count| *count > 0)?;
        let brightest = histogram.iter().rposition(|count| *count > 0)?;
        let range = brightest - darkest;
        (range > 0).then(|| std::array::from_fn(|value| (value.saturating_sub(darkest) * 255 / range).min(255) as u8))
    });
}

/// Spreads each channel's samples so that all values become equally frequent, as far as they can.
pub fn equalize(image: &mut Image) {
    look_up_by_histogram(image, |histogram| {
        let total: usize = histogram.iter().sum();
        let brightest = histogram.iter().rfind(|count| **count > 0)?;
        let step = (total - brightest) / 255;
        let mut below = step / 2;
        (step > 0).then(|| {
            histogram.map(|count| {
                let value = (below / step).min(255) as u8;
                below += count;
                value
            })
        })
    });
}

/// The negative.
pub fn invert(image: &mut Image) {
    look_up(image, &std::array::from_fn(|value| 255 - value as u8));
}

/// Inverts samples at or above `threshold` (0 to 256).
pub fn solarize(image: &mut Image, threshold: usize) {
    look_up(image, &std::array::from_fn(|value| if value < threshold { value as u8 } else { 255 - value as u8 }));
}

/// Adds `amount` to samples below 128.
pub fn solarize_add(image: &mut Image, amount: u8) {
    look_up(image, &std::array::from_fn(|value| (value as u8).saturating_add(if value < 128 { amount } else { 0 })));
}

/// Keeps the `bits` highest bits of every sample (0 to 8).
pub fn posterize(image: &mut Image, bits: u32) {
    let mask = !(0xFF_u32 >> bits.min(8)) as u8;
    look_up(image, &std::array::from_fn(|value| value as u8 & mask));
}

/// From `base` (factor 0) to `sample` (factor 1) and beyond. The cast cuts and saturates.
fn blend(base: f32, sample: u8, factor: f32) -> u8 {
    (base + factor * (f32::from(sample) - base)) as u8
}

/// Brightness: 0 gives black, 1 the image.
pub fn brightness(image: &mut Image, factor: f64) {
    look_up(image, &std::array::from_fn(|value| blend(0.0, value as u8, factor as f32)));
}

/// Contrast: 0 gives the image's mean luma everywhere, 1 the image.
pub fn contrast(image: &mut Image, factor: f64) {
    let luma_of = |pixel: &[u8]| u64::from(if pixel.len() == 3 { luma(pixel) } else { pixel[0] });
    let sum: u64 = image.pixels.chunks_exact(image.channels).map(luma_of).sum();
    let mean = (sum as f64 / (image.height * image.width) as f64 + 0.5).floor() as f32;
    look_up(image, &std::array::from_fn(|value| blend(mean, value as u8, factor as f32)));
}

/// Saturation: 0 gives grey, 1 the image. Leaves grey images alone.
pub fn saturation(image: &mut Image, factor: f64) {
    if image.channels == 3 {
        for pixel in image.pixels.chunks_exact_mut(3) {
            let grey = f32::from(luma(pixel));
            pixel.iter_mut().for_each(|sample| *sample = blend(grey, *sample, factor as f32));
        }
    }
}

/// Sharpness: 0 gives the image smoothed by a 3×3 kernel (5 in the middle, 1 around, over 13), 1 the image. The
/// outermost pixels stay.
pub fn sharpness(image: &mut Image, factor: f64) {
    let (stride, channels) = (image.width * image.channels, image.channels);
    if image.height < 3 || image.width < 3 {
        return;
    }
    let original = image.pixels.clone();
    for y in 1..image.height - 1 {
        for at in y * stride + channels..(y + 1) * stride - channels {
            let around: u32 = [at - stride, at, at + stride]
                .iter()
                .flat_map(|middle| [middle - channels, *middle, middle + channels])
                .map(|neighbour| u32::from(original[neighbour]))
                .sum();
            let smooth = (around + 4 * u32::from(original[at])) as f32 / 13.0;
            image.pixels[at] = blend((smooth + 0.5).floor(), original[at], factor as f32);
        }
    }
}

/// Turns the hue by `turn` of the colour circle, keeping saturation and value. Leaves grey images alone.
pub fn hue(image: &mut Image, turn: f64) {
    if image.channels == 3 {
        for pixel in image.pixels.chunks_exact_mut(3) {
            turn_hue(pixel, turn as f32);
        }
    }
}

fn turn_hue(pixel: &mut [u8], turn: f32) {
    let [r, g, b] = [pixel[0], pixel[1], pixel[2]].map(f32::from);
    let (value, least) = (r.max(g).max(b), r.min(g).min(b));
    let chroma = value - least;
    if chroma == 0.0 {
        return;
    }
    // Hue in sixths of the circle (Smith 1978).
    let sixth = if value == r {
        (g - b) / chroma
    } else if value == g {
        (b - r) / chroma + 2.0
    } else {
        (r - g) / chroma + 4.0
    };
    let sixth = sixth + 6.0 * turn;
    for (sample, offset) in pixel.iter_mut().zip([5.0, 3.0, 1.0]) {
        let k = (offset + sixth).rem_euclid(6.0);
        *sample = (value - chroma * k.min(4.0 - k).clamp(0.0, 1.0) + 0.5) as u8;
    }
}

/// Random brightness, contrast, saturation and hue, in random order (torchvision's `ColorJitter`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ColourJitter {
    /// The factor is drawn from 1 ± this, at least 0.
    pub brightness: f64,
    /// The factor is drawn from 1 ± this, at least 0.
    pub contrast: f64,
    /// The factor is drawn from 1 ± this, at least 0.
    pub saturation: f64,
    /// The turn is drawn from ± this, at most 0.5 of the circle.
    pub hue: f64,
}

impl ColourJitter {
    /// Changes `image` at random.
    pub fn apply(&self, image: &mut Image, draws: &mut Draws) {
        let mut steps = [0, 1, 2, 3];
        for last in (1..steps.len()).rev() {
            steps.swap(last, draws.below(last + 1));
        }
        for step in steps {
            let strength = [self.brightness, self.contrast, self.saturation, self.hue][step];
            if strength > 0.0 {
                let factor = |draws: &mut Draws| draws.range((1.0 - strength).max(0.0), 1.0 + strength);
                match step {
                    0 => brightness(image, factor(draws)),
                    1 => contrast(image, factor(draws)),
                    2 => saturation(image, factor(draws)),
                    _ => hue(image, draws.range(-strength, strength)),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Philox;

    fn grey(pixels: &[u8]) -> Image {
        Image::new(1, pixels.len(), 1, pixels.to_vec()).unwrap()
    }

    fn after(pixels: &[u8], change: impl Fn(&mut Image)) -> Vec<u8> {
        let mut image = grey(pixels);
        change(&mut image);
        image.pixels
    }

    #[test]
    fn tables_do_what_their_names_say() {
        assert_eq!(after(&[0, 100, 255], invert), [255, 155, 0]);
        assert_eq!(after(&[0, 99, 100, 255], |i| solarize(i, 100)), [0, 99, 155, 0]);
        assert_eq!(after(&[0, 99, 255], |i| solarize(i, 256)), [0, 99, 255]);
        assert_eq!(after(&[0, 127, 128], |i| solarize_add(i, 110)), [110, 237, 128]);
        assert_eq!(after(&[0xFF, 0x6F], |i| posterize(i, 1)), [0x80, 0]);
        assert_eq!(after(&[0xFF, 0x6F], |i| posterize(i, 4)), [0xF0, 0x60]);
        assert_eq!(after(&[0xFF, 0x6F], |i| posterize(i, 0)), [0, 0]);
        assert_eq!(after(&[0xFF, 0x6F], |i| posterize(i, 8)), [0xFF, 0x6F]);
    }

    #[test]
    fn histograms_are_stretched_and_flattened() {
        assert_eq!(after(&[50, 100, 150], auto_contrast), [0, 127, 255]);
        assert_eq!(after(&[50, 50], auto_contrast), [50, 50]);
        // 511 samples of 10, 20 and 30: one step of (511 - 1) / 255 = 2 samples.
        let mut image = grey(&[vec![10; 255], vec![20; 255], vec![30]].concat());
        equalize(&mut image);
        assert_eq!((image.pixels[0], image.pixels[300], image.pixels[510]), (0, 128, 255));
        assert_eq!(after(&[3, 4, 5], equalize), [3, 4, 5]);
    }

    #[test]
    fn a_factor_of_one_keeps_the_image_and_zero_removes_what_is_named() {
        let image = Image::new(3, 3, 3, (0..27).map(|i| i * 9).collect()).unwrap();
        let changes = [brightness, contrast, saturation, sharpness];
        for change in changes {
            let mut same = image.clone();
            change(&mut same, 1.0);
            assert_eq!(same, image);
        }
        let zero = |change: fn(&mut Image, f64)| {
            let mut changed = image.clone();
            change(&mut changed, 0.0);
            changed
        };
        assert!(zero(brightness).pixels.iter().all(|&sample| sample == 0));
        let flat = zero(contrast);
        assert!(flat.pixels.iter().all(|&sample| sample == flat.pixels[0]) && flat.pixels[0] == 115);
        assert!(zero(saturation).pixels.chunks(3).all(|pixel| pixel[0] == pixel[1] && pixel[1] == pixel[2]));
        assert_eq!(after(&[100, 250], |i| brightness(i, 1.5)), [150, 255]);
    }

    #[test]
    fn sharpness_blends_with_the_smoothed_middle() {
        let mut image = Image::filled(3, 3, 1, 0);
        image.pixels[4] = 130;
        sharpness(&mut image, 0.0);
        assert_eq!(image.pixels[4], 50);
        sharpness(&mut image, 2.0);
        assert_eq!(image.pixels[4], 81); // smoothed: 250 / 13 = 19
    }

    #[test]
    fn hue_turns_colours_and_a_whole_turn_is_none() {
        let turned = |pixel: [u8; 3], turn: f64| {
            let mut image = Image::new(1, 1, 3, pixel.to_vec()).unwrap();
            hue(&mut image, turn);
            image.pixels
        };
        assert_eq!(turned([200, 0, 0], 1.0 / 3.0), [0, 200, 0]);
        assert_eq!(turned([200, 0, 0], -1.0 / 3.0), [0, 0, 200]);
        assert_eq!(turned([10, 200, 90], 0.0), [10, 200, 90]);
        assert_eq!(turned([10, 90, 200], 1.0), [10, 90, 200]);
        assert_eq!(turned([77, 77, 77], 0.3), [77, 77, 77]);
    }

    #[test]
    fn jitter_stays_within_its_strength() {
        let jitter = ColourJitter { brightness: 0.2, contrast: 0.0, saturation: 0.0, hue: 0.0 };
        let mut draws = Philox::new(9).draws();
        let values: Vec<u8> = (0..300).map(|_| after(&[100], |i| jitter.apply(i, &mut draws.clone()))[0]).collect();
        assert!(values.iter().all(|&v| v == values[0]));
        let mut seen = [255, 0];
        for _ in 0..300 {
            let mut image = grey(&[100]);
            jitter.apply(&mut image, &mut draws);
            seen = [seen[0].min(image.pixels[0]), seen[1].max(image.pixels[0])];
        }
        assert!(seen[0] < 85 && seen[0] >= 79 && seen[1] > 115 && seen[1] <= 120, "{seen:?}");
    }
}
