//! `gridgrad run` against values of the authors' code.

use std::path::{Path, PathBuf};

use gridgrad::nn::state_dict::{self, Metadata, StateDict};
use gridgrad::{DType, Tensor};

use crate::{refused, refused_in_one_line, succeeds};

fn fixture(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/crossformer").join(name);
    path.to_str().unwrap().to_owned()
}

fn largest(tensor: &Tensor) -> f64 {
    tensor.to_f64_vec().unwrap().iter().fold(0.0, |largest, value| largest.max(value.abs()))
}

/// The arguments of a run of a fixture in `folder`, writing `out.safetensors`.
fn arguments(name: &str) -> Vec<String> {
    let files = [
        ("--config", fixture(&format!("{name}.json"))),
        ("--weights", fixture(&format!("{name}.weights.safetensors"))),
        ("--input", fixture(&format!("{name}.io.safetensors"))),
        ("--output", "out.safetensors".to_owned()),
    ];
    std::iter::once("run".to_owned())
        .chain(files.into_iter().flat_map(|(flag, file)| [flag.to_owned(), file]))
        .collect()
}

fn with<'a>(arguments: &'a [String], more: &[&'a str]) -> Vec<&'a str> {
    arguments.iter().map(String::as_str).chain(more.iter().copied()).collect()
}

/// Replaces the value of `flag`.
fn replace(arguments: &mut [String], flag: &str, value: &Path) {
    let at = arguments.iter().position(|argument| argument == flag).unwrap();
    arguments[at + 1] = value.to_str().unwrap().to_owned();
}

fn check(name: &str, dtype: DType, device: &str) {
    let folder = tempfile::tempdir().unwrap();
    let (arguments, type_name) = (arguments(name), dtype.to_string());
    let run = |more: &[&str]| -> StateDict {
        let flags = ["--dtype", &type_name, "--device", device];
        succeeds(folder.path(), &with(&arguments, &[&flags, more].concat()));
        state_dict::read(folder.path().join("out.safetensors")).unwrap().0
    };
    let (outputs, all) = (run(&[]), run(&["--grads"]));
    let (stored, _) = state_dict::read(fixture(&format!("{name}.io.safetensors"))).unwrap();
    let expected: StateDict = stored
        .into_iter()
        .filter(|(name, _)| name != "input" && name != "target" && !name.starts_with("cotangent."))
        .collect();
    assert_eq!(all.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    let is_gradient = |name: &str| name.starts_with("grad");
    let scale = expected.iter().filter(|(name, _)| is_gradient(name)).map(|(_, g)| largest(g)).fold(0.0, f64::max);
    for (name, want) in &expected {
        let tolerance = match (is_gradient(name), dtype) {
            (_, DType::F64) => 1e-6 * largest(want) + 1e-6 * if is_gradient(name) { scale } else { 0.0 },
            (true, _) => 1e-3 * largest(want) + 2e-5 * scale,
            (false, _) => 1e-4 * largest(want),
        };
        let got = &all[name];
        assert_eq!(got.dtype(), dtype, "{name}");
        // The loss is a scalar here and has one dimension in the file.
        assert!(got.shape() == want.shape() || name == "loss", "{name}: {} and {}", got.shape(), want.shape());
        let differences =
            got.to_f64_vec().unwrap().into_iter().zip(want.to_f64_vec().unwrap()).map(|(a, b)| (a - b).abs());
        let worst = differences.fold(0.0, f64::max);
        assert!(worst <= tolerance, "{name} in {dtype}: differs by {worst:e}, allowed {tolerance:e}");
        if let Some(output) = outputs.get(name) {
            assert_eq!(output.raw_bytes().unwrap(), got.raw_bytes().unwrap(), "{name} with and without --grads");
        }
    }
    let names = outputs.keys().all(|name| name == "logits" || name.starts_with("feature."));
    assert!(names && !outputs.is_empty(), "{:?}", outputs.keys());
}

#[test]
fn outputs_and_gradients_are_those_of_the_authors_code() {
    for name in ["classifier", "backbone"] {
        for dtype in [DType::F32, DType::F64] {
            check(name, dtype, "cpu");
        }
    }
}

#[test]
fn on_a_device_too() {
    let device = std::env::var("GRIDGRAD_TEST_DEVICE").ok();
    if let Some(device) = device.or(cfg!(feature = "emulator").then(|| "emulated".to_owned())) {
        check("classifier", DType::F32, &device);
        check("backbone", DType::F32, &device);
    }
}

/// A copy of a fixture's tensors in `folder`, changed.
fn changed(folder: &Path, name: &str, change: impl FnOnce(&mut StateDict)) -> PathBuf {
    let (mut tensors, _) = state_dict::read(fixture(name)).unwrap();
    change(&mut tensors);
    let path = folder.join("changed.safetensors");
    state_dict::write(&path, &tensors, Metadata::new()).unwrap();
    path
}

#[test]
fn inputs_that_do_not_fit_are_refused_and_an_older_output_stays() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    std::fs::write(folder.join("out.safetensors"), b"older").unwrap();
    let refused_inputs = |name: &str, parts: &[&str], change: &dyn Fn(&mut StateDict)| {
        let mut arguments = arguments(name);
        replace(&mut arguments, "--input", &changed(folder, &format!("{name}.io.safetensors"), change));
        refused_in_one_line(folder, &with(&arguments, &["--grads"]), parts);
        assert_eq!(std::fs::read(folder.join("out.safetensors")).unwrap(), b"older");
    };
    let put = |tensors: &mut StateDict, name: &str, tensor: gridgrad::Result<Tensor>| {
        tensors.insert(name.into(), tensor.unwrap());
    };
    let file = "changed.safetensors";
    refused_inputs("classifier", &[file, "no tensor input"], &|t| drop(t.remove("input")));
    refused_inputs("classifier", &[file, "no tensor target"], &|t| drop(t.remove("target")));
    refused_inputs("classifier", &[file, "label", "7"], &|t| put(t, "target", Tensor::new(&[0i64, 7], [2])));
    refused_inputs("classifier", &[file, "label", "-1"], &|t| put(t, "target", Tensor::new(&[-1i64, 1], [2])));
    refused_inputs("classifier", &[file, "target"], &|t| put(t, "target", Tensor::new(&[0i64, 1, 2], [3])));
    refused_inputs("classifier", &[file, "target", "f32"], &|t| put(t, "target", Tensor::new(&[0f32, 1.0], [2])));
    refused_inputs("classifier", &[file, "(batch,"], &|t| put(t, "input", Tensor::zeros([3, 40, 40], DType::F32)));
    refused_inputs("classifier", &["3"], &|t| put(t, "input", Tensor::zeros([2, 4, 40, 40], DType::F32)));
    refused_inputs("classifier", &["8×8"], &|t| put(t, "input", Tensor::zeros([2, 3, 4, 4], DType::F32)));
    refused_inputs("backbone", &[file, "no tensor cotangent.1"], &|t| drop(t.remove("cotangent.1")));
    let flat = || Tensor::zeros([1, 48, 14, 17], DType::F32);
    refused_inputs("backbone", &[file, "cotangent.0", "(1, 48, 14, 17)"], &|t| put(t, "cotangent.0", flat()));
}

#[test]
fn weights_that_do_not_fit_are_refused_with_the_file_and_every_problem() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let mut arguments = arguments("classifier");
    let weights = changed(folder, "classifier.weights.safetensors", |tensors| {
        tensors.remove("head.bias");
        tensors.insert("head.weight".into(), Tensor::zeros([7, 3], DType::F32).unwrap());
        tensors.insert("tail".into(), Tensor::zeros([1], DType::F32).unwrap());
    });
    replace(&mut arguments, "--weights", &weights);
    refused(folder, &with(&arguments, &[]), &["changed.safetensors", "head.bias", "head.weight", "tail"]);
    let sound = std::fs::read(fixture("classifier.weights.safetensors")).unwrap();
    for len in [0, 7, 100, sound.len() / 2, sound.len() - 1] {
        std::fs::write(&weights, &sound[..len]).unwrap();
        refused_in_one_line(folder, &with(&arguments, &[]), &["changed.safetensors", "not a safetensors file"]);
    }
    assert!(!folder.join("out.safetensors").exists());
}

#[test]
fn configurations_that_cannot_be_are_refused_with_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let path = folder.join("network.json");
    let mut arguments = arguments("classifier");
    replace(&mut arguments, "--config", &path);
    for (json, part) in [
        (r#"{"embed_dims": 48}"#, "unknown field `embed_dims`"),
        (r#"{"model": "resnet"}"#, "'resnet'"),
        (r#"{"embed_dim": "wide"}"#, "expected usize"),
        (r#"{"embed_dim": 48, "num_heads": [5, 6, 12, 24]}"#, "5 heads do not divide 48 channels"),
        (r#"{"group_size": [0, 7, 7, 7]}"#, "group_size 0"),
        (r#"{"interval": [8, 4, 2, 0]}"#, "interval 0"),
        (r#"{"img_size": [3, 224]}"#, "3×224"),
        (r#"{"depths": []}"#, "depths"),
        (r#"{"depths": [2, 2"#, "EOF"),
        ("", "expected a JSON object"),
        ("[]", "expected a JSON object"),
    ] {
        std::fs::write(&path, json).unwrap();
        refused_in_one_line(folder, &with(&arguments, &[]), &["network.json", part]);
    }
    assert!(!folder.join("out.safetensors").exists());
}

#[test]
fn flags_that_cannot_be_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let arguments = arguments("backbone");
    refused_in_one_line(folder.path(), &with(&arguments, &["--dtype", "bf16"]), &["f32 or f64"]);
    refused(folder.path(), &with(&arguments, &["--dtype", "f12"]), &["f12"]);
    refused(folder.path(), &with(&arguments, &["--device", "abacus"]), &["abacus"]);
    if !cfg!(feature = "emulator") {
        let more = ["--device", "emulated"];
        refused_in_one_line(folder.path(), &with(&arguments, &more), &["emulated", "--features emulator"]);
    }
    refused_in_one_line(folder.path(), &with(&arguments, &["--device", "cuda:99"]), &["cuda:99"]);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    let mut lost = arguments.clone();
    replace(&mut lost, "--output", Path::new("no-such-folder/out.safetensors"));
    refused_in_one_line(folder.path(), &with(&lost, &[]), &["no-such-folder/out.safetensors"]);
}
