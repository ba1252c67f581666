//! The device's memory: every buffer ends at a guard page, is poisoned when it is handed out, and is checked for writes
//! into the few bytes that the guard pages leave open.

use std::collections::{BTreeMap, VecDeque};

use super::pages::{POISON, Pages};
use crate::driver::seam::Address;
use crate::tensor::Device;
use crate::{Error, Result};

/// Buffers begin at multiples of this, so they end up to 15 bytes before their guard page.
const ALIGNMENT: usize = 16;
/// What lies around a buffer on its own pages.
const CANARY: u8 = 0xA5;
/// How many bytes before each buffer are looked at after every launch; all are when it is freed.
const NEAR: usize = 64;

/// How many freed buffers keep their addresses, so that a use after the free faults and does not hit a new buffer.
const RETIRED: usize = 1024;

struct Buffer {
    pages: Pages,
    bytes: usize,
}

impl Buffer {
    /// The bytes of its pages before and behind it.
    fn margins(&mut self) -> [&mut [u8]; 2] {
        let rounded = self.bytes.next_multiple_of(ALIGNMENT);
        let before = self.pages.end() as usize - self.pages.start() as usize - rounded;
        // SAFETY (both): the pages are mapped and writable, the two ranges lie within them and do not overlap, and only
        // this buffer's owner, borrowed for as long, touches them.
        unsafe {
            let front = std::slice::from_raw_parts_mut(self.pages.start(), before);
            let back = self.pages.end().sub(rounded - self.bytes);
            [front, std::slice::from_raw_parts_mut(back, rounded - self.bytes)]
        }
    }

    fn poison(&mut self) {
        let start = self.pages.end().wrapping_sub(self.bytes.next_multiple_of(ALIGNMENT));
        // SAFETY: the buffer's own bytes, which lie within its pages.
        unsafe { start.write_bytes(POISON, self.bytes) };
    }

    /// What was written around the buffer, in words; `near` looks close by only. Puts the canary back.
    fn check(&mut self, near: bool) -> Option<String> {
        let bytes = self.bytes;
        let [front, back] = self.margins();
        let skip = if near { front.len().saturating_sub(NEAR) } else { 0 };
        let (before, after) = (smashed(&mut front[skip..]), smashed(back));
        let side = match (before, after) {
            (_, true) => "behind the end",
            (true, false) => "before the start",
            (false, false) => return None,
        };
        Some(format!("something was written {side} of a buffer of {bytes} bytes"))
    }
}

fn smashed(margin: &mut [u8]) -> bool {
    let smashed = margin.iter().any(|&byte| byte != CANARY);
    if smashed {
        margin.fill(CANARY);
    }
    smashed
}

/// Counters of what a program asked for, for tests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counters {
    /// Buffers that live.
    pub live: usize,
    /// Their bytes.
    pub bytes: usize,
    /// Allocations so far.
    pub allocations: u64,
    /// Kernels run so far.
    pub launches: u64,
    /// Uploads and downloads so far.
    pub transfers: u64,
}

/// All buffers of a device, by address.
pub(super) struct Memory {
    buffers: BTreeMap<u64, Buffer>,
    retired: VecDeque<Pages>,
    pub counters: Counters,
    pub limit: usize,
    /// A fault found where no error could be returned.
    pub pending: Option<String>,
}

impl Memory {
    pub fn new(limit: usize) -> Self {
        Memory {
            buffers: BTreeMap::new(),
            retired: VecDeque::new(),
            counters: Counters::default(),
            limit,
            pending: None,
        }
    }

    pub fn allocate(&mut self, bytes: usize) -> Result<Address> {
        let free = self.limit.saturating_sub(self.counters.bytes);
        let refused =
            || Error::OutOfDeviceMemory { device: Device::Emulated, requested: bytes, free, total: self.limit };
        if bytes > free {
            return Err(refused());
        }
        let mut buffer = Buffer { pages: Pages::new(bytes.max(1)).map_err(|_| refused())?, bytes };
        buffer.margins().into_iter().for_each(|margin| margin.fill(CANARY));
        buffer.poison();
        let address = buffer.pages.end() as u64 - bytes.next_multiple_of(ALIGNMENT) as u64;
        self.buffers.insert(address, buffer);
        self.counters.live += 1;
        self.counters.allocations += 1;
        self.counters.bytes += bytes;
        Ok(Address(address))
    }

    pub fn free(&mut self, address: Address, bytes: usize) {
        match self.buffers.remove(&address.0) {
            Some(mut buffer) if buffer.bytes == bytes => {
                self.counters.live -= 1;
                self.counters.bytes -= bytes;
                let found = buffer.check(false);
                self.remember(found);
                self.retire(buffer.pages);
            }
            Some(buffer) => {
                self.remember(Some(format!("{bytes} bytes freed of a buffer of {}", buffer.bytes)));
                self.buffers.insert(address.0, buffer);
            }
            None => self.remember(Some(format!("no buffer begins at the freed address {:#x}", address.0))),
        }
    }

    fn retire(&mut self, pages: Pages) {
        pages.retire();
        self.retired.push_back(pages);
        if self.retired.len() > RETIRED {
            self.retired.pop_front();
        }
    }

    /// Poisons memory that is handed out again. It may be a part of a buffer.
    pub fn recycle(&mut self, address: Address, bytes: usize) {
        let found = match self.find(address, bytes) {
            Ok(buffer) => {
                let found = buffer.check(false);
                // SAFETY: `find` has checked that the range lies in a live buffer; nothing else uses recycled memory.
                unsafe { (address.0 as *mut u8).write_bytes(POISON, bytes) };
                found
            }
            Err(reason) => Some(reason),
        };
        self.remember(found);
    }

    /// Checks that a range lies within one live buffer.
    pub fn check_range(&mut self, call: &'static str, address: Address, bytes: usize) -> Result<()> {
        match self.find(address, bytes) {
            Ok(_) => Ok(()),
            Err(reason) => Err(Error::Gpu { device: Device::Emulated, call, reason }),
        }
    }

    /// What was written around any buffer, near it or anywhere on its pages.
    pub fn check(&mut self, near: bool) -> Option<String> {
        self.buffers.values_mut().fold(None, |found, buffer| buffer.check(near).or(found))
    }

    /// Where an address lies, seen from the nearest buffer.
    pub fn describe(&self, address: u64) -> String {
        const NEAREST: u64 = 1 << 20;
        if address < 4096 {
            return format!("{address} bytes from a null pointer");
        }
        if let Some((&start, buffer)) = self.buffers.range(..=address).next_back() {
            let behind = address.saturating_sub(start + buffer.bytes as u64);
            if behind < NEAREST {
                return format!("{behind} bytes behind the end of a buffer of {} bytes", buffer.bytes);
            }
        }
        match self.buffers.range(address..).next() {
            Some((&start, buffer)) if start - address < NEAREST => {
                format!("{} bytes before the start of a buffer of {} bytes", start - address, buffer.bytes)
            }
            _ => format!("at address {address:#x}, near no live buffer"),
        }
    }

    fn find(&mut self, address: Address, bytes: usize) -> std::result::Result<&mut Buffer, String> {
        let reason = || format!("{bytes} bytes at {:#x} do not lie within one live buffer", address.0);
        let (&start, buffer) = self.buffers.range_mut(..=address.0).next_back().ok_or_else(reason)?;
        let end = address.0.checked_add(bytes as u64).ok_or_else(reason)?;
        if end <= start + buffer.bytes as u64 { Ok(buffer) } else { Err(reason()) }
    }

    fn remember(&mut self, found: Option<String>) {
        self.pending = self.pending.take().or(found);
    }
}
