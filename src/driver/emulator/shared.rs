//! A block's shared memory: static arrays as the block comes to their declarations, and the dynamic part, which ends at
//! a guard page.

use std::ffi::c_void;

use super::pages::{POISON, Pages};

/// Bytes between and around arrays that no thread may write.
const GAP: usize = 64;
/// Dynamic shared memory begins at multiples of this.
const DYNAMIC_ALIGNMENT: usize = 128;
/// Room for the gaps between static arrays.
const GAPS: usize = 64 * GAP;

struct Array {
    declaration: *const c_void,
    start: usize,
    bytes: usize,
}

/// The shared memory of the block that an OS thread runs.
pub(super) struct Shared {
    fixed: Pages,
    dynamic: Pages,
    arrays: Vec<Array>,
    /// Offset in `fixed` behind the last array and its gap.
    used: usize,
    /// Bytes of all static arrays, without gaps.
    static_bytes: usize,
    dynamic_bytes: usize,
    limit: usize,
}

impl Shared {
    pub fn new(limit: usize) -> std::io::Result<Self> {
        let (fixed, dynamic) = (Pages::new(limit + GAPS)?, Pages::new(limit + DYNAMIC_ALIGNMENT)?);
        // SAFETY: the pages' own bytes, which nothing else uses yet.
        unsafe { fixed.start().write_bytes(POISON, fixed.end().offset_from(fixed.start()) as usize) };
        Ok(Shared { fixed, dynamic, arrays: Vec::new(), used: GAP, static_bytes: 0, dynamic_bytes: 0, limit })
    }

    /// Poisons everything for a new block with `dynamic_bytes` of dynamic shared memory, and returns that memory.
    pub fn reset(&mut self, dynamic_bytes: usize) -> *mut u8 {
        self.arrays.clear();
        // SAFETY (both): the launch has checked `dynamic_bytes` against the limit that the pages were made for, and no
        // thread of the last block runs any more.
        unsafe { self.fixed.start().write_bytes(POISON, self.used) };
        let rounded = dynamic_bytes.next_multiple_of(DYNAMIC_ALIGNMENT);
        let start = self.dynamic.end().wrapping_sub(rounded);
        unsafe { start.sub(DYNAMIC_ALIGNMENT).write_bytes(POISON, rounded + DYNAMIC_ALIGNMENT) };
        (self.used, self.static_bytes, self.dynamic_bytes) = (GAP, 0, dynamic_bytes);
        start
    }

    /// The array of a declaration: the same one for every thread of the block.
    pub fn array(&mut self, declaration: *const c_void, bytes: usize, alignment: usize) -> Result<*mut u8, String> {
        let base = self.fixed.start();
        if let Some(array) = self.arrays.iter().find(|array| array.declaration == declaration) {
            return Ok(base.wrapping_add(array.start));
        }
        let start = self.used.next_multiple_of(alignment);
        let needed = self.static_bytes + self.dynamic_bytes + bytes;
        if needed > self.limit || start + bytes + GAP > self.limit + GAPS {
            return Err(format!("{needed} bytes of shared memory, but a block can have {}", self.limit));
        }
        self.arrays.push(Array { declaration, start, bytes });
        self.static_bytes += bytes;
        self.used = start + bytes + GAP;
        Ok(base.wrapping_add(start))
    }

    /// What was written between the arrays, or around the dynamic part.
    pub fn check(&self) -> Option<&'static str> {
        let clean = |start: *const u8, bytes: usize| {
            // SAFETY: all ranges below lie within the two mappings, and no thread of the block runs any more.
            unsafe { std::slice::from_raw_parts(start, bytes) }.iter().all(|&byte| byte == POISON)
        };
        let mut end = 0;
        for array in &self.arrays {
            if !clean(self.fixed.start().wrapping_add(end), array.start - end) {
                return Some("something was written outside the static shared arrays");
            }
            end = array.start + array.bytes;
        }
        if !clean(self.fixed.start().wrapping_add(end), self.used - end) {
            return Some("something was written outside the static shared arrays");
        }
        let rounded = self.dynamic_bytes.next_multiple_of(DYNAMIC_ALIGNMENT);
        let start = self.dynamic.end().wrapping_sub(rounded);
        if !clean(start.wrapping_sub(DYNAMIC_ALIGNMENT), DYNAMIC_ALIGNMENT) {
            return Some("something was written before the start of the dynamic shared memory");
        }
        if !clean(start.wrapping_add(self.dynamic_bytes), rounded - self.dynamic_bytes) {
            return Some("something was written behind the end of the dynamic shared memory");
        }
        None
    }

    /// Which guard page `address` lies in, if any.
    pub fn guard(&self, address: u64) -> Option<&'static str> {
        let behind = |pages: &Pages| (pages.end() as u64..pages.end() as u64 + 4096).contains(&address);
        if behind(&self.dynamic) {
            Some("behind the end of the dynamic shared memory")
        } else if behind(&self.fixed) {
            Some("behind the end of the static shared memory")
        } else {
            None
        }
    }
}
