//! `gridgrad train finite-aggregation`, `dpa`, `bagging` and `random-subsets`, `merge-shards` and `certify`: from images to certificates.

use std::path::Path;

#[cfg(unix)]
use serde_json::Value;

use crate::{assert_tells_peak_memory, bytes, content, refused, refused_in_one_line, succeeds, text};

/// A run of nearest neighbours on some of the digits that come with the program.
const SMALL: [&str; 6] = ["--learner", "nearest", "--train-fraction", "0.28", "--limit-test", "40"];

fn train(folder: &Path, method: &str, more: &[&str]) -> String {
    succeeds(folder, &[&["train", method], &SMALL[..], more].concat())
}

/// Files of a run, those of its classifiers included.
fn files(run: &Path) -> Vec<(String, Vec<u8>)> {
    let manifest = ("manifest.json".to_owned(), bytes(run, "manifest.json"));
    content(&run.join("votes")).into_iter().chain([manifest]).collect()
}

#[test]
fn finite_aggregation_with_d_of_1_is_deep_partition_aggregation_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let printed = train(folder.path(), "finite-aggregation", &["--k", "10", "--d", "1", "--out", "fa"]);
    assert!(printed.contains("Deep Partition Aggregation: k = 10, d = 1, 10 classifiers"), "{printed}");
    assert!(printed.contains(" training images of 8×8") && printed.contains("40 held out"), "{printed}");
    assert!(printed.contains("Trained 10 classifiers"), "{printed}");
    assert_tells_peak_memory(&printed);
    train(folder.path(), "dpa", &["--k", "10", "--out", "dpa"]);
    let [fa, dpa] = ["fa", "dpa"].map(|name| files(&folder.path().join(name)));
    assert_eq!(fa.len(), 11);
    assert!(fa == dpa);
}

#[test]
fn threads_groups_and_shards_change_no_byte() {
    let folder = tempfile::tempdir().unwrap();
    let options = ["--k", "5", "--d", "2"];
    train(folder.path(), "finite-aggregation", &[&options[..], &["--out", "whole", "--threads", "1"]].concat());
    for shard in ["1", "2", "3"] {
        let printed = train(
            folder.path(),
            "finite-aggregation",
            &[&options[..], &["--threads", "3", "--shard", &format!("{shard}/3"), "--out", shard]].concat(),
        );
        assert!(printed.contains(&format!("That was shard {shard}/3")), "{printed}");
    }
    let printed = succeeds(folder.path(), &["merge-shards", "2", "3", "1", "--out", "merged"]);
    assert!(printed.contains("Merged 3 shards with 10 classifiers"), "{printed}");
    let [whole, merged] = ["whole", "merged"].map(|name| files(&folder.path().join(name)));
    assert!(whole == merged);
    refused_in_one_line(
        folder.path(),
        &["merge-shards", "1", "3", "--out", "part"],
        &["classifiers are missing, from 3 to 5"],
    );
    refused_in_one_line(
        folder.path(),
        &["merge-shards", "1", "2", "2", "3", "--out", "part"],
        &["is both in 2 and in 2"],
    );
    refused_in_one_line(
        folder.path(),
        &["merge-shards", "1", "2", "3", "--out", "merged"],
        &["merged holds a run already"],
    );
}

#[test]
fn resuming_a_complete_run_trains_nothing_and_refuses_what_is_damaged() {
    let folder = tempfile::tempdir().unwrap();
    let options = ["--k", "20", "--d", "2"];
    let shard = ["--shard", "1/2", "--out", "killed"];
    train(folder.path(), "finite-aggregation", &[&options[..], &shard].concat());
    let half = bytes(&folder.path().join("killed"), "votes/000003.safetensors");
    let printed = succeeds(folder.path(), &["train", "finite-aggregation", "--resume", "killed"]);
    assert!(printed.contains("Trained 0 classifiers"), "{printed}");
    std::fs::write(folder.path().join("killed/votes/000003.safetensors"), &half[..half.len() / 2]).unwrap();
    let resume = ["train", "finite-aggregation", "--resume", "killed"];
    refused_in_one_line(folder.path(), &resume, &["killed/votes/000003.safetensors", "damaged"]);
    refused_in_one_line(
        folder.path(),
        &["train", "dpa", "--resume", "absent"],
        &["absent/manifest.json", "No such file"],
    );
    refused(folder.path(), &["train", "dpa", "--resume", "killed", "--k", "3"], &["cannot be used with"]);
    refused_in_one_line(
        folder.path(),
        &["train", "dpa", "--out", "killed"],
        &["holds a run already", "--resume killed"],
    );
}

#[cfg(unix)]
#[test]
fn a_process_that_is_killed_leaves_a_run_that_can_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let options = ["--k", "40", "--d", "8", "--limit-test", "20"];
    let arguments = |out: &'static str| {
        [&["train", "finite-aggregation", "--learner", "nearest"], &options[..], &["--out", out]].concat()
    };
    succeeds(folder.path(), &arguments("whole"));
    let run = folder.path().join("killed");
    let votes = |number: usize| format!("votes/{number:06}.safetensors");
    // A process that is done before the signal arrives is started again.
    let untrained = (0..20).find_map(|_| {
        let _ = std::fs::remove_dir_all(&run);
        kill_after_some(folder.path(), &arguments("killed"), &run.join("votes"));
        let absent = (0..320).filter(|number| !run.join(votes(*number)).exists()).collect::<Vec<_>>();
        (!absent.is_empty()).then_some(absent)
    });
    let untrained = untrained.expect("20 processes were done before they were killed");
    // What a process can leave of a file that was not finished: part of a temporary one, or another's content.
    let present = (0..320).find(|number| run.join(votes(*number)).exists()).unwrap();
    let other = bytes(&run, &votes(present));
    std::fs::write(run.join("votes/.tmpHalf"), &other[..other.len() / 2]).unwrap();
    std::fs::write(run.join(votes(untrained[0])), &other).unwrap();
    let printed = succeeds(folder.path(), &["train", "finite-aggregation", "--resume", "killed"]);
    // One whose file was written may not have been noted yet.
    let trained: usize =
        printed.split_once("Trained ").and_then(|(_, rest)| rest.split(' ').next()?.parse().ok()).unwrap();
    assert!((untrained.len()..320).contains(&trained), "{} files were absent; {printed}", untrained.len());
    let [whole, killed] = ["whole", "killed"].map(|name| files(&folder.path().join(name)));
    let lasting = |file: &&(String, Vec<u8>)| file.0.ends_with(".safetensors") || file.0 == "manifest.json";
    assert!(whole.iter().eq(killed.iter().filter(lasting)));
}

/// Starts the program, and kills it once there are some files in `votes`.
#[cfg(unix)]
fn kill_after_some(folder: &Path, arguments: &[&str], votes: &Path) {
    let mut child = crate::gridgrad();
    let mut child = child.current_dir(folder).args(arguments).stdout(std::process::Stdio::null()).spawn().unwrap();
    let start = std::time::Instant::now();
    while std::fs::read_dir(votes).map_or(0, Iterator::count) < 40 {
        assert!(start.elapsed() < std::time::Duration::from_secs(300));
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    // SIGKILL: nothing of the program runs any more.
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn what_makes_no_sense_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let cases: [(&[&str], &[&str]); 13] = [
        (&["finite-aggregation", "--k", "0"], &["k = 0 and d = 2", "at least 1"]),
        (&["finite-aggregation", "--k", "3", "--d", "0"], &["k = 3 and d = 0"]),
        (&["dpa", "--k", "1443"], &["1443", "1442 samples"]),
        (&["finite-aggregation", "--k", "99999999999", "--d", "9999999999"], &["k = 99999999999"]),
        (&["bagging", "--models", "0"], &["bagging of 0 classifiers"]),
        (&["random-subsets", "--k", "0"], &["k = 0 for 100 classifiers"]),
        // More than certify takes.
        (&["random-subsets", "--k", "16777217"], &["k = 16777217 for 100 classifiers", "1 to 16777216"]),
        (&["dpa", "--data", "absent"], &["\"absent\" is neither a folder nor one of"]),
        (&["dpa", "--data", "mnist"], &["GRIDGRAD_DATA"]),
        (&["dpa", "--train-fraction", "-1"], &["train fraction of -1"]),
        (&["bagging", "--models", "18446744073709551615"], &["bagging of 18446744073709551615 classifiers"]),
        (&["bagging", "--samples", "18446744073709551615"], &["with 18446744073709551615 samples"]),
        (&["dpa", "--epochs", "18446744073709551615"], &["18446744073709551615 epochs"]),
    ];
    for (arguments, parts) in cases {
        refused_in_one_line(folder.path(), &[&["train"], arguments].concat(), parts);
    }
    refused(folder.path(), &["train", "dpa", "--shard", "3/2"], &["3/2"]);
    refused(folder.path(), &["train", "dpa", "--hash", "md5"], &["md5"]);
    refused(folder.path(), &["train", "dpa", "--learner", "oracle"], &["oracle"]);
    let epochs = ["train", "dpa", "--learner", "nearest", "--epochs", "3"];
    refused_in_one_line(folder.path(), &epochs, &["--epochs is for --learner nin"]);
    assert!(content(folder.path()).is_empty());
}

#[test]
fn a_run_is_certified_with_the_other_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    train(folder.path(), "dpa", &["--k", "10", "--out", "dpa"]);
    train(folder.path(), "finite-aggregation", &["--k", "10", "--d", "3", "--out", "fa"]);
    let printed = succeeds(folder.path(), &["certify", "fa", "--beside", "dpa"]);
    for part in ["fa, k = 10, d = 3: 40 samples, 30 classifiers", "clean accuracy", "fa/certified-fa.svg"] {
        assert!(printed.contains(part), "{part}: {printed}");
    }
    let report: Value = serde_json::from_slice(&bytes(&folder.path().join("fa"), "certified-fa.json")).unwrap();
    assert_eq!(report["samples"].as_array().unwrap().len(), 40);
    assert_eq!(report["certified_fraction"][0], report["clean_accuracy"]);
    let csv = text(&bytes(&folder.path().join("fa"), "certified-fa.csv"));
    assert!(csv.starts_with("size,certified_fraction,stable_fraction\n0,"), "{csv}");
    let picture = text(&bytes(&folder.path().join("fa"), "certified-fa.svg"));
    assert!(picture.contains("fa, k = 10, d = 3") && picture.contains("dpa, k = 10, d = 1"), "{picture}");
    // Found without being named, but not with another k, data or hash, or where the run is not whole.
    let without = |printed: &str| {
        let picture = text(&bytes(&folder.path().join("fa"), "certified-fa.svg"));
        assert!(picture.contains("coarse bound, k = 10, d = 3") && !picture.contains("dpa"), "{picture}");
        let commands = ["gridgrad train dpa --k 10 --out DPA", "gridgrad certify fa --beside DPA"];
        assert!(commands.iter().all(|command| printed.contains(command)), "{printed}");
    };
    std::fs::rename(folder.path().join("dpa"), folder.path().join("fa/dpa")).unwrap();
    train(folder.path(), "dpa", &["--k", "9", "--out", "other-k"]);
    let fewer = ["train", "dpa", "--learner", "nearest", "--train-fraction", "0.3", "--limit-test", "39", "--k", "10"];
    succeeds(folder.path(), &[&fewer[..], &["--out", "other-data"]].concat());
    train(folder.path(), "dpa", &["--k", "10", "--hash", "pixel-sum", "--out", "other-hash"]);
    train(folder.path(), "dpa", &["--k", "10", "--shard", "1/2", "--out", "half"]);
    without(&succeeds(folder.path(), &["certify", "fa"]));
    std::fs::rename(folder.path().join("fa/dpa"), folder.path().join("dpa")).unwrap();
    let printed = succeeds(folder.path(), &["certify", "fa"]);
    let picture = text(&bytes(&folder.path().join("fa"), "certified-fa.svg"));
    assert!(picture.contains("dpa, k = 10, d = 1") && !printed.contains("--beside"), "{printed}: {picture}");
    for (run, method) in [("fa", "fa-roe"), ("dpa", "roe"), ("dpa", "fa"), ("fa", "coarse")] {
        succeeds(folder.path(), &["certify", run, "--method", method]);
    }
    refused_in_one_line(folder.path(), &["certify", "fa", "--method", "dpa"], &["dpa is the case d = 1"]);
    refused_in_one_line(folder.path(), &["certify", "fa", "--method", "bagging"], &["gridgrad train bagging"]);
    refused_in_one_line(folder.path(), &["certify", "fa", "--method", "infinite-bound"], &["independent random"]);
    refused(folder.path(), &["certify", "fa", "dpa"], &["fa and dpa are not shards of one run"]);
    refused(folder.path(), &["certify", "fa", "--k", "3"], &["cannot be used with"]);
    refused(folder.path(), &["certify"], &["RUN"]);
}

#[test]
fn bagging_is_certified_by_its_own_method_alone() {
    let folder = tempfile::tempdir().unwrap();
    let options = ["--models", "60", "--samples", "30", "--votes-only", "--out", "run"];
    let printed = train(folder.path(), "bagging", &options);
    assert!(printed.contains("Bagging: 60 classifiers of 30 draws each"), "{printed}");
    let printed = succeeds(folder.path(), &["certify", "run"]);
    assert!(
        printed.contains("bagging, 60 classifiers of 30 samples: 40 samples, 10")
            && printed.contains("with probability 0.999"),
        "{printed}"
    );
    for method in ["fa", "dpa", "infinite-estimate"] {
        refused_in_one_line(
            folder.path(),
            &["certify", "run", "--method", method],
            &["of bagging", "does not certify"],
        );
    }
    train(folder.path(), "dpa", &["--k", "4", "--votes-only", "--out", "votes"]);
    refused_in_one_line(folder.path(), &["certify", "votes", "--method", "roe"], &["needs scores"]);
}

#[test]
fn random_subsets_are_certified_as_the_infinite_limit() {
    let folder = tempfile::tempdir().unwrap();
    let printed =
        train(folder.path(), "random-subsets", &["--k", "25", "--models", "200", "--votes-only", "--out", "run"]);
    assert!(printed.contains("Random subsets: k = 25, 200 classifiers"), "{printed}");
    let printed = succeeds(folder.path(), &["certify", "run"]);
    assert!(printed.starts_with("infinite-bound, k = 25, 200 classifiers: 40 samples, 10 classes"), "{printed}");
    assert!(printed.contains("with probability 0.999"), "{printed}");
    let printed = succeeds(folder.path(), &["certify", "run", "--method", "infinite-estimate"]);
    assert!(printed.starts_with("infinite-estimate, k = 25, 200 classifiers: 40 samples"), "{printed}");
    for method in ["fa", "dpa", "fa-roe"] {
        refused_in_one_line(
            folder.path(),
            &["certify", "run", "--method", method],
            &["of random subsets", "does not certify"],
        );
    }
}

#[test]
fn the_digits_have_a_recipe_of_their_own_that_flags_change() {
    let folder = tempfile::tempdir().unwrap();
    let few = ["train", "dpa", "--k", "2", "--train-fraction", "0.01", "--limit-test", "3", "--epochs", "1"];
    for (flags, batch, padding, out) in [(&[][..], 8, 0, "own"), (&["--augment", "crop"], 8, 1, "crop")] {
        succeeds(folder.path(), &[&few[..], flags, &["--out", out]].concat());
        let manifest: Value = serde_json::from_slice(&bytes(&folder.path().join(out), "manifest.json")).unwrap();
        let training = &manifest["run"]["recipe"]["training"];
        assert_eq!(
            (&training["batch_size"], &training["crop_padding"]),
            (&batch.into(), &padding.into()),
            "{training}"
        );
        assert_eq!((&training["epochs"], &training["flip"]), (&1.into(), &false.into()), "{training}");
    }
}

/// DPA*: the scores of versions with different seeds are added. Nearest neighbours do not depend on the seed, so that
/// their sums answer as one of them.
#[test]
fn versions_of_a_run_are_certified_as_one() {
    let folder = tempfile::tempdir().unwrap();
    for seed in ["0", "7", "3"] {
        train(folder.path(), "dpa", &["--k", "10", "--seed", seed, "--out", seed]);
    }
    train(folder.path(), "bagging", &["--models", "5", "--samples", "30", "--out", "bag"]);
    for method in ["dpa", "fa-roe"] {
        succeeds(folder.path(), &["certify", "0", "--method", method, "--json", "one.json"]);
        let boosted = ["certify", "7", "0", "3", "--boosted", "--method", method];
        let printed = succeeds(folder.path(), &[&boosted[..], &["--json", "all.json", "--plot", "all.svg"]].concat());
        let title = format!("{method}, k = 10, d = 1, 3 versions: ");
        assert!(printed.starts_with(&format!("{title}40 samples, 10 classifiers")), "{printed}");
        assert!(text(&bytes(folder.path(), "all.svg")).contains(&title));
        let report = |name| serde_json::from_slice::<Value>(&bytes(folder.path(), name)).unwrap();
        let (one, all) = (report("one.json"), report("all.json"));
        assert_eq!((&one["samples"], &one["versions"]), (&all["samples"], &Value::Null));
        assert_eq!(all["versions"], 3);
    }
    refused_in_one_line(folder.path(), &["certify", "0", "--boosted"], &["got 1 runs", "two or more"]);
    refused_in_one_line(folder.path(), &["certify", "3", "0", "3", "--boosted"], &["3 and 3 both have the seed 3"]);
    refused_in_one_line(folder.path(), &["certify", "bag", "0", "--boosted"], &["its seed decides the subsets"]);
    let file = ["certify", "--votes", "v.safetensors", "--method", "dpa", "--boosted"];
    refused(folder.path(), &file, &["cannot be used with"]);
}

/// Tasks that start at the same time find the same folders free.
#[test]
fn shards_have_folders_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    for shard in ["1/2", "2/2"] {
        train(folder.path(), "dpa", &["--k", "4", "--shard", shard]);
    }
    let shards = ["runs/dpa-shard-1-of-2-builtin", "runs/dpa-shard-2-of-2-builtin"];
    let printed = succeeds(folder.path(), &[&["certify"], &shards[..]].concat());
    assert!(printed.starts_with("dpa, k = 4, d = 1: 40 samples, 4 classifiers"), "{printed}");
}

/// Pictures of different sizes become one size, and are hashed before.
#[test]
fn folders_of_pictures_of_different_sizes() {
    let folder = tempfile::tempdir().unwrap();
    for (split, count) in [("train", 6u8), ("val", 2)] {
        for (class, shade) in [("dark", 20), ("light", 220)] {
            let place = folder.path().join("set").join(split).join(class);
            std::fs::create_dir_all(&place).unwrap();
            for number in 0..count {
                let side = 5 + u32::from(number);
                let picture = image::RgbImage::from_pixel(side, 7, image::Rgb([shade + number, shade, shade]));
                picture.save(place.join(format!("{number}.png"))).unwrap();
            }
        }
    }
    let options = ["--data", "set", "--k", "2", "--d", "2", "--learner", "nearest", "--out", "run"];
    refused_in_one_line(folder.path(), &["train", "dpa", "--data", "set", "--learner", "nearest"], &["add --k"]);
    let printed = succeeds(folder.path(), &[&["train", "finite-aggregation"], &options[..]].concat());
    assert!(printed.contains("12 training images of 48×48") && printed.contains("4 held out, 2 classes"), "{printed}");
    let manifest: Value = serde_json::from_slice(&bytes(&folder.path().join("run"), "manifest.json")).unwrap();
    assert_eq!(manifest["run"]["data"]["shape"], serde_json::json!([48, 48, 3]));
    assert!(text(&bytes(&folder.path().join("run"), "manifest.json")).contains("\"classes\": [\"dark\", \"light\"]"));
}
