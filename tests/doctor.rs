//! `gridgrad doctor` runs on any machine and says what it found.

use std::path::Path;
use std::process::Command;

/// What `gridgrad doctor` prints, with `data` as GRIDGRAD_DATA.
fn doctor(arguments: &[&str], data: Option<&Path>) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gridgrad"));
    command.arg("doctor").args(arguments).env_remove("GRIDGRAD_DATA").env("RAYON_NUM_THREADS", "3");
    data.map(|folder| command.env("GRIDGRAD_DATA", folder));
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn every_line_is_marked_and_fits_a_terminal() {
    let text = doctor(&[], None);
    for name in
        ["system", "processor", "threads", "SIMD found", "SIMD used", "memory", "GPU", "GPU kernels", "data sets"]
    {
        let line = |mark| text.lines().any(|line| line.starts_with(&format!("  {mark} {name} ")));
        assert!(line('✓') || line('–'), "{name} is missing:\n{text}");
    }
    assert!(text.contains("threads       3 in use"), "{text}");
    assert!(text.contains("GRIDGRAD_DATA is not set"), "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
}

#[test]
fn data_sets_are_found_by_the_names_of_their_folders() {
    let folder = tempfile::tempdir().unwrap();
    for set in ["mnist", "imagenette224", "holidays"] {
        std::fs::create_dir(folder.path().join(set)).unwrap();
    }
    std::fs::write(folder.path().join("gtsrb"), "a file, not a folder").unwrap();
    let words = doctor(&[], Some(folder.path())).split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(words.contains("✓ data sets mnist, imagenette in GRIDGRAD_DATA"), "{words}");
    assert!(words.contains("not there: cifar10, gtsrb"), "{words}");
    let missing = doctor(&[], Some(&folder.path().join("missing")));
    assert!(missing.contains("– data sets"), "{missing}");
}

#[test]
fn json_holds_the_same_facts() {
    let report: serde_json::Value = serde_json::from_str(&doctor(&["--json"], None)).unwrap();
    assert_eq!(report["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(report["threads_in_use"], 3);
    assert!(report["data"]["folder"].is_null());
    // Either GPUs or a reason why not, never both or neither.
    let gpus = report["gpus"].as_array().unwrap();
    assert_eq!(gpus.is_empty(), report["no_gpu_reason"].is_string());
}
