//! The command line, driven as a person or a script would.

mod bench;
mod certify;
#[cfg(all(feature = "cuda", target_os = "linux"))]
mod devices;
mod finite_aggregation;
mod info;
mod refusals;
mod run;
#[cfg(all(feature = "cuda", target_os = "linux"))]
#[path = "../stand_in_drivers/mod.rs"]
mod stand_in_drivers;
mod train;
mod trained;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

/// A run that takes a second or two: 2 epochs of 45 steps on the digits that come with the program.
const SMALL: &str = "
batch_size = 32
train = { epochs = 2 }

[model]
img_size = [16, 16]
embed_dim = 16
depths = [1, 2]
num_heads = [1, 2]
group_size = [2, 2]
interval = [2, 1]
mlp_ratio = [1.0, 1.0]
patch_kernels = [4, 8]

[augment]
image_size = 16
";

/// The program, without what the environment could tell it.
fn gridgrad() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gridgrad"));
    command.env_remove("GRIDGRAD_DATA").env("RUST_BACKTRACE", "0");
    command
}

/// Calls the program in `folder`.
fn call(folder: &Path, arguments: &[&str]) -> Output {
    gridgrad().current_dir(folder).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Standard output of a call that succeeds.
fn succeeds(folder: &Path, arguments: &[&str]) -> String {
    let output = call(folder, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// Checks that a training command has told the most memory of its process and of its tensors, the lesser of the two.
fn assert_tells_peak_memory(printed: &str) {
    let (_, told) = printed.split_once("Peak memory: ").unwrap_or_else(|| panic!("no peak memory in {printed}"));
    let parts: Vec<&str> = told.lines().next().unwrap_or_default().split(", ").collect();
    let megabytes = |part: &str, what: &str| -> f64 {
        let amount = part.strip_suffix(what).and_then(|amount| amount.strip_suffix(" MB"));
        amount.and_then(|amount| amount.parse().ok()).unwrap_or_else(|| panic!("{part:?} in {printed}"))
    };
    let tensors = megabytes(parts[parts.len() - 1], " of tensors");
    // Of the process, Linux alone tells it.
    assert_eq!(parts.len(), if cfg!(target_os = "linux") { 2 } else { 1 }, "{printed}");
    if let [process, _] = parts[..] {
        let process = megabytes(process, " of the process");
        assert!(process > 0.0 && process >= tensors, "{printed}");
    }
}

/// Checks that a call fails with an error that has all of `parts`, on one line unless it lists several problems.
fn refused(folder: &Path, arguments: &[&str], parts: &[&str]) -> String {
    let output = call(folder, arguments);
    check_refusal(&output, &format!("{arguments:?}"), parts)
}

fn check_refusal(output: &Output, what: &str, parts: &[&str]) -> String {
    let message = text(&output.stderr);
    assert!(matches!(output.status.code(), Some(1 | 2)), "{what}: {} {message}", output.status);
    assert!(message.starts_with("error: ") && !message.contains("panicked"), "{what}: {message}");
    for part in parts {
        assert!(message.contains(part), "{what}: {part:?} is not in {message}");
    }
    message
}

fn refused_in_one_line(folder: &Path, arguments: &[&str], parts: &[&str]) {
    let message = refused(folder, arguments, parts);
    assert_eq!(message.lines().count(), 1, "{message}");
}

/// A folder with the small run's configuration in `small.toml`.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("small.toml"), SMALL).unwrap();
    folder
}

/// The folder of a finished small run, trained once for all tests, and what the program printed.
fn finished_run() -> &'static (PathBuf, String) {
    static RUN: OnceLock<(PathBuf, String)> = OnceLock::new();
    RUN.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cli-finished-run");
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("small.toml"), SMALL).unwrap();
        let printed = succeeds(&folder, &["train", "crossformer", "--config", "small.toml", "--out", "run"]);
        (folder.join("run"), printed)
    })
}

fn bytes(folder: &Path, name: &str) -> Vec<u8> {
    std::fs::read(folder.join(name)).unwrap_or_else(|error| panic!("{}/{name}: {error}", folder.display()))
}

/// Every file of a folder with its content, sorted by name.
fn content(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let names = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut files: Vec<_> = names.map(|name| (name.clone(), bytes(folder, &name))).collect();
    files.sort();
    files
}
