//! `gridgrad eval` and `gridgrad predict` on a trained network.

use std::path::Path;

use image::{GrayImage, Luma, Rgb, RgbImage};
use serde_json::Value;

use crate::{finished_run, refused, refused_in_one_line, succeeds};

fn checkpoint() -> String {
    finished_run().0.join("best.safetensors").to_str().unwrap().to_owned()
}

/// A folder with a grey PNG and a coloured JPEG of a bar.
fn pictures() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let ink = |x: u32| if (12..18).contains(&x) { 250 } else { 5 };
    GrayImage::from_fn(28, 28, |x, _| Luma([ink(x)])).save(folder.path().join("bar.png")).unwrap();
    RgbImage::from_fn(40, 28, |x, _| Rgb([ink(x); 3])).save(folder.path().join("bar.jpeg")).unwrap();
    folder
}

#[test]
fn eval_measures_what_training_did() {
    let folder = finished_run().0.to_str().unwrap();
    let shown: Value = serde_json::from_str(&succeeds(Path::new("."), &["eval", folder, "--json"])).unwrap();
    let metrics = std::fs::read_to_string(finished_run().0.join("metrics.jsonl")).unwrap();
    let epochs = metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let best = epochs.filter_map(|line| line["held_out"]["top1"].as_f64()).fold(0.0, f64::max);
    assert_eq!((shown["samples"].as_u64(), shown["top1"].as_f64()), (Some(355), Some(best)));
    let shown = succeeds(Path::new("."), &["eval", &checkpoint(), "--batch-size", "100", "--on-training-set"]);
    assert!(shown.contains("builtin: 1442 images"), "{shown}");
}

#[test]
fn predict_ranks_classes_of_every_image() {
    let folder = pictures();
    let files = ["bar.png", "bar.jpeg"];
    for checkpoint in [finished_run().0.to_str().unwrap(), &checkpoint()] {
        let table = succeeds(folder.path(), &[&["predict", checkpoint], &files[..]].concat());
        assert_eq!(table.lines().count(), 1 + 2 * 3, "{table}");
        let json = succeeds(folder.path(), &[&["predict", checkpoint, "--json", "--top", "99"], &files[..]].concat());
        let list: Value = serde_json::from_str(&json).unwrap();
        for (entry, file) in list.as_array().unwrap().iter().zip(files) {
            assert_eq!(entry["image"], file);
            let probabilities: Vec<f64> = entry["classes"]
                .as_array()
                .unwrap()
                .iter()
                .map(|class| class["probability"].as_f64().unwrap())
                .collect();
            assert_eq!(probabilities.len(), 10);
            assert!(probabilities.is_sorted_by(|a, b| a >= b), "{json}");
            assert!((probabilities.iter().sum::<f64>() - 1.0).abs() < 1e-5, "{json}");
        }
    }
}

#[test]
fn images_that_cannot_be_read_are_refused_by_name() {
    let folder = pictures();
    let write = |name: &str, content: &[u8]| std::fs::write(folder.path().join(name), content).unwrap();
    let sound = |name: &str| std::fs::read(folder.path().join(name)).unwrap();
    let (png, jpeg) = (sound("bar.png"), sound("bar.jpeg"));
    write("text.png", b"This is a letter, not a picture.");
    write("empty.jpg", b"");
    write("half.jpeg", &jpeg[..jpeg.len() / 2]);
    write("half.png", &png[..png.len() / 2]);
    for (name, reason) in [
        ("absent.png", "No such file"),
        ("text.png", "neither a JPEG, a PNG nor a PNM image"),
        ("empty.jpg", "neither a JPEG, a PNG nor a PNM image"),
        ("half.jpeg", "truncated"),
        ("half.png", "cannot be decoded"),
        (".", "not a file"),
    ] {
        refused_in_one_line(folder.path(), &["predict", &checkpoint(), "bar.png", name], &[name, reason]);
    }
}

#[test]
fn files_that_are_no_checkpoint_are_refused_by_name() {
    let folder = pictures();
    let sound = std::fs::read(checkpoint()).unwrap();
    let mut flipped = sound.clone();
    flipped[sound.len() - 5] ^= 1;
    let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/crossformer/classifier.weights.safetensors");
    for (content, reason) in [
        (&sound[..sound.len() - 1], "not a safetensors file"),
        (&sound[..20], "not a safetensors file"),
        (b"", "not a safetensors file"),
        (&flipped, "damaged checkpoint"),
        (&std::fs::read(fixture).unwrap(), "not a checkpoint"),
    ] {
        std::fs::write(folder.path().join("net.safetensors"), content).unwrap();
        for arguments in [&["eval", "net.safetensors"][..], &["predict", "net.safetensors", "bar.png"]] {
            refused_in_one_line(folder.path(), arguments, &["net.safetensors", reason]);
        }
    }
    refused_in_one_line(folder.path(), &["eval", "absent"], &["absent", "No such file"]);
    refused_in_one_line(folder.path(), &["eval", "."], &["no best.safetensors"]);
}

#[test]
fn eval_refuses_data_and_batches_that_do_not_fit() {
    let folder = pictures();
    for split in ["train", "val"] {
        std::fs::create_dir_all(folder.path().join("set").join(split).join("bar")).unwrap();
        std::fs::copy(folder.path().join("bar.png"), folder.path().join("set").join(split).join("bar/0.png")).unwrap();
    }
    refused_in_one_line(folder.path(), &["eval", &checkpoint(), "--data", "set"], &["set has 1 classes", "10 classes"]);
    refused_in_one_line(folder.path(), &["eval", &checkpoint(), "--batch-size", "0"], &["batch_size is 0"]);
    refused_in_one_line(folder.path(), &["eval", &checkpoint(), "--data", "mnist"], &["GRIDGRAD_DATA"]);
    refused(folder.path(), &["predict", &checkpoint()], &["<IMAGES>"]);
}
