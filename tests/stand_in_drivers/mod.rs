//! Small libraries that answer in place of NVIDIA's driver, for the tests of what is said where there is no GPU to use.

use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

/// The driver works and sees no GPU.
pub const NO_DEVICE: &str = "int cuInit(unsigned f) { return 100; }";

/// The library that programs are linked against.
pub const STUB: &str = "int cuInit(unsigned f) { return 34; }";

/// A driver that fails in its own way.
pub const BROKEN: &str = "int cuInit(unsigned f) { return 999; }";

/// A driver of CUDA 12.2.
pub const OLD: &str = "
    int cuInit(unsigned f) { return 0; }
    int cuDriverGetVersion(int *v) { *v = 12020; return 0; }";

/// A driver of CUDA 13.1 with two GPUs, of compute capability 9.5 and 80 GiB each.
pub const TWO_DEVICES: &str = r#"
    #include <stdio.h>
    int cuInit(unsigned f) { return 0; }
    int cuDriverGetVersion(int *v) { *v = 13010; return 0; }
    int cuDeviceGetCount(int *n) { *n = 2; return 0; }
    int cuDeviceGet(int *d, int i) { *d = i; return 0; }
    int cuDeviceGetName(char *s, int n, int d) { snprintf(s, n, "Stand-in %d", d); return 0; }
    int cuDeviceGetAttribute(int *v, int a, int d) { *v = a == 75 ? 9 : a == 76 ? 5 : -1; return 0; }
    int cuDeviceTotalMem_v2(unsigned long *b, int d) { *b = 80ul << 30; return 0; }"#;

/// A folder for LD_LIBRARY_PATH with this driver, or `None` without a C compiler.
pub fn compiled(source: &str) -> Option<TempDir> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("driver.c"), source).unwrap();
    let compiler = Command::new("cc")
        .args(["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "driver.c", "-o", "libcuda.so.1"])
        .current_dir(folder.path())
        .output();
    let Ok(compiler) = compiler else {
        println!("skipped: no C compiler `cc` to build the stand-in driver with");
        return None;
    };
    assert!(compiler.status.success(), "{}", String::from_utf8_lossy(&compiler.stderr));
    link_unversioned(folder.path());
    Some(folder)
}

/// A folder for LD_LIBRARY_PATH that hides the driver of this machine, if it has one: what is found there cannot be
/// loaded, and the loader looks no further.
pub fn none() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("libcuda.so.1"), "not a library").unwrap();
    link_unversioned(folder.path());
    folder
}

/// An unversioned name is tried first; without it a real driver of this machine would answer.
fn link_unversioned(folder: &Path) {
    std::os::unix::fs::symlink("libcuda.so.1", folder.join("libcuda.so")).unwrap();
}
