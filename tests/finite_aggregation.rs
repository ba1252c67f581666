//! Finite Aggregation on data: partitions, files of answers, and certificates against poisoned training sets.

use gridgrad::Result;
use gridgrad::data::{self, Dataset, InMemory, Split};
use gridgrad::methods::finite_aggregation::{
    ContentHash, FractionOf, Method, Partition, Report, ScoreValues, Scores, Spread, VoteFile, Votes, certify,
    certify_table,
};

/// Images of one row.
fn images(rows: &[(&[u8], usize)]) -> InMemory {
    let names = (0..10).map(|class| class.to_string()).collect();
    let pixels: Vec<u8> = rows.iter().flat_map(|row| row.0).copied().collect();
    InMemory::new("test", names, [1, rows[0].0.len(), 1], pixels, rows.iter().map(|row| row.1).collect()).unwrap()
}

#[test]
fn samples_are_sorted_from_the_last_pixel_on_and_labels_come_last() {
    let rows: [(&[u8], usize); 6] =
        [(&[9, 1], 0), (&[0, 2], 0), (&[1, 2], 3), (&[1, 2], 1), (&[1, 2], 3), (&[0, 0], 9)];
    let partition = Partition::new(&images(&rows), ContentHash::Fnv1a, &Spread::new(1, 1).unwrap()).unwrap();
    assert_eq!(partition.samples_of(0), [5, 0, 1, 3, 2, 4]);
    // Channel by channel: the last one counts most, and in it the last pixel.
    let colours =
        InMemory::new("rgb", vec!["x".into()], [1, 2, 3], vec![9, 9, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1], vec![0, 0]);
    let partition = Partition::new(&colours.unwrap(), ContentHash::Fnv1a, &Spread::new(1, 1).unwrap()).unwrap();
    assert_eq!(partition.samples_of(0), [0, 1]);
}

#[test]
fn the_order_of_the_file_does_not_matter() {
    let digits = data::open("builtin", Split::Train, None).unwrap();
    let samples: Vec<_> = (0..300).map(|index| digits.sample(index % 290).unwrap()).collect();
    let set = |order: &[usize]| {
        let pixels = order.iter().flat_map(|&index| samples[index].0.pixels()).copied().collect();
        let labels = order.iter().map(|&index| samples[index].1).collect();
        InMemory::new("digits", digits.class_names().to_vec(), [8, 8, 1], pixels, labels).unwrap()
    };
    let spread = Spread::new(5, 3).unwrap();
    let forward: Vec<usize> = (0..300).collect();
    let shuffled: Vec<usize> = (0..300).map(|index| index * 7 % 300).collect();
    let [a, b] = [&forward, &shuffled].map(|order| {
        let set = set(order);
        let partition = Partition::new(&set, ContentHash::Fnv1a, &spread).unwrap();
        (0..spread.n())
            .map(|i| {
                let samples = partition.samples_of(i).into_iter().map(|s| set.sample(s).unwrap());
                (partition.digest_of(i), samples.map(|(image, label)| (image.pixels().to_vec(), label)).collect())
            })
            .collect::<Vec<(u64, Vec<(Vec<u8>, usize)>)>>()
    });
    assert_eq!(a, b);
    // One sample less changes the digests of the classifiers that it feeds, and no others.
    let fewer = set(&forward[..299]);
    let fewer = Partition::new(&fewer, ContentHash::Fnv1a, &spread).unwrap();
    let bucket = (ContentHash::Fnv1a.of(samples[299].0.pixels()) % spread.n() as u64) as usize;
    let mut fed: Vec<usize> = spread.classifiers_of(bucket).collect();
    fed.sort_unstable();
    let changed: Vec<usize> = (0..spread.n()).filter(|&i| fewer.digest_of(i) != a[i].0).collect();
    assert_eq!(changed, fed);
}

#[test]
fn data_that_cannot_be_cut_is_refused() {
    let set = images(&[(&[1], 0), (&[2], 0), (&[3], 0)]);
    let message = |result: Result<Partition>| result.unwrap_err().to_string();
    let text = message(Partition::new(&set, ContentHash::Fnv1a, &Spread::new(2, 2).unwrap()));
    assert!(text.contains("k·d = 2·2 = 4 buckets for the 3 samples of test"), "{text}");
    let spread = Spread::new(3, 1).unwrap();
    assert!(message(Partition::with_buckets(&set, &[0, 1], &spread)).contains("2 buckets for the 3 samples"));
    assert!(message(Partition::with_buckets(&set, &[0, 1, 3], &spread)).contains("bucket 3"));
}

/// The partitions that the published scripts make of MNIST.
#[test]
fn partitions_of_mnist_are_the_published_ones() {
    if std::env::var_os("GRIDGRAD_DATA").is_none() {
        eprintln!("skipped: GRIDGRAD_DATA is not set");
        return;
    }
    let Ok(mnist) = data::open("mnist", Split::Train, None) else {
        eprintln!("skipped: GRIDGRAD_DATA has no MNIST");
        return;
    };
    let rows: [(usize, [usize; 3], [usize; 8], [f64; 2]); 2] = [
        (1200, [25, 50, 81], [19105, 39903, 33454, 19206, 6201, 23343, 22987, 58515], [0.1341264, 0.30968076]),
        (3000, [7, 20, 38], [33454, 19206, 22987, 54553, 19360, 43621, 37703, 16200], [0.12241739, 0.29677388]),
    ];
    for (k, sizes, first, [mean, deviation]) in rows {
        let spread = Spread::new(k, 1).unwrap();
        let partition = Partition::new(&*mnist, ContentHash::PixelSum, &spread).unwrap();
        let of_each: Vec<usize> = (0..k).map(|classifier| partition.samples_of(classifier).len()).collect();
        let (least, most) = (of_each.iter().min().unwrap(), of_each.iter().max().unwrap());
        assert_eq!([*least, of_each.iter().sum::<usize>() / k, *most], sizes);
        // DPA counts its partitions from the first offset on.
        let samples = partition.samples_of(spread.offsets()[0]);
        assert_eq!(samples[..8], first);
        let pixels = samples.iter().flat_map(|&index| mnist.sample(index).unwrap().0.pixels().to_vec());
        let values: Vec<f64> = pixels.map(|pixel| f64::from(pixel) / 255.0).collect();
        let average = values.iter().sum::<f64>() / values.len() as f64;
        let variance = values.iter().map(|v| (v - average).powi(2)).sum::<f64>() / (values.len() - 1) as f64;
        approx::assert_abs_diff_eq!(average, mean, epsilon = 1e-6);
        approx::assert_abs_diff_eq!(variance.sqrt(), deviation, epsilon = 1e-6);
    }
}

/// The digits with rows 0..=1296 to train and the rest to test: (pixels, label), pixels from 0 to 16.
fn all_digits() -> Vec<([u8; 64], usize)> {
    let digits = smartcore::dataset::digits::load_dataset();
    let rows = digits.data.chunks_exact(64).zip(&digits.target);
    rows.map(|(row, &label)| (std::array::from_fn(|i| row[i] as u8), label as usize)).collect()
}

fn distance(a: &[u8; 64], b: &[u8; 64]) -> i32 {
    a.iter().zip(b).map(|(&a, &b)| (i32::from(a) - i32::from(b)).pow(2)).sum()
}

/// Nearest neighbours on the digits, the table of the specification: all of it integers.
#[test]
fn nearest_neighbours_on_the_digits_certify_the_listed_fractions() {
    let digits = all_digits();
    let (train, test) = digits.split_at(1297);
    let rows: Vec<(&[u8], usize)> = train.iter().map(|(pixels, label)| (&pixels[..], *label)).collect();
    let set = images(&rows);
    // For each test sample the training samples from near to far; of equally near ones the smaller label first.
    let nearest: Vec<Vec<usize>> = test
        .iter()
        .map(|(pixels, _)| {
            let mut order: Vec<(i32, usize, usize)> =
                train.iter().enumerate().map(|(i, (other, label))| (distance(pixels, other), *label, i)).collect();
            order.sort_unstable();
            order.into_iter().map(|(_, _, index)| index).collect()
        })
        .collect();
    let (fnv, sum) = (ContentHash::Fnv1a, ContentHash::PixelSum);
    let table: [(ContentHash, usize, usize, f64, [f64; 10]); 7] = [
        (fnv, 25, 1, 80.96, [93.2, 91.4, 90.4, 88.8, 82.8, 67.6, 50.8, 18.4, 0.0, 0.0]),
        (fnv, 25, 4, 81.12, [93.8, 92.6, 91.2, 89.0, 82.4, 67.4, 52.2, 20.2, 0.0, 0.0]),
        (fnv, 25, 16, 81.876, [94.4, 93.0, 91.6, 89.0, 84.2, 70.8, 55.2, 20.6, 0.0, 0.0]),
        (fnv, 50, 1, 68.584, [91.6, 91.0, 89.0, 86.6, 83.2, 77.2, 70.6, 62.2, 49.2, 20.2]),
        (fnv, 50, 8, 69.6435, [92.0, 91.0, 89.4, 88.8, 85.0, 78.6, 70.6, 65.2, 52.8, 23.8]),
        (sum, 25, 1, 82.072, [93.8, 92.2, 90.4, 87.4, 83.2, 68.6, 54.4, 28.6, 0.0, 0.0]),
        (sum, 50, 8, 59.6685, [92.6, 90.8, 89.2, 88.2, 84.2, 76.2, 66.0, 55.4, 26.8, 5.8]),
    ];
    for (hash, k, d, base, fractions) in table {
        let spread = Spread::new(k, d).unwrap();
        let partition = Partition::new(&set, hash, &spread).unwrap();
        let columns: Vec<Vec<u16>> = (0..spread.n())
            .map(|classifier| {
                let mut held = vec![false; train.len()];
                partition.samples_of(classifier).into_iter().for_each(|sample| held[sample] = true);
                let vote = |order: &Vec<usize>| order.iter().find(|&&i| held[i]).map_or(0, |&i| train[i].1 as u16);
                nearest.iter().map(vote).collect()
            })
            .collect();
        let votes = Some(Votes::from_columns(10, &columns).unwrap());
        let labels = Some(test.iter().map(|row| row.1).collect());
        let answers = VoteFile { votes, labels, ..VoteFile::default() };
        let report = certify_table(&answers, &spread, &Method::FiniteAggregation).unwrap();
        approx::assert_abs_diff_eq!(100.0 * report.base_accuracy.unwrap(), base, epsilon = 1e-9);
        for (size, fraction) in [0, 1, 2, 3, 5, 8, 10, 12, 15, 20].into_iter().zip(fractions) {
            approx::assert_abs_diff_eq!(100.0 * report.fraction(size), fraction, epsilon = 1e-9);
        }
        let coarse = certify_table(&answers, &spread, &Method::Coarse).unwrap();
        assert!((0..30).all(|size| coarse.fraction(size) <= report.fraction(size)));
        let half = report.certified_fraction.iter().filter(|share| **share >= 0.5).count();
        assert_eq!((report.median_radius, report.sizes_with_half_certified), (half.checked_sub(1), Some(half)));
    }
}

/// The class of the nearest item of a bucket's classifiers, for numbers on a line: `items` are (value, class).
fn answer_on_the_line(items: &[(usize, usize)], spread: &Spread, at: usize) -> Votes {
    let vote = |classifier: usize| {
        let buckets: Vec<usize> = spread.buckets_of(classifier).collect();
        let mine = items.iter().filter(|(value, _)| buckets.contains(&(value % spread.n())));
        mine.min_by_key(|(value, class)| (value.abs_diff(at), *value, *class)).map_or(0, |item| item.1 as u16)
    };
    Votes::new(1, spread.n(), 2, (0..spread.n()).map(vote).collect()).unwrap()
}

/// All training sets at a distance of up to 3 from `items`, in a universe of ten numbers and two classes.
#[test]
fn no_training_set_within_the_radius_changes_the_answer() {
    let universe: Vec<(usize, usize)> = (0..10).flat_map(|value| [(value, 0), (value, 1)]).collect();
    let mut radii = Vec::new();
    for seed in 0..12usize {
        let (k, d) = [(5, 1), (4, 2), (3, 2), (3, 3)][seed % 4];
        let spread = Spread::new(k, d).unwrap();
        let items: Vec<(usize, usize)> =
            universe.iter().enumerate().filter(|(i, _)| (i * 7 + seed * 5) % 11 < 6).map(|(_, item)| *item).collect();
        let at = seed % 10;
        let votes = answer_on_the_line(&items, &spread, at);
        let certificate = certify::finite_aggregation(&votes, &spread).unwrap()[0];
        radii.push(certificate.radius);
        let edit = |items: &[(usize, usize)], item: (usize, usize)| -> Vec<(usize, usize)> {
            match items.iter().position(|other| *other == item) {
                Some(place) => [&items[..place], &items[place + 1..]].concat(),
                None => [items, &[item]].concat(),
            }
        };
        let keeps = |items: &[(usize, usize)], size: usize| {
            let votes = answer_on_the_line(items, &spread, at);
            let prediction = certify::dpa(&votes)[0].prediction;
            assert!(prediction == certificate.prediction || size > certificate.radius, "{k} {d} {items:?} {at}");
        };
        for (i, &first) in universe.iter().enumerate() {
            let once = edit(&items, first);
            keeps(&once, 1);
            for (j, &second) in universe[..i].iter().enumerate() {
                let twice = edit(&once, second);
                keeps(&twice, 2);
                universe[..j].iter().for_each(|&third| keeps(&edit(&twice, third), 3));
            }
        }
    }
    assert!(radii.iter().any(|&radius| radius > 0), "no certificate says anything: {radii:?}");
}

#[test]
fn files_of_answers_round_trip() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("votes.safetensors");
    for classes in [3, 300] {
        let votes = Votes::new(2, 4, classes, vec![0, 1, 2, 0, 1, 1, classes as u16, 2]).unwrap();
        for values in [
            ScoreValues::F32((0..8 * classes).map(|i| i as f32 / 7.0).collect()),
            ScoreValues::F64((0..8 * classes).map(|i| i as f64 / 7.0).collect()),
            ScoreValues::I64((0..8 * classes).map(|i| 5 - i as i64).collect()),
        ] {
            let scores = Scores::new(2, 4, classes, values).unwrap();
            let file = VoteFile {
                votes: Some(votes.clone()),
                scores: Some(scores),
                offsets: Some(vec![3, 0]),
                labels: Some(vec![1, 2]),
            };
            file.write(&path).unwrap();
            assert_eq!(VoteFile::read(&path, None).unwrap(), file);
            assert_eq!(VoteFile::read(&path, Some(classes)).unwrap(), file);
        }
    }
    let wrong = VoteFile { votes: None, ..VoteFile::read(&path, None).unwrap() };
    let unlabelled = VoteFile { labels: Some(vec![0]), ..wrong };
    assert!(unlabelled.write(&path).unwrap_err().to_string().contains("1 labels for 2 samples"));
    let bytes = std::fs::read(&path).unwrap();
    for cut in 0..bytes.len().min(600) {
        assert!(VoteFile::parse(&bytes[..cut], &path, None).unwrap_err().to_string().contains("votes.safetensors"));
    }
}

#[test]
fn reports_say_what_was_certified() {
    let votes = Votes::new(3, 5, 3, [[0, 0, 0, 0, 0], [1, 1, 1, 0, 2], [2, 2, 0, 0, 1]].concat()).unwrap();
    let answers = VoteFile { votes: Some(votes), labels: Some(vec![0, 1, 1]), ..VoteFile::default() };
    let spread = Spread::new(5, 1).unwrap();
    let report = certify_table(&answers, &spread, &Method::Dpa).unwrap();
    let json: serde_json::Value = serde_json::from_str(&report.to_json().unwrap()).unwrap();
    let sample = |prediction: usize, radius: i64, correct: bool| serde_json::json!({"prediction": prediction, "radius": radius, "correct": correct});
    assert_eq!(json["samples"], serde_json::json!([sample(0, 2, true), sample(1, 0, true), sample(0, 0, false)]));
    assert_eq!(report.certified_fraction, [2.0 / 3.0, 1.0 / 3.0, 1.0 / 3.0]);
    assert_eq!(report.stable_fraction, [1.0, 1.0 / 3.0, 1.0 / 3.0]);
    assert_eq!((report.clean_accuracy, report.base_accuracy), (Some(2.0 / 3.0), Some(9.0 / 15.0)));
    assert_eq!((report.median_radius, report.sizes_with_half_certified), (Some(0), Some(1)));
    // Any of the three votes for class 1 can be turned, which makes 2 against 2.
    assert_eq!(report.single_poison.map(|poison| (poison.bucket, poison.lost)).unwrap().1, 1);
    assert!(report.to_csv().starts_with("size,certified_fraction,stable_fraction\n0,0.666"));
    assert_eq!(report.to_json().unwrap().parse::<Report>().unwrap(), report);
    // Finite Aggregation with d = 1 says the same of each sample.
    let fa = certify_table(&answers, &spread, &Method::FiniteAggregation).unwrap();
    assert_eq!(Report { method: "dpa".into(), ..fa }, report);

    let unlabelled = VoteFile { labels: None, ..answers };
    let report = certify_table(&unlabelled, &spread, &Method::Dpa).unwrap();
    assert_eq!(report.certified_fraction, [1.0, 1.0 / 3.0, 1.0 / 3.0]);
    assert!(report.certified_fraction_of == FractionOf::Predictions && report.clean_accuracy.is_none());
    assert_eq!((report.fraction(0), report.samples[0].correct), (1.0, None));
    let twice = Spread::with_offsets(1, 5, vec![0, 1, 2, 3, 4]).unwrap();
    assert!(certify_table(&unlabelled, &twice, &Method::Dpa).unwrap_err().to_string().contains("d = 5"));
    assert!(certify_table(&unlabelled, &spread, &Method::RunOff).unwrap_err().to_string().contains("needs scores"));
    assert!(certify_table(&VoteFile::default(), &spread, &Method::Dpa).is_err());
}
