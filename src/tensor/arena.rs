//! Memory of buffers: pieces of a few large mappings, side by side and on huge pages.
//!
//! A page of 4 KiB for every few rows of a map makes products and gathers wait for the tables of pages, the more so in a
//! virtual machine, and every first write of one enters the kernel. Linux maps 2 MiB at once where it is asked to, but only
//! whole and aligned: buffers mapped one by one have small pages at both ends, or nothing else. Pieces come from the smallest
//! free range that holds them and join their free neighbours again, so that a program which repeats its steps soon finds
//! all its memory where it left it.

#![allow(unsafe_code, reason = "disjoint pieces of one mapping, some of them written while others are read")]

use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;

use memmap2::{MmapMut, MmapRaw};
use range_alloc::RangeAllocator;

/// Bytes in which memory is taken from the system and given back: a huge page of x86-64, and of Arm with pages of 4 KiB.
const PAGE: usize = 2 << 20;
const SMALLEST_REGION: usize = 64 << 20;

/// A piece of a region, until it is put back; contents are unspecified. Regions live as long as one of their blocks does.
pub(super) struct Block {
    memory: Arc<MmapRaw>,
    range: Range<usize>,
}

impl Deref for Block {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the range lies inside of the mapping, whose bytes the system has set to zero, and which this block keeps
        // alive. No two blocks of a mapping overlap ([`Region::take`] alone makes them, of ranges that are free), so that
        // nobody else writes to it.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr().add(self.range.start), self.range.len()) }
    }
}

impl DerefMut for Block {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and nobody else reads it; the mapping may be written.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_mut_ptr().add(self.range.start), self.range.len()) }
    }
}

struct Region {
    memory: Arc<MmapRaw>,
    /// Offset of the first page that is aligned.
    first: usize,
    free: RangeAllocator<usize>,
    /// Which pages have ever belonged to a block since they were mapped or given back.
    touched: Vec<bool>,
}

impl Region {
    fn map(bytes: usize) -> std::io::Result<Self> {
        // Mappings are aligned to small pages alone.
        let memory = MmapMut::map_anon(bytes + PAGE)?;
        // Without huge pages all works, slower.
        #[cfg(target_os = "linux")]
        let _ = memory.advise(memmap2::Advice::HugePage);
        let memory = MmapRaw::from(memory);
        let first = (memory.as_ptr() as usize).next_multiple_of(PAGE) - memory.as_ptr() as usize;
        let free = RangeAllocator::new(first..first + bytes);
        Ok(Region { memory: Arc::new(memory), first, free, touched: vec![false; bytes / PAGE] })
    }

    fn len(&self) -> usize {
        self.touched.len() * PAGE
    }

    /// The pages that hold some of a range's bytes.
    fn pages(&self, range: &Range<usize>) -> Range<usize> {
        (range.start - self.first) / PAGE..(range.end - self.first).div_ceil(PAGE)
    }

    fn take(&mut self, bytes: usize) -> Option<Block> {
        let range = self.free.allocate_range(bytes).ok()?;
        Some(Block { memory: Arc::clone(&self.memory), range })
    }

    /// Gives pages without blocks back to the system; returns their number.
    fn give_back(&mut self) -> usize {
        let mut used = vec![false; self.touched.len()];
        for range in self.free.allocated_ranges() {
            used[self.pages(&range)].fill(true);
        }
        let mut given = 0;
        for (page, touched) in self.touched.iter_mut().enumerate() {
            if *touched && !used[page] {
                #[cfg(target_os = "linux")]
                // SAFETY: no block has bytes on this page, so nobody holds a reference to what is lost.
                let done = unsafe {
                    let advice = memmap2::UncheckedAdvice::DontNeed;
                    self.memory.unchecked_advise_range(advice, self.first + page * PAGE, PAGE).is_ok()
                };
                #[cfg(not(target_os = "linux"))]
                let done = false;
                if done {
                    *touched = false;
                    given += 1;
                }
            }
        }
        given
    }
}

#[derive(Default)]
pub(super) struct Arena {
    regions: Vec<Region>,
    touched: usize,
}

impl Arena {
    pub const fn new() -> Self {
        Arena { regions: Vec::new(), touched: 0 }
    }

    /// Bytes of pages that blocks have been on, and that the system has not got back.
    pub fn touched(&self) -> usize {
        self.touched * PAGE
    }

    /// A block of so many bytes, at least one, and aligned to as many as they are a multiple of, up to a cache line; `None`
    /// where the system maps no more.
    pub fn take(&mut self, bytes: usize) -> Option<Block> {
        for index in 0..self.regions.len() {
            if let Some(block) = self.regions[index].take(bytes) {
                self.touch(index, &block);
                return Some(block);
            }
        }
        let mapped: usize = self.regions.iter().map(Region::len).sum();
        let needed = bytes.next_multiple_of(PAGE);
        // What is never written costs nothing, and few large regions are better filled than many.
        let region = Region::map(needed.max(mapped).max(SMALLEST_REGION)).or_else(|_| Region::map(needed)).ok()?;
        self.regions.push(region);
        let index = self.regions.len() - 1;
        let block = self.regions[index].take(bytes)?;
        self.touch(index, &block);
        Some(block)
    }

    fn touch(&mut self, index: usize, block: &Block) {
        let region = &mut self.regions[index];
        let pages = region.pages(&block.range);
        for touched in &mut region.touched[pages] {
            self.touched += usize::from(!std::mem::replace(touched, true));
        }
    }

    /// Takes back a block of its own.
    pub fn put(&mut self, block: Block) {
        let of_block = |region: &&mut Region| Arc::ptr_eq(&region.memory, &block.memory);
        if let Some(region) = self.regions.iter_mut().find(of_block) {
            region.free.free_range(block.range.clone());
        }
    }

    /// Gives all memory without blocks back to the system.
    pub fn give_back(&mut self) {
        for region in &mut self.regions {
            self.touched -= region.give_back();
        }
        self.regions.retain(|region| {
            let empty = region.free.is_empty();
            if empty {
                self.touched -= region.touched.iter().filter(|&&touched| touched).count();
            }
            !empty
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_disjoint_and_join_again() {
        let mut arena = Arena::new();
        let mut blocks: Vec<Block> = (1..100).map(|i| arena.take(i * 4096).unwrap()).collect();
        for (i, block) in blocks.iter_mut().enumerate() {
            assert_eq!((block.len(), block.as_ptr() as usize % 64), ((i + 1) * 4096, 0));
            block.fill(i as u8);
        }
        for (i, block) in blocks.iter().enumerate() {
            assert!(block.iter().all(|&byte| byte == i as u8));
        }
        let touched = arena.touched();
        assert!((99 * 100 / 2 * 4096..99 * 100 / 2 * 4096 + PAGE).contains(&touched));
        blocks.into_iter().for_each(|block| arena.put(block));
        // The whole region again, from its first page.
        let whole = arena.take(SMALLEST_REGION).unwrap();
        assert_eq!(arena.regions.len(), 1);
        assert_eq!(whole.as_ptr() as usize % PAGE, 0);
        assert_eq!(arena.touched(), SMALLEST_REGION);
        arena.put(whole);
        arena.give_back();
        assert_eq!((arena.touched(), arena.regions.len()), (0, 0));
    }

    #[test]
    fn a_step_repeated_touches_nothing_new() {
        let mut arena = Arena::new();
        let mut step = || {
            let kept: Vec<Block> = (0..40)
                .map(|i| {
                    let scratch = arena.take((i + 1) << 16).unwrap();
                    let kept = arena.take((40 - i) << 15).unwrap();
                    arena.put(scratch);
                    kept
                })
                .collect();
            kept.into_iter().rev().for_each(|block| arena.put(block));
            arena.touched()
        };
        let first = step();
        assert_eq!([step(), step()], [first; 2]);
    }

    #[test]
    fn pages_between_blocks_are_given_back() {
        let mut arena = Arena::new();
        let [mut low, middle, mut high] = [PAGE + 4096, 5 * PAGE, 4096].map(|bytes| arena.take(bytes).unwrap());
        low.fill(7);
        high.fill(9);
        arena.put(middle);
        assert_eq!(arena.touched(), 7 * PAGE);
        arena.give_back();
        #[cfg(target_os = "linux")]
        assert_eq!(arena.touched(), 3 * PAGE);
        assert!(low.iter().all(|&byte| byte == 7) && high.iter().all(|&byte| byte == 9));
        let again = arena.take(5 * PAGE).unwrap();
        assert_eq!(arena.touched(), 7 * PAGE);
        assert_eq!(arena.regions.len(), 1);
        [low, again, high].into_iter().for_each(|block| arena.put(block));
    }

    #[test]
    fn a_block_outlives_its_arena() {
        let mut arena = Arena::new();
        let mut block = arena.take(PAGE).unwrap();
        drop(arena);
        block.fill(1);
        assert!(block.iter().all(|&byte| byte == 1));
        // Another arena leaves it alone.
        Arena::new().put(block);
    }

    #[test]
    fn what_the_system_does_not_have_is_refused() {
        assert!(Arena::new().take(1 << 60).is_none());
    }
}
