//! How every model is trained.

use serde::{Deserialize, Serialize};

use crate::train::Sgd;
use crate::{Error, Result};

/// Hyperparameters of many models, the same for all. The defaults are the published ones of Deep Partition Aggregation
/// and Finite Aggregation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Recipe {
    /// Passes over a model's subset.
    pub epochs: usize,
    /// Samples of a step; the last one of an epoch may have fewer.
    pub batch_size: usize,
    /// In the first epochs. After 61, 121 and 161 of 200 epochs, and in proportion of others, it becomes a fifth.
    pub learning_rate: f64,
    /// Momentum and weight decay, which is on all weights.
    pub sgd: Sgd,
    /// Black pixels around an image, of which a crop of its size is cut at random.
    pub crop_padding: usize,
    /// Whether images are mirrored at random.
    pub flip: bool,
}

impl Default for Recipe {
    fn default() -> Self {
        Recipe {
            epochs: 200,
            batch_size: 128,
            learning_rate: 0.1,
            sgd: Sgd { momentum: 0.9, nesterov: true, weight_decay: 5e-4 },
            crop_padding: 4,
            flip: false,
        }
    }
}

impl Recipe {
    /// The learning rate of `epoch`, from 0: a fifth of the last one after epochs 60, 120 and 160 of 200.
    pub fn learning_rate_of(&self, epoch: usize) -> f64 {
        const OF_EPOCHS: u128 = 200;
        let after = |&mark: &u128| epoch as u128 * OF_EPOCHS > mark * self.epochs as u128;
        let decays = [60, 120, 160].iter().filter(|mark| after(mark)).count();
        self.learning_rate * 0.2f64.powi(decays as i32)
    }

    /// Most passes over a subset.
    const MAX_EPOCHS: usize = 1_000_000;
    /// Most black pixels around an image: beyond, hardly a crop has anything of it.
    const MAX_PADDING: usize = 1 << 16;

    /// # Errors
    /// `Config` where there is no epoch or batch, there are too many epochs or pixels of padding, or the learning rate is
    /// not a positive number.
    pub fn check(&self) -> Result<()> {
        if self.epochs == 0 || self.batch_size == 0 {
            let message = format!("{} epochs of batches of {}: expected 1 or more", self.epochs, self.batch_size);
            return Err(Error::Config(message));
        }
        if self.epochs > Self::MAX_EPOCHS || self.crop_padding > Self::MAX_PADDING {
            let (epochs, padding) = (self.epochs, self.crop_padding);
            let [most, widest] = [Self::MAX_EPOCHS, Self::MAX_PADDING];
            let message =
                format!("{epochs} epochs with crops padded by {padding}: expected at most {most} and {widest}");
            return Err(Error::Config(message));
        }
        if !self.learning_rate.is_finite() || self.learning_rate <= 0.0 {
            let message = format!("learning rate {}: expected a positive number", self.learning_rate);
            return Err(Error::Config(message));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_learning_rate_falls_where_the_published_one_does() {
        let recipe = Recipe::default();
        let epochs_at = |decays: i32| {
            let rate = 0.1 * 0.2f64.powi(decays);
            (0..200).filter(|&epoch| recipe.learning_rate_of(epoch) == rate).count()
        };
        assert_eq!([0, 1, 2, 3].map(epochs_at), [61, 60, 40, 39]);
        let short = Recipe { epochs: 10, ..recipe };
        let endless = Recipe { epochs: usize::MAX, ..recipe };
        assert_eq!(endless.learning_rate_of(usize::MAX - 1), 0.1 * 0.2f64.powi(3));
        assert!(endless.check().unwrap_err().to_string().contains("at most 1000000"));
        assert_eq!((short.learning_rate_of(3), short.learning_rate_of(4)), (0.1, 0.1 * 0.2));
    }
}
