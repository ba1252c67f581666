//! `gridgrad bench`: what it measures, and what it refuses.

use std::path::Path;

use serde_json::Value;

use super::{refused_in_one_line, succeeds};

fn here() -> &'static Path {
    Path::new(".")
}

#[test]
fn networks_of_every_kind_are_timed() {
    for (model, image) in
        [("micro", "32"), ("crossformer-tiny", "32"), ("resnet18", "8"), ("nin", "8"), ("block", "14")]
    {
        for what in ["step", "inference"] {
            let args = ["--model", model, "--image", image, "--batch", "2", "--steps", "2", "--warmup", "0", "--json"];
            let shown = succeeds(here(), &[&["bench", what][..], &args].concat());
            let report: Value = serde_json::from_str(&shown).unwrap();
            assert_eq!(report["steps_ms"].as_array().unwrap().len(), 2, "{shown}");
            assert!(report["wall_ms"].as_f64().unwrap() > 0.0 && report["gflops"].as_f64().unwrap() > 0.0, "{shown}");
            let keys: &[&str] = if what == "step" { &["cpu_ms", "peak_bytes"] } else { &["images_per_second"] };
            assert!(keys.iter().all(|key| report.get(key).is_some()), "{shown}");
        }
    }
    refused_in_one_line(
        here(),
        &["bench", "step", "--model", "resnet17"],
        &["resnet17", "resnet18", "network-in-network"],
    );
}

#[test]
fn ops_are_listed_and_timed_by_number() {
    let listed = succeeds(here(), &["bench", "ops", "--list"]);
    let ops: Vec<Value> = listed.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(ops.iter().enumerate().all(|(number, op)| op["number"] == number), "{listed}");
    assert!(ops.iter().all(|op| op["flops"].as_u64().unwrap() > 0 && op["bytes"].as_u64().unwrap() > 0), "{listed}");
    let small = ops.iter().position(|op| op["op"] == "position_bias").unwrap().to_string();
    let shown = succeeds(here(), &["bench", "ops", "--number", &small, "--milliseconds", "1", "--json"]);
    let report: Value = serde_json::from_str(&shown).unwrap();
    assert!(report["forward_ms"].as_f64().unwrap() > 0.0 && report["both_ms"].as_f64().unwrap() > 0.0, "{shown}");
    refused_in_one_line(here(), &["bench", "ops", "--number", "100000"], &["--number 100000"]);
    refused_in_one_line(here(), &["bench", "ops", "--only", "nonsense"], &["--list"]);
}
