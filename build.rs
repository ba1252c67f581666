//! Compiles `kernels/*.cu`: with nvcc for GPUs (feature `cuda`), with a C++ compiler for the emulator (feature
//! `emulator`). Takes a fingerprint of the sources.

#[path = "build/emulator.rs"]
mod emulator;
#[path = "build/fingerprint.rs"]
mod fingerprint;
#[path = "build/nvcc.rs"]
mod nvcc;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-changed=kernels");
    fingerprint::emit();
    nvcc::build(std::env::var_os("CARGO_FEATURE_CUDA").is_some());
    if std::env::var_os("CARGO_FEATURE_EMULATOR").is_some() {
        emulator::build();
    }
}
