//! What a run leaves, and how it stops, goes on and is merged.

use std::sync::atomic::{AtomicBool, Ordering};

use gridgrad::methods::finite_aggregation::Method;
use gridgrad::methods::finite_aggregation::learner::NearestNeighbour;
use gridgrad::methods::finite_aggregation::run::{
    Answers, Ensemble, MANIFEST, Manifest, Run, Shard, merge, votes_path,
};
use gridgrad::random::Philox;

use crate::{Limited, Small, assert_same, base_accuracy, content, in_order, settings, votes};

#[test]
fn a_run_leaves_a_manifest_and_a_file_for_each_classifier() {
    let (small, folder) = (Small::new(), tempfile::tempdir().unwrap());
    let run = small.run(&folder.path().join("run"), settings(5, 2));
    assert_eq!(content(&run).len(), 1 + 10);
    let manifest = Manifest::read(&run).unwrap();
    assert!(manifest.is_complete());
    // Another build differs in this place alone, which is enough to be refused.
    let build = &manifest.run.build;
    assert!(build.len() == 16 && build.bytes().all(|byte| byte.is_ascii_hexdigit()), "{build}");
    let sizes: Vec<usize> = manifest.classifiers.iter().map(|record| record.samples).collect();
    assert_eq!(sizes.iter().sum::<usize>(), 2 * 300);
    assert!(manifest.classifiers.iter().enumerate().all(|(i, r)| (r.classifier, r.seed) == (i, i as u64)));
    let text = std::fs::read_to_string(run.join(MANIFEST)).unwrap();
    assert!(text.lines().filter(|line| line.contains("\"subset\"")).count() == 10, "{text}");
    assert!(text.contains(r#"{"k": 5, "d": 2, "offsets": ["#), "{text}");
    let answers = Answers::read(&[&run]).unwrap();
    assert_eq!((votes(&answers).samples(), votes(&answers).classifiers(), votes(&answers).classes()), (20, 10, 10));
    assert!((0.5..1.0).contains(&base_accuracy(&answers)), "{}", base_accuracy(&answers));
}

#[test]
fn without_scores_the_votes_are_the_same() {
    let (small, folder) = (Small::new(), tempfile::tempdir().unwrap());
    let with = Answers::read(&[small.run(&folder.path().join("with"), settings(5, 2))]).unwrap();
    let mut alone = settings(5, 2);
    alone.keep_scores = false;
    let without = Answers::read(&[small.run(&folder.path().join("without"), alone)]).unwrap();
    assert!(with.scores().is_ok() && without.scores().unwrap_err().to_string().contains("votes alone"));
    // Votes alone are read until a method needs more.
    assert!(with.table.scores.is_none());
    assert_eq!(with.certify(&Method::RunOff).unwrap().samples.len(), 20);
    assert_eq!(votes(&with), votes(&without));
}

#[test]
fn a_run_that_is_killed_after_any_group_and_resumed_leaves_the_same_bytes() {
    let (small, folder) = (Small::new(), tempfile::tempdir().unwrap());
    let whole = small.run(&folder.path().join("whole"), settings(5, 2));
    for groups in 0..4 {
        let run = folder.path().join(format!("killed-{groups}"));
        let killed = Limited::new(3, groups);
        let mut first = Run::create(&run, settings(5, 2), Shard::WHOLE, &small.sources(&killed)).unwrap();
        assert!(first.train(&AtomicBool::new(false), |_| Ok(())).unwrap_err().to_string().contains("killed"));
        drop(first);
        let trained = Manifest::read(&run).unwrap().classifiers.iter().filter(|one| one.trained.is_some()).count();
        assert_eq!(trained, 3 * groups);
        // What a kill between the files of a classifier and the journal leaves: a file that is not listed, whatever it has.
        let left = Manifest::read(&run).unwrap().classifiers.into_iter().find(|one| one.trained.is_none()).unwrap();
        std::fs::write(votes_path(&run, left.classifier), b"half").unwrap();
        let mut second = Run::resume(&run, &small.sources(&NearestNeighbour)).unwrap();
        assert!(second.train(&AtomicBool::new(false), |_| Ok(())).unwrap());
        assert_same(&whole, &run);
    }
}

#[test]
fn a_run_that_is_killed_within_a_group_has_lost_nothing_that_was_finished() {
    let (small, folder) = (Small::new(), tempfile::tempdir().unwrap());
    let whole = small.run(&folder.path().join("whole"), settings(5, 2));
    for finished in [1, 4, 10] {
        let run = folder.path().join(format!("killed-{finished}"));
        let mut first = Run::create(&run, settings(5, 2), Shard::WHOLE, &small.sources(&NearestNeighbour)).unwrap();
        let mut heard = 0;
        let killed = first.train(&AtomicBool::new(false), |_| {
            heard += 1;
            if heard == finished { Err(gridgrad::Error::Training("killed".into())) } else { Ok(()) }
        });
        assert!(killed.unwrap_err().to_string().contains("killed"));
        let journal = run.join("finished.jsonl");
        assert_eq!(std::fs::read_to_string(&journal).unwrap().lines().count(), finished);
        // A line and files that were being written.
        let line = std::fs::read_to_string(&journal).unwrap();
        std::fs::write(&journal, format!("{line}{}", &line[..100])).unwrap();
        for place in ["", "votes/"] {
            std::fs::write(run.join(format!("{place}.gridgrad-unfinished-x7")), b"half").unwrap();
        }
        let mut second = Run::resume(&run, &small.sources(&NearestNeighbour)).unwrap();
        let trained = |manifest: &Manifest| manifest.classifiers.iter().filter(|one| one.trained.is_some()).count();
        assert_eq!(trained(second.manifest()), finished);
        assert_eq!(trained(&Manifest::read(&run).unwrap()), finished);
        let mut more = 0;
        let report = |_: &_| {
            more += 1;
            Ok(())
        };
        assert!(second.train(&AtomicBool::new(false), report).unwrap());
        assert_eq!(more, 10 - finished);
        assert_same(&whole, &run);
    }
}

#[test]
fn a_classifier_whose_file_is_missing_is_trained_again() {
    let (small, folder) = (Small::new(), tempfile::tempdir().unwrap());
    let whole = small.run(&folder.path().join("whole"), settings(5, 2));
    let run = small.run(&folder.path().join("run"), settings(5, 2));
    std::fs::remove_file(votes_path(&run, 4)).unwrap();
    let mut again = Run::resume(&run, &small.sources(&NearestNeighbour)).unwrap();
    let mut heard = Vec::new();
    let report = |record: &gridgrad::methods::finite_aggregation::run::Record| {
        heard.push(record.classifier);
        Ok(())
    };
    assert!(again.train(&AtomicBool::new(false), report).unwrap());
    assert_eq!(heard, [4]);
    assert_same(&whole, &run);
}

#[test]
fn a_run_that_is_asked_to_stop_ends_after_the_group() {
    let (small, folder) = (Small::new(), tempfile::tempdir().unwrap());
    let (stop, groups_of_four) = (AtomicBool::new(false), Limited::new(4, usize::MAX));
    let mut run = Run::create(folder.path(), settings(5, 2), Shard::WHOLE, &small.sources(&groups_of_four)).unwrap();
    let mut heard = Vec::new();
    let finished = run.train(&stop, |record| {
        heard.push((std::cmp::Reverse(record.samples), record.classifier));
        stop.store(heard.len() > 4, Ordering::SeqCst);
        Ok(())
    });
    assert!(!finished.unwrap());
    assert_eq!(heard.len(), 8);
    assert!(heard.is_sorted(), "the largest first: {heard:?}");
    assert!(Answers::read(&[folder.path()]).err().unwrap().to_string().contains("is not trained yet"));
}

#[test]
fn shards_of_any_size_merge_to_the_bytes_of_the_whole_run() {
    let (small, folder) = (Small::new(), tempfile::tempdir().unwrap());
    let whole = small.run(&folder.path().join("whole"), settings(5, 2));
    for count in [1, 3, 10] {
        let group = Limited::new(2, usize::MAX);
        let shards: Vec<_> = (1..=count)
            .rev()
            .map(|index| {
                let shard = folder.path().join(format!("{index}-of-{count}"));
                let mut run =
                    Run::create(&shard, settings(5, 2), Shard { index, count }, &small.sources(&group)).unwrap();
                assert!(run.train(&AtomicBool::new(false), |_| Ok(())).unwrap());
                shard
            })
            .collect();
        let merged = folder.path().join(format!("merged-{count}"));
        merge(&shards, &merged).unwrap();
        assert_same(&whole, &merged);
        assert_eq!(Answers::read(&shards).unwrap().table.votes, Answers::read(&[&whole]).unwrap().table.votes);
    }
}

#[test]
fn the_order_of_the_training_set_changes_nothing() {
    let (small, folder) = (Small::new(), tempfile::tempdir().unwrap());
    let order = Philox::new(5).permutation(300);
    let shuffled = Small { train: in_order(&small.train, &order), test: small.test.clone() };
    let mut bagging = settings(1, 1);
    bagging.ensemble = Ensemble::Bagging { classifiers: 6, samples: 40 };
    let mut random = settings(1, 1);
    random.ensemble = Ensemble::RandomSubsets { k: 7, classifiers: 6 };
    for (name, settings) in [("fa", settings(5, 2)), ("bagging", bagging), ("random-subsets", random)] {
        let runs = [(&small, "a"), (&shuffled, "b")];
        let [a, b] = runs.map(|(set, part)| set.run(&folder.path().join(format!("{name}-{part}")), settings.clone()));
        assert_same(&a, &b);
    }
}

#[test]
fn bagging_draws_with_replacement_and_depends_on_the_seed() {
    let (small, folder) = (Small::new(), tempfile::tempdir().unwrap());
    let bagging = |seed| {
        let mut settings = settings(1, 1);
        settings.ensemble = Ensemble::Bagging { classifiers: 8, samples: 400 };
        settings.seed = seed;
        settings
    };
    let [a, b] = [0, 1].map(|seed| small.run(&folder.path().join(seed.to_string()), bagging(seed)));
    let [a, b] = [a, b].map(|run| Answers::read(&[run]).unwrap());
    // More draws than samples: some came twice.
    assert!(a.classifiers.iter().all(|record| record.samples == 400));
    assert_ne!(a.classifiers[0].subset, b.classifiers[0].subset);
    assert_ne!(a.classifiers[0].subset, a.classifiers[1].subset);
    assert!(base_accuracy(&a) > 0.6, "{}", base_accuracy(&a));
}
