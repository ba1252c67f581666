//! A fingerprint of what the library is compiled from, by which runs tell builds apart that have the same version.

use std::path::{Path, PathBuf};
use std::{env, fs};

/// Sets `GRIDGRAD_BUILD` for `env!`: a hash over the names and contents of the library's sources, the kernels and the
/// versions of the dependencies. A change of the program's own files (`src/bin`) alone changes no number that a library
/// computes, and is left out, or every change of a flag would recompile the library.
pub fn emit() {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    // As a dependency the crate has no lock file of its own, and cargo would look for it again at every build.
    let lock = PathBuf::from("Cargo.lock");
    let roots: Vec<PathBuf> = entries(&root, Path::new("src"))
        .into_iter()
        .filter(|path| !path.ends_with("bin"))
        .chain([PathBuf::from("kernels"), lock].into_iter().filter(|path| root.join(path).exists()))
        .collect();
    roots.iter().for_each(|path| println!("cargo::rerun-if-changed={}", path.display()));
    println!("cargo::rustc-env=GRIDGRAD_BUILD={:016x}", of(&root, &roots));
}

/// FNV-1a with 64 bits over all files at or below `paths`, by name, whose line ends count as `\n`.
pub fn of(root: &Path, paths: &[PathBuf]) -> u64 {
    let mut files = Vec::new();
    paths.iter().for_each(|path| collect(root, path, &mut files));
    files.sort();
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut feed = |bytes: &[u8]| {
        for &byte in bytes.iter().filter(|byte| **byte != b'\r').chain(&[0xff]) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    };
    for (name, path) in files {
        feed(name.as_bytes());
        feed(&fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())));
    }
    hash
}

/// The files at or below `path`, each with a name that is the same on every system.
fn collect(root: &Path, path: &Path, files: &mut Vec<(String, PathBuf)>) {
    let full = root.join(path);
    if full.is_dir() {
        entries(root, path).iter().for_each(|inner| collect(root, inner, files));
    } else {
        let parts: Vec<_> = path.components().map(|part| part.as_os_str().to_string_lossy()).collect();
        files.push((parts.join("/"), full));
    }
}

/// What is in a folder, in order of names, beside hidden files such as those of editors.
fn entries(root: &Path, folder: &Path) -> Vec<PathBuf> {
    let listed = fs::read_dir(root.join(folder)).into_iter().flatten().flatten();
    let names = listed.map(|entry| entry.file_name()).filter(|name| !name.to_string_lossy().starts_with('.'));
    let mut entries: Vec<PathBuf> = names.map(|name| folder.join(name)).collect();
    entries.sort();
    entries
}
