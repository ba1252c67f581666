//! Whose turn it is to use a device: everybody's, or that of the one thread which records.
//!
//! A stream records whatever is launched into it. Work of another thread would end up in the recording instead of
//! running, and would run again with every repetition.

use std::ops::Deref;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

use crate::driver::seam::Driver;

#[derive(Default)]
struct State {
    recording: Option<ThreadId>,
    /// Calls under way, of all threads.
    calls: usize,
}

#[derive(Default)]
pub(super) struct Turns {
    state: Mutex<State>,
    changed: Condvar,
}

impl Turns {
    fn wait_while(&self, condition: impl Fn(&State) -> bool) -> MutexGuard<'_, State> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.changed.wait_while(state, |state| condition(state)).unwrap_or_else(PoisonError::into_inner)
    }

    /// A turn of this thread, after the recording of any other. A thread may have several at a time.
    pub fn take<'a>(&'a self, driver: &'a dyn Driver) -> Turn<'a> {
        let this = thread::current().id();
        self.wait_while(|state| state.recording.is_some_and(|thread| thread != this)).calls += 1;
        Turn { turns: self, driver }
    }

    /// All turns for this thread, until the result is dropped; or none where this thread records already.
    pub fn record(&self) -> Option<RecordingTurn<'_>> {
        let this = thread::current().id();
        let mut state =
            self.wait_while(|state| state.recording != Some(this) && (state.recording.is_some() || state.calls > 0));
        if state.recording.is_some() {
            return None;
        }
        state.recording = Some(this);
        Some(RecordingTurn(self))
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }
}

/// The driver, for as long as this thread's turn lasts.
pub(crate) struct Turn<'a> {
    turns: &'a Turns,
    driver: &'a dyn Driver,
}

impl<'a> Deref for Turn<'a> {
    type Target = dyn Driver + 'a;

    fn deref(&self) -> &Self::Target {
        self.driver
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.turns.change(|state| state.calls -= 1);
    }
}

/// Keeps other threads from the device.
pub(super) struct RecordingTurn<'a>(&'a Turns);

impl Drop for RecordingTurn<'_> {
    fn drop(&mut self) {
        self.0.change(|state| state.recording = None);
    }
}
