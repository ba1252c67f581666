//! Run-time dispatch to the widest vector instructions that the processor has.
//!
//! Loops are plain Rust over slices, marked `#[inline(always)]`; [`dispatch`] compiles them once for each instruction
//! set (AVX-512, AVX2 with FMA, the baseline) and picks one when called. NEON is part of the AArch64 baseline.

/// Runs `body` compiled for the best instruction set of this machine. `body` and what it calls must be
/// `#[inline(always)]`, or they stay compiled for the baseline. That holds for every closure, too, also those given to
/// iterators: write `for` loops, since the closure of a `for_each` is a function of its own once it is large.
#[inline(always)]
pub fn dispatch<R>(body: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(body)
}

/// The name of the instruction set that [`dispatch`] uses here.
pub fn instruction_set() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        match pulp::Arch::new() {
            pulp::Arch::V4(_) => "AVX-512",
            pulp::Arch::V3(_) => "AVX2 with FMA",
            _ => "SSE2",
        }
    }
    #[cfg(target_arch = "aarch64")]
    {
        "NEON"
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        "scalar"
    }
}
