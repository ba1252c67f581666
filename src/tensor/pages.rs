//! Huge pages for large buffers.
//!
//! A page of 4 KiB for every few rows of a map makes gathers wait for the tables of pages, the more so in a virtual machine,
//! and every first write of one enters the kernel. Linux maps 2 MiB at once where it is asked to.

#![allow(unsafe_code, reason = "madvise is a function of the system")]

use std::mem::MaybeUninit;

/// Asks for huge pages under those parts of `memory` that fill some; without an effect on other systems than Linux.
pub(super) fn prefer_huge<T>(memory: &mut [MaybeUninit<T>]) {
    #[cfg(target_os = "linux")]
    {
        const PAGE: usize = 4096;
        const HUGE_PAGE: usize = 2 << 20;
        let bytes = memory.as_mut_ptr_range();
        let (start, end) = ((bytes.start as usize).next_multiple_of(PAGE), bytes.end as usize / PAGE * PAGE);
        if end.saturating_sub(start) < HUGE_PAGE {
            return;
        }
        let skipped = start - bytes.start as usize;
        // SAFETY: the range lies inside of `memory`, and this advice changes no byte of it. An error (a kernel without
        // huge pages) leaves everything as it was.
        unsafe { libc::madvise(bytes.start.byte_add(skipped).cast(), end - start, libc::MADV_HUGEPAGE) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = memory;
}
