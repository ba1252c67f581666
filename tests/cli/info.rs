//! Help, `info`, and output that nobody reads to its end.

use std::io::Read;
use std::path::Path;
use std::process::Stdio;

use gridgrad::models::crossformer::NAMES;
use serde_json::Value;

use crate::{gridgrad, refused_in_one_line, succeeds, text};

#[test]
fn info_prints_the_published_numbers() {
    let shown = succeeds(Path::new("."), &["info", "crossformer-s"]);
    assert!(shown.contains("30,657,394") && shown.contains("4.910"), "{shown}");
}

#[test]
fn info_knows_every_name_and_says_so() {
    for name in NAMES {
        // The size is looked at once the name is understood, before memory is taken.
        refused_in_one_line(Path::new("."), &["info", name, "--image", "0"], &["img_size [0, 0]"]);
    }
    for name in ["micro", "tiny", "++small"] {
        let shown = succeeds(Path::new("."), &["info", name, "--classes", "10", "--json"]);
        let cost: Value = serde_json::from_str(&shown).unwrap();
        assert!(cost["total"]["parameters"].as_u64().unwrap() > 100_000, "{name}: {shown}");
        assert_eq!(cost["config"]["num_classes"], 10);
    }
    refused_in_one_line(Path::new("."), &["info", "resnet"], &["'resnet'", &NAMES.join(", ")]);
    refused_in_one_line(Path::new("."), &["info", "absent.json"], &["absent.json", "No such file"]);
}

#[test]
fn info_refuses_images_that_cannot_be() {
    for side in ["0", "1", "4294967296", "18446744073709551615"] {
        refused_in_one_line(Path::new("."), &["info", "small", "--image", side], &[side]);
    }
    refused_in_one_line(Path::new("."), &["info", "small", "--classes", "0"], &["num_classes 0"]);
}

#[test]
fn every_level_has_help() {
    let commands = ["train", "eval", "predict", "info", "run", "certify", "bench", "doctor"];
    let top = succeeds(Path::new("."), &["--help"]);
    for command in commands {
        assert!(top.contains(&format!("\n  {command} ")), "{command} is not in {top}");
        let help = succeeds(Path::new("."), &[command, "--help"]);
        assert!(help.contains("Usage: gridgrad"), "{help}");
    }
    let train = succeeds(Path::new("."), &["train", "crossformer", "--help"]);
    assert!(train.contains("--resume <FOLDER>") && train.contains("Ctrl-C"), "{train}");
}

#[test]
fn readers_that_leave_early_are_no_error() {
    for arguments in [["info", "micro"], ["doctor", "--json"]] {
        let mut child = gridgrad().args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let mut message = Vec::new();
        child.stderr.take().unwrap().read_to_end(&mut message).unwrap();
        assert!(child.wait().unwrap().success(), "{}", text(&message));
        assert_eq!(text(&message), "");
    }
    // An error that nobody reads is still an exit code, not a panic.
    let mut child = gridgrad().args(["info", "resnet"]).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stderr.take());
    assert_eq!(child.wait().unwrap().code(), Some(1));
}
