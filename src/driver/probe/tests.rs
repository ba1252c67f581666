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

#[test]
fn emulation_is_refused_with_the_reason() {
    let error = require(Device::Emulated).unwrap_err().to_string();
    assert_eq!(error, "emulated: this version of gridgrad has no GPU kernels to emulate yet; use --device cpu");
}

#[test]
fn a_probe_error_comes_before_missing_kernels() {
    let reason = usable(0, &Err(NoGpu::NoDriver), false).unwrap_err();
    assert_eq!(reason, NoGpu::NoDriver.to_string());
    let reason = usable(0, &Ok(vec![gpu(0)]), false).unwrap_err();
    assert_eq!(reason, "this version of gridgrad has no GPU kernels yet; use --device cpu");
    assert!(usable(1, &Ok(vec![gpu(0)]), true).unwrap_err().contains("GPU 1 was asked for"));
    assert!(usable(1, &Ok(vec![gpu(0), gpu(1)]), true).is_ok());
}

#[test]
fn reasons_are_one_line_and_name_versions_as_people_do() {
    let old = NoGpu::DriverTooOld { have: 12_020, need: 13_000 }.to_string();
    assert!(old.contains("CUDA 12.2") && old.contains("CUDA 13.0"), "{old}");
    for reason in [NoGpu::FeatureOff, NoGpu::NoDriver, NoGpu::NoDevice, NoGpu::StubLibrary, NoGpu::Driver("999".into())]
    {
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

/// The driver is loaded once per process, so each stand-in driver is probed by a child: this test binary again.
#[cfg(all(feature = "cuda", target_os = "linux"))]
mod stand_ins {
    use std::path::Path;
    use std::process::Command;

    use super::super::*;

    const CHILD: &str = "GRIDGRAD_TEST_PROBE";

    /// Does nothing unless a parent started it; then prints the probe's answer and that of `require`.
    #[test]
    fn child() {
        if std::env::var_os(CHILD).is_some() {
            println!("probe={:?}", probe());
            println!("require={}", require(Device::Cuda(0)).map_or_else(|e| e.to_string(), |()| "ok".into()));
        }
    }

    /// What a child prints that finds only this `libcuda.so.1`, or `None` without a C compiler.
    fn probe_with(source: &str) -> Option<String> {
        let folder = tempfile::tempdir().unwrap();
        compile(folder.path(), source)?;
        Some(run_child(folder.path()))
    }

    fn compile(folder: &Path, source: &str) -> Option<()> {
        std::fs::write(folder.join("driver.c"), source).unwrap();
        let compiled = Command::new("cc")
            .args(["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "driver.c", "-o", "libcuda.so.1"])
            .current_dir(folder)
            .output();
        let Ok(compiled) = compiled else {
            println!("skipped: no C compiler `cc` to build the stand-in driver with");
            return None;
        };
        assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
        // An unversioned name is tried first; without it a real driver of this machine would answer.
        std::os::unix::fs::symlink("libcuda.so.1", folder.join("libcuda.so")).unwrap();
        Some(())
    }

    fn run_child(library_path: &Path) -> String {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "driver::tests::stand_ins::child", "--nocapture", "--test-threads=1"])
            .env(CHILD, "1")
            .env("LD_LIBRARY_PATH", library_path)
            .output()
            .unwrap();
        let output = String::from_utf8_lossy(&child.stdout).into_owned();
        assert!(child.status.success(), "{output}{}", String::from_utf8_lossy(&child.stderr));
        output
    }

    #[test]
    fn no_device() {
        let Some(output) = probe_with("int cuInit(unsigned f) { return 100; }") else { return };
        assert!(output.contains("probe=Err(NoDevice)"), "{output}");
        assert!(output.contains("require=cuda:0: the NVIDIA driver finds no GPU"), "{output}");
    }

    #[test]
    fn stub_library() {
        let Some(output) = probe_with("int cuInit(unsigned f) { return 34; }") else { return };
        assert!(output.contains("probe=Err(StubLibrary)"), "{output}");
    }

    #[test]
    fn broken_driver() {
        let Some(output) = probe_with("int cuInit(unsigned f) { return 999; }") else { return };
        assert!(output.contains("probe=Err(Driver(\"CUDA_ERROR_UNKNOWN\"))"), "{output}");
    }

    #[test]
    fn old_driver() {
        let source = "int cuInit(unsigned f) { return 0; }\nint cuDriverGetVersion(int *v) { *v = 12020; return 0; }";
        let Some(output) = probe_with(source) else { return };
        assert!(output.contains("probe=Err(DriverTooOld { have: 12020, need: 13000 })"), "{output}");
    }

    #[test]
    fn two_devices() {
        let source = r#"
            #include <stdio.h>
            int cuInit(unsigned f) { return 0; }
            int cuDriverGetVersion(int *v) { *v = 13010; return 0; }
            int cuDeviceGetCount(int *n) { *n = 2; return 0; }
            int cuDeviceGet(int *d, int i) { *d = i; return 0; }
            int cuDeviceGetName(char *s, int n, int d) { snprintf(s, n, "Stand-in %d", d); return 0; }
            int cuDeviceGetAttribute(int *v, int a, int d) { *v = a == 75 ? 9 : a == 76 ? 5 : -1; return 0; }
            int cuDeviceTotalMem_v2(unsigned long *b, int d) { *b = 80ul << 30; return 0; }"#;
        let Some(output) = probe_with(source) else { return };
        let second = "GpuInfo { ordinal: 1, name: \"Stand-in 1\", compute_capability: (9, 5), \
                      total_memory_bytes: 85899345920, driver_version: 13010 }";
        assert!(output.contains("probe=Ok([GpuInfo { ordinal: 0") && output.contains(second), "{output}");
        assert!(output.contains("require=cuda:0: this version of gridgrad has no GPU kernels yet"), "{output}");
    }
}
