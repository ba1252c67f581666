//! The theorem that certificates rest on: a sample that is added, removed or changed changes the classifiers whose
//! buckets hold it, and no other. And the figures of an ensemble that was computed independently.

use std::path::Path;

use gridgrad::data::InMemory;
use gridgrad::methods::finite_aggregation::run::{Answers, Record};
use gridgrad::methods::finite_aggregation::{ContentHash, Spread};

use crate::{Small, digits, in_order, settings};

/// What a classifier was trained on, and what became of it.
fn trained(record: &Record) -> (&str, &str) {
    (&record.subset, &record.trained.as_ref().unwrap().votes)
}

/// The bucket of a sample.
fn bucket(set: &InMemory, index: usize, spread: &Spread) -> usize {
    let size = set.image_bytes();
    (ContentHash::Fnv1a.of(&set.pixels()[index * size..][..size]) % spread.n() as u64) as usize
}

/// Trains on `train` in `folder`, and returns the classifiers that differ from `before` in subset and in votes.
fn differing(folder: &Path, before: &Answers, train: InMemory) -> [Vec<usize>; 2] {
    let small = Small { train, test: digits(1700..1720) };
    let after = Answers::read(&[small.run(folder, settings(5, 3))]).unwrap();
    let pairs = || before.classifiers.iter().zip(&after.classifiers).map(|(a, b)| (trained(a), trained(b)));
    let subsets = pairs().enumerate().filter(|(_, (a, b))| a.0 != b.0).map(|(i, _)| i).collect();
    let votes = pairs().enumerate().filter(|(_, (a, b))| a.1 != b.1).map(|(i, _)| i).collect();
    [subsets, votes]
}

#[test]
fn a_sample_changes_the_classifiers_of_its_bucket_and_no_other() {
    let (small, folder) = (Small::new(), tempfile::tempdir().unwrap());
    let before = Answers::read(&[small.run(&folder.path().join("before"), settings(5, 3))]).unwrap();
    let spread = Spread::new(5, 3).unwrap();
    let fed = |buckets: &[usize]| {
        let mut fed: Vec<usize> = buckets.iter().flat_map(|&bucket| spread.classifiers_of(bucket)).collect();
        fed.sort_unstable();
        fed.dedup();
        fed
    };
    let all: Vec<usize> = (0..300).collect();
    let mut votes_changed = 0;
    let mut check = |name: &str, train: InMemory, buckets: &[usize]| {
        let [subsets, votes] = differing(&folder.path().join(name), &before, train);
        assert_eq!(subsets, fed(buckets), "{name}");
        assert!(votes.iter().all(|classifier| subsets.contains(classifier)), "{name}: {votes:?}");
        votes_changed += votes.len();
    };
    for index in [0, 17, 123, 299] {
        let without: Vec<usize> = all.iter().copied().filter(|&other| other != index).collect();
        let place = bucket(&small.train, index, &spread);
        check(&format!("without-{index}"), in_order(&small.train, &without), &[place]);

        // A label that is flipped stays in its bucket.
        let mut labels = small.train.labels().to_vec();
        labels[index] = (labels[index] + 1) % 10;
        let names = (0..10).map(|digit| digit.to_string()).collect();
        let flipped = InMemory::new("digits", names, [8, 8, 1], small.train.pixels().to_vec(), labels).unwrap();
        check(&format!("flipped-{index}"), flipped, &[place]);

        let more = digits(0..301 + index);
        let added: Vec<usize> = all.iter().copied().chain([300 + index]).collect();
        let new = bucket(&more, 300 + index, &spread);
        check(&format!("with-{index}"), in_order(&more, &added), &[new]);

        // An edited image leaves one bucket and enters another.
        let edited: Vec<usize> = all.iter().map(|&other| if other == index { 300 + index } else { other }).collect();
        check(&format!("edited-{index}"), in_order(&more, &edited), &[place, new]);
    }
    assert!(votes_changed > 0, "no sample ever changed a vote: the test would not see it if one did");
}

#[test]
fn votes_of_nearest_neighbours_are_those_of_a_loop_over_partitions() {
    let (small, folder) = (Small::new(), tempfile::tempdir().unwrap());
    let answers = Answers::read(&[small.run(folder.path(), settings(7, 1))]).unwrap();
    let distance = |test: usize, train: usize| -> i64 {
        let (a, b) = (&small.test.pixels()[64 * test..][..64], &small.train.pixels()[64 * train..][..64]);
        a.iter().zip(b).map(|(&a, &b)| (i64::from(a) - i64::from(b)).pow(2)).sum()
    };
    let spread = Spread::new(7, 1).unwrap();
    for test in 0..20 {
        for partition in 0..7 {
            let own = (0..300).filter(|&train| bucket(&small.train, train, &spread) == partition);
            let nearest = own.map(|train| (distance(test, train), small.train.labels()[train])).min();
            // Deep Partition Aggregation, with classifiers renumbered by the one offset.
            let classifier = (partition + spread.offsets()[0]) % 7;
            assert_eq!(usize::from(answers.votes.of_sample(test)[classifier]), nearest.unwrap().1);
        }
    }
}

/// Base accuracies of nearest neighbours on the first 1,297 digits, for the last 500: computed by other means.
#[test]
fn base_accuracies_are_those_of_an_independent_computation() {
    let folder = tempfile::tempdir().unwrap();
    let set = Small { train: digits(0..1297), test: digits(1297..1797) };
    let pixel_sum = |k, d| {
        let mut settings = settings(k, d);
        let spread = Spread::new(k, d).unwrap();
        settings.ensemble = gridgrad::methods::finite_aggregation::run::Ensemble::FiniteAggregation {
            spread,
            hash: ContentHash::PixelSum,
        };
        settings
    };
    let cases = [(settings(25, 1), 0.8096), (settings(25, 4), 0.8112), (pixel_sum(25, 1), 0.82072)];
    for (number, (settings, expected)) in cases.into_iter().enumerate() {
        let answers = Answers::read(&[set.run(&folder.path().join(number.to_string()), settings)]).unwrap();
        assert!((answers.base_accuracy() - expected).abs() < 1e-9, "{} {expected}", answers.base_accuracy());
    }
}
