//! What is done to images between a set and a batch.
//!
//! For training: a crop, a flip, an affine view, RandAugment, colour jitter, normalisation, random erasing; then mixup
//! or CutMix over the batch. For testing: the shorter side is scaled, the centre cut out and normalised. All before
//! normalisation, and CutMix, leaves bytes; where that is all, normalisation waits until the images are where a model is.

mod affine;
mod colour;
mod crop;
mod erasing;
mod mixing;
mod normalise;
mod policy;
mod resize;
mod validate;

use serde::{Deserialize, Serialize};

pub use affine::{Matrix, RandomAffine, rotation, warp};
pub use colour::{
    ColourJitter, auto_contrast, brightness, contrast, equalize, hue, invert, posterize, saturation, sharpness,
    solarize, solarize_add,
};
pub use crop::{centre_crop, flip_horizontal, random_padded_crop, random_resized_crop, resize_and_centre_crop};
pub use erasing::{ErasingMode, RandomErasing};
pub(super) use mixing::write_target;
pub use mixing::{Mix, Mixing};
pub use normalise::Normalise;
pub use policy::RandAugment;
pub use resize::{Interpolation, MAX_SIDE, Region, resize, resize_region};

use super::{ByteTable, Image};
use crate::random::Draws;
use crate::{Error, Result};

/// How a training image gets its size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Crop {
    /// The shorter side is scaled to the size and the centre cut out.
    Centre,
    /// As `Centre`, then `padding` black pixels all around and a crop at a random place.
    Padded {
        /// Pixels on each side.
        padding: usize,
    },
    /// A random part, scaled.
    RandomResized {
        /// Smallest and largest area, as a share of the image.
        scale: [f64; 2],
        /// Smallest and largest width by height.
        ratio: [f64; 2],
    },
}

/// What is done to images. Fields left out when reading are off, as in [`none`](AugmentConfig::none).
///
/// ```
/// use gridgrad::data::AugmentConfig;
/// use gridgrad::data::augment::{Normalise, RandomErasing};
/// let config = AugmentConfig {
///     erasing: Some(RandomErasing::default()),
///     normalise: Normalise::for_set("cifar10").unwrap(),
///     ..AugmentConfig::small()
/// };
/// assert_eq!(config.with_image_size(64).image_size, 64);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AugmentConfig {
    /// Height and width of images in a batch, in pixels.
    pub image_size: usize,
    /// For resizing and for geometric changes.
    pub interpolation: Interpolation,
    /// How training images get their size.
    pub crop: Crop,
    /// Probability of a left-right flip.
    pub horizontal_flip: f64,
    /// Random rotation, shift and scale.
    pub affine: Option<RandomAffine>,
    /// Random operations.
    pub rand_augment: Option<RandAugment>,
    /// Random changes of colour.
    pub colour_jitter: Option<ColourJitter>,
    /// Random rectangles erased.
    pub erasing: Option<RandomErasing>,
    /// Mixup and CutMix.
    pub mixing: Option<Mixing>,
    /// Share of a training target's weight that is spread over all classes.
    pub label_smoothing: f64,
    /// Mean and standard deviation.
    pub normalise: Normalise,
    /// For testing, the shorter side is scaled to `image_size` by this, rounded down, before the centre is cut out.
    pub test_crop_fraction: f64,
}

impl Default for AugmentConfig {
    fn default() -> Self {
        AugmentConfig::none()
    }
}

impl AugmentConfig {
    /// Resizing to 32 pixels alone; samples from 0 to 1.
    pub fn none() -> Self {
        AugmentConfig {
            image_size: 32,
            interpolation: Interpolation::Bicubic,
            crop: Crop::Centre,
            horizontal_flip: 0.0,
            affine: None,
            rand_augment: None,
            colour_jitter: None,
            erasing: None,
            mixing: None,
            label_smoothing: 0.0,
            normalise: Normalise::unit(),
            test_crop_fraction: 1.0,
        }
    }

    /// The recipe of CrossFormer (Wang et al. 2022) for ImageNet, that of DeiT (Touvron et al. 2021) without repeats.
    /// RandAugment takes the place of colour jitter, as in timm.
    pub fn imagenet() -> Self {
        AugmentConfig {
            image_size: 224,
            crop: Crop::RandomResized { scale: [0.08, 1.0], ratio: [3.0 / 4.0, 4.0 / 3.0] },
            horizontal_flip: 0.5,
            rand_augment: Some(RandAugment::default()),
            erasing: Some(RandomErasing::default()),
            mixing: Some(Mixing::default()),
            label_smoothing: 0.1,
            normalise: Normalise::imagenet(),
            test_crop_fraction: 224.0 / 256.0,
            ..AugmentConfig::none()
        }
    }

    /// For digits, which must not be flipped: slightly turned, shifted and scaled.
    pub fn digits() -> Self {
        AugmentConfig {
            interpolation: Interpolation::Bilinear,
            affine: Some(RandomAffine { degrees: 10.0, translate: 0.08, scale: [0.9, 1.1] }),
            normalise: Normalise::new(&[0.3053], &[0.3761]),
            ..AugmentConfig::none()
        }
    }

    /// For CIFAR (He et al. 2016): a crop after padding by 4 pixels, and a flip.
    pub fn small() -> Self {
        AugmentConfig {
            crop: Crop::Padded { padding: 4 },
            horizontal_flip: 0.5,
            normalise: Normalise::new(&[0.4914, 0.4822, 0.4465], &[0.2470, 0.2435, 0.2616]),
            ..AugmentConfig::none()
        }
    }

    /// What suits one of the [known sets](super::KNOWN_SETS), with its own mean and deviation. Traffic signs are not
    /// flipped: some mean another thing in the mirror.
    pub fn for_set(name: &str) -> Option<Self> {
        let config = match name {
            "builtin" | "mnist" => AugmentConfig::digits(),
            "cifar10" | "cifar100" => AugmentConfig::small(),
            "gtsrb" => AugmentConfig { horizontal_flip: 0.0, ..AugmentConfig::small() },
            _ => AugmentConfig::imagenet(),
        };
        Some(AugmentConfig { normalise: Normalise::for_set(name)?, ..config })
    }

    /// The preset called `imagenet`, `digits`, `small` or `none`.
    ///
    /// # Errors
    /// `Config` where there is none of that name.
    pub fn preset(name: &str) -> Result<Self> {
        match name {
            "imagenet" => Ok(AugmentConfig::imagenet()),
            "digits" => Ok(AugmentConfig::digits()),
            "small" => Ok(AugmentConfig::small()),
            "none" => Ok(AugmentConfig::none()),
            _ => Err(Error::Config(format!("augment preset {name:?}, expected imagenet, digits, small or none"))),
        }
    }

    /// This configuration for images of another size.
    #[must_use]
    pub fn with_image_size(self, image_size: usize) -> Self {
        AugmentConfig { image_size, ..self }
    }
}

/// A configuration made ready for images of a number of channels.
#[derive(Clone, Debug)]
pub struct Augment {
    config: AugmentConfig,
    channels: usize,
    table: ByteTable,
    mean_colour: [u8; 3],
}

impl Augment {
    /// For images of `channels` (1 or 3).
    ///
    /// # Errors
    /// `Config` as [`AugmentConfig::validate`]; `Argument` for another number of channels.
    pub fn new(config: AugmentConfig, channels: usize) -> Result<Self> {
        config.validate()?;
        if !matches!(channels, 1 | 3) {
            return Err(Error::argument("Augment::new", format!("got {channels} channels, expected 1 or 3")));
        }
        let (table, mean_colour) = (config.normalise.table(channels), config.normalise.mean_colour(channels));
        Ok(Augment { config, channels, table, mean_colour })
    }

    /// What it was made from.
    pub fn config(&self) -> &AugmentConfig {
        &self.config
    }

    /// What normalises bytes.
    pub fn table(&self) -> &ByteTable {
        &self.table
    }

    /// Whether all training images are still bytes when all is done to them, so that the table is all that is left to
    /// apply: none is erased, and mixing does not average. Depends on the configuration alone, so that batches do not
    /// differ in it.
    pub fn leaves_bytes(&self) -> bool {
        let erases = self.config.erasing.as_ref().is_some_and(|erasing| erasing.probability > 0.0);
        let averages = |mixing: &Mixing| mixing.mixup > 0.0 && mixing.probability > 0.0;
        !erases && !self.config.mixing.as_ref().is_some_and(averages)
    }

    /// Number of values that one image becomes: `image_size`² × channels.
    pub fn sample_len(&self) -> usize {
        self.config.image_size * self.config.image_size * self.channels
    }

    /// Writes `image`, changed at random and normalised, to `out`: (height, width, channels).
    ///
    /// # Errors
    /// `Shape` where `image` has other channels or `out` another length than [`sample_len`](Augment::sample_len).
    pub fn training_sample(&self, image: &Image, draws: &mut Draws, out: &mut [f32]) -> Result<()> {
        self.write(&self.training_image(image, draws)?, out)?;
        if let Some(erasing) = &self.config.erasing {
            erasing.apply(out, self.config.image_size, self.config.image_size, self.channels, draws);
        }
        Ok(())
    }

    /// Writes the centre of `image`, normalised, to `out`: (height, width, channels).
    ///
    /// # Errors
    /// As [`training_sample`](Augment::training_sample).
    pub fn test_sample(&self, image: &Image, out: &mut [f32]) -> Result<()> {
        self.write(&self.test_image(image)?, out)
    }

    /// `image` of `image_size`, changed at random by all that leaves bytes: what is left is to be normalised and erased.
    ///
    /// # Errors
    /// `Shape` where `image` has other channels.
    pub fn training_image(&self, image: &Image, draws: &mut Draws) -> Result<Image> {
        self.check(image)?;
        let config = &self.config;
        let (size, interpolation) = (config.image_size, config.interpolation);
        let mut image = match config.crop {
            Crop::Centre => resize_and_centre_crop(image, size, size, interpolation)?,
            Crop::Padded { padding } => {
                random_padded_crop(&resize_and_centre_crop(image, size, size, interpolation)?, padding, draws)
            }
            Crop::RandomResized { scale, ratio } => {
                random_resized_crop(image, size, scale, ratio, interpolation, draws)?
            }
        };
        if draws.chance(config.horizontal_flip) {
            flip_horizontal(&mut image);
        }
        if let Some(affine) = &config.affine {
            image = affine.apply(&image, interpolation, draws);
        }
        if let Some(policy) = &config.rand_augment {
            policy.apply(&mut image, self.mean_colour, interpolation, draws);
        }
        if let Some(jitter) = &config.colour_jitter {
            jitter.apply(&mut image, draws);
        }
        Ok(image)
    }

    /// The centre of `image`, of `image_size`.
    ///
    /// # Errors
    /// `Shape` where `image` has other channels.
    pub fn test_image(&self, image: &Image) -> Result<Image> {
        self.check(image)?;
        let size = self.config.image_size;
        // The small addition undoes the rounding of fractions such as 0.9.
        let shorter = (size as f64 / self.config.test_crop_fraction + 1e-6) as usize;
        resize_and_centre_crop(image, shorter, size, self.config.interpolation)
    }

    fn check(&self, image: &Image) -> Result<()> {
        if image.channels == self.channels {
            return Ok(());
        }
        let reason = format!("got an image of {} channels, expected {}", image.channels, self.channels);
        Err(Error::shape("Augment", reason))
    }

    /// Normalises `image`.
    fn write(&self, image: &Image, out: &mut [f32]) -> Result<()> {
        if out.len() != image.pixels.len() {
            let reason = format!("got room for {} values, expected {}", out.len(), image.pixels.len());
            return Err(Error::shape("Augment", reason));
        }
        self.table.write(&image.pixels, out);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Philox;

    fn picture(channels: usize) -> Image {
        let pixels = (0..50 * 70 * channels).map(|i| (i * 31 % 256) as u8).collect();
        Image::new(50, 70, channels, pixels).unwrap()
    }

    #[test]
    fn every_preset_works_in_grey_and_colour() {
        for name in ["imagenet", "digits", "small", "none"] {
            for channels in [1, 3] {
                let config = AugmentConfig::preset(name).unwrap().with_image_size(24);
                let augment = Augment::new(config, channels).unwrap();
                let mut out = vec![f32::NAN; augment.sample_len()];
                augment.training_sample(&picture(channels), &mut Philox::new(1).draws(), &mut out).unwrap();
                assert!(out.iter().all(|value| value.is_finite()), "{name}");
                out.fill(f32::NAN);
                augment.test_sample(&picture(channels), &mut out).unwrap();
                assert!(out.iter().all(|value| value.is_finite()), "{name}");
                assert!(augment.test_sample(&picture(4 - channels), &mut out).is_err());
                assert!(augment.test_sample(&picture(channels), &mut out[1..]).is_err());
            }
        }
        assert!(AugmentConfig::preset("strong").is_err());
    }

    #[test]
    fn without_augmentation_training_and_testing_see_the_same() {
        let augment = Augment::new(AugmentConfig::none(), 3).unwrap();
        let (mut a, mut b) = (vec![0.0; augment.sample_len()], vec![0.0; augment.sample_len()]);
        augment.training_sample(&picture(3), &mut Philox::new(1).draws(), &mut a).unwrap();
        augment.test_sample(&picture(3), &mut b).unwrap();
        assert_eq!(a, b);
    }

    #[test]
    fn the_test_crop_of_imagenet_is_224_of_256() {
        let augment = Augment::new(AugmentConfig::imagenet(), 3).unwrap();
        let image = picture(3);
        let mut out = vec![0.0; augment.sample_len()];
        augment.test_sample(&image, &mut out).unwrap();
        let resized = resize(&image, 256, 358, Interpolation::Bicubic).unwrap();
        let centre = centre_crop(&resized, 224, 224).unwrap();
        let mut expected = vec![0.0; out.len()];
        augment.table.write(centre.pixels(), &mut expected);
        assert_eq!(out, expected);
    }
}
