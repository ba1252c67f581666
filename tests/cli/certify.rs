//! `certify`: radii from files of answers.

use std::path::Path;

use gridgrad::methods::finite_aggregation::{ScoreValues, Scores, VoteFile, Votes};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use crate::{content, refused_in_one_line, succeeds};

/// Writes tensors of any kind: (name, dtype, shape, bytes).
fn write(folder: &Path, tensors: &[(&str, Dtype, &[usize], Vec<u8>)]) {
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| (name.to_string(), TensorView::new(*dtype, shape.to_vec(), bytes).unwrap()));
    std::fs::write(folder.join("v.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
}

fn i64s(values: &[i64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn certify(folder: &Path, flags: &str) -> (String, Value) {
    let mut arguments = vec!["certify", "--votes", "v.safetensors", "--json", "out.json"];
    arguments.extend(flags.split_whitespace());
    let printed = succeeds(folder, &arguments);
    (printed, serde_json::from_slice(&std::fs::read(folder.join("out.json")).unwrap()).unwrap())
}

fn refuses(folder: &Path, flags: &str, parts: &[&str]) {
    let mut arguments = vec!["certify", "--votes", "v.safetensors", "--json", "out.json"];
    arguments.extend(flags.split_whitespace());
    refused_in_one_line(folder, &arguments, parts);
    assert!(!folder.join("out.json").exists(), "{flags}: a refused call left a report");
}

#[test]
fn votes_of_every_integer_type_give_the_radii_of_the_examples() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    // Examples E and G of the specification.
    let values: [i64; 16] = [0, 1, 0, 2, 0, 3, 0, 4, 0, 0, 0, 0, 1, 2, 3, 4];
    let (offsets, labels) = (i64s(&[0, 1]), i64s(&[0, 3]));
    for dtype in [Dtype::U8, Dtype::I8, Dtype::U16, Dtype::I16, Dtype::U32, Dtype::I32, Dtype::U64, Dtype::I64] {
        let size = dtype.bitsize() / 8;
        let votes = values.iter().flat_map(|value| value.to_le_bytes()[..size].to_vec()).collect();
        let offsets = ("offsets", Dtype::I64, &[2][..], offsets.clone());
        write(folder, &[("votes", dtype, &[2, 8], votes), offsets, ("labels", Dtype::I64, &[2], labels.clone())]);
        let (printed, report) = certify(folder, "--k 4 --d 2 --num-classes 5 --method fa");
        let right = json!({"prediction": 0, "radius": 1, "correct": true});
        assert_eq!(report["samples"], json!([right, {"prediction": 0, "radius": 0, "correct": false}]));
        assert_eq!(report["certified_fraction"], json!([0.5, 0.5]));
        assert_eq!(report["spread"], json!({"k": 4, "d": 2, "offsets": [0, 1]}));
        assert!(printed.contains("clean accuracy 50.00 %") && printed.contains("deterministic"), "{printed}");
    }
    let (_, coarse) = certify(folder, "--k 4 --d 2 --num-classes 5 --method coarse");
    assert_eq!(coarse["samples"][0]["radius"], 0);
    let (_, exact) = certify(folder, "--k 4 --d 2 --method exact");
    assert_eq!(exact["samples"][0]["radius"], 1);
}

#[test]
fn every_method_runs_and_every_output_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let values = (0..3 * 6 * 4).map(|i| ((i * 37 + i / 5) % 11) as f32).collect();
    let scores = Scores::new(3, 6, 4, ScoreValues::F32(values)).unwrap();
    let file = VoteFile { scores: Some(scores), labels: Some(vec![0, 1, 2]), ..VoteFile::default() };
    file.write(folder.join("v.safetensors")).unwrap();
    for (flags, title) in [
        ("--k 3 --d 2 --method fa", "fa, k = 3, d = 2: 3 samples, 6 classifiers"),
        ("--k 3 --d 2 --method fa-roe --num-classes 4", "fa-roe, k = 3, d = 2: 3 samples, 6 classifiers"),
        ("--k 6 --d 1 --method fa-roe", "fa-roe, k = 6, d = 1: 3 samples, 6 classifiers"),
        ("--k 6 --method dpa", "dpa, k = 6, d = 1: 3 samples, 6 classifiers"),
        ("--k 3 --d 2 --method exact", "exact, k = 3, d = 2: 3 samples, 6 classifiers"),
        ("--k 3 --d 2 --method bagging", "hash-bagging, k = 3, d = 2: 3 samples, 6 classifiers"),
        // What has no spread is not called by one.
        ("--method bagging --subset-size 30 --train-size 60000", "bagging, 6 classifiers of 30 samples: 3 samples"),
        ("--k 3 --method infinite-estimate", "infinite-estimate, k = 3, 6 classifiers: 3 samples"),
        ("--k 3 --method infinite-bound --alpha 0.01", "infinite-bound, k = 3, 6 classifiers: 3 samples"),
        ("--k 3 --d 2 --method infinite-bound", "infinite-bound, k = 3, 6 classifiers: 3 samples"),
    ] {
        let (printed, report) = certify(folder, &format!("{flags} --csv out.csv --plot out.svg"));
        assert_eq!(report["samples"].as_array().unwrap().len(), 3, "{flags}");
        let fractions = report["certified_fraction"].as_array().unwrap();
        let lines = std::fs::read_to_string(folder.join("out.csv")).unwrap();
        assert_eq!(lines.lines().count(), 1 + fractions.len(), "{flags}: {lines}");
        let heading = format!("{title}, 4 classes\nguarantee: ");
        assert!(printed.starts_with(&heading), "{heading}: {printed}");
        let (name, _) = title.split_once(':').unwrap();
        let picture = std::fs::read_to_string(folder.join("out.svg")).unwrap();
        assert!(picture.contains(&format!("{name}: ")), "{name}: {picture}");
        assert_eq!(report["spread"].is_null(), !name.contains("d = "), "{flags}");
    }
    succeeds(
        folder,
        &"certify --votes v.safetensors --k 6 --d 1 --method dpa --json dpa.json".split(' ').collect::<Vec<_>>(),
    );
    certify(folder, "--k 3 --d 2 --method fa --plot both.svg --beside dpa.json");
    let drawn = std::fs::read_to_string(folder.join("both.svg")).unwrap();
    assert!(drawn.contains("dpa, k = 6, d = 1") && drawn.contains("coarse bound, k = 3, d = 2"), "{drawn}");
    let before = content(folder);
    certify(folder, "--k 3 --d 2 --method fa --plot both.svg --beside dpa.json --threads 1");
    assert_eq!(content(folder), before);
    std::fs::write(folder.join("bad.json"), "{}").unwrap();
    std::fs::remove_file(folder.join("out.json")).unwrap();
    refuses(folder, "--k 3 --d 2 --method fa --plot both.svg --beside bad.json", &["bad.json", "not a report"]);
    let mut empty: Value = serde_json::from_slice(&std::fs::read(folder.join("dpa.json")).unwrap()).unwrap();
    empty["certified_fraction"] = json!([]);
    std::fs::write(folder.join("bad.json"), empty.to_string()).unwrap();
    refuses(
        folder,
        "--k 3 --d 2 --method fa --plot both.svg --beside bad.json",
        &["bad.json", "no certified fraction"],
    );
}

#[test]
fn bagging_without_sizes_is_hash_bagging() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    // Margins of 8, 3 (class 1 wins against the smaller class 0) and 0.
    let votes = [[0; 8], [1, 1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]].concat();
    let file = VoteFile { votes: Some(Votes::new(3, 8, 2, votes).unwrap()), ..VoteFile::default() };
    file.write(folder.join("v.safetensors")).unwrap();
    let sample = |class: usize, radius: i64| json!({"prediction": class, "radius": radius, "correct": null});
    for (flags, radii) in [("--k 4 --d 2", [2, 0, 0]), ("--k 8 --d 1", [4, 1, 0]), ("--k 1 --d 8", [0, 0, 0])] {
        let (printed, report) = certify(folder, &format!("{flags} --method bagging --num-classes 2"));
        assert_eq!(report["samples"], json!([sample(0, radii[0]), sample(1, radii[1]), sample(0, radii[2])]));
        assert_eq!(
            (&report["method"], &report["guarantee"]["kind"]),
            (&json!("hash-bagging"), &json!("deterministic"))
        );
        assert!(printed.contains("guarantee: deterministic"), "{printed}");
    }
    let (printed, report) = certify(folder, "--k 4 --d 2 --method bagging --subset-size 3 --train-size 90");
    assert_eq!((&report["method"], &report["guarantee"]["kind"]), (&json!("bagging"), &json!("probabilistic")));
    assert!(printed.contains("with probability 0.999"), "{printed}");
}

#[test]
fn without_labels_the_certified_fraction_is_of_predictions() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let votes = Votes::new(2, 5, 2, vec![0, 0, 0, 0, 0, 1, 1, 1, 1, 0]).unwrap();
    let file = VoteFile { votes: Some(votes), ..VoteFile::default() };
    file.write(folder.join("v.safetensors")).unwrap();
    let (_, report) = certify(folder, "--k 5 --method dpa --csv out.csv");
    assert_eq!(report["certified_fraction"], json!([1.0, 1.0, 0.5]));
    assert_eq!(report["certified_fraction_of"], "predictions");
    let lines = std::fs::read_to_string(folder.join("out.csv")).unwrap();
    assert_eq!(lines, "size,certified_fraction,stable_fraction\n0,1,1\n1,1,1\n2,0.5,0.5\n");
    VoteFile { labels: Some(vec![1, 1]), ..file }.write(folder.join("v.safetensors")).unwrap();
    let (_, report) = certify(folder, "--k 5 --method dpa");
    assert_eq!(report["certified_fraction"], json!([0.5, 0.5, 0.0]));
    assert_eq!(report["certified_fraction_of"], "labels");
}

/// A radius of ten million: radii and printed shares are exact, curves end before.
#[test]
fn files_stay_small_however_large_a_radius_is() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let votes = [[0u16; 1000], std::array::from_fn(|i| (i % 2) as u16)].concat();
    let votes = Votes::new(2, 1000, 2, votes).unwrap();
    let file = VoteFile { votes: Some(votes), labels: Some(vec![0, 0]), ..VoteFile::default() };
    file.write(folder.join("v.safetensors")).unwrap();
    let flags = "--method bagging --subset-size 1 --train-size 100000000 --plot out.svg";
    let (printed, report) = certify(folder, flags);
    let radius = report["samples"][0]["radius"].as_u64().unwrap();
    assert!(radius > 10_000_000 && report["samples"][1]["radius"] == -1, "{radius}");
    assert_eq!(
        (&report["median_radius"], report["sizes_with_half_certified"].as_u64()),
        (&json!(radius), Some(radius + 1))
    );
    let fractions = report["certified_fraction"].as_array().unwrap();
    assert!(fractions.len() == 100_001 && fractions.iter().all(|share| *share == 0.5));
    assert!(printed.contains("curves in files end at size 100000"), "{printed}");
    assert!(
        printed.lines().any(|line| line.starts_with(&radius.to_string()) && line.ends_with("50.00 %")),
        "{printed}"
    );
}

#[test]
fn flags_that_do_not_fit_the_table() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    refuses(folder, "--k 4 --d 1 --method fa", &["v.safetensors", "No such file"]);
    let votes = Votes::new(2, 4, 3, vec![0, 1, 2, 0, 1, 1, 2, 2]).unwrap();
    VoteFile { votes: Some(votes), ..VoteFile::default() }.write(folder.join("v.safetensors")).unwrap();
    for (flags, parts) in [
        ("--k 0 --d 4 --method fa", &["k = 0"][..]),
        ("--k 4 --d 0 --method fa", &["d = 0"]),
        ("--k 4 --d 2 --method fa", &["4 classifiers", "4·2 = 8"]),
        ("--k 5 --d 1 --method dpa", &["4 classifiers", "5·1 = 5"]),
        ("--k 2 --d 2 --method dpa", &["d = 1", "got d = 2"]),
        ("--k 18446744073709551615 --d 2 --method fa", &["16777216"]),
        ("--d 1 --method fa", &["needs --k"]),
        ("--k 4 --method fa", &["needs --d"]),
        ("--k 4 --d 1 --method fa-roe", &["needs scores"]),
        ("--method bagging", &["hash-bagging needs --k"]),
        ("--k 4 --method bagging", &["hash-bagging needs --d"]),
        ("--k 4 --d 2 --method bagging", &["4 classifiers", "4·2 = 8"]),
        ("--k 4 --d 2 --method bagging --subset-size 3 --train-size 9", &["4 classifiers", "4·2 = 8"]),
        ("--k 4 --d 2 --method infinite-estimate", &["4 classifiers", "4·2 = 8"]),
        ("--k 4 --d 1 --method bagging --subset-size 3", &["needs --train-size"]),
        ("--k 4 --d 1 --method bagging --train-size 3", &["needs --subset-size"]),
        ("--method bagging --subset-size 1 --train-size 1000000000000", &["1000000000000 samples", "100000000"]),
        ("--method bagging --subset-size 0 --train-size 3", &["subsets of 0"]),
        ("--method bagging --subset-size 3 --train-size 3 --alpha 0", &["alpha = 0"]),
        ("--k 4 --method infinite-bound --alpha NaN", &["alpha = NaN"]),
        ("--k 4 --d 1 --method fa --subset-size 3", &["bagging alone"]),
        ("--k 4 --d 1 --method fa --num-classes 1", &["value 2 at index 2 is not in 0 to 1"]),
        ("--k 4 --d 1 --method fa --num-classes 0", &["--num-classes 0"]),
        ("--k 4 --d 1 --method fa --num-classes 70000", &["70000 classes"]),
        ("--k 4 --d 1 --method fa --num-classes 18446744073709551615", &["18446744073709551615 classes"]),
    ] {
        refuses(folder, flags, parts);
    }
}

#[test]
fn tables_that_are_wrong_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let votes = || ("votes", Dtype::I64, &[1, 2][..], i64s(&[0, 1]));
    let cases: [(&[(&str, Dtype, &[usize], Vec<u8>)], &str); 15] = [
        (&[], "holds nothing"),
        (&[("vote", Dtype::I64, &[1, 2], i64s(&[0, 1]))], "holds vote, expected a tensor votes or scores"),
        (&[("votes", Dtype::I64, &[2], i64s(&[0, 1]))], "votes: has shape [2], expected (samples, classifiers)"),
        (&[("votes", Dtype::F32, &[1, 1], vec![0; 4])], "votes: has dtype F32, expected integers"),
        (&[("votes", Dtype::I64, &[1, 2], i64s(&[0, -1]))], "votes: value -1 at index 1"),
        (&[("votes", Dtype::I64, &[1, 2], i64s(&[0, 1 << 40]))], "votes: value 1099511627776 at index 1"),
        (&[("votes", Dtype::I64, &[0, 2], vec![])], "no samples"),
        (&[("votes", Dtype::I64, &[2, 0], vec![])], "0 classifiers"),
        (&[("scores", Dtype::F32, &[1, 2], vec![0; 8])], "scores: has shape [1, 2]"),
        (&[("scores", Dtype::BOOL, &[1, 2, 2], vec![0; 4])], "scores: has dtype BOOL"),
        (&[("scores", Dtype::F32, &[1, 2, 0], vec![])], "0 classes"),
        (&[votes(), ("labels", Dtype::I64, &[2], i64s(&[0, 1]))], "2 labels for 1 samples"),
        (&[votes(), ("labels", Dtype::I64, &[1], i64s(&[-1]))], "labels: value -1 at index 0"),
        (&[votes(), ("offsets", Dtype::I64, &[1], i64s(&[2]))], "offsets: Spread: got offset 2"),
        (&[votes(), ("scores", Dtype::F32, &[1, 3, 2], vec![0; 24])], "votes are for [1, 2, 2]"),
    ];
    for (tensors, part) in cases {
        write(folder, tensors);
        refuses(folder, "--k 2 --d 1 --method fa", &["v.safetensors", part]);
    }
    write(folder, &[votes(), ("labels", Dtype::I64, &[1], i64s(&[2]))]);
    refuses(folder, "--k 2 --d 1 --method fa --num-classes 2", &["sample 0 has label 2, expected one below 2"]);
    write(folder, &[votes(), ("offsets", Dtype::I64, &[2], i64s(&[0, 1]))]);
    refuses(folder, "--k 2 --d 1 --method fa", &["got 2 offsets, expected d = 1"]);
    std::fs::write(folder.join("v.safetensors"), b"not a table").unwrap();
    refuses(folder, "--k 2 --d 1 --method fa", &["not a safetensors file"]);
}
