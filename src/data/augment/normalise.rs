//! From bytes to floats of zero mean and unit variance.

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::data::{ByteTable, Dataset};

/// Mean and standard deviation of a set's samples on a scale from 0 to 1: one of each for every channel, or one for all.
///
/// ```
/// use gridgrad::data::augment::Normalise;
/// use gridgrad::data::{self, Split};
/// let digits = data::open("builtin", Split::Train, None)?;
/// let measured = Normalise::measured(&*digits, 500)?;
/// assert!((measured.mean[0] - Normalise::for_set("builtin").unwrap().mean[0]).abs() < 0.02);
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Normalise {
    /// Mean of each channel.
    pub mean: Vec<f32>,
    /// Standard deviation of each channel.
    pub std: Vec<f32>,
}

impl Normalise {
    /// From the values of one or three channels.
    pub fn new(mean: &[f32], std: &[f32]) -> Self {
        Normalise { mean: mean.to_vec(), std: std.to_vec() }
    }

    /// Samples from 0 to 1, as they are.
    pub fn unit() -> Self {
        Normalise::new(&[0.0], &[1.0])
    }

    /// The constants in use for ImageNet. Its deviations are averages over images, not of all pixels together.
    pub fn imagenet() -> Self {
        Normalise::new(&[0.485, 0.456, 0.406], &[0.229, 0.224, 0.225])
    }

    /// Of the training part of one of the [known sets](crate::data::KNOWN_SETS).
    pub fn for_set(name: &str) -> Option<Self> {
        Some(match name {
            "builtin" => Normalise::new(&[0.3053], &[0.3761]),
            "mnist" => Normalise::new(&[0.1307], &[0.3081]),
            "cifar10" => Normalise::new(&[0.4914, 0.4822, 0.4465], &[0.2470, 0.2435, 0.2616]),
            "cifar100" => Normalise::new(&[0.5071, 0.4865, 0.4409], &[0.2673, 0.2564, 0.2762]),
            "gtsrb" => Normalise::new(&[0.3403, 0.3121, 0.3214], &[0.2724, 0.2608, 0.2669]),
            "imagenette" => Normalise::imagenet(),
            _ => return None,
        })
    }

    /// Measured on up to `samples` images, spread evenly over `dataset`.
    ///
    /// # Errors
    /// Those of [`Dataset::sample`].
    pub fn measured(dataset: &dyn Dataset, samples: usize) -> Result<Self> {
        let channels = dataset.channels();
        let taken = samples.clamp(1, dataset.len().max(1));
        let (mut sums, mut squares, mut count) = ([0_u64; 3], [0_u64; 3], 0_usize);
        for nth in 0..taken.min(dataset.len()) {
            let (image, _) = dataset.sample((nth as u128 * dataset.len() as u128 / taken as u128) as usize)?;
            for pixel in image.pixels.chunks_exact(channels) {
                for (channel, &sample) in pixel.iter().enumerate() {
                    sums[channel] += u64::from(sample);
                    squares[channel] += u64::from(sample).pow(2);
                }
            }
            count += image.height * image.width;
        }
        let mean_of = |sum: u64, scale: f64| sum as f64 / (count.max(1) as f64 * scale);
        let mean: Vec<f64> = sums[..channels].iter().map(|&sum| mean_of(sum, 255.0)).collect();
        let variance = squares.iter().zip(&mean).map(|(&sum, mean)| mean_of(sum, 255.0 * 255.0) - mean * mean);
        // A constant channel is left as it is, up to a shift.
        let std = variance.map(|v| if v > 1e-12 { v.sqrt() as f32 } else { 1.0 }).collect();
        Ok(Normalise { mean: mean.into_iter().map(|mean| mean as f32).collect(), std })
    }

    /// Mean and standard deviation of each of `channels`. Grey images take the average of three channels' values.
    pub(super) fn per_channel(&self, channels: usize) -> (Vec<f32>, Vec<f32>) {
        let fit = |values: &[f32]| match (values.len(), channels) {
            (have, want) if have == want => values.to_vec(),
            (1, want) => vec![values[0]; want],
            _ => vec![values.iter().sum::<f32>() / values.len() as f32; channels],
        };
        (fit(&self.mean), fit(&self.std))
    }

    /// The mean colour, in bytes.
    pub(super) fn mean_colour(&self, channels: usize) -> [u8; 3] {
        let (mean, _) = self.per_channel(channels);
        std::array::from_fn(|channel| (mean[channel.min(channels - 1)] * 255.0).round() as u8)
    }

    /// The normalised value of every byte, for each of `channels` (at least 1).
    pub fn table(&self, channels: usize) -> ByteTable {
        let (mean, std) = self.per_channel(channels.max(1));
        let row = |(mean, std): (&f32, &f32)| std::array::from_fn(|value| (value as f32 / 255.0 - mean) / std);
        ByteTable::of_rows(&mean.iter().zip(&std).map(row).collect::<Vec<[f32; 256]>>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Split, open};

    #[test]
    fn channels_are_matched_to_the_image() {
        let imagenet = Normalise::imagenet();
        assert_eq!(imagenet.per_channel(3).0, imagenet.mean);
        assert!((imagenet.per_channel(1).0[0] - 0.449).abs() < 1e-6);
        assert_eq!(Normalise::unit().per_channel(3), (vec![0.0; 3], vec![1.0; 3]));
        assert_eq!(imagenet.mean_colour(3), [124, 116, 104]);
        let mut out = [0.0; 3];
        imagenet.table(3).write(&[255, 0, 51], &mut out);
        assert_eq!(out, [(1.0 - 0.485) / 0.229, (0.0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]);
    }

    #[test]
    fn the_constants_of_the_builtin_set_are_measured() {
        let set = open("builtin", Split::Train, None).unwrap();
        let measured = Normalise::measured(&*set, usize::MAX).unwrap();
        let known = Normalise::for_set("builtin").unwrap();
        assert!((measured.mean[0] - known.mean[0]).abs() < 2e-3, "{measured:?}");
        assert!((measured.std[0] - known.std[0]).abs() < 2e-3, "{measured:?}");
    }
}
