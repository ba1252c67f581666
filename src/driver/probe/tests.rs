use super::*;

fn gpu(ordinal: usize) -> GpuInfo {
    GpuInfo {
        ordinal,
        name: "Test GPU".into(),
        compute_capability: (9, 0),
        total_memory_bytes: 1 << 30,
        driver_version: 13_000,
    }
}

#[test]
fn the_processor_is_always_there() {
    assert!(require(Device::Cpu).is_ok());
}

#[cfg(not(feature = "emulator"))]
#[test]
fn emulation_is_refused_with_the_reason() {
    let error = require(Device::Emulated).unwrap_err().to_string();
    assert!(error.starts_with("emulated: ") && error.contains("--features emulator"), "{error}");
}

#[test]
fn a_probe_error_comes_before_missing_kernels() {
    let reason = usable(0, &Err(NoGpu::NoDriver), false).unwrap_err();
    assert_eq!(reason, NoGpu::NoDriver.to_string());
    let reason = usable(0, &Ok(vec![gpu(0)]), false).unwrap_err();
    assert_eq!(reason, NoGpu::BuiltWithoutNvcc.to_string());
    assert!(usable(1, &Ok(vec![gpu(0)]), true).unwrap_err().contains("GPU 1 was asked for"));
    assert!(usable(1, &Ok(vec![gpu(0), gpu(1)]), true).is_ok());
}

#[test]
fn a_gpu_older_than_the_kernels_is_refused_and_passed_over() {
    let old = GpuInfo { compute_capability: (7, 5), ..gpu(0) };
    let reason = usable(0, &Ok(vec![old.clone()]), true).unwrap_err();
    assert!(reason.contains("(Test GPU) has compute capability 7.5, but gridgrad's kernels need 8.0"), "{reason}");
    assert_eq!(best_of(&Ok(vec![old.clone(), gpu(1)]), true), Device::Cuda(1));
    assert_eq!(best_of(&Ok(vec![old]), true), Device::Cpu);
    assert_eq!(best_of(&Ok(vec![gpu(0)]), false), Device::Cpu);
    assert_eq!(best_of(&Err(NoGpu::NoDriver), true), Device::Cpu);
}

#[test]
fn reasons_are_one_line_and_name_versions_as_people_do() {
    let old = NoGpu::DriverTooOld { have: 12_020, need: 13_000 }.to_string();
    assert!(old.contains("CUDA 12.2") && old.contains("CUDA 13.0"), "{old}");
    let (feature, nvcc) = (NoGpu::FeatureOff, NoGpu::BuiltWithoutNvcc);
    let driver = NoGpu::Driver("999".into());
    for reason in [feature, nvcc, NoGpu::NoDriver, NoGpu::NoDevice, NoGpu::StubLibrary, driver] {
        let words = reason.to_string();
        assert!(!words.contains('\n') && words.contains("; "), "{words}");
    }
}

#[cfg(not(feature = "cuda"))]
#[test]
fn without_the_feature_the_probe_says_so() {
    assert_eq!(probe(), Err(NoGpu::FeatureOff));
    assert!(require(Device::Cuda(0)).unwrap_err().to_string().contains("--features cuda"));
}

#[cfg(all(feature = "cuda", target_os = "linux"))]
#[path = "../../../tests/stand_in_drivers/mod.rs"]
mod stand_in_drivers;

/// The driver is loaded once per process, so each stand-in driver is probed by a child: this test binary again.
#[cfg(all(feature = "cuda", target_os = "linux"))]
mod stand_ins {
    use std::path::Path;
    use std::process::Command;

    use super::super::*;
    use super::stand_in_drivers as drivers;

    const CHILD: &str = "GRIDGRAD_TEST_PROBE";

    /// Does nothing unless a parent started it; then prints the probe's answer, that of `require`, and the best device.
    #[test]
    fn child() {
        if std::env::var_os(CHILD).is_some() {
            println!("probe={:?}", probe());
            println!("require={}", require(Device::Cuda(0)).map_or_else(|e| e.to_string(), |()| "ok".into()));
            println!("best={}", best());
        }
    }

    /// Checks what a child prints that finds only this driver.
    fn check(driver: Option<tempfile::TempDir>, expected: &[&str]) {
        let Some(driver) = driver else { return };
        let output = run_child(driver.path());
        for part in expected {
            assert!(output.contains(part), "{part:?} is not in {output}");
        }
    }

    fn run_child(library_path: &Path) -> String {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "driver::probe::tests::stand_ins::child", "--nocapture", "--test-threads=1"])
            .env(CHILD, "1")
            .env("LD_LIBRARY_PATH", library_path)
            .output()
            .unwrap();
        let output = String::from_utf8_lossy(&child.stdout).into_owned();
        assert!(child.status.success(), "{output}{}", String::from_utf8_lossy(&child.stderr));
        output
    }

    #[test]
    fn no_driver() {
        check(Some(drivers::none()), &["probe=Err(NoDriver)", "best=cpu"]);
    }

    #[test]
    fn no_device() {
        let words = "require=cuda:0: the NVIDIA driver finds no GPU";
        check(drivers::compiled(drivers::NO_DEVICE), &["probe=Err(NoDevice)", words, "best=cpu"]);
    }

    #[test]
    fn stub_library() {
        check(drivers::compiled(drivers::STUB), &["probe=Err(StubLibrary)", "best=cpu"]);
    }

    #[test]
    fn broken_driver() {
        check(drivers::compiled(drivers::BROKEN), &["probe=Err(Driver(\"CUDA_ERROR_UNKNOWN\"))", "best=cpu"]);
    }

    #[test]
    fn old_driver() {
        check(drivers::compiled(drivers::OLD), &["probe=Err(DriverTooOld { have: 12020, need: 13000 })", "best=cpu"]);
    }

    #[test]
    fn two_devices() {
        let second = "GpuInfo { ordinal: 1, name: \"Stand-in 1\", compute_capability: (9, 5), \
                      total_memory_bytes: 85899345920, driver_version: 13010 }";
        let (required, best) = match kernels_built() {
            true => ("require=ok", "best=cuda:0"),
            false => ("require=cuda:0: gridgrad was built without nvcc", "best=cpu"),
        };
        let expected = ["probe=Ok([GpuInfo { ordinal: 0", second, required, best];
        check(drivers::compiled(drivers::TWO_DEVICES), &expected);
    }
}
