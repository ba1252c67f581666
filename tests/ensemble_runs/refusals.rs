//! What a run refuses: settings that make no sense, files that are damaged, shards that do not belong together.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use gridgrad::Error;
use gridgrad::data::InMemory;
use gridgrad::methods::finite_aggregation::learner::{BaseLearner, Member, NearestNeighbour, Trained, Training};
use gridgrad::methods::finite_aggregation::run::{
    Answers, Ensemble, MANIFEST, Manifest, Run, Settings, Shard, merge, votes_path,
};

use crate::{Limited, Small, settings};

fn refusal<T>(result: gridgrad::Result<T>, parts: &[&str]) {
    let message = result.err().expect("must be refused").to_string();
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in {message}");
    }
}

fn create(small: &Small, settings: Settings, parts: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    refusal(Run::create(&run, settings, Shard::WHOLE, &small.sources(&NearestNeighbour)), parts);
    assert!(!run.exists(), "a refused run leaves nothing");
}

#[test]
fn settings_that_make_no_sense() {
    let small = Small::new();
    create(&small, settings(100, 4), &["400", "300 samples"]);
    let bagging = |classifiers, samples| {
        let mut settings = settings(1, 1);
        settings.ensemble = Ensemble::Bagging { classifiers, samples };
        settings
    };
    create(&small, bagging(0, 5), &["bagging of 0 classifiers"]);
    create(&small, bagging(5, 0), &["with 0 samples"]);
    for (classifiers, samples) in
        [(usize::MAX, 5), (1_000_000_000_000, 1), (5, usize::MAX), (usize::MAX, usize::MAX), (1 << 24, 1 << 24)]
    {
        create(&small, bagging(classifiers, samples), &[&format!("bagging of {classifiers} "), "at most 16777216"]);
    }
    for (k, classifiers) in [(0, 5), (5, 0), (5, usize::MAX)] {
        let mut settings = settings(1, 1);
        settings.ensemble = Ensemble::RandomSubsets { k, classifiers };
        create(&small, settings, &[&format!("k = {k} for {classifiers} classifiers")]);
    }
    let limited = |test| Settings { limit_test: test, ..settings(5, 2) };
    create(&small, limited(Some(0)), &["limit of 0", "20"]);
    let fraction = |fraction| Settings { train_fraction: Some(fraction), ..settings(5, 2) };
    for out_of_range in [0.0, -0.5, 1.5, f64::NAN, f64::INFINITY] {
        create(&small, fraction(out_of_range), &["train fraction", "above 0 and at most 1"]);
    }
    create(&small, fraction(1e-9), &["no training image"]);
    create(&small, limited(Some(21)), &["limit of 21", "20"]);
    create(&small, fraction(0.01), &["10 buckets", " samples"]);
    create(&small, Settings { image_size: Some(0), ..settings(5, 2) }, &["resize", "0×0"]);
    let other = InMemory::new("other", vec!["a".into()], [8, 8, 1], vec![0; 64], vec![0]).unwrap();
    create(&Small { test: other, ..Small::new() }, settings(5, 2), &["other classes"]);
    let none = InMemory::new("none", (0..10).map(|d| d.to_string()).collect(), [8, 8, 1], vec![], vec![]).unwrap();
    create(&Small { test: none, ..Small::new() }, settings(5, 2), &["none held out"]);
    let folder = tempfile::tempdir().unwrap();
    let shard = Shard { index: 1, count: 11 };
    refusal(
        Run::create(folder.path(), settings(5, 2), shard, &small.sources(&NearestNeighbour)),
        &["1/11", "10 classifiers"],
    );
}

#[test]
fn a_folder_with_a_run() {
    let (small, folder) = (Small::new(), tempfile::tempdir().unwrap());
    let run = small.run(folder.path(), settings(5, 2));
    let before = crate::content(&run);
    let again = Run::create(&run, settings(5, 2), Shard::WHOLE, &small.sources(&NearestNeighbour));
    refusal(again, &["holds a run already"]);
    refusal(merge(&[&run], &run), &["holds a run already"]);
    assert!(crate::content(&run) == before);
}

/// Resuming and reading both refuse, and name `file`.
fn both_refuse(small: &Small, run: &Path, parts: &[&str]) {
    refusal(Run::resume(run, &small.sources(&NearestNeighbour)), parts);
    refusal(Answers::read(&[run]), parts);
}

#[test]
fn damaged_missing_and_foreign_files() {
    let (small, folder) = (Small::new(), tempfile::tempdir().unwrap());
    let run = small.run(&folder.path().join("run"), settings(5, 2));
    let other = small.run(&folder.path().join("other"), settings(3, 2));
    let path = votes_path(&run, 4);
    let sound = std::fs::read(&path).unwrap();
    let mut flipped = sound.clone();
    *flipped.last_mut().unwrap() ^= 1;
    for damaged in [&flipped[..], &sound[..sound.len() / 2], b"", &std::fs::read(votes_path(&other, 4)).unwrap()] {
        std::fs::write(&path, damaged).unwrap();
        both_refuse(&small, &run, &["000004.safetensors", "damaged, or of another run"]);
    }
    std::fs::remove_file(&path).unwrap();
    refusal(Answers::read(&[&run]), &["000004.safetensors", "No such file"]);
    std::fs::write(&path, &sound).unwrap();
    assert!(Answers::read(&[&run]).is_ok());

    let manifest = std::fs::read(run.join(MANIFEST)).unwrap();
    let text = String::from_utf8(manifest.clone()).unwrap();
    let (other_offset, other_seed) =
        (text.replacen("\"d\": 2", "\"d\": 3", 1), text.replacen("\"seed\": 0", "\"seed\": 7", 1));
    let later = text.replacen("version 2", "version 3", 1);
    let cases: [(&[u8], &str); 7] = [
        (other_seed.as_bytes(), "changed by hand"),
        (other_offset.as_bytes(), "manifest"),
        (later.as_bytes(), "version 3"),
        (&manifest[..manifest.len() / 2], "damaged"),
        (b"{}", "damaged or not a manifest"),
        (b"\xff\xfe", "not UTF-8"),
        (b"", "damaged"),
    ];
    for (bytes, reason) in cases {
        std::fs::write(run.join(MANIFEST), bytes).unwrap();
        both_refuse(&small, &run, &["manifest.json", reason]);
    }
    std::fs::remove_file(run.join(MANIFEST)).unwrap();
    both_refuse(&small, &run, &["manifest.json", "No such file"]);
}

/// Every bit of a manifest counts. (All of them would take minutes: a prime stride visits every kind of place.)
#[test]
fn a_manifest_with_a_flipped_bit() {
    let (small, folder) = (Small::new(), tempfile::tempdir().unwrap());
    let run = small.run(folder.path(), settings(3, 1));
    let sound = std::fs::read(run.join(MANIFEST)).unwrap();
    for bit in (0..8 * sound.len()).step_by(37) {
        let mut flipped = sound.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        std::fs::write(run.join(MANIFEST), flipped).unwrap();
        refusal(Manifest::read(&run), &["manifest.json"]);
    }
}

#[test]
fn resuming_with_other_data_another_recipe_or_another_backend() {
    struct Renamed;
    impl BaseLearner for Renamed {
        fn recipe(&self) -> serde_json::Value {
            serde_json::json!({ "learner": "nearest", "epochs": 3 })
        }
        fn group_size(&self) -> usize {
            1
        }
        fn open<'a>(&'a self, _: &'a InMemory, _: &'a InMemory) -> gridgrad::Result<Box<dyn Training + 'a>> {
            Ok(Box::new(Renamed))
        }
    }
    impl Training for Renamed {
        fn train_each(
            &self,
            _: &[Member<'_>],
            _: &mut dyn FnMut(usize, Trained) -> gridgrad::Result<()>,
        ) -> gridgrad::Result<()> {
            Ok(())
        }
    }
    let (small, folder) = (Small::new(), tempfile::tempdir().unwrap());
    let run = small.run(folder.path(), settings(5, 2));
    refusal(
        Run::resume(&run, &small.sources(&Renamed)),
        &["cannot go on", "recipe.epochs: absent, now 3", "backend: \"integers", "now \"cpu, "],
    );
    let fewer = Small { train: crate::digits(0..299), test: small.test.clone() };
    refusal(
        Run::resume(&run, &fewer.sources(&NearestNeighbour)),
        &["data.train_samples: 300, now 299", "data.train: "],
    );
    // A learner that breaks its promise.
    let mut broken = Run::create(&run.join("inner"), settings(5, 2), Shard::WHOLE, &small.sources(&Renamed)).unwrap();
    refusal(broken.train(&AtomicBool::new(false), |_| Ok(())), &["0 results for 1 classifiers"]);
}

#[test]
fn shards_that_do_not_belong_together() {
    let (small, folder) = (Small::new(), tempfile::tempdir().unwrap());
    let shard = |name: &str, settings: Settings, index, count, learner: &dyn BaseLearner| {
        let path = folder.path().join(name);
        let mut run = Run::create(&path, settings, Shard { index, count }, &small.sources(learner)).unwrap();
        let _ = run.train(&AtomicBool::new(false), |_| Ok(()));
        path
    };
    let nearest = &NearestNeighbour;
    let first = shard("first", settings(5, 2), 1, 2, nearest);
    let second = shard("second", settings(5, 2), 2, 2, nearest);
    let seeded = shard("seeded", Settings { seed: 1, ..settings(5, 2) }, 2, 2, nearest);
    let other = shard("other", settings(10, 1), 2, 2, nearest);
    let third = shard("third", settings(5, 2), 2, 3, nearest);
    let unfinished = shard("unfinished", settings(5, 2), 2, 2, &Limited::new(2, 1));
    let merged = folder.path().join("merged");
    let cases: [(&[&std::path::PathBuf], &[&str]); 6] = [
        (&[&first, &seeded], &["first and", "not shards of one run", "settings.seed: 0, now 1"]),
        (&[&first, &other], &["not shards of one run", "spread.k: 5, now 10"]),
        (&[&first], &["5 of 10 classifiers are missing, from 5 to 9"]),
        (&[&first, &second, &third], &["classifier 3 is both in", "first", "third"]),
        (&[&first, &unfinished], &["unfinished is not trained yet", "--resume"]),
        (&[], &["no run"]),
    ];
    for (shards, parts) in cases {
        refusal(Answers::read(shards), parts);
        refusal(merge(shards, &merged), parts);
        assert!(!merged.exists());
    }
    assert!(Answers::read(&[first, second]).is_ok());
}

#[test]
fn versions_that_do_not_belong_together() {
    let (small, folder) = (Small::new(), tempfile::tempdir().unwrap());
    let version = |name: &str, settings| small.run(&folder.path().join(name), settings);
    let [first, second] = [0, 9].map(|seed| version(&format!("seed {seed}"), Settings { seed, ..settings(5, 2) }));
    let other = version("other", Settings { seed: 1, ..settings(10, 1) });
    let [votes, more_votes] =
        [2, 3].map(|seed| version(&format!("votes {seed}"), Settings { seed, keep_scores: false, ..settings(5, 2) }));
    let bagging = Ensemble::Bagging { classifiers: 4, samples: 9 };
    let bagging = version("bagging", Settings { ensemble: bagging, ..settings(5, 2) });
    let cases: [(&[&std::path::PathBuf], &[&str]); 7] = [
        (&[], &["got 0 runs"]),
        (&[&first], &["got 1 runs", "two or more"]),
        (&[&first, &second, &first], &["both have the seed 0"]),
        (&[&first, &other], &["not versions of one run", "spread.k: 5, now 10"]),
        (&[&first, &votes], &["not versions of one run", "settings.keep_scores: true, now false"]),
        (&[&votes, &more_votes], &["votes 2 kept votes alone"]),
        (&[&second, &bagging], &["bagging", "its seed decides the subsets"]),
    ];
    for (versions, parts) in cases {
        refusal(Answers::boosted(versions), parts);
    }
    assert_eq!(Answers::boosted(&[&first, &second]).unwrap().versions(), 2);
}

#[test]
fn a_place_where_nothing_can_be_written() {
    let small = Small::new();
    let run = Run::create(Path::new("/dev/null/run"), settings(5, 2), Shard::WHOLE, &small.sources(&NearestNeighbour));
    assert!(matches!(run, Err(Error::Io { .. })));
}
