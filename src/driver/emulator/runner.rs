//! Runs the threads of a block, each as a fiber, on one OS thread.
//!
//! A fiber whose thread has exited takes the next thread that has yet to start, so a kernel that never waits needs one
//! fiber for the whole block and no switch. Fibers and their stacks are kept for the blocks that follow.

use std::ffi::{CStr, c_char, c_void};
use std::sync::{Mutex, PoisonError};

use corosensei::Coroutine;
use corosensei::stack::{DefaultStack, Stack, StackPointer};

use super::abi::{Thread, gridgrad_current_slot, place};
use super::fault::Fault;
use super::state::{Launch, State};

/// Bytes of a fiber's stack, without its guard page.
const STACK_BYTES: usize = 64 << 10;

/// A stack that begins some way into its pages. Stacks that all begin at the same offset would share a few sets of the
/// cache, and evict each other at every switch.
struct StaggeredStack {
    stack: DefaultStack,
    base: StackPointer,
}

impl StaggeredStack {
    fn new(index: u32) -> std::io::Result<Self> {
        // An odd number of cache lines apart, within the first page.
        let offset = (index as usize * 5 % 64) * 64;
        let stack = DefaultStack::new(STACK_BYTES)?;
        let base = stack.base();
        let base = StackPointer::new(base.get() - offset).unwrap_or(base);
        Ok(StaggeredStack { stack, base })
    }
}

// SAFETY: a stack that begins lower is a part of the whole one, and the offset keeps the alignment of 16 bytes.
unsafe impl Stack for StaggeredStack {
    fn base(&self) -> StackPointer {
        self.base
    }

    fn limit(&self) -> StackPointer {
        self.stack.limit()
    }
}

type Fiber = Coroutine<(), (), (), StaggeredStack>;

/// One block at a time.
pub(super) struct Runner {
    fibers: Vec<Fiber>,
    /// Shared with the fibers; owned here, and freed never: runners live as long as the process.
    state: *mut State,
}

// SAFETY: a runner moves to another OS thread only between blocks, when no fiber has a kernel's frame on its stack, and
// no frame that stays there (the loop in `fiber`) keeps an address of thread-local memory.
unsafe impl Send for Runner {}

/// Runners that are not in use.
static RUNNERS: Mutex<Vec<Runner>> = Mutex::new(Vec::new());

impl Runner {
    /// A runner that was used before, or else a new one.
    pub fn take(shared_limit: usize) -> std::io::Result<Self> {
        if let Some(runner) = RUNNERS.lock().unwrap_or_else(PoisonError::into_inner).pop() {
            return Ok(runner);
        }
        Ok(Runner { fibers: Vec::new(), state: Box::into_raw(Box::new(State::new(shared_limit)?)) })
    }

    /// Keeps the runner for the next launch.
    pub fn give_back(self) {
        RUNNERS.lock().unwrap_or_else(PoisonError::into_inner).push(self);
    }

    /// Runs one block from start to end.
    pub fn run(&mut self, launch: &Launch, block: u64) -> Result<(), Fault> {
        let state = self.state;
        // SAFETY (here and below): the state lives as long as the process; only this OS thread uses it now, and no
        // reference to it is held while a fiber runs.
        unsafe {
            (*state).slot = gridgrad_current_slot();
            (*state).prepare(state, launch, block);
        }
        let result = self.run_rounds();
        // SAFETY: the slot of this OS thread, just stored.
        unsafe { *(*state).slot = std::ptr::null_mut() };
        if result.is_err() {
            self.reset();
        }
        result
    }

    fn run_rounds(&mut self) -> Result<(), Fault> {
        let state = self.state;
        loop {
            self.run_round()?;
            // SAFETY: as in `run`.
            let state = unsafe { &mut *state };
            if state.all_exited() {
                return match state.shared.check() {
                    Some(what) => {
                        Err(Fault { block: state.block.index, thread: None, what: what.into(), address: None })
                    }
                    None => Ok(()),
                };
            }
            if !state.release() {
                return Err(state.deadlock());
            }
        }
    }

    fn run_round(&mut self) -> Result<(), Fault> {
        let state = self.state;
        loop {
            // SAFETY: as in `run`; the reference ends before the fiber is resumed.
            let fiber = unsafe {
                let state = &mut *state;
                if state.round_is_over() {
                    return Ok(());
                }
                let fiber = match state.next_resumed() {
                    Some(thread) => {
                        *state.slot = &raw mut state.threads[thread];
                        state.fiber_of[thread]
                    }
                    None => match state.idle.pop() {
                        Some(fiber) => fiber,
                        None => self.add_fiber()?,
                    },
                };
                state.running = fiber;
                fiber
            };
            self.fibers[fiber as usize].resume(());
            // SAFETY: as in `run`.
            if let Some(fault) = unsafe { (*state).fault.take() } {
                return Err(fault);
            }
        }
    }

    fn add_fiber(&mut self) -> Result<u32, Fault> {
        let index = self.fibers.len() as u32;
        // SAFETY: as in `run`.
        let state = unsafe { &mut *self.state };
        let stack = StaggeredStack::new(index).map_err(|error| Fault {
            block: state.block.index,
            thread: None,
            what: format!("the system has no stack for another thread: {error}"),
            address: None,
        })?;
        let fiber = fiber(stack, self.state, index);
        state.yielders.push(std::ptr::null());
        state.traps.push(fiber.trap_handler());
        self.fibers.push(fiber);
        Ok(index)
    }

    /// Abandons all threads of a block that has failed.
    fn reset(&mut self) {
        let state = self.state;
        // SAFETY: as in `run`.
        unsafe { (*state).idle.clear() };
        let fibers = std::mem::take(&mut self.fibers);
        for (index, mut old) in fibers.into_iter().enumerate() {
            // SAFETY: what is on the stack are frames of kernels, which own nothing, and of the callbacks and the loop
            // below, which hold nothing that needs dropping where they suspend.
            unsafe { old.force_reset() };
            let new = fiber(old.into_stack(), state, index as u32);
            // SAFETY: as in `run`.
            unsafe {
                (&mut (*state).traps)[index] = new.trap_handler();
                (*state).idle.push(index as u32);
            }
            self.fibers.push(new);
        }
    }
}

fn fiber(stack: StaggeredStack, state: *mut State, index: u32) -> Fiber {
    Coroutine::with_stack(stack, move |yielder, ()| {
        // SAFETY (all): as in `Runner::run`: the scheduler holds no reference while a fiber runs, and the references
        // here end with their statements. The kernel gets arguments that its caller vouches for.
        unsafe { (&mut (*state).yielders)[index as usize] = yielder };
        loop {
            while let Some(thread) = unsafe { (*state).next_started() } {
                unsafe {
                    *(*state).slot = thread;
                    if let Some(invoke) = (*state).invoke {
                        invoke((*state).arguments);
                    }
                    (*state).exit(*(*state).slot);
                }
            }
            unsafe {
                *(*state).slot = std::ptr::null_mut();
                (*state).idle.push(index);
            }
            yielder.suspend(());
        }
    })
}

/// The state of the block that `thread` belongs to.
///
/// # Safety
/// `thread` is a thread of a block that runs.
unsafe fn state_of(thread: *mut Thread) -> *mut State {
    // SAFETY: the caller promises a live thread; `State::prepare` has set its block and the block's runner.
    unsafe { (*(*thread).block).runner.cast() }
}

/// Goes back to the scheduler until it resumes this fiber.
///
/// # Safety
/// Called on the running fiber, whose state it is.
unsafe fn suspend(state: *mut State) {
    // SAFETY: the yielder of the running fiber lives on its stack for as long as the fiber does.
    unsafe {
        let yielder = (&(*state).yielders)[(*state).running as usize];
        (*yielder).suspend(());
    }
}

/// Stops the running thread for good.
///
/// # Safety
/// As `suspend`.
unsafe fn stop(state: *mut State) -> ! {
    loop {
        // SAFETY: the caller's promise.
        unsafe { suspend(state) };
    }
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn gridgrad_wait_block(thread: *mut Thread, vote: u32, file: *const c_char, line: u32) -> u32 {
    // SAFETY: kernels/emulator/shim.h passes the running thread.
    unsafe {
        let state = state_of(thread);
        (*state).wait_block(thread, vote, file, line);
        suspend(state);
        (*state).count
    }
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn gridgrad_wait_warp(thread: *mut Thread, mask: u32, file: *const c_char, line: u32) {
    // SAFETY: as above.
    unsafe {
        let state = state_of(thread);
        if !(*state).wait_warp(thread, mask, file, line) {
            let what = format!("waits for lanes {mask:#010x}, but is not among them, {}", place(file, line));
            (*state).report(thread, what, None);
            stop(state);
        }
        suspend(state);
    }
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn gridgrad_static_shared(
    thread: *mut Thread,
    declaration: *const c_void,
    bytes: usize,
    alignment: usize,
) -> *mut c_void {
    // SAFETY: as above.
    unsafe {
        let state = state_of(thread);
        match (*state).shared.array(declaration, bytes, alignment) {
            Ok(array) => array.cast(),
            Err(what) => {
                (*state).report(thread, what, None);
                stop(state)
            }
        }
    }
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn gridgrad_fault(
    thread: *mut Thread,
    reason: *const c_char,
    file: *const c_char,
    line: u32,
) -> ! {
    // SAFETY: as above, and the reason is a C string.
    unsafe {
        let state = state_of(thread);
        let what = format!("{}, {}", CStr::from_ptr(reason).to_string_lossy(), place(file, line));
        (*state).report(thread, what, None);
        stop(state)
    }
}
