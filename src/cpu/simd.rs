//! Run-time dispatch to the widest vector instructions that the processor has.
//!
//! Loops are plain Rust over slices, marked `#[inline(always)]`; [`dispatch`] compiles them once for each instruction
//! set (AVX-512, AVX2 with FMA, the baseline) and picks one when called. NEON is part of the AArch64 baseline. Builds
//! with debug assertions leave AVX-512 out, which halves the time they take to compile.

/// Runs `body` compiled for the best instruction set of this machine. `body` and what it calls must be
/// `#[inline(always)]`, or they stay compiled for the baseline. That holds for every closure, too, also those given to
/// iterators: write `for` loops, since the closure of a `for_each` is a function of its own once it is large.
#[inline(always)]
pub fn dispatch<R>(body: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        #[cfg(not(debug_assertions))]
        if let Some(avx512) = pulp::x86::V4::try_new() {
            return avx512.vectorize(body);
        }
        if let Some(avx2) = pulp::x86::V3::try_new() {
            return avx2.vectorize(body);
        }
    }
    body()
}

/// Runs `work`, which is written for explicit vectors, with the widest ones of this machine. For loops that the compiler
/// does not vectorise as they stand: blocks of many registers. Also builds with debug assertions have all sets.
#[inline(always)]
pub(crate) fn with_vectors<W: pulp::WithSimd>(work: W) -> W::Output {
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(avx512) = pulp::x86::V4::try_new() {
            return pulp::Simd::vectorize(avx512, work);
        }
        if let Some(avx2) = pulp::x86::V3::try_new() {
            return pulp::Simd::vectorize(avx2, work);
        }
    }
    #[cfg(target_arch = "aarch64")]
    if let Some(neon) = pulp::aarch64::Neon::try_new() {
        return pulp::Simd::vectorize(neon, work);
    }
    pulp::Simd::vectorize(pulp::Scalar128b, work)
}

/// Asks for the cache lines under `data`, which will be written.
#[inline(always)]
#[allow(unsafe_code, reason = "an instruction that has no safe form")]
pub(crate) fn prefetch_to_write<T>(data: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for line in data.chunks((64 / size_of::<T>().max(1)).max(1)) {
        // SAFETY: a prefetch reads and writes nothing, wherever it points; x86-64 always has it (without effect on
        // processors that know no such hint).
        unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_ET0 }>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = data;
}

/// Asks for the cache lines under `data`, which will be read.
#[inline(always)]
#[allow(unsafe_code, reason = "an instruction that has no safe form")]
pub(crate) fn prefetch<T>(data: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for line in data.chunks((64 / size_of::<T>().max(1)).max(1)) {
        // SAFETY: a prefetch reads and writes nothing, wherever it points; x86-64 always has it.
        unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = data;
}

/// Writes a vector of a loop that [`with_vectors`] runs past the caches, where the processor can and `data` begins on a
/// multiple of the vector's size. Whoever is done calls [`finish_streaming`].
#[inline(always)]
#[allow(unsafe_code, reason = "an instruction that has no safe form")]
pub(crate) fn stream<S: pulp::Simd>(data: &mut [f32], value: S::f32s) {
    assert_eq!(data.len(), S::F32_LANES, "a vector");
    #[cfg(target_arch = "x86_64")]
    if (data.as_ptr() as usize).is_multiple_of(size_of::<S::f32s>()) {
        use std::arch::x86_64::{_mm256_loadu_ps, _mm256_stream_ps, _mm512_loadu_ps, _mm512_stream_ps};
        let (to, from) = (data.as_mut_ptr(), (&raw const value).cast());
        // SAFETY: `data` is as long as the vector and aligned to it, as was just checked; a vector of this size exists
        // only where `S` stands for the instruction set that has it.
        unsafe {
            match size_of::<S::f32s>() {
                64 => return _mm512_stream_ps(to, _mm512_loadu_ps(from)),
                32 => return _mm256_stream_ps(to, _mm256_loadu_ps(from)),
                _ => {}
            }
        }
    }
    S::as_mut_simd_f32s(data).0[0] = value;
}

/// Orders what [`stream`] wrote before everything that follows.
#[inline(always)]
#[allow(unsafe_code, reason = "an instruction that has no safe form")]
pub(crate) fn finish_streaming() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a fence touches no memory, and x86-64 always has it.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

/// The name of the instruction set that [`with_vectors`] uses here: the widest of this machine, in every build.
pub(crate) fn widest_instruction_set() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    if pulp::x86::V4::try_new().is_some() {
        return "AVX-512";
    }
    instruction_set()
}

/// Whether [`dispatch`] has 32 registers of 512 bits.
#[inline(always)]
pub fn has_wide_registers() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        cfg!(not(debug_assertions)) && pulp::x86::V4::try_new().is_some()
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// The name of the instruction set that [`dispatch`] uses here.
pub fn instruction_set() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        match pulp::x86::V3::try_new() {
            _ if has_wide_registers() => "AVX-512",
            Some(_) => "AVX2 with FMA",
            None => "SSE2",
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

/// Runs what `work` makes with every instruction set that this machine has.
#[cfg(test)]
pub(crate) fn with_every_set<W: pulp::WithSimd>(work: impl Fn() -> W) -> Vec<W::Output> {
    let mut results = vec![with_vectors(work())];
    results.push(pulp::Simd::vectorize(pulp::Scalar128b, work()));
    results.push(pulp::Simd::vectorize(pulp::Scalar, work()));
    #[cfg(target_arch = "x86_64")]
    results.extend(pulp::x86::V3::try_new().map(|avx2| pulp::Simd::vectorize(avx2, work())));
    results
}
