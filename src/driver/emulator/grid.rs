//! Spreads the blocks of a launch over the threads of the current rayon pool.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use super::abi::Index;
use super::fault::Fault;
use super::runner::Runner;
use super::signals;
use super::state::{Launch, mix};

/// The most OS threads that one launch runs on: each keeps a stack for every thread of a block.
const MOST_RUNNERS: usize = 16;
/// Launches of fewer threads run where they are.
const FEWEST_THREADS: u64 = 1024;

// SAFETY: the arguments behind the pointer are only read, and outlive the launch.
unsafe impl Sync for Launch {}

/// Runs all blocks, or as many as it takes to find a fault: of those found, the one of the first block.
pub(super) fn run(launch: &Launch, shared_limit: usize) -> Result<(), Fault> {
    let blocks: u64 = launch.grid.iter().map(|&n| u64::from(n)).product();
    let threads: u64 = launch.block.iter().map(|&n| u64::from(n)).product();
    let tasks = (rayon::current_num_threads().min(MOST_RUNNERS) as u64).min(blocks);
    let grid = Grid {
        launch,
        shared_limit,
        blocks,
        stride: stride(blocks, launch.schedule),
        next: AtomicU64::new(0),
        failed: AtomicBool::new(false),
        first: Mutex::new(None),
    };
    if tasks <= 1 || blocks * threads < FEWEST_THREADS {
        grid.run_some();
    } else {
        (0..tasks as usize).into_par_iter().with_max_len(1).for_each(|_| grid.run_some());
    }
    match grid.first.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some((_, fault)) => Err(fault),
        None => Ok(()),
    }
}

struct Grid<'a> {
    launch: &'a Launch,
    shared_limit: usize,
    blocks: u64,
    /// The i-th block to run is i · stride modulo their number.
    stride: u64,
    next: AtomicU64,
    failed: AtomicBool,
    /// The first block that failed, and how.
    first: Mutex<Option<(u64, Fault)>>,
}

impl Grid<'_> {
    /// Runs blocks until none are left, or one has failed anywhere.
    fn run_some(&self) {
        signals::use_alternate_stack();
        let mut runner = match Runner::take(self.shared_limit) {
            Ok(runner) => runner,
            Err(error) => {
                let what = format!("the system has no memory for a block's state: {error}");
                return self.fail(0, Fault { block: Index::default(), thread: None, what, address: None });
            }
        };
        while !self.failed.load(Ordering::Relaxed) {
            let turn = self.next.fetch_add(1, Ordering::Relaxed);
            if turn >= self.blocks {
                break;
            }
            let block = (u128::from(turn) * u128::from(self.stride) % u128::from(self.blocks)) as u64;
            if let Err(fault) = runner.run(self.launch, block) {
                self.fail(block, fault);
            }
        }
        runner.give_back();
    }

    fn fail(&self, block: u64, fault: Fault) {
        self.failed.store(true, Ordering::Relaxed);
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        if first.as_ref().is_none_or(|&(other, _)| block < other) {
            *first = Some((block, fault));
        }
    }
}

/// A number without a common divisor with `blocks`: its multiples visit every block once.
fn stride(blocks: u64, schedule: u64) -> u64 {
    if schedule == 0 {
        return 1;
    }
    let mut stride = mix(schedule) % blocks.max(1) + 1;
    while greatest_common_divisor(stride, blocks) != 1 {
        stride += 1;
    }
    stride
}

fn greatest_common_divisor(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}
