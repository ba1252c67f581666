//! The samples of a run: images of one size in memory, their digests, and the subset of each classifier.

use rayon::prelude::*;

use super::super::{Partition, Spread};
use super::settings::{Ensemble, Settings};
use crate::data::augment::{Interpolation, resize};
use crate::data::{Dataset, Image, InMemory};
use crate::random::Philox;
use crate::sha256::{Sha256, hex};
use crate::{Error, Result};

/// What all classifiers are trained and tested on.
pub(super) struct Samples {
    pub train: InMemory,
    pub test: InMemory,
    /// SHA-256 of each training sample.
    digests: Vec<[u8; 32]>,
    subsets: Subsets,
}

enum Subsets {
    Parts(Partition),
    /// All samples, sorted by content, and what draws from them.
    Draws {
        sorted: Vec<usize>,
        samples: usize,
        stream: Philox,
    },
    /// All samples, sorted by content, what decides for each, and the inverse of the probability of being kept.
    Kept {
        sorted: Vec<usize>,
        stream: Philox,
        k: usize,
    },
}

impl Samples {
    /// Reads both sets.
    ///
    /// # Errors
    /// `Config` where the sets do not go together or an option asks for what is not there; `Argument` where there are
    /// fewer samples than buckets; what reading a sample says.
    pub fn new(settings: &Settings, train: &dyn Dataset, test: &dyn Dataset) -> Result<Self> {
        if train.class_names() != test.class_names() || train.channels() != test.channels() {
            return Err(Error::Config(format!(
                "{}: training and held-out images have other classes or channels",
                settings.data
            )));
        }
        let (train, test) = (read_fraction(train, settings.train_fraction)?, read_limited(test, settings.limit_test)?);
        let buckets = match &settings.ensemble {
            // Before images are resized, as the published setup for GTSRB hashes them.
            Ensemble::FiniteAggregation { spread, hash } => {
                let bucket = |(image, _): &(Image, usize)| (hash.of(image.pixels()) % spread.n() as u64) as usize;
                train.samples.par_iter().map(bucket).collect()
            }
            Ensemble::Bagging { .. } | Ensemble::RandomSubsets { .. } => vec![0; train.samples.len()],
        };
        let side = side(settings, &train.samples, &test.samples)?;
        let (train, test) = (train.in_memory(side)?, test.in_memory(side)?);
        let sorted =
            || Ok::<_, Error>(Partition::with_buckets(&train, &buckets, &Spread::new(1, 1)?)?.bucket(0).to_vec());
        let stream = |name| Philox::new(settings.seed).stream(name);
        let subsets = match &settings.ensemble {
            Ensemble::FiniteAggregation { spread, .. } => {
                Subsets::Parts(Partition::with_buckets(&train, &buckets, spread)?)
            }
            Ensemble::Bagging { samples, .. } => {
                Subsets::Draws { sorted: sorted()?, samples: *samples, stream: stream("bagging") }
            }
            Ensemble::RandomSubsets { k, .. } => {
                Subsets::Kept { sorted: sorted()?, stream: stream("random subsets"), k: *k }
            }
        };
        let digests = (0..train.len()).into_par_iter().map(|index| digest(&train, index)).collect();
        Ok(Samples { train, test, digests, subsets })
    }

    /// The samples of `classifier`, sorted by content.
    pub fn of(&self, classifier: usize) -> Vec<usize> {
        match &self.subsets {
            Subsets::Parts(partition) => partition.samples_of(classifier),
            Subsets::Draws { sorted, samples, stream } => {
                let mut draws = stream.fork(classifier as u64).draws();
                let mut places: Vec<usize> = (0..*samples).map(|_| draws.below(sorted.len())).collect();
                places.sort_unstable();
                places.into_iter().map(|place| sorted[place]).collect()
            }
            Subsets::Kept { sorted, stream, k } => {
                let stream = stream.fork(classifier as u64);
                let keeps = |sample: &usize| is_kept(&self.digests[*sample], stream, *k);
                sorted.iter().copied().filter(keeps).collect()
            }
        }
    }

    /// SHA-256 of a subset: of what its samples hold, in their order.
    pub fn digest_of(&self, subset: &[usize]) -> String {
        let mut hash = Sha256::new();
        subset.iter().for_each(|&sample| hash.update(&self.digests[sample]));
        hex(&hash.finish())
    }

    /// SHA-256 of the training set, whatever the order of its samples.
    pub fn train_digest(&self) -> String {
        let mut sorted = self.digests.clone();
        sorted.sort_unstable();
        let mut hash = Sha256::new();
        hash.update(sorted.as_flattened());
        hex(&hash.finish())
    }

    /// SHA-256 of the held-out set, whose order is that of the votes.
    pub fn test_digest(&self) -> String {
        let digests: Vec<_> = (0..self.test.len()).into_par_iter().map(|index| digest(&self.test, index)).collect();
        let mut hash = Sha256::new();
        hash.update(digests.as_flattened());
        hex(&hash.finish())
    }
}

/// Whether a sample is kept: with probability `1/k`, rounded to a multiple of `2⁻⁶⁴`, over the seed of the stream.
fn is_kept(digest: &[u8; 32], stream: Philox, k: usize) -> bool {
    let words = digest.as_chunks::<8>().0.iter();
    let stream = words.fold(stream, |stream, word| stream.fork(u64::from_le_bytes(*word)));
    let [a, b, ..] = stream.block(0);
    u64::from(a) | u64::from(b) << 32 <= u64::MAX / k as u64
}

/// SHA-256 of a sample: its shape, label and bytes.
fn digest(set: &InMemory, index: usize) -> [u8; 32] {
    let mut hash = Sha256::new();
    for number in set.shape().into_iter().chain([set.labels()[index]]) {
        hash.update(&(number as u64).to_le_bytes());
    }
    let size = set.image_bytes();
    hash.update(&set.pixels()[index * size..][..size]);
    hash.finish()
}

/// A set as it was read.
struct Read {
    name: String,
    class_names: Vec<String>,
    channels: usize,
    samples: Vec<(Image, usize)>,
}

/// Reads `set`, or the fraction of its samples that [`is_chosen`].
fn read_fraction(set: &dyn Dataset, fraction: Option<f64>) -> Result<Read> {
    let all: Vec<usize> = (0..set.len()).collect();
    read(set, &all, |image| fraction.is_none_or(|fraction| is_chosen(image, fraction)))
}

/// Whether an image takes part in a run on `fraction` of the set. Its bytes alone decide, before it is resized: an image
/// that is added can drive out no other.
fn is_chosen(image: &Image, fraction: f64) -> bool {
    const STEPS: f64 = (1u64 << 53) as f64;
    let mut hash = Sha256::new();
    // Other hashes of the same bytes are independent of this one.
    hash.update(b"gridgrad train fraction");
    for side in [image.height(), image.width()] {
        hash.update(&(side as u64).to_le_bytes());
    }
    hash.update(image.pixels());
    let [a, b, c, d, e, f, g, h, ..] = hash.finish();
    let place = u64::from_le_bytes([a, b, c, d, e, f, g, h]) >> 11;
    (place as f64) < fraction * STEPS
}

/// Reads `set`, or so many samples of it, whose places in the file were drawn once and for all.
fn read_limited(set: &dyn Dataset, limit: Option<usize>) -> Result<Read> {
    let mut chosen: Vec<usize> = (0..set.len()).collect();
    if let Some(limit) = limit {
        if limit == 0 || limit > set.len() {
            let message = format!("got a limit of {limit} samples, {} has {}", set.name(), set.len());
            return Err(Error::Config(message));
        }
        chosen = Philox::new(0).stream("limit").permutation(set.len());
        chosen.truncate(limit);
        chosen.sort_unstable();
    }
    read(set, &chosen, |_| true)
}

/// Reads those of the samples at `places` whose image is to be kept.
fn read(set: &dyn Dataset, places: &[usize], keep: impl Fn(&Image) -> bool + Sync) -> Result<Read> {
    let channels = set.channels();
    let sample = |&index: &usize| {
        let (image, label) = set.sample(index)?;
        let image = if channels == 1 { image.into_grey() } else { image.into_rgb() };
        Ok(keep(&image).then_some((image, label)))
    };
    let samples = places.par_iter().filter_map(|place| sample(place).transpose()).collect::<Result<Vec<_>>>()?;
    Ok(Read { name: set.name().to_owned(), class_names: set.class_names().to_vec(), channels, samples })
}

/// Height and width of all images: that of the settings, or the one that the held-out images share. Training images have
/// no say: a single one of another size would change every classifier.
fn side(settings: &Settings, train: &[(Image, usize)], test: &[(Image, usize)]) -> Result<[usize; 2]> {
    let size_of = |(image, _): &(Image, usize)| [image.height(), image.width()];
    let (Some(first), false) = (test.first().map(size_of), train.is_empty()) else {
        return Err(Error::Config(format!("{}: no training image, or none held out", settings.data)));
    };
    Ok(match settings.image_size {
        Some(side) => [side; 2],
        None if test.iter().all(|sample| size_of(sample) == first) => first,
        None => [Settings::SIDE; 2],
    })
}

impl Read {
    /// The set with images of `height` × `width`.
    fn in_memory(self, [height, width]: [usize; 2]) -> Result<InMemory> {
        let resized = |(image, label): (Image, usize)| {
            let fits = [image.height(), image.width()] == [height, width];
            Ok((if fits { image } else { resize(&image, height, width, Interpolation::Bilinear)? }, label))
        };
        let samples = self.samples.into_par_iter().map(resized).collect::<Result<Vec<_>>>()?;
        let pixels = samples.iter().flat_map(|(image, _)| image.pixels()).copied().collect();
        let labels = samples.iter().map(|(_, label)| *label).collect();
        InMemory::new(self.name, self.class_names, [height, width, self.channels], pixels, labels)
    }
}
