//! What cannot be trained: refused before a folder is touched.

use std::path::Path;

use crate::{folder, refused, refused_in_one_line};

const TRAIN: [&str; 4] = ["train", "crossformer", "--out", "run"];

fn assert_no_run(folder: &Path) {
    assert!(!folder.join("run").exists(), "a refused run left its folder");
}

#[test]
fn flags_out_of_their_range() {
    let folder = folder();
    for (flags, part) in [
        (["--lr", "NaN"], "lr is NaN"),
        (["--lr", "-1"], "lr is -1"),
        (["--lr", "inf"], "lr is inf"),
        (["--batch-size", "0"], "batch_size is 0"),
        (["--batch-size", "1443"], "does not fill a single batch"),
        (["--image-size", "0"], "img_size [0, 0]"),
        (["--image-size", "1000000000"], "[1000000000, 1000000000]"),
        (["--workers", "9999"], "workers"),
        (["--model", "resnet"], "++huge"),
        (["--augment", "all"], "imagenet, digits, small or none"),
        (["--data", "coco"], "builtin, mnist"),
        (["--data", "mnist"], "GRIDGRAD_DATA"),
        (["--config", "absent.toml"], "absent.toml"),
        (["--threads", "0"], "--threads 0"),
    ] {
        refused_in_one_line(folder.path(), &[&TRAIN[..], &flags].concat(), &[part]);
        assert_no_run(folder.path());
    }
    let unreadable = [["--epochs", "0"], ["--epochs", "many"], ["--seed", "9223372036854775808"], ["--data", ""]];
    for flags in unreadable.into_iter().chain([["--precision", "f8"], ["--device", "gpu"]]) {
        refused(folder.path(), &[&TRAIN[..], &flags].concat(), &[flags[1]]);
        assert_no_run(folder.path());
    }
}

#[test]
fn configuration_files() {
    let folder = folder();
    for (toml, part) in [
        ("epoch = 3", "unknown field `epoch`"),
        ("batch_size = 'many'", "line 1, column 14"),
        ("batch_size = -1", "line 1"),
        ("data = ", "line 1"),
        ("[train\nepochs = 1", "line 1"),
        ("[train]\nepoch = 1", "[train] unknown field `epoch`"),
        ("[train]\nepochs = 'two'", "[train] invalid type"),
        ("[train]\nepochs = 0", "epochs is 0"),
        ("[train]\nepochs = -3", "[train] "),
        ("[train]\naccumulation = 0", "at least 1"),
        ("[train]\nclip_norm = -1.0", "clip_norm is -1"),
        ("[train]\nclip_norm = nan", "clip_norm is NaN"),
        (
            "[train]\nschedule = { lr = 1.0, warmup = { length = { epochs = 99 }, start_lr = 0 } }",
            "shorten the warm-up",
        ),
        ("[train]\noptimizer = { kind = 'adam' }", "[train] unknown variant"),
        ("[model]\nwidth = 3", "[model] unknown field `width`"),
        ("[model]\nkind = 'backbone'", "only a classifier"),
        ("[model]\nimg_size = [64, 64]", "img_size is [64, 64]"),
        ("[model]\nembed_dim = 48\nnum_heads = [5, 6, 12, 24]", "5 heads do not divide 48 channels"),
        ("[model]\ngroup_size = [0, 7, 7, 7]", "group_size 0"),
        ("[model]\ninterval = [0, 7, 7, 7]", "interval 0"),
        ("[model]\ndepths = [1, 1]\nmerge_kernels = [[0]]", "merge_kernels"),
        ("[augment]\nimage_size = 3", "3×3"),
        ("[augment]\nlabel_smoothing = 7.0", "label_smoothing"),
        ("[augment]\nflip = 1", "unknown field `flip`"),
    ] {
        std::fs::write(folder.path().join("bad.toml"), toml).unwrap();
        let message = refused(folder.path(), &[&TRAIN[..], &["--config", "bad.toml"]].concat(), &[part]);
        assert_eq!(message.lines().count(), 1, "{message}");
        assert_no_run(folder.path());
    }
    std::fs::write(folder.path().join("bad.toml"), [0xFF, 0xFE, 0x00]).unwrap();
    refused_in_one_line(folder.path(), &[&TRAIN[..], &["--config", "bad.toml"]].concat(), &["bad.toml", "UTF-8"]);
}

#[test]
fn folders_without_images_and_places_that_cannot_be_written() {
    let folder = folder();
    let path = folder.path();
    std::fs::create_dir_all(path.join("empty")).unwrap();
    refused_in_one_line(path, &[&TRAIN[..], &["--data", "empty"]].concat(), &["empty: the folder is empty"]);
    std::fs::create_dir_all(path.join("set/train/cat")).unwrap();
    std::fs::create_dir_all(path.join("set/val/cat")).unwrap();
    refused_in_one_line(path, &[&TRAIN[..], &["--data", "set"]].concat(), &["set"]);
    std::fs::write(path.join("set/train/cat/0.png"), b"no picture").unwrap();
    std::fs::write(path.join("set/val/cat/0.png"), b"no picture").unwrap();
    refused_in_one_line(path, &[&TRAIN[..], &["--data", "set", "--batch-size", "1"]].concat(), &["set"]);
    for out in ["small.toml", "small.toml/run"] {
        refused_in_one_line(path, &["train", "crossformer", "--config", "small.toml", "--out", out], &[out]);
    }
}
