//! The build script's part that compiles kernels, with a stand-in for nvcc.

#[allow(dead_code, reason = "cargo runs the rest")]
#[path = "../build/fingerprint.rs"]
mod fingerprint;
#[allow(dead_code, reason = "cargo runs the rest")]
#[path = "../build/nvcc.rs"]
mod nvcc;

use std::ffi::OsStr;
use std::path::PathBuf;

#[test]
fn releases_are_read_from_the_version() {
    let version = "nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release 13.0, V13.0.88\nBuild cuda";
    assert_eq!(nvcc::release(version), Some((13, 0)));
    assert_eq!(nvcc::release("release 9.2, V9.2.148"), Some((9, 2)));
    assert_eq!(nvcc::release("g++ (Debian 12.2.0) 12.2.0"), None);
    assert_eq!(nvcc::release("release soon"), None);
}

#[test]
fn a_fingerprint_is_of_names_and_contents() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    let of = || fingerprint::of(folder.path(), &[PathBuf::from("src")]);
    write("src/a/b.rs", "one\n");
    write("src/c.rs", "two\n");
    write("other.rs", "outside");
    let first = of();
    assert_eq!(first, of());
    write("other.rs", "changed");
    write("src/c.rs", "two\r\n");
    write("src/.c.rs.swp", "hidden");
    assert_eq!(first, of());
    write("src/a/b.rs", "One\n");
    assert_ne!(first, of());
    write("src/a/b.rs", "one\n");
    assert_eq!(first, of());
    std::fs::rename(folder.path().join("src/c.rs"), folder.path().join("src/d.rs")).unwrap();
    assert_ne!(first, of());
}

#[test]
fn places_follow_the_kind_of_variable() {
    let executable = format!("nvcc{}", std::env::consts::EXE_SUFFIX);
    assert_eq!(nvcc::places("NVCC", OsStr::new("/a/mine")), [PathBuf::from("/a/mine")]);
    assert_eq!(nvcc::places("CUDA_HOME", OsStr::new("/a")), [PathBuf::from("/a/bin").join(&executable)]);
    let path = std::env::join_paths(["/a", "/b"]).unwrap();
    assert_eq!(nvcc::places("PATH", &path), ["/a", "/b"].map(|folder| PathBuf::from(folder).join(&executable)));
}

#[test]
fn targets_are_checked() {
    let flags = nvcc::target_flags("sm_80, sm_89,sm_90a,compute_120").unwrap();
    let expected = [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=sm_89",
        "-gencode=arch=compute_80,code=sm_90a",
        "-gencode=arch=compute_120,code=compute_120",
    ];
    assert_eq!(flags, expected);
    assert_eq!(nvcc::target_flags(nvcc::TARGETS).unwrap().len(), 7);
    for wrong in ["", "80", "sm_8", "sm_90aa", "sm_90x", "sm_9000", "gfx_90", "sm_80;sm_90", "sm_é0"] {
        let error = nvcc::target_flags(wrong).unwrap_err();
        assert!(error.starts_with("GRIDGRAD_CUDA_TARGETS"), "{error}");
    }
}

/// All machine code is made from the same PTX, which knows of no other architecture.
#[test]
fn kernels_are_the_same_for_all_targets() {
    let mut folders = vec![PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("kernels")];
    let mut files = 0;
    while let Some(folder) = folders.pop() {
        for path in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                folders.push(path);
            } else {
                files += 1;
                let text = std::fs::read_to_string(&path).unwrap();
                assert!(!text.contains("__CUDA_ARCH"), "{}: needs PTX of its own, see build/nvcc.rs", path.display());
            }
        }
    }
    assert!(files > 30, "{files} files");
}

#[test]
fn depfiles_give_the_files_of_kernels() {
    let depfile =
        "out/a.fatbin : kernels/a.cu \\\n    /usr/include/cuda.h \\\n    kernels/common/x.cuh \\\r\n .nvcc/y.h\n";
    assert_eq!(nvcc::dependencies(depfile), ["kernels/a.cu", "kernels/common/x.cuh"]);
    assert!(nvcc::dependencies("").is_empty());
}

#[test]
fn the_table_is_empty_without_modules() {
    assert!(nvcc::table(&[]).ends_with("pub static KERNELS: &[(&str, &[u8])] = &[];\n"));
    let table = nvcc::table(&["relu".into(), "softmax".into()]);
    assert!(table.contains("(\"softmax\", &Aligned(*include_bytes!(\"softmax.fatbin\")).0)"), "{table}");
}

#[test]
fn errors_are_shown_without_reports() {
    let stderr = "ptxas info    : 0 bytes gmem\n    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
                  kernels/a.cu(3): error: expected a \";\"\nptxas fatal   : aborted";
    assert_eq!(nvcc::complaints(stderr), "kernels/a.cu(3): error: expected a \";\"\nptxas fatal   : aborted");
}

#[cfg(unix)]
mod compiling {
    use std::fs;
    use std::path::Path;

    use super::nvcc::{self, Compiler};

    /// Notes each call in `log`, and "compiles" by copying; a source with `FAIL` in it leaves half an output and fails.
    const NVCC: &str = r#"
while [ $# -gt 1 ]; do
    case "$1" in
        -MF) depfile="$2" ;;
        -o) output="$2" ;;
    esac
    shift
done
echo "$1" >>log
if grep -q FAIL "$1"; then
    echo half >"$output"
    echo "$1(1): error: as planned" >&2
    exit 2
fi
cp "$1" "$output"
echo "$output : $1 kernels/common/shared.cuh /usr/include/cuda.h" >"$depfile"
echo "ptxas info    : report on $1" >&2
"#;

    /// A folder with two kernels, a header and the stand-in.
    fn project() -> (tempfile::TempDir, Compiler) {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        fs::create_dir_all(root.join("kernels/common")).unwrap();
        fs::create_dir_all(root.join("kernels/emulator")).unwrap();
        fs::create_dir(root.join("out")).unwrap();
        for name in ["b.cu", "a.cu", "common/shared.cuh", "emulator/host.cu", "notes.txt"] {
            fs::write(root.join("kernels").join(name), name).unwrap();
        }
        // Run by the shell: a file that was just written can be too busy to be executed itself.
        fs::write(root.join("nvcc"), NVCC).unwrap();
        let compiler = Compiler {
            program: "sh".into(),
            flags: vec!["nvcc".into(), "-fatbin".into()],
            identity: "release 13.0".into(),
            root: root.into(),
            out: root.join("out"),
        };
        (folder, compiler)
    }

    /// What the stand-in was called for since the last time, sorted.
    fn compiled(root: &Path) -> Vec<String> {
        let log = fs::read_to_string(root.join("log")).unwrap_or_default();
        let _ = fs::remove_file(root.join("log"));
        let mut sources: Vec<String> = log.lines().map(String::from).collect();
        sources.sort();
        sources
    }

    #[test]
    fn only_what_changed_is_compiled_again() {
        let (folder, mut compiler) = project();
        let root = folder.path();
        assert_eq!(compiler.compile_all().unwrap(), ["a", "b"]);
        assert_eq!(compiled(root), ["kernels/a.cu", "kernels/b.cu"]);
        assert_eq!(fs::read_to_string(root.join("out/a.ptxas")).unwrap(), "ptxas info    : report on kernels/a.cu\n");
        // The same content at another time is no change.
        fs::write(root.join("kernels/a.cu"), "a.cu").unwrap();
        compiler.compile_all().unwrap();
        assert!(compiled(root).is_empty());
        fs::write(root.join("kernels/b.cu"), "changed").unwrap();
        compiler.compile_all().unwrap();
        assert_eq!(compiled(root), ["kernels/b.cu"]);
        assert_eq!(fs::read_to_string(root.join("out/b.fatbin")).unwrap(), "changed");
        fs::remove_file(root.join("out/a.ptxas")).unwrap();
        compiler.compile_all().unwrap();
        assert_eq!(compiled(root), ["kernels/a.cu"]);
        // A header, a flag, and the compiler concern all kernels.
        fs::write(root.join("kernels/common/shared.cuh"), "changed").unwrap();
        compiler.compile_all().unwrap();
        assert_eq!(compiled(root).len(), 2);
        compiler.flags.push("-lineinfo".into());
        compiler.compile_all().unwrap();
        assert_eq!(compiled(root).len(), 2);
        compiler.identity = "release 13.1".into();
        compiler.compile_all().unwrap();
        assert_eq!(compiled(root).len(), 2);
    }

    #[test]
    fn a_failure_names_the_file_and_leaves_the_old_output() {
        let (folder, compiler) = project();
        let root = folder.path();
        compiler.compile_all().unwrap();
        fs::write(root.join("kernels/a.cu"), "FAIL").unwrap();
        let message = compiler.compile_all().unwrap_err();
        assert_eq!(message, "nvcc does not compile kernels/a.cu:\nkernels/a.cu(1): error: as planned");
        assert_eq!(fs::read_to_string(root.join("out/a.fatbin")).unwrap(), "a.cu");
        assert!(!root.join("out/a.fatbin.part").exists());
        // It is tried again as long as it fails, and the rest is kept.
        compiled(root);
        assert!(compiler.compile_all().is_err());
        assert_eq!(compiled(root), ["kernels/a.cu"]);
    }

    #[test]
    fn folders_without_kernels_are_fine_and_strange_names_are_not() {
        let (folder, compiler) = project();
        let root = folder.path();
        fs::write(root.join("kernels/Soft-max.cu"), "").unwrap();
        assert!(compiler.compile_all().unwrap_err().contains("Soft-max.cu: a kernel file is named in a-z, 0-9 and _"));
        assert!(nvcc::modules(&root.join("out")).unwrap().is_empty());
        assert!(nvcc::modules(&root.join("missing")).unwrap().is_empty());
    }
}
