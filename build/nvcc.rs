//! Device code: one fatbin for each `kernels/*.cu`, and `kernels.rs`, the table through which the crate embeds them.
//!
//! A fatbin is compiled again only when its stamp is out of date. The stamp holds the command line, the compiler's
//! version, and the content of every file of `kernels/` that went in: content, not time, since a fresh checkout or a
//! restored cache changes all times. Beside each fatbin lies what ptxas reported (`NAME.ptxas`), which
//! `scripts/check_kernels.py` reads.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, exit};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs, thread};

/// Machine code for the GPUs that people train on, and PTX, which the driver compiles when first loaded, for all others.
///
/// The PTX is `compute_80`, not the newest: PTX runs on every GPU from its architecture on, so this serves Orin (8.7) and
/// Thor (11.0) as well as what comes after 12.0.
pub const TARGETS: &str = "sm_80,sm_86,sm_89,sm_90a,sm_100,sm_120,compute_80";

/// The files that take longest, from 15 s of CPU time for all targets on: started first, so that none is left for the end.
const LONGEST: [&str; 5] = ["lsda_backward", "lsda_forward", "matmul", "denfi_conv_backward", "conv2d"];

/// The release of `scripts/install_nvcc.py`, and the oldest taken: its fatbins load on the drivers that the crate needs.
pub const RELEASE: (u32, u32) = (13, 0);

/// Where `scripts/install_nvcc.py` puts nvcc.
const LOCAL: &str = ".nvcc/toolkit/nvidia/cu13/bin/nvcc";

/// Variables that nvcc itself takes flags from.
const NVCC_VARIABLES: [&str; 3] = ["NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"];

/// Writes the fatbins and their table to `OUT_DIR`: an empty table unless `wanted`, and where there is no nvcc.
pub fn build(wanted: bool) {
    if let Err(message) = try_build(wanted) {
        eprintln!("{message}");
        exit(1);
    }
}

fn try_build(wanted: bool) -> Result<(), String> {
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set: cargo runs this script")?);
    let modules = match if wanted { find_compiler()? } else { None } {
        Some((program, version)) => Compiler::new(program, &version, &out)?.compile_all()?,
        None => Vec::new(),
    };
    write_whole(&out.join("kernels.rs"), table(&modules).as_bytes())
}

/// nvcc and what its `--version` prints, or `None` where the crate is to be built without.
fn find_compiler() -> Result<Option<(PathBuf, String)>, String> {
    // docs.rs has no nvcc, and nobody reads its warnings.
    if variable("DOCS_RS").is_some() {
        return Ok(None);
    }
    let required = variable("GRIDGRAD_REQUIRE_NVCC").is_some_and(|value| value != "0");
    let refused = match search() {
        Ok(found) => return Ok(Some(found)),
        Err(refused) if refused.is_empty() => String::new(),
        Err(refused) => format!(" (found: {})", refused.join("; ")),
    };
    let message = format!(
        "no GPU kernels are built: there is no nvcc {}.{} or newer in NVCC, CUDA_HOME, CUDA_PATH, PATH or .nvcc{refused}; \
         `python3 scripts/install_nvcc.py` in a checkout of gridgrad installs one",
        RELEASE.0, RELEASE.1
    );
    if required {
        return Err(format!("{message} (GRIDGRAD_REQUIRE_NVCC is set, so this is an error)"));
    }
    println!("cargo::warning={message}");
    Ok(None)
}

/// The first nvcc that answers and is new enough, with its version; or what was found instead.
fn search() -> Result<(PathBuf, String), Vec<String>> {
    let mut refused = Vec::new();
    let variables = ["NVCC", "CUDA_HOME", "CUDA_PATH", "PATH"].into_iter();
    let named = variables.flat_map(|name| variable(name).map_or_else(Vec::new, |value| places(name, &value)));
    for place in named.chain([PathBuf::from(LOCAL)]) {
        let Ok(answer) = Command::new(&place).arg("--version").output() else { continue };
        let version = String::from_utf8_lossy(&answer.stdout).into_owned();
        match release(&version) {
            Some(release) if release >= RELEASE => {
                println!("cargo::rerun-if-changed={}", place.display());
                return Ok((place, version));
            }
            Some((major, minor)) => refused.push(format!("{} is release {major}.{minor}", place.display())),
            None => refused.push(format!("{} names no release", place.display())),
        }
    }
    // Cargo takes a missing path for one that has changed.
    if Path::new(".nvcc").exists() {
        println!("cargo::rerun-if-changed=.nvcc");
    }
    Err(refused)
}

/// An environment variable, unless empty; cargo runs this script again when it changes.
fn variable(name: &str) -> Option<OsString> {
    println!("cargo::rerun-if-env-changed={name}");
    env::var_os(name).filter(|value| !value.is_empty())
}

/// Where nvcc may be, according to a variable.
pub fn places(variable: &str, value: &OsStr) -> Vec<PathBuf> {
    let executable = format!("nvcc{}", env::consts::EXE_SUFFIX);
    match variable {
        "NVCC" => vec![value.into()],
        "PATH" => env::split_paths(value).map(|folder| folder.join(&executable)).collect(),
        _ => vec![Path::new(value).join("bin").join(executable)],
    }
}

/// The (major, minor) after `release` in what `nvcc --version` prints.
pub fn release(version: &str) -> Option<(u32, u32)> {
    let (_, rest) = version.split_once("release ")?;
    let (major, minor) = rest.split([',', ' ', '\n']).next()?.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The PTX from which all machine code is made, so that the longer half of a compilation, from C++ to PTX, is done once.
/// Nothing is lost by it as long as no kernel asks which architecture it is compiled for, which a test sees to.
const PTX: u32 = 80;

/// nvcc's flags for a list of targets: `sm_…` is machine code, `compute_…` PTX.
pub fn target_flags(targets: &str) -> Result<Vec<String>, String> {
    let flag = |target: &str| {
        let (kind, number) = target.split_once('_').unwrap_or_default();
        let digits = number.trim_end_matches(['a', 'f']);
        let valid = matches!(kind, "sm" | "compute")
            && matches!(digits.len(), 2 | 3)
            && digits.bytes().all(|byte| byte.is_ascii_digit())
            && number.len() - digits.len() <= 1;
        let is_code = kind == "sm" && digits.parse::<u32>().is_ok_and(|digits| digits >= PTX);
        let ptx = if is_code { PTX.to_string() } else { number.into() };
        valid
            .then(|| format!("-gencode=arch=compute_{ptx},code={target}"))
            .ok_or_else(|| format!("GRIDGRAD_CUDA_TARGETS: '{target}' is no target like sm_80, sm_90a or compute_80"))
    };
    let flags: Vec<_> =
        targets.split([',', ' ']).filter(|target| !target.is_empty()).map(flag).collect::<Result<_, _>>()?;
    if flags.is_empty() { Err("GRIDGRAD_CUDA_TARGETS names no target".into()) } else { Ok(flags) }
}

/// nvcc with its flags, from the folder that holds `kernels/` to the folder of the fatbins.
pub struct Compiler {
    pub program: PathBuf,
    pub flags: Vec<String>,
    /// What else the output depends on: version, environment.
    pub identity: String,
    pub root: PathBuf,
    pub out: PathBuf,
}

impl Compiler {
    fn new(program: PathBuf, version: &str, out: &Path) -> Result<Self, String> {
        let targets =
            variable("GRIDGRAD_CUDA_TARGETS").map_or(TARGETS.into(), |value| value.to_string_lossy().into_owned());
        // Compressed for size, which any driver of CUDA 13 reads. Line numbers would double the fatbins.
        let fixed = "-fatbin -std=c++20 -I kernels -Xptxas -v -compress-mode=size";
        let mut flags: Vec<String> = fixed.split(' ').map(String::from).collect();
        if variable("GRIDGRAD_CUDA_LINEINFO").is_some() {
            flags.push("-lineinfo".into());
        }
        // Later releases have new warnings, and those must not keep anyone from building.
        if release(version) == Some(RELEASE) {
            flags.extend(["--Werror".into(), "all-warnings".into()]);
        }
        flags.extend(target_flags(&targets)?);
        let environment = NVCC_VARIABLES.map(|name| format!("{name}={:?}", variable(name)));
        let identity = format!("{}\n{}", version.trim(), environment.join("\n"));
        Ok(Compiler { program, flags, identity, root: ".".into(), out: out.into() })
    }

    /// Compiles what is out of date, as many files at a time as cargo allows. Gives the modules' names, sorted.
    ///
    /// nvcc's own `--threads` over the targets of a file would start more processes than cargo allows.
    pub fn compile_all(&self) -> Result<Vec<String>, String> {
        let mut modules = modules(&self.root.join("kernels"))?;
        modules.sort_by_key(|module| LONGEST.iter().position(|long| long == module).unwrap_or(LONGEST.len()));
        let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1);
        let next = AtomicUsize::new(0);
        let failures = Mutex::new(Vec::new());
        let work = || {
            while let Some(module) = modules.get(next.fetch_add(1, Ordering::Relaxed)) {
                if let Err(message) = self.compile(module) {
                    failures.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(message);
                }
            }
        };
        thread::scope(|scope| (0..modules.len().min(jobs)).for_each(|_| drop(scope.spawn(work))));
        let mut failures = failures.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
        failures.sort();
        modules.sort();
        if failures.is_empty() { Ok(modules) } else { Err(failures.join("\n")) }
    }

    /// Compiles one module unless its stamp is up to date. A build that is killed leaves old files or new, never halves.
    fn compile(&self, module: &str) -> Result<(), String> {
        let source = format!("kernels/{module}.cu");
        let file = |extension: &str| self.out.join(format!("{module}.{extension}"));
        let (fatbin, report, stamp) = (file("fatbin"), file("ptxas"), file("stamp"));
        if fatbin.exists() && report.exists() && self.is_current(&stamp) {
            return Ok(());
        }
        let (part, depfile) = (file("fatbin.part"), file("d"));
        let output = Command::new(&self.program)
            .args(&self.flags)
            .args([
                "-MD".as_ref(),
                "-MF".as_ref(),
                depfile.as_os_str(),
                "-o".as_ref(),
                part.as_os_str(),
                source.as_ref(),
            ])
            .current_dir(&self.root)
            .output()
            .map_err(|error| format!("{}: {error}", self.program.display()))?;
        if !output.status.success() {
            let _ = fs::remove_file(&part);
            return Err(format!(
                "nvcc does not compile {source}:\n{}",
                complaints(&String::from_utf8_lossy(&output.stderr))
            ));
        }
        let depfile = fs::read_to_string(&depfile).map_err(|error| format!("{}: {error}", depfile.display()))?;
        let current =
            self.stamp(&dependencies(&depfile)).ok_or(format!("{source}: a file it includes has vanished"))?;
        // The stamp goes first: an old one beside a new fatbin would look current again once the source is back to old.
        let _ = fs::remove_file(&stamp);
        write_whole(&report, &output.stderr)?;
        fs::rename(&part, &fatbin).map_err(|error| format!("{}: {error}", fatbin.display()))?;
        write_whole(&stamp, current.as_bytes())
    }

    fn is_current(&self, stamp: &Path) -> bool {
        let Ok(old) = fs::read_to_string(stamp) else { return false };
        let files: Vec<_> = old
            .lines()
            .filter_map(|line| line.strip_prefix("file ")?.split_once(' '))
            .map(|(_, path)| path.into())
            .collect();
        self.stamp(&files) == Some(old)
    }

    /// Everything that a fatbin depends on, or `None` if a file is missing.
    fn stamp(&self, files: &[String]) -> Option<String> {
        let mut stamp = format!("{} {}\n{}\n", self.program.display(), self.flags.join(" "), self.identity);
        for path in files {
            stamp += &format!("file {:016x} {path}\n", fingerprint(&fs::read(self.root.join(path)).ok()?));
        }
        Some(stamp)
    }
}

/// The names of `*.cu` in a folder, not below it, sorted. None where there is no folder.
pub fn modules(folder: &Path) -> Result<Vec<String>, String> {
    let Ok(entries) = fs::read_dir(folder) else { return Ok(Vec::new()) };
    let mut names = Vec::new();
    for path in entries.flatten().map(|entry| entry.path()).filter(|path| path.extension() == Some("cu".as_ref())) {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if !name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_') {
            return Err(format!("{}: a kernel file is named in a-z, 0-9 and _", path.display()));
        }
        names.push(name);
    }
    names.sort();
    Ok(names)
}

/// The files of `kernels/` that a depfile lists. The others are nvcc's own headers, which go with its version.
pub fn dependencies(depfile: &str) -> Vec<String> {
    let text = depfile.replace("\\\r\n", " ").replace("\\\n", " ");
    let (_, files) = text.split_once(" :").or_else(|| text.split_once(": ")).unwrap_or_default();
    let files = files.split_whitespace().filter(|path| Path::new(path).starts_with("kernels"));
    files.map(String::from).collect()
}

/// What nvcc says, without ptxas's report on what it did compile.
pub fn complaints(stderr: &str) -> String {
    let report = |line: &&str| line.starts_with("ptxas info") || line.ends_with("bytes spill loads");
    stderr.lines().filter(|line| !report(line)).collect::<Vec<_>>().join("\n")
}

/// The text of `kernels.rs`.
pub fn table(modules: &[String]) -> String {
    let mut text = String::from(
        "/// Each file of `kernels/` by its stem, with its code for all targets.\n\
         pub static KERNELS: &[(&str, &[u8])] = ",
    );
    if modules.is_empty() {
        return text + "&[];\n";
    }
    // The bytes of `include_bytes!` may begin anywhere, but drivers read a fatbin's header as 8-byte words.
    text += "{\n    #[repr(C, align(64))]\n    struct Aligned<T>(T);\n    &[\n";
    for module in modules {
        text += &format!("        ({module:?}, &Aligned(*include_bytes!(\"{module}.fatbin\")).0),\n");
    }
    text + "    ]\n};\n"
}

/// Replaces a file in one step.
fn write_whole(path: &Path, content: &[u8]) -> Result<(), String> {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    fs::write(&part, content)
        .and_then(|()| fs::rename(&part, path))
        .map_err(|error| format!("{}: {error}", path.display()))
}

/// FNV-1a, 64 bits: the same for every version of Rust, unlike the standard library's hasher.
fn fingerprint(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}
