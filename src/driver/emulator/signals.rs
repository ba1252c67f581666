//! Turns a kernel's access to memory that is not there into a fault of that kernel.
//!
//! On x86-64 and aarch64 Linux a handler of SIGSEGV and SIGBUS lets the fiber continue in a function that keeps the
//! report and ends it. Signals from anywhere else go to the handler that was there before. On other systems a guard page
//! ends the process.

#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(super) use linux::{install, use_alternate_stack};

#[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
pub(super) fn install() {}
#[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
pub(super) fn use_alternate_stack() {}

#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod linux {
    use std::cell::RefCell;
    use std::ffi::{c_int, c_void};
    use std::sync::OnceLock;

    use corosensei::trap::TrapHandlerRegs;

    use super::super::abi::{Thread, gridgrad_current_slot, place};
    use super::super::pages::Pages;
    use super::super::state::State;

    const SIGNALS: [c_int; 2] = [libc::SIGSEGV, libc::SIGBUS];
    static PREVIOUS: OnceLock<[libc::sigaction; 2]> = OnceLock::new();

    /// Installs the handler, once in the life of the process.
    pub fn install() {
        PREVIOUS.get_or_init(|| {
            SIGNALS.map(|signal| {
                // SAFETY: both structures are plain data, for which zeros are valid; the handler has the signature that
                // SA_SIGINFO asks for, and does nothing that a handler may not.
                unsafe {
                    let mut previous: libc::sigaction = std::mem::zeroed();
                    let mut action: libc::sigaction = std::mem::zeroed();
                    action.sa_sigaction = handle as extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) as usize;
                    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                    libc::sigaction(signal, &action, &mut previous);
                    previous
                }
            })
        });
    }

    /// A stack for the handler, as the fiber's own may be full.
    struct AlternateStack(#[expect(dead_code, reason = "owned, until the thread ends")] Pages);

    impl Drop for AlternateStack {
        fn drop(&mut self) {
            // SAFETY: takes back the stack that this thread was given, before its pages go.
            unsafe {
                let mut none: libc::stack_t = std::mem::zeroed();
                none.ss_flags = libc::SS_DISABLE;
                libc::sigaltstack(&none, std::ptr::null_mut());
            }
        }
    }

    thread_local! {
        static ALTERNATE: RefCell<Option<AlternateStack>> = const { RefCell::new(None) };
    }

    /// Gives this OS thread a stack for the handler unless it has one, as all threads that Rust starts do.
    pub fn use_alternate_stack() {
        // SAFETY: asks only.
        let current = unsafe {
            let mut current: libc::stack_t = std::mem::zeroed();
            libc::sigaltstack(std::ptr::null(), &mut current);
            current
        };
        if current.ss_flags & libc::SS_DISABLE == 0 {
            return;
        }
        let Ok(pages) = Pages::new(64 << 10) else { return };
        let size = pages.end() as usize - pages.start() as usize;
        let stack = libc::stack_t { ss_sp: pages.start().cast(), ss_flags: 0, ss_size: size };
        // SAFETY: the pages are owned by this thread until it ends, and are taken back before they go.
        unsafe { libc::sigaltstack(&stack, std::ptr::null_mut()) };
        ALTERNATE.with(|place| *place.borrow_mut() = Some(AlternateStack(pages)));
    }

    extern "C" fn handle(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
        // SAFETY: the slot is this OS thread's own, and the system passes a `ucontext_t` of the interrupted code. While
        // a fiber runs, its thread, block and state are live; the registers written are those that `corosensei` asks
        // for, to continue on the fiber's stack, which the check says the interrupted code ran on.
        unsafe {
            let thread = *gridgrad_current_slot();
            let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext;
            if !thread.is_null() {
                let state = (*(*thread).block).runner.cast::<State>();
                let trap = (&(*state).traps)[(*state).running as usize];
                let stack_pointer = stack_pointer(registers);
                if trap.stack_ptr_in_bounds(stack_pointer) {
                    let (address, what) = ((*info).si_addr() as u64, access(registers));
                    let overflow =
                        address.abs_diff(stack_pointer as u64) < 8192 && trap.stack_ptr_in_bounds(address as usize);
                    let report = move || report(state, thread, address, if overflow { "stack overflow" } else { what });
                    continue_with(registers, trap.setup_trap_handler(report));
                    return;
                }
            }
            chain(signal, info, context);
        }
    }

    /// Runs on the fiber's stack, after the handler has returned.
    fn report(state: *mut State, thread: *mut Thread, address: u64, what: &str) {
        // SAFETY: the state of the running fiber, to which nobody holds a reference while it runs.
        unsafe {
            let last = place((*thread).file, (*thread).line);
            let after = if last.is_empty() { last } else { format!(", after its wait at {last}") };
            let (place, address) = match (*state).shared.guard(address) {
                _ if what == "stack overflow" => (String::new(), None),
                Some(place) => (format!(", {place}"), None),
                None => (String::new(), Some(address)),
            };
            (*state).report(thread, format!("{what}{place}{after}"), address);
        }
    }

    /// Does what would have been done without this handler.
    ///
    /// # Safety
    /// The arguments are those of a signal handler.
    unsafe fn chain(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
        let index = usize::from(signal != SIGNALS[0]);
        // SAFETY: the previous action is what the system gave; where it is a function, its flags say of which type.
        unsafe {
            let Some(previous) = PREVIOUS.get().map(|all| all[index]) else {
                // Between the first installation and its record: nobody runs fibers yet.
                libc::signal(signal, libc::SIG_DFL);
                return;
            };
            match previous.sa_sigaction {
                libc::SIG_DFL | libc::SIG_IGN => {
                    // The access is repeated when this returns, and now has its usual end.
                    libc::signal(signal, libc::SIG_DFL);
                }
                function if previous.sa_flags & libc::SA_SIGINFO != 0 => {
                    let function: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) =
                        std::mem::transmute(function);
                    function(signal, info, context);
                }
                function => {
                    let function: extern "C" fn(c_int) = std::mem::transmute(function);
                    function(signal);
                }
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn stack_pointer(registers: &libc::mcontext_t) -> usize {
        registers.gregs[libc::REG_RSP as usize] as usize
    }

    #[cfg(target_arch = "x86_64")]
    fn access(registers: &libc::mcontext_t) -> &'static str {
        // Bit 1 of a page fault's error code.
        if registers.gregs[libc::REG_ERR as usize] & 2 != 0 { "write out of bounds" } else { "read out of bounds" }
    }

    #[cfg(target_arch = "x86_64")]
    fn continue_with(registers: &mut libc::mcontext_t, new: TrapHandlerRegs) {
        registers.gregs[libc::REG_RIP as usize] = new.rip as i64;
        registers.gregs[libc::REG_RSP as usize] = new.rsp as i64;
        registers.gregs[libc::REG_RBP as usize] = new.rbp as i64;
        registers.gregs[libc::REG_RDI as usize] = new.rdi as i64;
        registers.gregs[libc::REG_RSI as usize] = new.rsi as i64;
    }

    #[cfg(target_arch = "aarch64")]
    fn stack_pointer(registers: &libc::mcontext_t) -> usize {
        registers.sp as usize
    }

    #[cfg(target_arch = "aarch64")]
    fn access(_: &libc::mcontext_t) -> &'static str {
        "access out of bounds"
    }

    #[cfg(target_arch = "aarch64")]
    fn continue_with(registers: &mut libc::mcontext_t, new: TrapHandlerRegs) {
        (registers.pc, registers.sp) = (new.pc, new.sp);
        (registers.regs[0], registers.regs[1]) = (new.x0, new.x1);
        (registers.regs[29], registers.regs[30]) = (new.x29, new.lr);
    }
}
