//! Memory with guard pages, straight from the operating system.

use std::io;

/// What fresh memory holds: NaN as a float of any width, and far out of range as an index.
pub(super) const POISON: u8 = 0xFF;

/// Pages between two guard pages. Gives them back when dropped.
pub(super) struct Pages {
    base: *mut u8,
    length: usize,
    page: usize,
}

// SAFETY: the pages are plain memory that this value alone owns; who may touch their content is up to its user.
unsafe impl Send for Pages {}

impl Pages {
    /// At least `bytes` of zeros.
    pub fn new(bytes: usize) -> io::Result<Self> {
        let page = page_size();
        let inner = bytes.checked_next_multiple_of(page).ok_or(io::ErrorKind::OutOfMemory)?;
        let length = inner.checked_add(2 * page).ok_or(io::ErrorKind::OutOfMemory)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping wherever the system likes; it touches nothing that exists.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), length, libc::PROT_NONE, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let pages = Pages { base: base.cast(), length, page };
        // SAFETY: the range is the mapping just made, less its first and last page.
        let failed = unsafe { libc::mprotect(pages.start().cast(), inner, libc::PROT_READ | libc::PROT_WRITE) };
        if failed != 0 { Err(io::Error::last_os_error()) } else { Ok(pages) }
    }

    /// Gives the memory back, but keeps the addresses: every later access faults.
    pub fn retire(&self) {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
        // SAFETY: replaces the mapping made in `new`, whole, by one that nobody can touch.
        unsafe { libc::mmap(self.base.cast(), self.length, libc::PROT_NONE, flags, -1, 0) };
    }

    /// The first usable byte; the guard page lies before it.
    pub fn start(&self) -> *mut u8 {
        self.base.wrapping_add(self.page)
    }

    /// The guard page after the last usable byte.
    pub fn end(&self) -> *mut u8 {
        self.base.wrapping_add(self.length - self.page)
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`, whole.
        unsafe { libc::munmap(self.base.cast(), self.length) };
    }
}

fn page_size() -> usize {
    // SAFETY: asks for a constant of the system.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}
