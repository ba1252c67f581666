//! The nearest neighbour: a base learner without training, in integers.

use serde_json::{Value, json};

use super::{BaseLearner, Member, Trained, Training};
use crate::cpu::{parallel, simd};
use crate::data::InMemory;
use crate::{Error, Result};

/// Answers the label of the nearest sample by squared Euclidean distance of the bytes; of equally near ones, the
/// smallest label; without samples, class 0.
///
/// The score of a class is minus its rank among the classes by the distance of their nearest samples, ties by label, so
/// that run-off election sees the whole order, and no distance is rounded. Classes without a sample share the last rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NearestNeighbour;

impl BaseLearner for NearestNeighbour {
    fn recipe(&self) -> Value {
        json!({ "learner": "nearest" })
    }

    fn backend(&self) -> String {
        "integers, the same anywhere".into()
    }

    fn group_size(&self) -> usize {
        16
    }

    fn open<'a>(&'a self, train: &'a InMemory, test: &'a InMemory) -> Result<Box<dyn Training + 'a>> {
        if train.shape() != test.shape() || train.classes() != test.classes() {
            let of = |set: &InMemory| format!("images of {:?} in {} classes", set.shape(), set.classes());
            let message = format!("trained on {}, tested on {}", of(train), of(test));
            return Err(Error::argument("NearestNeighbour::train", message));
        }
        Ok(Box::new(Sets { train, test }))
    }
}

struct Sets<'a> {
    train: &'a InMemory,
    test: &'a InMemory,
}

impl Training for Sets<'_> {
    fn train_each(&self, members: &[Member<'_>], done: &mut dyn FnMut(usize, Trained) -> Result<()>) -> Result<()> {
        let mut members = members.iter().enumerate();
        members.try_for_each(|(place, member)| done(place, classify(member, self.train, self.test)?))
    }
}

fn classify(member: &Member<'_>, train: &InMemory, test: &InMemory) -> Result<Trained> {
    if let Some(index) = member.samples.iter().find(|&&index| index >= train.labels().len()) {
        let message = format!("classifier {} has sample {index} of {}", member.classifier, train.labels().len());
        return Err(Error::argument("NearestNeighbour::train", message));
    }
    let (size, classes) = (train.image_bytes(), train.classes());
    let mut scores = vec![0.0; test.labels().len() * classes];
    parallel::pieces_mut(&mut scores, classes, |index, scores| {
        let image = &test.pixels()[index * size..][..size];
        let mut nearest = vec![u64::MAX; classes];
        for &sample in member.samples {
            let distance = squared_distance(image, &train.pixels()[sample * size..][..size]);
            let of_class = &mut nearest[train.labels()[sample]];
            *of_class = distance.min(*of_class);
        }
        rank(&nearest, scores);
    });
    Ok(Trained { scores, weights: None, mean: Vec::new(), deviation: Vec::new(), loss: 0.0 })
}

/// Minus the number of classes before each one, by (distance, label).
fn rank(nearest: &[u64], scores: &mut [f32]) {
    for (class, score) in scores.iter_mut().enumerate() {
        let distance = nearest[class];
        let before = nearest.iter().enumerate().filter(|&(other, &its)| match distance {
            u64::MAX => its != u64::MAX,
            _ => (its, other) < (distance, class),
        });
        *score = -(before.count() as f32);
    }
}

fn squared_distance(a: &[u8], b: &[u8]) -> u64 {
    /// Squares of bytes whose sum fits into 32 bits.
    const RUN: usize = 1 << 15;
    simd::dispatch(
        #[inline(always)]
        || {
            let mut total = 0;
            for (a, b) in a.chunks(RUN).zip(b.chunks(RUN)) {
                let mut sum = 0;
                for (&a, &b) in a.iter().zip(b) {
                    let difference = i32::from(a) - i32::from(b);
                    sum += (difference * difference) as u32;
                }
                total += u64::from(sum);
            }
            total
        },
    )
}

#[cfg(test)]
mod tests {
    use super::super::vote;
    use super::*;

    fn set(pixels: &[u8], labels: &[usize]) -> InMemory {
        let names = (0..4).map(|class| class.to_string()).collect();
        InMemory::new("set", names, [1, 2, 1], pixels.to_vec(), labels.to_vec()).unwrap()
    }

    fn member(samples: &[usize]) -> Member<'_> {
        Member { classifier: 0, seed: 0, samples }
    }

    #[test]
    fn the_nearest_wins_and_scores_are_ranks() {
        let train = set(&[0, 0, 10, 0, 0, 6, 255, 255], &[3, 2, 1, 0]);
        let test = set(&[4, 0, 255, 250], &[3, 0]);
        let members = [member(&[0, 1, 2, 3]), member(&[1, 2]), member(&[])];
        let trained = NearestNeighbour.train(&members, &train, &test).unwrap();
        // Squared distances of the first: 16 (class 3), 36 (class 2), 52 (class 1), far (class 0).
        assert_eq!(trained[0].scores[..4], [-3.0, -2.0, -1.0, 0.0]);
        assert_eq!(trained[1].scores[..4], [-2.0, -1.0, 0.0, -2.0]);
        assert_eq!(trained[2].scores, [0.0; 8]);
        assert_eq!(trained[0].scores.chunks(4).map(vote).collect::<Vec<_>>(), [3, 0]);
    }

    #[test]
    fn ties_go_to_the_smaller_label_and_distances_are_exact() {
        let train = set(&[1, 0, 3, 0], &[2, 1]);
        let trained = NearestNeighbour.train(&[member(&[0, 1])], &train, &set(&[2, 0], &[1])).unwrap();
        assert_eq!(vote(&trained[0].scores), 1);
        let (white, black) = (vec![255; 300_000], vec![0; 300_000]);
        assert_eq!(squared_distance(&white, &black), 300_000 * 255 * 255);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let train = set(&[1, 0], &[2]);
        assert!(NearestNeighbour.train(&[member(&[1])], &train, &train).is_err());
        let other = InMemory::new("other", vec!["a".into()], [1, 2, 1], vec![0; 2], vec![0]).unwrap();
        assert!(NearestNeighbour.train(&[member(&[0])], &train, &other).is_err());
    }
}
