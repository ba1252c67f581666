//! The samples of each classifier.

use rayon::prelude::*;

use super::hash::{FNV_START, fnv1a};
use super::{ContentHash, Spread};
use crate::data::{Dataset, Image};
use crate::{Error, Result};

const OP: &str = "partition";

/// A training set cut into buckets, each sorted by content.
///
/// Where a sample goes, and its place among the others, depends on its content alone: neither the order of the file nor
/// samples of other buckets play a part. Samples that are equal in image and label are interchangeable.
#[derive(Clone, Debug)]
pub struct Partition {
    spread: Spread,
    /// For each bucket its samples, in the order of their content.
    buckets: Vec<Vec<usize>>,
    /// For each sample its place among all contents; equal contents share one.
    ranks: Vec<usize>,
    /// For each sample a hash of image and label.
    digests: Vec<u64>,
}

impl Partition {
    /// Sends every sample of `data` to the bucket `hash mod n`, and sorts.
    ///
    /// # Errors
    /// `Argument` where there are fewer samples than buckets, and where a sample cannot be read.
    pub fn new(data: &dyn Dataset, hash: ContentHash, spread: &Spread) -> Result<Self> {
        check_size(data, spread)?;
        let bucket = |index| Ok((hash.of(data.sample(index)?.0.pixels()) % spread.n() as u64) as usize);
        let buckets = (0..data.len()).into_par_iter().map(bucket).collect::<Result<Vec<_>>>()?;
        Partition::with_buckets(data, &buckets, spread)
    }

    /// As [`new`](Partition::new), with the bucket of each sample given: `data` may hold images that were resized since
    /// they were hashed, as the published setup for GTSRB does.
    ///
    /// # Errors
    /// As [`new`](Partition::new), and `Argument` where `buckets` has not one bucket below `n` for each sample.
    pub fn with_buckets(data: &dyn Dataset, buckets: &[usize], spread: &Spread) -> Result<Self> {
        check_size(data, spread)?;
        if buckets.len() != data.len() {
            let message = format!("got {} buckets for the {} samples of {}", buckets.len(), data.len(), data.name());
            return Err(Error::argument(OP, message));
        }
        if let Some(bucket) = buckets.iter().find(|bucket| **bucket >= spread.n()) {
            return Err(Error::argument(OP, format!("got bucket {bucket}, expected one below k·d = {}", spread.n())));
        }
        let content = |index| data.sample(index).map(|(image, label)| Content::new(&image, label));
        let contents = (0..data.len()).into_par_iter().map(content).collect::<Result<Vec<_>>>()?;
        let mut order: Vec<usize> = (0..data.len()).collect();
        order.par_sort_unstable_by(|&a, &b| contents[a].cmp(&contents[b]).then(a.cmp(&b)));
        let (mut ranks, mut in_bucket) = (vec![0; data.len()], vec![Vec::new(); spread.n()]);
        for (place, &sample) in order.iter().enumerate() {
            let equal = place > 0 && contents[order[place - 1]] == contents[sample];
            ranks[sample] = if equal { ranks[order[place - 1]] } else { place };
            in_bucket[buckets[sample]].push(sample);
        }
        let digests = contents.par_iter().map(Content::digest).collect();
        Ok(Partition { spread: spread.clone(), buckets: in_bucket, ranks, digests })
    }

    /// Which bucket feeds which classifiers.
    pub fn spread(&self) -> &Spread {
        &self.spread
    }

    /// The samples of `bucket`, as indices into the data, in the order of their content. Buckets count modulo `n`.
    pub fn bucket(&self, bucket: usize) -> &[usize] {
        &self.buckets[bucket % self.buckets.len()]
    }

    /// The samples that `classifier` is trained on, as indices into the data, in the order of their content: that of
    /// the published scripts, where images are flattened channel by channel, the last pixel counts most, the first one
    /// least, and the label less than that. Classifiers count modulo `n`. May be empty.
    pub fn samples_of(&self, classifier: usize) -> Vec<usize> {
        let mut samples: Vec<usize> =
            self.spread.buckets_of(classifier).flat_map(|bucket| self.bucket(bucket)).copied().collect();
        samples.sort_unstable_by_key(|&sample| (self.ranks[sample], sample));
        samples
    }

    /// A hash of what [`samples_of`](Partition::samples_of) the classifier hold: equal where two training sets give it
    /// the same multiset of samples, and else different, but for collisions of 64 bits.
    pub fn digest_of(&self, classifier: usize) -> u64 {
        let samples = self.samples_of(classifier);
        samples.iter().fold(FNV_START, |hash, &sample| fnv1a(hash, &self.digests[sample].to_le_bytes()))
    }
}

fn check_size(data: &dyn Dataset, spread: &Spread) -> Result<()> {
    if data.len() < spread.n() {
        let message = format!(
            "got k·d = {}·{} = {} buckets for the {} samples of {}, expected no more buckets than samples",
            spread.k(),
            spread.d(),
            spread.n(),
            data.len(),
            data.name()
        );
        return Err(Error::argument(OP, message));
    }
    Ok(())
}

/// What a sample is sorted by. Images of different shapes are told apart by shape first.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Content {
    shape: [usize; 3],
    /// The image flattened channel by channel, back to front.
    backwards: Vec<u8>,
    label: usize,
}

impl Content {
    fn new(image: &Image, label: usize) -> Self {
        let channels = image.channels();
        let backwards = (0..channels)
            .rev()
            .flat_map(|channel| image.pixels().iter().skip(channel).step_by(channels).rev().copied())
            .collect();
        Content { shape: [image.height(), image.width(), channels], backwards, label }
    }

    fn digest(&self) -> u64 {
        let [height, width, channels] = self.shape;
        let numbers = [height, width, channels, self.label].map(|number| (number as u64).to_le_bytes());
        fnv1a(fnv1a(FNV_START, numbers.as_flattened()), &self.backwards)
    }
}
