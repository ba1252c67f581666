//! Host code: one static library of all kernels for the emulator, and the table of their modules.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;
use std::{env, fs};

/// Checks that the compiler puts into the kernels; kernels/emulator/shim.cpp reports what they find.
/// The last makes large frames touch their stack's guard page.
const CHECKS: [&str; 3] = [
    "-fsanitize=alignment,bounds,shift,integer-divide-by-zero,signed-integer-overflow",
    "-fno-sanitize-recover=all",
    "-fstack-clash-protection",
];

pub fn build() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let unix = env::var("CARGO_CFG_TARGET_FAMILY").is_ok_and(|families| families.split(',').any(|f| f == "unix"));
    // Elsewhere the crate builds, and says at run time that there is no emulator.
    let sources = if unix { kernels() } else { Vec::new() };
    let stems: Vec<&str> = sources.iter().filter(|path| is_kernel(path)).map(|path| stem(path)).collect();
    for path in sources.iter().filter(|path| is_kernel(path)) {
        check_table(path);
    }
    fs::write(out.join("emulated.rs"), table(&stems)).expect("the table of emulated modules can be written");
    if !sources.is_empty() {
        compile(&sources, &out.join("emulated"));
    }
}

/// All kernel files and the shim, in order.
fn kernels() -> Vec<PathBuf> {
    let mut sources = vec![PathBuf::from("kernels/emulator/shim.cpp")];
    for folder in ["kernels", "kernels/emulator"] {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
        sources.extend(entries.filter(|path| is_kernel(path)));
    }
    sources.sort();
    sources
}

fn is_kernel(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "cu")
}

fn stem(path: &Path) -> &str {
    path.file_stem().and_then(|stem| stem.to_str()).expect("kernel files have plain names")
}

/// A wrong module name would otherwise be an unresolved symbol.
fn check_table(path: &Path) {
    let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let expected = format!("KERNELS({},", stem(path));
    assert!(text.contains(&expected), "{}: ends without `{expected} KERNEL(...))`", path.display());
}

/// Rust source of `MODULES`: each module's name, and the function that gives its kernels.
fn table(stems: &[&str]) -> String {
    let declarations: String = stems
        .iter()
        .map(|stem| format!("    fn gridgrad_kernels_{stem}(count: *mut u32) -> *const Kernel;\n"))
        .collect();
    let rows: String = stems.iter().map(|stem| format!("    (\"{stem}\", gridgrad_kernels_{stem}),\n")).collect();
    format!(
        "unsafe extern \"C\" {{\n{declarations}}}\n\
         /// Every module of kernels, by the stem of its file.\n\
         pub(super) static MODULES: &[(&str, ModuleTable)] = &[\n{rows}];\n"
    )
}

/// Compiles what changed, as many files at once as cargo allows, and archives everything.
fn compile(sources: &[PathBuf], folder: &Path) {
    fs::create_dir_all(folder).expect("the folder for objects can be made");
    let mut build = cc::Build::new();
    // The same bits on every machine: no fused multiply-add that the source does not ask for.
    build.cpp(true).std("c++20").opt_level(2).include("kernels").pic(true).flag("-ffp-contract=off");
    build.flag("-Wno-unknown-pragmas").flags(CHECKS);
    // Kernels are full of fused multiply-adds, which without the instruction are calls that take fifty times as long.
    if env::var("CARGO_CFG_TARGET_ARCH").is_ok_and(|architecture| architecture == "x86_64") {
        build.flag("-mavx2").flag("-mfma");
    }
    let compiler = build.get_compiler();
    let objects: Vec<PathBuf> = sources.iter().map(|source| folder.join(stem(source)).with_extension("o")).collect();
    let next = AtomicUsize::new(0);
    let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1);
    std::thread::scope(|scope| {
        for _ in 0..sources.len().min(jobs) {
            scope.spawn(|| {
                while let Some(source) = sources.get(next.fetch_add(1, Ordering::Relaxed)) {
                    compile_file(compiler.to_command(), source, &folder.join(stem(source)).with_extension("o"));
                }
            });
        }
    });
    cc::Build::new().cpp(true).objects(objects).compile("gridgrad_emulated");
}

/// Compiles one file unless its object is newer than all that went into it, the command line included.
fn compile_file(mut command: Command, source: &Path, object: &Path) {
    let (dependencies, line) = (object.with_extension("d"), object.with_extension("command"));
    command.args(["-MMD", "-MF"]).arg(&dependencies).args(["-x", "c++", "-c"]).arg(source).arg("-o").arg(object);
    let words: Vec<OsString> =
        std::iter::once(command.get_program()).chain(command.get_args()).map(Into::into).collect();
    let words = format!("{words:?}");
    if fs::read_to_string(&line).is_ok_and(|last| last == words) && is_fresh(object, &dependencies) {
        return;
    }
    let output = command.output().unwrap_or_else(|error| panic!("the C++ compiler does not start: {error}"));
    let messages = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{} does not compile for the emulator:\n{messages}", source.display());
    fs::write(&line, words).expect("the command line can be written beside its object");
}

fn is_fresh(object: &Path, dependencies: &Path) -> bool {
    let modified = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
    let (Some(built), Ok(list)) = (modified(object), fs::read_to_string(dependencies)) else { return false };
    let files = list.split_once(':').map_or("", |(_, files)| files);
    files
        .split_whitespace()
        .filter(|word| *word != "\\")
        .all(|file| modified(Path::new(file)).is_some_and(|at: SystemTime| at < built))
}
