//! A GPU that is asked for and cannot be had: one line that says why, and exit code 2.

use tempfile::TempDir;

use crate::stand_in_drivers as drivers;
use crate::{folder, gridgrad, text};

/// Checks what training on a GPU says where only this driver is found.
fn check(driver: Option<TempDir>, device: &str, reason: &str) {
    let Some(driver) = driver else { return };
    let folder = folder();
    let output = gridgrad()
        .current_dir(folder.path())
        .args(["train", "crossformer", "--config", "small.toml", "--out", "run", "--device", device])
        .env("LD_LIBRARY_PATH", driver.path())
        .output()
        .unwrap();
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert_eq!(message.lines().count(), 1, "{message}");
    assert!(message.starts_with("error: cuda:") && message.contains(reason), "{message}");
    assert!(output.stdout.is_empty() && !folder.path().join("run").exists(), "a refused run left something");
}

#[test]
fn no_driver() {
    check(Some(drivers::none()), "cuda", "no NVIDIA driver was found");
}

#[test]
fn no_device() {
    check(drivers::compiled(drivers::NO_DEVICE), "cuda", "the NVIDIA driver finds no GPU");
}

#[test]
fn stub_library() {
    check(drivers::compiled(drivers::STUB), "cuda", "the CUDA toolkit's stub, not a driver");
}

#[test]
fn broken_driver() {
    check(drivers::compiled(drivers::BROKEN), "cuda", "CUDA_ERROR_UNKNOWN");
}

#[test]
fn old_driver() {
    check(drivers::compiled(drivers::OLD), "cuda", "supports CUDA 12.2, but gridgrad needs CUDA 13.0");
}

#[test]
fn no_such_gpu() {
    check(drivers::compiled(drivers::TWO_DEVICES), "cuda:2", "GPU 2 was asked for, but the machine has 2");
}

/// A build with kernels has nothing to refuse here; `usable` is tested for both beside its code.
#[test]
fn built_without_nvcc() {
    if !::gridgrad::driver::kernels_built() {
        check(drivers::compiled(drivers::TWO_DEVICES), "cuda", "gridgrad was built without nvcc");
    }
}
