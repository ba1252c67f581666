//! Finding NVIDIA's libraries on machines where they are not on the loader's path.
//!
//! Wheels of Python packages bring NVIDIA's libraries in folders of their own. A library that the process has loaded by
//! its full path is found by its name afterwards, so one such load, never undone, is all that `cudarc` needs.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

/// A library: how to ask the loader for it, its files, and the folders of wheels that have it.
struct Library {
    is_on_the_loaders_path: fn() -> bool,
    files: &'static [&'static str],
    wheels: &'static [&'static str],
}

const CUBLASLT: Library = Library {
    // SAFETY: opens and closes the library, which runs its load-time initialisers and nothing else.
    is_on_the_loaders_path: || unsafe { cudarc::cublaslt::sys::is_culib_present() },
    files: &["libcublasLt.so.13", "libcublasLt.so.12"],
    wheels: &["nvidia/cu13/lib", "nvidia/cublas/lib"],
};

#[cfg(feature = "cudnn")]
const CUDNN: Library = Library {
    // SAFETY: opens and closes the library, which runs its load-time initialisers and nothing else.
    is_on_the_loaders_path: || unsafe { cudarc::cudnn::sys::is_culib_present() },
    files: &["libcudnn.so.9"],
    wheels: &["nvidia/cudnn/lib"],
};

/// Whether cuBLASLt can be called.
pub(super) fn load_cublaslt() -> bool {
    load(&CUBLASLT)
}

/// Whether cuDNN can be called.
#[cfg(feature = "cudnn")]
pub(super) fn load_cudnn() -> bool {
    load(&CUDNN)
}

/// Looks in `GRIDGRAD_CUDA_LIBS`, on the loader's path, in the packages of the active Python, and where the CUDA
/// toolkit installs itself; the first found stays loaded.
fn load(library: &Library) -> bool {
    if let Some(folder) = env::var_os("GRIDGRAD_CUDA_LIBS") {
        load_from(library, Path::new(&folder));
    }
    if (library.is_on_the_loaders_path)() {
        return true;
    }
    let packages = python_prefixes().into_iter().flat_map(|prefix| package_folders(library, &prefix));
    let mut folders = packages.chain(["/usr/local/cuda/lib64".into()]);
    folders.any(|folder| load_from(library, &folder)) && (library.is_on_the_loaders_path)()
}

/// Where the active Python lives: the activated environment, or what `python3` on the path belongs to.
fn python_prefixes() -> Vec<PathBuf> {
    let mut prefixes: Vec<PathBuf> =
        ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(env::var_os).map(PathBuf::from).collect();
    let path = env::var_os("PATH").unwrap_or_default();
    let interpreter = env::split_paths(&path).find(|folder| folder.join("python3").is_file());
    prefixes.extend(interpreter.as_deref().and_then(Path::parent).map(Path::to_path_buf));
    prefixes
}

/// The folders of NVIDIA's wheels under a Python prefix: those for CUDA 13, then those for CUDA 12. Sorted, so that a
/// machine with several Pythons gives the same answer every time.
fn package_folders(library: &Library, prefix: &Path) -> Vec<PathBuf> {
    let Ok(entries) = prefix.join("lib").read_dir() else { return Vec::new() };
    let is_python = |name: &OsStr| name.to_string_lossy().starts_with("python3");
    let mut versions: Vec<_> =
        entries.flatten().filter(|entry| is_python(&entry.file_name())).map(|entry| entry.path()).collect();
    versions.sort();
    let homes = ["site-packages", "dist-packages"];
    let folders = versions.iter().flat_map(|version| homes.map(|home| version.join(home)));
    let wheels = |packages: PathBuf| library.wheels.iter().map(move |wheel| packages.join(wheel));
    folders.flat_map(wheels).filter(|folder| folder.is_dir()).collect()
}

/// Loads a library from a folder and never unloads it. False where the folder has none that loads.
#[cfg(unix)]
fn load_from(library: &Library, folder: &Path) -> bool {
    use std::ffi::{CString, c_char, c_int, c_void};
    use std::os::unix::ffi::OsStrExt;

    // Of the system's C library, which the standard library links already.
    unsafe extern "C" {
        fn dlopen(path: *const c_char, flags: c_int) -> *mut c_void;
    }
    const RTLD_NOW: c_int = 2;

    library.files.iter().any(|name| {
        let path = folder.join(name);
        let Ok(text) = CString::new(path.as_os_str().as_bytes()) else { return false };
        // SAFETY: `text` ends in 0 and outlives the call, which runs the library's load-time initialisers.
        path.is_file() && !unsafe { dlopen(text.as_ptr(), RTLD_NOW) }.is_null()
    })
}

/// On other systems only the loader's own path is searched.
#[cfg(not(unix))]
fn load_from(_library: &Library, _folder: &Path) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wheels_are_found_in_order_below_a_prefix() {
        let prefix = tempfile::tempdir().unwrap();
        let lib = prefix.path().join("lib");
        let folders = [
            "python3.11/site-packages/nvidia/cu13/lib",
            "python3.11/site-packages/nvidia/cublas/lib",
            "python3.12/dist-packages/nvidia/cublas/lib",
        ];
        for folder in folders {
            std::fs::create_dir_all(lib.join(folder)).unwrap();
        }
        std::fs::create_dir_all(lib.join("perl5/site-packages/nvidia/cu13/lib")).unwrap();
        assert_eq!(package_folders(&CUBLASLT, prefix.path()), folders.map(|folder| lib.join(folder)));
        assert!(package_folders(&CUBLASLT, &lib).is_empty());
    }

    #[test]
    fn a_folder_without_the_library_is_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        assert!(!load_from(&CUBLASLT, folder.path()));
        std::fs::write(folder.path().join("libcublasLt.so.13"), "not a library").unwrap();
        assert!(!load_from(&CUBLASLT, folder.path()));
    }
}
