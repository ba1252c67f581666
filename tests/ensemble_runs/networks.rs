//! Runs of Network-in-Networks, tiny ones: what holds for nearest neighbours holds for what is really trained.

use std::sync::atomic::AtomicBool;

use gridgrad::methods::finite_aggregation::learner::{BaseLearner, NetworkInNetwork, from_recipe};
use gridgrad::methods::finite_aggregation::run::{Answers, Run, Settings, Shard, weights_path};
use gridgrad::methods::finite_aggregation::{Method, Report, Scores, Spread, VoteFile, Votes, certify_table};
use gridgrad::train::many::{Recipe, Trainer};
use gridgrad::{Device, nn::state_dict};

use crate::{Limited, Small, assert_same, digits, in_order, settings, train};

/// Six networks of a step or two each.
fn small() -> (Small, Settings, NetworkInNetwork) {
    let recipe = Recipe { epochs: 1, batch_size: 8, crop_padding: 1, ..Recipe::default() };
    let set = Small { train: digits(0..24), test: digits(1700..1704) };
    let learner = NetworkInNetwork::new(Trainer::new(recipe).keep_weights(true));
    (set, Settings { keep_weights: true, ..settings(3, 2) }, learner)
}

#[test]
fn a_run_of_networks_that_is_killed_and_resumed_leaves_the_same_bytes() {
    let ((small, settings, learner), folder) = (small(), tempfile::tempdir().unwrap());
    let whole = train(&folder.path().join("whole"), settings.clone(), &small.sources(&learner));
    let run = folder.path().join("killed");
    let killed = Limited { inner: &learner, group: 2, groups: 1.into() };
    let mut first = Run::create(&run, settings, Shard::WHOLE, &small.sources(&killed)).unwrap();
    assert!(first.train(&AtomicBool::new(false), |_| Ok(())).is_err());
    // As the command line resumes: from what the manifest says.
    let again = from_recipe(&learner.recipe(), Device::Cpu, None, true).unwrap();
    let four = Limited { inner: &*again, group: 3, groups: usize::MAX.into() };
    assert!(Run::resume(&run, &small.sources(&four)).unwrap().train(&AtomicBool::new(false), |_| Ok(())).unwrap());
    assert_same(&whole, &run);
    let (weights, _) = state_dict::read(weights_path(&run, 5)).unwrap();
    assert_eq!(weights["fc.weight"].shape().to_vec(), [10, 192]);
    assert!(Answers::read(&[&run]).unwrap().scores().is_ok());
}

#[test]
fn a_sample_changes_the_networks_of_its_bucket_and_no_other() {
    let ((small, settings, learner), folder) = (small(), tempfile::tempdir().unwrap());
    let before = train(&folder.path().join("before"), settings.clone(), &small.sources(&learner));
    let without = Small { train: in_order(&small.train, &Vec::from_iter(1..24)), test: small.test.clone() };
    let after = train(&folder.path().join("after"), settings, &without.sources(&learner));
    let [before, after] = [before, after].map(|run| Answers::read(&[run]).unwrap().classifiers);
    let spread = Spread::new(3, 2).unwrap();
    let mut fed: Vec<usize> = spread.classifiers_of(crate::theorem::bucket(&small.train, 0, &spread)).collect();
    fed.sort_unstable();
    let differ: Vec<usize> = (0..6).filter(|&one| before[one].trained != after[one].trained).collect();
    // Weights and all: a network that lost a sample is another one, and the others are the same bits.
    assert_eq!(differ, fed);
}

/// DPA*, and the same for `d > 1`.
#[test]
fn scores_of_versions_are_added() {
    let ((small, settings, learner), folder) = (small(), tempfile::tempdir().unwrap());
    let version = |name: &str, settings: Settings| train(&folder.path().join(name), settings, &small.sources(&learner));
    let first = version("first", settings.clone());
    let second = version("second", Settings { seed: 1000, ..settings.clone() });
    let [a, b] = [&first, &second].map(|run| Answers::read(&[run]).unwrap().scores().unwrap());
    assert_ne!(a, b);
    let sum = Scores::boosted(&[a, b]).unwrap();
    // Whatever the order of the folders.
    let boosted = Answers::boosted(&[&second, &first]).unwrap();
    assert_eq!((boosted.versions(), boosted.run.settings.seed), (2, 0));
    assert_eq!(boosted.scores().unwrap(), sum);
    assert_eq!(boosted.table.votes, Some(Votes::from_scores(&sum).unwrap()));
    for method in [Method::FiniteAggregation, Method::RunOff] {
        let table = VoteFile { scores: Some(sum.clone()), ..boosted.table.clone() };
        let expected = certify_table(&table, &Spread::new(3, 2).unwrap(), &method).unwrap();
        let report = boosted.certify(&method).unwrap();
        assert_eq!(report, Report { versions: Some(2), ..expected });
    }
}

#[test]
fn recipes_that_are_not_known_are_refused() {
    for recipe in [
        serde_json::json!({ "learner": "oracle" }),
        serde_json::json!({}),
        serde_json::json!({ "learner": "network-in-network", "training": { "epoch": 3 } }),
    ] {
        let error = from_recipe(&recipe, Device::Cpu, None, false).err().unwrap().to_string();
        assert!(error.contains("no learner of this program"), "{error}");
    }
}
