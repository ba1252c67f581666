//! RandAugment (Cubuk et al. 2020) with the operations and strengths of timm's `rand-m9-mstd0.5-inc1`.

use serde::{Deserialize, Serialize};

use super::affine::{rotation, warp};
use super::colour;
use super::resize::Interpolation;
use crate::data::Image;
use crate::random::Draws;

/// Random operations of random strength.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RandAugment {
    /// Operations drawn for an image, with replacement.
    pub operations: usize,
    /// Mean strength, from 0 to 10.
    pub magnitude: f64,
    /// Standard deviation of the strength, which is drawn anew for every operation and cut to 0 to 10.
    pub magnitude_std: f64,
    /// Probability that an operation drawn is carried out.
    pub probability: f64,
}

impl Default for RandAugment {
    fn default() -> Self {
        RandAugment { operations: 2, magnitude: 9.0, magnitude_std: 0.5, probability: 0.5 }
    }
}

/// The strength at which an operation is strongest.
pub(super) const MAX_MAGNITUDE: f64 = 10.0;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    AutoContrast,
    Equalize,
    Invert,
    Rotate,
    Posterize,
    Solarize,
    SolarizeAdd,
    Colour,
    Contrast,
    Brightness,
    Sharpness,
    ShearX,
    ShearY,
    TranslateX,
    TranslateY,
}

/// All operations, each as likely; those with a strength change the image the more, the higher it is ("increasing").
const OPERATIONS: [Operation; 15] = {
    use Operation::*;
    [
        AutoContrast,
        Equalize,
        Invert,
        Rotate,
        Posterize,
        Solarize,
        SolarizeAdd,
        Colour,
        Contrast,
        Brightness,
        Sharpness,
        ShearX,
        ShearY,
        TranslateX,
        TranslateY,
    ]
};

impl RandAugment {
    /// Changes `image` at random; `fill` shows where it is moved out of its frame.
    pub fn apply(&self, image: &mut Image, fill: [u8; 3], interpolation: Interpolation, draws: &mut Draws) {
        for _ in 0..self.operations {
            let operation = OPERATIONS[draws.below(OPERATIONS.len())];
            if !draws.chance(self.probability) {
                continue;
            }
            let magnitude = (self.magnitude + self.magnitude_std * draws.normal()).clamp(0.0, MAX_MAGNITUDE);
            let sign = if draws.chance(0.5) { 1.0 } else { -1.0 };
            operation.apply(image, magnitude / MAX_MAGNITUDE, sign, fill, interpolation);
        }
    }
}

impl Operation {
    /// `level` is the strength from 0 to 1; `sign` the direction, for operations that have two.
    fn apply(self, image: &mut Image, level: f64, sign: f64, fill: [u8; 3], interpolation: Interpolation) {
        let (height, width) = (image.height, image.width);
        let factor = (1.0 + sign * 0.9 * level).max(0.1);
        let shear = sign * 0.3 * level;
        let shift = sign * 0.45 * level;
        let matrix = match self {
            Operation::AutoContrast => return colour::auto_contrast(image),
            Operation::Equalize => return colour::equalize(image),
            Operation::Invert => return colour::invert(image),
            Operation::Posterize => return colour::posterize(image, 4 - (level * 4.0) as u32),
            Operation::Solarize => return colour::solarize(image, 256 - (level * 256.0) as usize),
            Operation::SolarizeAdd => return colour::solarize_add(image, (level * 110.0) as u8),
            Operation::Colour => return colour::saturation(image, factor),
            Operation::Contrast => return colour::contrast(image, factor),
            Operation::Brightness => return colour::brightness(image, factor),
            Operation::Sharpness => return colour::sharpness(image, factor),
            Operation::Rotate => rotation(sign * 30.0 * level, height, width),
            Operation::ShearX => [1.0, shear, 0.0, 0.0, 1.0, 0.0],
            Operation::ShearY => [1.0, 0.0, 0.0, shear, 1.0, 0.0],
            Operation::TranslateX => [1.0, 0.0, shift * width as f64, 0.0, 1.0, 0.0],
            Operation::TranslateY => [1.0, 0.0, 0.0, 0.0, 1.0, shift * height as f64],
        };
        *image = warp(image, &matrix, fill, interpolation);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Philox;

    fn texture(channels: usize) -> Image {
        let stream = Philox::new(8);
        let pixels = (0..20 * 24 * channels).map(|i| 40 + (stream.bits(i as u64) % 150) as u8).collect();
        Image::new(20, 24, channels, pixels).unwrap()
    }

    #[test]
    fn every_operation_keeps_the_size_and_changes_a_colour_image() {
        for operation in OPERATIONS {
            for channels in [1, 3] {
                let image = texture(channels);
                let mut changed = image.clone();
                operation.apply(&mut changed, 0.9, -1.0, [1, 2, 3], Interpolation::Bicubic);
                assert_eq!((changed.height, changed.width, changed.channels), (20, 24, channels));
                let has_effect = channels == 3 || operation != Operation::Colour;
                assert_eq!(changed != image, has_effect, "{operation:?} in {channels} channels");
            }
        }
    }

    #[test]
    fn strength_zero_leaves_the_increasing_operations_without_effect() {
        use Operation::*;
        for operation in [Rotate, Solarize, SolarizeAdd, Colour, Contrast, Brightness, Sharpness, ShearX, TranslateY] {
            let image = texture(3);
            let mut changed = image.clone();
            operation.apply(&mut changed, 0.0, 1.0, [0; 3], Interpolation::Bilinear);
            assert_eq!(changed, image, "{operation:?}");
        }
    }

    #[test]
    fn a_quarter_of_the_images_stay_as_they_are() {
        // Two operations, each carried out half of the time; a few of those change nothing in a given image.
        let image = texture(3);
        let mut draws = Philox::new(10).draws();
        let same = (0..2000).filter(|_| {
            let mut changed = image.clone();
            RandAugment::default().apply(&mut changed, [0; 3], Interpolation::Bilinear, &mut draws);
            changed == image
        });
        let share = same.count() as f64 / 2000.0;
        assert!((0.22..0.30).contains(&share), "{share}");
    }
}
