//! The threads of one block: who runs, who waits for whom, who may go on.

use std::ffi::{c_char, c_void};
use std::sync::atomic::{AtomicU64, Ordering};

use corosensei::Yielder;
use corosensei::trap::CoroutineTrapHandler;

use super::abi::{Block, EXCHANGE_BYTES, Index, Invoke, Thread, place};
use super::fault::Fault;
use super::shared::Shared;

/// What a launch asks of every block.
pub(super) struct Launch {
    pub invoke: Invoke,
    /// Addresses of the arguments.
    pub arguments: *const *const u8,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub shared: usize,
    /// Seed of the order of fibers and blocks; 0 for the natural one.
    pub schedule: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Status {
    Unstarted,
    Running,
    AtBlock,
    /// At a rendezvous of the lanes of this mask.
    AtWarp(u32),
    Exited,
}

/// What fibers and their scheduler share. Fibers reach it through a raw pointer, and no reference to it lives across a
/// switch.
pub(super) struct State {
    pub block: Block,
    pub threads: Vec<Thread>,
    statuses: Vec<Status>,
    /// Which fiber each thread runs on, once started.
    pub fiber_of: Vec<u32>,
    /// Threads to run in this round, in order, and how many of them have been.
    ready: Vec<u32>,
    position: usize,
    at_block: usize,
    exited: usize,
    votes: u32,
    /// How many threads came to the last barrier with a true predicate.
    pub count: u32,
    /// Lanes of each warp that wait at a rendezvous.
    waiting: Vec<u32>,
    /// Warps of which some do.
    rendezvous: Vec<u32>,
    exchange: Vec<u128>,
    pub shared: Shared,
    pub fault: Option<Fault>,
    pub invoke: Option<Invoke>,
    pub arguments: *const *const u8,
    random: u64,
    /// Where this OS thread keeps the running thread.
    pub slot: *mut *mut Thread,
    pub running: u32,
    /// Fibers without a thread.
    pub idle: Vec<u32>,
    /// For each fiber.
    pub yielders: Vec<*const Yielder<(), ()>>,
    /// For each fiber.
    pub traps: Vec<CoroutineTrapHandler<()>>,
}

/// Blocks run so far.
static RUNS: AtomicU64 = AtomicU64::new(0);

impl State {
    pub fn new(limit: usize) -> std::io::Result<Self> {
        let none = Index::default();
        let (dynamic_shared, runner) = (std::ptr::null_mut(), std::ptr::null_mut());
        Ok(State {
            block: Block { index: none, threads: none, blocks: none, dynamic_shared, runner, run: 0 },
            threads: Vec::new(),
            statuses: Vec::new(),
            fiber_of: Vec::new(),
            ready: Vec::new(),
            position: 0,
            at_block: 0,
            exited: 0,
            votes: 0,
            count: 0,
            waiting: Vec::new(),
            rendezvous: Vec::new(),
            exchange: Vec::new(),
            shared: Shared::new(limit)?,
            fault: None,
            invoke: None,
            arguments: std::ptr::null(),
            random: 0,
            slot: std::ptr::null_mut(),
            running: 0,
            idle: Vec::new(),
            yielders: Vec::new(),
            traps: Vec::new(),
        })
    }

    /// Makes everything as it is before the first thread of a block starts. `this` is where the state lives.
    pub fn prepare(&mut self, this: *mut State, launch: &Launch, block: u64) {
        let threads = launch.block.iter().product::<u32>() as usize;
        if self.threads.len() != threads || self.block.threads != Index::from(launch.block) {
            self.resize(launch.block, threads);
        }
        self.block = Block {
            index: Index::of(block, launch.grid),
            threads: launch.block.into(),
            blocks: launch.grid.into(),
            dynamic_shared: self.shared.reset(launch.shared),
            runner: this.cast::<c_void>(),
            run: RUNS.fetch_add(1, Ordering::Relaxed) + 1,
        };
        let block_pointer = &raw mut self.block;
        for thread in &mut self.threads {
            (thread.phase, thread.file, thread.block) = (0, std::ptr::null(), block_pointer);
        }
        self.statuses.fill(Status::Unstarted);
        self.waiting.fill(0);
        self.rendezvous.clear();
        (self.at_block, self.exited, self.votes, self.count) = (0, 0, 0, 0);
        (self.invoke, self.arguments, self.fault) = (Some(launch.invoke), launch.arguments, None);
        self.random = if launch.schedule == 0 { 0 } else { mix(launch.schedule ^ mix(block + 1)) | 1 };
        self.ready.clear();
        self.ready.extend(0..threads as u32);
        self.begin_round();
    }

    fn resize(&mut self, extent: [u32; 3], threads: usize) {
        let warps = threads.div_ceil(32);
        self.exchange.resize(warps * EXCHANGE_BYTES / size_of::<u128>(), 0);
        let exchange = self.exchange.as_mut_ptr().cast::<u8>();
        self.threads.clear();
        self.threads.extend((0..threads).map(|i| Thread {
            index: Index::of(i as u64, extent),
            lane: i as u32 % 32,
            phase: 0,
            exchange: exchange.wrapping_add(i / 32 * EXCHANGE_BYTES),
            block: std::ptr::null_mut(),
            file: std::ptr::null(),
            line: 0,
        }));
        self.statuses.resize(threads, Status::Unstarted);
        self.fiber_of.resize(threads, 0);
        self.waiting.resize(warps, 0);
    }

    /// The next thread of this round that goes on where it waited; none where the round is over, or where the next
    /// thread has yet to start.
    pub fn next_resumed(&mut self) -> Option<usize> {
        let thread = *self.ready.get(self.position)? as usize;
        if self.statuses[thread] == Status::Unstarted {
            return None;
        }
        self.position += 1;
        self.statuses[thread] = Status::Running;
        Some(thread)
    }

    pub fn round_is_over(&self) -> bool {
        self.position == self.ready.len()
    }

    /// The next thread of this round if it has yet to start: then the fiber that asks runs it.
    pub fn next_started(&mut self) -> Option<*mut Thread> {
        let thread = *self.ready.get(self.position)? as usize;
        if self.statuses[thread] != Status::Unstarted {
            return None;
        }
        self.position += 1;
        self.statuses[thread] = Status::Running;
        self.fiber_of[thread] = self.running;
        Some(&raw mut self.threads[thread])
    }

    pub fn exit(&mut self, thread: *const Thread) {
        let index = self.index_of(thread);
        self.statuses[index] = Status::Exited;
        self.exited += 1;
    }

    pub fn all_exited(&self) -> bool {
        self.exited == self.threads.len()
    }

    pub fn wait_block(&mut self, thread: *mut Thread, predicate: u32, file: *const c_char, line: u32) {
        let index = self.index_of(thread);
        (self.threads[index].file, self.threads[index].line) = (file, line);
        self.statuses[index] = Status::AtBlock;
        self.at_block += 1;
        self.votes += predicate;
    }

    /// Whether the thread may wait for this mask: it must be in it.
    pub fn wait_warp(&mut self, thread: *mut Thread, mask: u32, file: *const c_char, line: u32) -> bool {
        let index = self.index_of(thread);
        (self.threads[index].file, self.threads[index].line) = (file, line);
        let (warp, lane) = (index / 32, index % 32);
        if mask >> lane & 1 == 0 {
            return false;
        }
        self.statuses[index] = Status::AtWarp(mask);
        if self.waiting[warp] == 0 {
            self.rendezvous.push(warp as u32);
        }
        self.waiting[warp] |= 1 << lane;
        true
    }

    /// Begins the next round: all who need not wait any longer. False where there is none.
    pub fn release(&mut self) -> bool {
        self.ready.clear();
        if self.at_block == self.threads.len() {
            (self.at_block, self.count, self.votes) = (0, self.votes, 0);
            self.ready.extend(0..self.threads.len() as u32);
        } else {
            self.release_warps();
        }
        self.begin_round();
        !self.ready.is_empty()
    }

    /// Under a seed, a warp that may go on is held back half of the time while others go, so that warps run apart.
    fn release_warps(&mut self) {
        let mut warps = std::mem::take(&mut self.rendezvous);
        for hold_back in [self.random != 0, false] {
            warps.retain(|&warp| {
                if !(hold_back && self.draw() & 1 == 0) {
                    self.release_groups(warp as usize);
                }
                self.waiting[warp as usize] != 0
            });
            if !self.ready.is_empty() {
                break;
            }
        }
        self.rendezvous = warps;
    }

    /// Releases each group of lanes that wait for exactly each other.
    fn release_groups(&mut self, warp: usize) {
        let first = warp * 32;
        let mut left = self.waiting[warp];
        while left != 0 {
            let Status::AtWarp(mask) = self.statuses[first + left.trailing_zeros() as usize] else { break };
            let came = |lane: &usize| left >> lane & 1 == 1 && self.statuses[first + lane] == Status::AtWarp(mask);
            let group = (0..32).filter(came).fold(0u32, |group, lane| group | 1 << lane);
            if group == mask {
                self.waiting[warp] &= !group;
                self.ready.extend((0..32).filter(|lane| group >> lane & 1 == 1).map(|lane| first as u32 + lane));
            }
            left &= !group;
        }
    }

    fn begin_round(&mut self) {
        self.position = 0;
        if self.random != 0 {
            for i in (1..self.ready.len()).rev() {
                let j = (self.draw() % (i as u64 + 1)) as usize;
                self.ready.swap(i, j);
            }
        }
    }

    fn draw(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.random)
    }

    /// Who waits where, when nobody can go on. The thread named is the first of the smallest party.
    pub fn deadlock(&self) -> Fault {
        // A party: what its threads do, the first of them, how many they are.
        let mut parties: Vec<(String, usize, usize)> = Vec::new();
        for index in 0..self.threads.len() {
            let what = self.describe(index);
            match parties.iter_mut().find(|(other, ..)| *other == what) {
                Some((.., count)) => *count += 1,
                None => parties.push((what, index, 1)),
            }
        }
        parties.sort_by_key(|&(_, first, count)| (count, first));
        let list: Vec<String> = parties
            .iter()
            .take(4)
            .map(|(what, first, count)| match count {
                1 => format!("thread {} {what}", self.threads[*first].index),
                _ => format!("{count} threads from {} on {what}", self.threads[*first].index),
            })
            .collect();
        let more = if parties.len() > 4 { "; and others" } else { "" };
        Fault {
            block: self.block.index,
            thread: parties.first().map(|&(_, first, _)| self.threads[first].index),
            what: format!("no thread can go on: {}{more}", list.join("; ")),
            address: None,
        }
    }

    fn describe(&self, index: usize) -> String {
        // SAFETY: kernels pass string literals as files.
        let place = unsafe { place(self.threads[index].file, self.threads[index].line) };
        match self.statuses[index] {
            Status::AtBlock => format!("at the block's barrier, {place}"),
            Status::AtWarp(mask) => format!("waiting for lanes {mask:#010x}, {place}"),
            Status::Exited => "exited".into(),
            Status::Unstarted | Status::Running => "running".into(),
        }
    }

    /// Keeps a fault of the running thread; the first one of a block counts.
    pub fn report(&mut self, thread: *const Thread, what: String, address: Option<u64>) {
        let thread = self.threads.get(self.index_of(thread)).map(|thread| thread.index);
        let block = self.block.index;
        self.fault.get_or_insert(Fault { block, thread, what, address });
    }

    pub fn index_of(&self, thread: *const Thread) -> usize {
        (thread as usize - self.threads.as_ptr() as usize) / size_of::<Thread>()
    }
}

/// SplitMix64's finaliser.
pub(super) fn mix(mut x: u64) -> u64 {
    x = (x ^ x >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ x >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ x >> 31
}
