//! Checks of an [`AugmentConfig`] before anything is made from it.

use super::policy::MAX_MAGNITUDE;
use super::{AugmentConfig, Crop};
use crate::{Error, Result};

/// Largest `image_size`, in pixels.
const MAX_IMAGE_SIZE: usize = 4096;

/// An error about the field `name`, unless `ok`.
fn require(ok: bool, name: &str, got: impl std::fmt::Debug, expected: &str) -> Result<()> {
    if ok { Ok(()) } else { Err(Error::Config(format!("augment.{name} is {got:?}, expected {expected}"))) }
}

fn probability(name: &str, value: f64) -> Result<()> {
    require((0.0..=1.0).contains(&value), name, value, "a probability from 0 to 1")
}

/// An interval within (0, `limit`].
fn interval(name: &str, [low, high]: [f64; 2], limit: f64) -> Result<()> {
    let ok = low > 0.0 && low <= high && high <= limit;
    require(ok, name, [low, high], &format!("two numbers above 0, in order, at most {limit}"))
}

impl AugmentConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// `Config` that names the first field out of its range.
    pub fn validate(&self) -> Result<()> {
        let sizes = 1..=MAX_IMAGE_SIZE;
        require(sizes.contains(&self.image_size), "image_size", self.image_size, "1 to 4096 pixels")?;
        match self.crop {
            Crop::Centre => {}
            Crop::Padded { padding } => {
                require(padding <= self.image_size, "crop.padded.padding", padding, "at most image_size")?;
            }
            Crop::RandomResized { scale, ratio } => {
                interval("crop.random_resized.scale", scale, 1.0)?;
                interval("crop.random_resized.ratio", ratio, 100.0)?;
            }
        }
        probability("horizontal_flip", self.horizontal_flip)?;
        let fraction = self.test_crop_fraction;
        require((0.1..=1.0).contains(&fraction), "test_crop_fraction", fraction, "a share from 0.1 to 1")?;
        let smoothing = self.label_smoothing;
        require((0.0..1.0).contains(&smoothing), "label_smoothing", smoothing, "a share from 0 to below 1")?;
        self.validate_colours()?;
        self.validate_geometry()
    }

    fn validate_colours(&self) -> Result<()> {
        let (mean, std) = (&self.normalise.mean, &self.normalise.std);
        let lengths_fit = matches!(mean.len(), 1 | 3) && mean.len() == std.len();
        require(lengths_fit, "normalise", (mean, std), "1 or 3 means and as many standard deviations")?;
        require(mean.iter().all(|m| (0.0..=1.0).contains(m)), "normalise.mean", mean, "numbers from 0 to 1")?;
        // Not below what a byte resolves, so that no value grows out of hand.
        let fits = std.iter().all(|std| (1e-3..=1e3).contains(std));
        require(fits, "normalise.std", std, "numbers from 0.001 to 1000")?;
        if let Some(jitter) = &self.colour_jitter {
            let strengths = [jitter.brightness, jitter.contrast, jitter.saturation];
            let fit = strengths.iter().all(|strength| (0.0..=10.0).contains(strength));
            require(fit, "colour_jitter", jitter, "brightness, contrast and saturation from 0 to 10")?;
            require((0.0..=0.5).contains(&jitter.hue), "colour_jitter.hue", jitter.hue, "0 to 0.5")?;
        }
        if let Some(policy) = &self.rand_augment {
            require(policy.operations <= 16, "rand_augment.operations", policy.operations, "at most 16")?;
            let (magnitude, std) = (policy.magnitude, policy.magnitude_std);
            require((0.0..=MAX_MAGNITUDE).contains(&magnitude), "rand_augment.magnitude", magnitude, "0 to 10")?;
            require((0.0..=100.0).contains(&std), "rand_augment.magnitude_std", std, "0 to 100")?;
            probability("rand_augment.probability", policy.probability)?;
        }
        Ok(())
    }

    fn validate_geometry(&self) -> Result<()> {
        if let Some(affine) = &self.affine {
            require((0.0..=180.0).contains(&affine.degrees), "affine.degrees", affine.degrees, "0 to 180")?;
            require((0.0..=1.0).contains(&affine.translate), "affine.translate", affine.translate, "0 to 1")?;
            interval("affine.scale", affine.scale, 100.0)?;
        }
        if let Some(erasing) = &self.erasing {
            probability("erasing.probability", erasing.probability)?;
            interval("erasing.area", erasing.area, 1.0)?;
            interval("erasing.ratio", erasing.ratio, 100.0)?;
            require((1..=64).contains(&erasing.count), "erasing.count", erasing.count, "1 to 64")?;
        }
        if let Some(mixing) = &self.mixing {
            probability("mixing.probability", mixing.probability)?;
            probability("mixing.switch_probability", mixing.switch_probability)?;
            for (name, alpha) in [("mixing.mixup", mixing.mixup), ("mixing.cutmix", mixing.cutmix)] {
                require(alpha == 0.0 || (1e-3..=1e3).contains(&alpha), name, alpha, "0, or 0.001 to 1000")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::augment::{ColourJitter, Mixing, Normalise, RandAugment, RandomAffine, RandomErasing};

    #[test]
    fn each_field_out_of_range_is_named() {
        let check = |name: &str, change: fn(&mut AugmentConfig)| {
            let mut config = AugmentConfig::imagenet();
            config.validate().unwrap();
            change(&mut config);
            let message = config.validate().unwrap_err().to_string();
            assert!(message.contains(&format!("augment.{name} ")), "{message}");
        };
        check("image_size", |c| c.image_size = 0);
        check("image_size", |c| c.image_size = 4097);
        check("crop.padded.padding", |c| c.crop = Crop::Padded { padding: 225 });
        check("crop.random_resized.scale", |c| c.crop = Crop::RandomResized { scale: [0.5, 0.1], ratio: [1.0; 2] });
        check("crop.random_resized.ratio", |c| c.crop = Crop::RandomResized { scale: [0.5; 2], ratio: [0.0, 1.0] });
        check("horizontal_flip", |c| c.horizontal_flip = f64::NAN);
        check("test_crop_fraction", |c| c.test_crop_fraction = 0.0);
        check("label_smoothing", |c| c.label_smoothing = 1.0);
        check("normalise", |c| c.normalise = Normalise::new(&[0.5, 0.5], &[0.5, 0.5]));
        check("normalise.std", |c| c.normalise = Normalise::new(&[0.5], &[0.0]));
        check("colour_jitter.hue", |c| {
            c.colour_jitter = Some(ColourJitter { brightness: 0.1, contrast: 0.1, saturation: 0.1, hue: 0.6 });
        });
        check("rand_augment.magnitude", |c| {
            c.rand_augment = Some(RandAugment { magnitude: 11.0, ..RandAugment::default() });
        });
        check("affine.scale", |c| {
            c.affine = Some(RandomAffine { degrees: 1.0, translate: 0.1, scale: [f64::INFINITY; 2] });
        });
        check("erasing.count", |c| c.erasing = Some(RandomErasing { count: 0, ..RandomErasing::default() }));
        check("mixing.mixup", |c| c.mixing = Some(Mixing { mixup: -1.0, ..Mixing::default() }));
    }

    #[test]
    fn configurations_survive_toml_and_what_is_left_out_is_off() {
        for name in ["imagenet", "digits", "small", "none"] {
            let config = AugmentConfig::preset(name).unwrap();
            config.validate().unwrap();
            let text = toml::to_string(&config).unwrap();
            assert_eq!(toml::from_str::<AugmentConfig>(&text).unwrap(), config, "{text}");
        }
        let config: AugmentConfig = toml::from_str("image_size = 64\ncrop = { padded = { padding = 2 } }").unwrap();
        let expected = AugmentConfig { image_size: 64, crop: Crop::Padded { padding: 2 }, ..AugmentConfig::none() };
        assert_eq!(config, expected);
        assert!(toml::from_str::<AugmentConfig>("image_sise = 64").is_err());
    }
}
