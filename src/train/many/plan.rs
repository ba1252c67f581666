//! What each model sees in each step: a function of its seed, its subset and the epoch.

use super::Task;
use super::recipe::Recipe;
use crate::data::InMemory;
use crate::random::Philox;

/// Numbers of a sample in the plan of `ops::crops_each`.
const NUMBERS: usize = 4;
/// A label that no class has.
pub(super) const IGNORED: i64 = -1;

/// One epoch of one model: its samples in the order of training.
pub(super) struct Epoch {
    /// (samples, 4): image, top, left, flip.
    crops: Vec<i64>,
    labels: Vec<i64>,
}

impl Epoch {
    /// Draws by position in the subset, never by index in the data set.
    pub fn draw(task: &Task<'_>, set: &InMemory, recipe: &Recipe, epoch: usize) -> Self {
        let root = Philox::new(task.seed);
        let order = root.stream("shuffle").fork(epoch as u64).permutation(task.samples.len());
        let offsets = root.stream("crop").fork(epoch as u64);
        let (padding, mut crops) = (recipe.crop_padding as i64, Vec::with_capacity(order.len() * NUMBERS));
        for &position in &order {
            let [top, left, mirror, _] = offsets.block(position as u64);
            let offset = |word: u32| ((u64::from(word) * (2 * padding as u64 + 1)) >> 32) as i64 - padding;
            let flip = i64::from(recipe.flip && mirror >> 31 == 1);
            crops.extend([task.samples[position] as i64, offset(top), offset(left), flip]);
        }
        let labels = order.iter().map(|&position| set.labels()[task.samples[position]] as i64).collect();
        Epoch { crops, labels }
    }
}

/// One step of a group: the batch of each model, padded to the largest.
pub(super) struct Step {
    /// (models, batch, 4)
    pub crops: Vec<i64>,
    /// (models, batch), [`IGNORED`] in padding.
    pub labels: Vec<i64>,
    /// (models, batch): what a sample's loss counts in its model's, 0 in padding.
    pub shares: Vec<f32>,
    /// Samples of each model.
    pub counts: Vec<usize>,
    pub batch: usize,
}

impl Step {
    /// Step number `step` of the models' `epochs`.
    pub fn new(epochs: &[Epoch], recipe: &Recipe, step: usize) -> Self {
        let count = |epoch: &Epoch| recipe.batch_size.min(epoch.labels.len() - step * recipe.batch_size);
        let counts: Vec<usize> = epochs.iter().map(count).collect();
        let batch = counts.iter().copied().max().unwrap_or(0);
        let rows = counts.len() * batch;
        let (mut crops, mut labels, mut shares) = (vec![-1; rows * NUMBERS], vec![IGNORED; rows], vec![0.0; rows]);
        for (model, (epoch, &count)) in epochs.iter().zip(&counts).enumerate() {
            let (from, to) = (step * recipe.batch_size, model * batch);
            crops[to * NUMBERS..][..count * NUMBERS].copy_from_slice(&epoch.crops[from * NUMBERS..][..count * NUMBERS]);
            labels[to..][..count].copy_from_slice(&epoch.labels[from..][..count]);
            shares[to..][..count].fill(1.0 / count as f32);
        }
        Step { crops, labels, shares, counts, batch }
    }
}

/// Mean and unbiased deviation of each channel over the pixels of a subset, as shares of 255. Sums are of integers, so
/// no order of the samples changes a bit. A channel of one value has deviation 1, so that it becomes zero.
pub(super) fn statistics(set: &InMemory, samples: &[usize]) -> (Vec<f32>, Vec<f32>) {
    let ([.., channels], size) = (set.shape(), set.image_bytes());
    let mut sums = vec![[0u64; 2]; channels];
    for &sample in samples {
        for pixel in set.pixels()[sample * size..][..size].chunks(channels) {
            for ([sum, squares], &byte) in sums.iter_mut().zip(pixel) {
                *sum += u64::from(byte);
                *squares += u64::from(byte) * u64::from(byte);
            }
        }
    }
    let count = (samples.len() * size / channels) as u128;
    let of_channel = |&[sum, squares]: &[u64; 2]| {
        let mean = sum as f64 / count as f64 / 255.0;
        // count² times the variance, exact.
        let spread = count * u128::from(squares) - u128::from(sum) * u128::from(sum);
        let variance = spread as f64 / (count as f64 * (count.max(2) - 1) as f64);
        (mean as f32, if spread == 0 { 1.0 } else { (variance.sqrt() / 255.0) as f32 })
    };
    sums.iter().map(of_channel).unzip()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set() -> InMemory {
        let pixels = (0..4 * 4).map(|i| (i * 37 % 256) as u8).collect();
        InMemory::new("set", vec!["a".into(), "b".into()], [2, 2, 1], pixels, vec![0, 1, 1, 0]).unwrap()
    }

    #[test]
    fn statistics_are_those_of_the_definition_in_any_order() {
        let set = set();
        let (mean, deviation) = statistics(&set, &[2, 0]);
        assert_eq!((mean.clone(), deviation.clone()), statistics(&set, &[0, 2]));
        let values: Vec<f64> =
            [0..4, 8..12].into_iter().flatten().map(|i| f64::from(set.pixels()[i]) / 255.0).collect();
        let exact = values.iter().sum::<f64>() / 8.0;
        let variance = values.iter().map(|value| (value - exact).powi(2)).sum::<f64>() / 7.0;
        assert!((f64::from(mean[0]) - exact).abs() < 1e-7);
        assert!((f64::from(deviation[0]) - variance.sqrt()).abs() < 1e-7);
    }

    #[test]
    fn an_epoch_visits_every_sample_and_padding_counts_for_nothing() {
        let (set, recipe) = (set(), Recipe { batch_size: 2, flip: true, ..Recipe::default() });
        let task = |samples| Task { seed: 3, samples };
        let (all, some) = ([3, 1, 0], [2, 0, 1, 3]);
        let epochs = [task(&all[..]), task(&some[..])].map(|task| Epoch::draw(&task, &set, &recipe, 7));
        let last = Step::new(&epochs, &recipe, 1);
        assert_eq!((last.counts.clone(), last.batch), (vec![1, 2], 2));
        assert_eq!((last.labels[1], last.shares[1], &last.crops[4..8]), (IGNORED, 0.0, &[-1; 4][..]));
        assert_eq!(last.shares, [1.0, 0.0, 0.5, 0.5]);
        let mut seen: Vec<i64> = epochs[1].crops.chunks(4).map(|crop| crop[0]).collect();
        seen.sort_unstable();
        assert_eq!(seen, [0, 1, 2, 3]);
        assert!(
            epochs.iter().flat_map(|epoch| epoch.crops.chunks(4)).all(|crop| crop[1].abs() <= 4 && crop[2].abs() <= 4)
        );
    }
}
