//! Device memory, kept between steps: once the first training step has filled the pool, later steps allocate nothing.

use std::collections::{BTreeMap, HashMap};

use crate::driver::seam::{Address, Driver};
use crate::tensor::MemoryStats;
use crate::{Error, Result};

/// Where a block is that a recording has touched.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Held {
    /// A tensor holds it.
    Live,
    /// Free for later work of the same recording.
    Free,
    /// Freed, but its content is read at every replay: made before the recording.
    Kept,
}

/// Blocks of one recording, with their sizes. They stay with it: a replay writes to them whoever holds them.
#[derive(Default)]
struct Recording {
    blocks: HashMap<Address, (usize, Held)>,
    /// Whether memory was asked for that the pool did not have.
    lacking: bool,
}

pub(super) struct Pool {
    /// On the emulator blocks have the size asked for, so that their end meets a guard page.
    exact: bool,
    free: BTreeMap<usize, Vec<Address>>,
    /// Recordings by number; the one under way, if any, is `current`.
    recordings: HashMap<u64, Recording>,
    current: Option<u64>,
    next: u64,
    stats: MemoryStats,
}

impl Pool {
    pub fn new(exact: bool) -> Self {
        Pool {
            exact,
            free: BTreeMap::new(),
            recordings: HashMap::new(),
            current: None,
            next: 0,
            stats: MemoryStats::default(),
        }
    }

    /// Bytes that a request takes: multiples of 512, then one of eight sizes per power of two.
    fn size_class(&self, bytes: usize) -> usize {
        if self.exact {
            return bytes.max(1);
        }
        let bytes = bytes.max(1).next_multiple_of(512);
        let step = (bytes.next_power_of_two() / 16).max(512);
        bytes.next_multiple_of(step)
    }

    pub fn take(&mut self, driver: &dyn Driver, bytes: usize) -> Result<Address> {
        let size = self.size_class(bytes);
        let address = match self.reuse(driver, size) {
            Some(address) => address,
            None => self.allocate(driver, size)?,
        };
        if let Some(recording) = self.current.and_then(|number| self.recordings.get_mut(&number)) {
            recording.blocks.insert(address, (size, Held::Live));
        }
        self.stats.live += size;
        self.stats.peak = self.stats.peak.max(self.stats.live);
        Ok(address)
    }

    fn reuse(&mut self, driver: &dyn Driver, size: usize) -> Option<Address> {
        let recorded = self.current.and_then(|number| self.recordings.get(&number)).and_then(|recording| {
            // The lowest address, so that two recordings of the same work are the same.
            let free = recording.blocks.iter().filter(|(_, held)| **held == (size, Held::Free));
            free.map(|(address, _)| *address).min()
        });
        if recorded.is_some() {
            return recorded;
        }
        let address = self.free.get_mut(&size).and_then(Vec::pop)?;
        self.stats.cached -= size;
        driver.recycle(address, size);
        Some(address)
    }

    fn allocate(&mut self, driver: &dyn Driver, size: usize) -> Result<Address> {
        if let Some(recording) = self.current.and_then(|number| self.recordings.get_mut(&number)) {
            recording.lacking = true;
            let reason = format!("the pool has no block of {size} bytes, and a new one cannot be recorded");
            return Err(Error::Gpu { device: driver.device(), call: "allocate", reason });
        }
        self.stats.allocations += 1;
        driver.allocate(size).or_else(|error| {
            if self.stats.cached == 0 {
                return Err(error);
            }
            self.release_cached(driver);
            driver.allocate(size)
        })
    }

    pub fn put(&mut self, address: Address, bytes: usize) {
        let size = self.size_class(bytes);
        self.stats.live -= size;
        for (number, recording) in &mut self.recordings {
            if let Some((_, held)) = recording.blocks.get_mut(&address) {
                *held = if self.current == Some(*number) { Held::Free } else { Held::Kept };
                return;
            }
        }
        if let Some(recording) = self.current.and_then(|number| self.recordings.get_mut(&number)) {
            recording.blocks.insert(address, (size, Held::Kept));
            return;
        }
        self.stats.cached += size;
        self.free.entry(size).or_default().push(address);
    }

    /// Blocks touched from here on belong to a recording, whose number is returned.
    pub fn begin_recording(&mut self) -> u64 {
        let number = self.next;
        self.next += 1;
        self.recordings.insert(number, Recording::default());
        self.current = Some(number);
        number
    }

    pub fn is_recording(&self) -> bool {
        self.current.is_some()
    }

    /// Returns whether the pool had all the memory that was asked for.
    pub fn end_recording(&mut self) -> bool {
        let ended = self.current.take().and_then(|number| self.recordings.get(&number));
        ended.is_none_or(|recording| !recording.lacking)
    }

    /// The recording will not be replayed again: what no tensor holds is free.
    pub fn forget_recording(&mut self, number: u64) {
        let Some(recording) = self.recordings.remove(&number) else { return };
        let mut blocks: Vec<_> = recording.blocks.into_iter().filter(|(_, (_, held))| *held != Held::Live).collect();
        blocks.sort_unstable_by_key(|(address, _)| *address);
        for (address, (size, _)) in blocks {
            self.stats.cached += size;
            self.free.entry(size).or_default().push(address);
        }
    }

    pub fn stats(&self) -> MemoryStats {
        self.stats
    }

    pub fn reset_peak(&mut self) {
        self.stats.peak = self.stats.live;
    }

    pub fn release_cached(&mut self, driver: &dyn Driver) {
        for (size, addresses) in std::mem::take(&mut self.free) {
            addresses.into_iter().for_each(|address| driver.free(address, size));
        }
        self.stats.cached = 0;
    }
}
