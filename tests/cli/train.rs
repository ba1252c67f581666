//! `gridgrad train crossformer`: what a run leaves, how it stops and goes on.

use std::path::Path;

use serde_json::Value;

use crate::{
    assert_tells_peak_memory, bytes, content, finished_run, folder, refused, refused_in_one_line, succeeds, text,
};

const WEIGHTS_AND_METRICS: [&str; 3] = ["best.safetensors", "last.safetensors", "metrics.jsonl"];

fn assert_same_run(a: &Path, b: &Path) {
    for name in WEIGHTS_AND_METRICS {
        assert!(bytes(a, name) == bytes(b, name), "{name} of {} and {} differ", a.display(), b.display());
    }
}

#[test]
fn a_run_leaves_checkpoints_metrics_and_pictures() {
    let (run, printed) = finished_run();
    let names: Vec<String> = content(run).into_iter().map(|(name, _)| name).collect();
    let expected = [
        "attention.svg",
        "best.safetensors",
        "config.toml",
        "curves.svg",
        "last.safetensors",
        "metrics.jsonl",
        "predictions.svg",
    ];
    assert_eq!(names, expected);
    let lines: Vec<Value> =
        text(&bytes(run, "metrics.jsonl")).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.iter().filter(|line| line["kind"] == "step").count(), 2 * 45);
    assert_eq!(lines.iter().filter(|line| line["kind"] == "epoch").count(), 2);
    // Standard error was no terminal, and there is a line for each epoch all the same.
    assert!(printed.contains("epoch   1/2 ") && printed.contains("epoch   2/2 "), "{printed}");
    assert!(printed.contains("Accuracy on held-out images: "), "{printed}");
    assert_tells_peak_memory(printed);
    for name in ["attention.svg", "curves.svg", "predictions.svg"] {
        assert!(text(&bytes(run, name)).starts_with("<svg"), "{name}");
    }
}

#[test]
fn a_folder_with_a_run_is_refused_and_stays_as_it_is() {
    let (run, _) = finished_run();
    let before = content(run);
    let out = run.to_str().unwrap();
    refused_in_one_line(run, &["train", "crossformer", "--epochs", "1", "--out", out], &["holds a run already", out]);
    assert!(content(run) == before);
    let other = folder();
    std::fs::copy(run.join("best.safetensors"), other.path().join("best.safetensors")).unwrap();
    refused_in_one_line(other.path(), &["train", "crossformer", "--out", "."], &["holds a run already"]);
}

/// A copy of the finished run, for tests that might change it.
fn copy_of_run() -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for (name, content) in content(&finished_run().0) {
        std::fs::write(copy.path().join(name), content).unwrap();
    }
    copy
}

#[test]
fn resuming_a_finished_run_changes_nothing() {
    let copy = copy_of_run();
    let printed = succeeds(copy.path(), &["train", "crossformer", "--resume", "."]);
    assert!(printed.contains("Accuracy on held-out images: "), "{printed}");
    assert!(content(copy.path()) == content(&finished_run().0));
}

#[test]
fn resuming_refuses_what_it_cannot_go_on_from() {
    let copy = copy_of_run();
    let resume = ["train", "crossformer", "--resume", "."];
    refused(copy.path(), &["train", "crossformer", "--resume", ".", "--lr", "1"], &["cannot be used with"]);
    let config = text(&bytes(copy.path(), "config.toml"));
    std::fs::write(copy.path().join("config.toml"), config.replace("epochs = 2\n", "epochs = 3\n")).unwrap();
    refused(copy.path(), &resume, &["of another run", "train.epochs: 2, now 3"]);
    std::fs::write(copy.path().join("config.toml"), &config).unwrap();
    let last = bytes(copy.path(), "last.safetensors");
    std::fs::write(copy.path().join("last.safetensors"), &last[..last.len() - 9]).unwrap();
    refused_in_one_line(copy.path(), &resume, &["last.safetensors"]);
    std::fs::remove_file(copy.path().join("last.safetensors")).unwrap();
    refused_in_one_line(copy.path(), &resume, &["has no last.safetensors to go on from"]);
    refused_in_one_line(copy.path(), &["train", "crossformer", "--resume", "absent"], &["absent has no"]);
}

#[test]
fn the_saved_configuration_gives_the_same_run_again() {
    let (run, _) = finished_run();
    let folder = tempfile::tempdir().unwrap();
    let config = run.join("config.toml");
    succeeds(folder.path(), &["train", "crossformer", "--config", config.to_str().unwrap(), "--out", "again"]);
    let again = folder.path().join("again");
    assert_same_run(run, &again);
    assert_eq!(text(&bytes(run, "config.toml")), text(&bytes(&again, "config.toml")));
}

#[test]
fn one_epoch_and_a_tiny_rate_train_with_the_default_schedule() {
    let folder = folder();
    let flags = ["--epochs", "1", "--lr", "1e-9", "--batch-size", "128", "--seed", "9223372036854775807"];
    let all = [&["train", "crossformer", "--config", "small.toml", "--out", "run"], &flags[..]].concat();
    assert!(succeeds(folder.path(), &all).contains("epoch   1/1 "));
    succeeds(folder.path(), &["train", "crossformer", "--resume", "run"]);
}

#[test]
fn a_loss_that_is_no_number_stops_the_run_and_names_the_step() {
    let folder = folder();
    let arguments = ["train", "crossformer", "--config", "small.toml", "--out", "run", "--lr", "1e30"];
    refused_in_one_line(folder.path(), &arguments, &["training: ", " in step ", "epoch 1"]);
    assert!(!folder.path().join("run/last.safetensors").exists());
    let go_on = ["train", "crossformer", "--resume", "run"];
    refused_in_one_line(folder.path(), &go_on, &["run has no last.safetensors"]);
}

#[cfg(unix)]
mod on_unix {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    use super::*;
    use crate::{check_refusal, gridgrad};

    /// Waits for the file at `path` to have `lines` lines.
    fn wait_for_lines(path: &Path, lines: usize) {
        let start = Instant::now();
        while std::fs::read(path).unwrap_or_default().iter().filter(|&&byte| byte == b'\n').count() < lines {
            assert!(start.elapsed() < Duration::from_secs(60), "{} never had {lines} lines", path.display());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_run_that_is_interrupted_and_goes_on_ends_as_one_that_is_not() {
        let folder = folder();
        let run = folder.path().join("run");
        // In the first epoch, and in the second.
        let starts: [&[&str]; 2] = [&["--config", "small.toml", "--out", "run"], &["--resume", "run"]];
        for (flags, lines) in starts.into_iter().zip([3, 60]) {
            let mut command = gridgrad();
            command.current_dir(folder.path()).args(["train", "crossformer"]).args(flags);
            let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
            wait_for_lines(&run.join("metrics.jsonl"), lines);
            assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
            let output = child.wait_with_output().unwrap();
            let printed = text(&output.stdout);
            assert!(output.status.success(), "{}", text(&output.stderr));
            assert!(printed.contains("gridgrad train crossformer --resume run"), "{printed}");
            assert_tells_peak_memory(&printed);
            assert!(text(&output.stderr).contains("Stopping after this step"));
            // What is there of it can be used.
            assert!(succeeds(folder.path(), &["eval", "run"]).contains("355 images"));
        }
        succeeds(folder.path(), &["train", "crossformer", "--resume", "run"]);
        assert_same_run(&finished_run().0, &run);
        for name in ["curves.svg", "predictions.svg", "attention.svg"] {
            assert!(bytes(&finished_run().0, name) == bytes(&run, name), "{name}");
        }
    }

    #[test]
    fn a_reader_that_leaves_early_does_not_stop_the_training() {
        let folder = folder();
        let mut command = gridgrad();
        command.args(["train", "crossformer", "--config", "small.toml", "--out", "run", "--epochs", "1"]);
        let mut child = command.current_dir(folder.path()).stdout(Stdio::piped()).spawn().unwrap();
        let mut first = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut first).unwrap();
        assert!(first.starts_with("CrossFormer: "), "{first}");
        assert!(child.wait().unwrap().success());
        assert!(folder.path().join("run/best.safetensors").exists());
    }

    /// The program where no file may be larger than `blocks` of 512 or 1,024 bytes: as on a full disk, writing fails.
    fn on_full_disk(folder: &Path, blocks: usize, arguments: &[&str]) -> std::process::Output {
        let script = format!("ulimit -f {blocks} && trap '' XFSZ && exec \"$0\" \"$@\"");
        let mut command = Command::new("sh");
        command.current_dir(folder).env_remove("GRIDGRAD_DATA").args(["-c", &script, env!("CARGO_BIN_EXE_gridgrad")]);
        command.args(arguments).output().unwrap()
    }

    #[test]
    fn a_full_disk_is_an_error_that_names_the_file_and_leaves_older_ones() {
        let folder = folder();
        let arguments = ["train", "crossformer", "--config", "small.toml", "--out", "run"];
        let output = on_full_disk(folder.path(), 0, &arguments);
        check_refusal(&output, "no space at all", &["config.toml", "os error"]);
        assert_eq!(content(&folder.path().join("run")), []);
        let output = on_full_disk(folder.path(), 16, &arguments);
        check_refusal(&output, "space for metrics alone", &["run/", "os error"]);
        assert!(!folder.path().join("run/last.safetensors").exists());

        let copy = copy_of_run();
        std::fs::write(copy.path().join("out.safetensors"), b"older").unwrap();
        let fixture =
            |name: &str| format!("{}/tests/fixtures/crossformer/classifier.{name}", env!("CARGO_MANIFEST_DIR"));
        let [config, weights, input] = ["json", "weights.safetensors", "io.safetensors"].map(fixture);
        let files = ["--config", &config, "--weights", &weights, "--input", &input, "--output", "out.safetensors"];
        let before = content(copy.path());
        let output = on_full_disk(copy.path(), 1, &[&["run", "--grads"], &files[..]].concat());
        check_refusal(&output, "an output file", &["out.safetensors", "os error"]);
        assert!(content(copy.path()) == before);
    }
}
