//! `gridgrad doctor`: what this machine offers, in plain words.

use std::path::{Path, PathBuf};

use gridgrad::driver::{self, GpuInfo, NoGpu};
use gridgrad::{Device, Result, check_kernels};
use serde::Serialize;

use crate::output::{print, print_json};

/// Columns at which long explanations wrap.
const LINE_WIDTH: usize = 100;
/// Column at which explanations start.
const INDENT: usize = 18;

/// Data sets that gridgrad reads, by the name that the folder starts with.
const DATA_SETS: [&str; 4] = ["mnist", "cifar10", "gtsrb", "imagenette"];

/// Prints what the machine has: as aligned lines, or as one JSON object.
pub fn run(json: bool) -> Result<()> {
    let checkup = Checkup::of_this_machine();
    if json { print_json(&checkup) } else { print(&checkup.to_string()) }
}

#[derive(Serialize)]
struct Checkup {
    version: &'static str,
    system: String,
    cpu_model: Option<String>,
    physical_cores: Option<usize>,
    logical_cpus: Option<usize>,
    threads_in_use: usize,
    simd_found: Vec<&'static str>,
    simd_used: &'static str,
    memory: Option<Memory>,
    gpus: Vec<GpuInfo>,
    no_gpu_reason: Option<String>,
    gpu_kernels_built: bool,
    data: Data,
}

/// Bytes of main memory.
#[derive(Serialize)]
struct Memory {
    total_bytes: u64,
    available_bytes: u64,
    /// What a container may use of it, where that is less.
    limit_bytes: Option<u64>,
}

#[derive(Serialize)]
struct Data {
    folder: Option<PathBuf>,
    folder_exists: bool,
    sets_found: Vec<&'static str>,
}

impl Checkup {
    fn of_this_machine() -> Self {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let (gpus, no_gpu_reason) = match driver::probe() {
            Ok(gpus) => (gpus, None),
            Err(reason) => (Vec::new(), Some(reason.to_string())),
        };
        Checkup {
            version: env!("CARGO_PKG_VERSION"),
            system: system(),
            cpu_model: field(&cpuinfo, "model name").map(String::from),
            physical_cores: physical_cores(&cpuinfo),
            logical_cpus: std::thread::available_parallelism().ok().map(usize::from),
            threads_in_use: rayon::current_num_threads(),
            simd_found: simd_found(),
            simd_used: simd_used(),
            memory: memory(),
            gpus,
            no_gpu_reason,
            gpu_kernels_built: driver::kernels_built(),
            data: data(std::env::var_os("GRIDGRAD_DATA").filter(|v| !v.is_empty()).map(PathBuf::from)),
        }
    }

    /// Whether all is well, what was looked at, what was found.
    fn lines(&self) -> Vec<(bool, &'static str, String)> {
        let unknown = || String::from("unknown");
        let count = |n: Option<usize>| n.map_or_else(unknown, |n| n.to_string());
        let threads = format!(
            "{} in use (RAYON_NUM_THREADS sets how many); cores: {} physical, {} logical",
            self.threads_in_use,
            count(self.physical_cores),
            count(self.logical_cpus),
        );
        let found = if self.simd_found.is_empty() { "none known".into() } else { self.simd_found.join(", ") };
        let mut lines = vec![
            (true, "system", self.system.clone()),
            (self.cpu_model.is_some(), "processor", self.cpu_model.clone().unwrap_or_else(unknown)),
            (true, "threads", threads),
            (!self.simd_found.is_empty(), "SIMD found", found),
            (self.simd_used != SCALAR, "SIMD used", self.simd_used.into()),
            (self.memory.is_some(), "memory", self.memory.as_ref().map_or_else(unknown, Memory::to_string)),
        ];
        lines.extend(self.gpus.iter().map(|gpu| (true, "GPU", describe(gpu))));
        lines.extend(self.no_gpu_reason.iter().map(|reason| (false, "GPU", reason.clone())));
        let kernels = match self.gpu_kernels_built {
            true => match Device::best() {
                Device::Cpu => "built in".into(),
                gpu => match check_kernels(gpu) {
                    Ok(count) => format!("{count}, loaded and compared on {gpu}"),
                    Err(error) => error.to_string(),
                },
            },
            false if cfg!(feature = "cuda") => NoGpu::BuiltWithoutNvcc.to_string(),
            false => NoGpu::FeatureOff.to_string(),
        };
        lines.push((self.gpu_kernels_built, "GPU kernels", kernels));
        lines.push((!self.data.sets_found.is_empty(), "data sets", self.data.to_string()));
        lines
    }
}

impl std::fmt::Display for Checkup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "gridgrad {} on this machine\n", self.version)?;
        for (well, name, text) in self.lines() {
            let mark = if well { '✓' } else { '–' };
            let mut label = format!("  {mark} {name}");
            for line in wrap(&text, LINE_WIDTH - INDENT) {
                writeln!(f, "{label:<INDENT$}{line}")?;
                label.clear();
            }
        }
        Ok(())
    }
}

impl std::fmt::Display for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} in all, {} available", gibibytes(self.total_bytes), gibibytes(self.available_bytes))?;
        self.limit_bytes.map_or(Ok(()), |limit| write!(f, "; limited here to {}", gibibytes(limit)))
    }
}

impl std::fmt::Display for Data {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Some(folder) = &self.folder else {
            return write!(
                f,
                "GRIDGRAD_DATA is not set; point it at a folder that holds {}, or work with the built-in digits",
                DATA_SETS.join(", ")
            );
        };
        let folder = folder.display();
        if !self.folder_exists {
            return write!(f, "GRIDGRAD_DATA is {folder}, which is not a folder that can be read");
        }
        let found = if self.sets_found.is_empty() { "none".into() } else { self.sets_found.join(", ") };
        write!(f, "{found} in GRIDGRAD_DATA ({folder})")?;
        let missing: Vec<_> = DATA_SETS.into_iter().filter(|set| !self.sets_found.contains(set)).collect();
        if missing.is_empty() { Ok(()) } else { write!(f, "; not there: {}", missing.join(", ")) }
    }
}

fn describe(gpu: &GpuInfo) -> String {
    let (major, minor) = gpu.compute_capability;
    let driver = driver::cuda_version(gpu.driver_version);
    let memory = gibibytes(gpu.total_memory_bytes as u64);
    format!("cuda:{} {}, {memory}, compute capability {major}.{minor}, driver for CUDA {driver}", gpu.ordinal, gpu.name)
}

fn gibibytes(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / (1_u64 << 30) as f64)
}

/// The operating system's own name where it tells, and the kind of processor.
fn system() -> String {
    let release = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let name = release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME=")).map(|name| name.trim_matches('"'));
    format!("{}, {}", name.unwrap_or(std::env::consts::OS), std::env::consts::ARCH)
}

/// The first `name : value` of a file of /proc.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.split_once(':').filter(|(key, _)| key.trim() == name)).map(|(_, v)| v.trim())
}

/// Distinct (socket, core) pairs of /proc/cpuinfo; hardware threads of one core share theirs.
fn physical_cores(cpuinfo: &str) -> Option<usize> {
    let cores: std::collections::BTreeSet<_> =
        cpuinfo.split("\n\n").filter_map(|cpu| Some((field(cpu, "physical id")?, field(cpu, "core id")?))).collect();
    (!cores.is_empty()).then_some(cores.len())
}

fn simd_found() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    let features = [
        ("AVX2", is_x86_feature_detected!("avx2")),
        ("FMA", is_x86_feature_detected!("fma")),
        ("AVX-512F", is_x86_feature_detected!("avx512f")),
        ("AVX-512-BF16", is_x86_feature_detected!("avx512bf16")),
    ];
    #[cfg(target_arch = "aarch64")]
    let features = [("NEON", std::arch::is_aarch64_feature_detected!("neon"))];
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let features: [(&str, bool); 0] = [];
    features.into_iter().filter_map(|(name, found)| found.then_some(name)).collect()
}

const SCALAR: &str = "none: plain code, slow but right";

/// What run-time dispatch chooses here.
fn simd_used() -> &'static str {
    match pulp::Arch::new() {
        #[cfg(target_arch = "x86_64")]
        pulp::Arch::V4(_) => "AVX-512 (x86-64-v4), chosen when the program starts",
        #[cfg(target_arch = "x86_64")]
        pulp::Arch::V3(_) => "AVX2 and FMA (x86-64-v3), chosen when the program starts",
        #[cfg(target_arch = "aarch64")]
        pulp::Arch::Neon(_) => "NEON",
        _ => SCALAR,
    }
}

fn memory() -> Option<Memory> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let bytes = |name| Some(1024 * field(&meminfo, name)?.strip_suffix("kB")?.trim().parse::<u64>().ok()?);
    let total_bytes = bytes("MemTotal")?;
    let limit = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"]
        .iter()
        .find_map(|path| std::fs::read_to_string(path).ok()?.trim().parse().ok());
    let limit_bytes = limit.filter(|limit| *limit < total_bytes);
    Some(Memory { total_bytes, available_bytes: bytes("MemAvailable")?, limit_bytes })
}

fn data(folder: Option<PathBuf>) -> Data {
    let names = folder.as_deref().and_then(folders_in);
    let found = |set: &&str| names.iter().flatten().any(|name| name.to_lowercase().starts_with(set));
    let sets_found = DATA_SETS.into_iter().filter(found).collect();
    Data { folder_exists: names.is_some(), folder, sets_found }
}

fn folders_in(folder: &Path) -> Option<Vec<String>> {
    let entries = std::fs::read_dir(folder).ok()?.flatten();
    Some(entries.filter(|e| e.path().is_dir()).map(|e| e.file_name().to_string_lossy().into_owned()).collect())
}

/// Breaks at spaces into lines of at most `width` characters, unless a single word is longer.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.into()),
        }
    }
    lines
}
