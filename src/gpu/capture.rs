//! A piece of work recorded once and run again: a CUDA graph.

use std::sync::atomic::{AtomicU64, Ordering};

use super::Gpu;
use crate::Result;
use crate::driver::seam::Graph;

/// Recorded launches, with the memory they work in. Running it again reads and writes the same addresses.
pub(crate) struct Captured {
    gpu: &'static Gpu,
    graph: Box<dyn Graph>,
    recording: u64,
}

/// Graphs that have run so far, on any device.
static REPLAYS: AtomicU64 = AtomicU64::new(0);

/// How often recorded work has been repeated. It writes to memory that tensors hold, without asking them: what was
/// computed from their values may be out of date when this number has changed.
pub(crate) fn replays() -> u64 {
    REPLAYS.load(Ordering::Acquire)
}

impl Gpu {
    /// Whether what is launched now is recorded.
    pub fn is_recording(&self) -> bool {
        self.pool().is_recording()
    }

    /// Records what `body` launches, without running it. Memory must come from the pool, so `body` has run before.
    ///
    /// # Errors
    /// Those of `body`, and where it did what cannot be recorded: it waited for the device, copied from the host, or
    /// needed memory that the pool did not have.
    pub fn capture<R>(&'static self, body: impl FnOnce() -> Result<R>) -> Result<(Captured, R)> {
        let recording = self.pool().begin_recording();
        let result = self.driver().begin_capture().and_then(|()| {
            let result = body();
            // Ended in any case: a stream that stays in capture mode takes no other work.
            let graph = self.driver().end_capture();
            result.and_then(|result| Ok((graph?, result)))
        });
        self.pool().end_recording();
        match result {
            Ok((graph, result)) => Ok((Captured { gpu: self, graph, recording }, result)),
            Err(error) => {
                self.pool().forget_recording(recording);
                Err(error)
            }
        }
    }
}

impl Captured {
    /// Runs the recorded work.
    ///
    /// # Errors
    /// Where the device refuses, or earlier work failed.
    pub fn launch(&self) -> Result<()> {
        REPLAYS.fetch_add(1, Ordering::AcqRel);
        self.graph.launch()
    }
}

impl Drop for Captured {
    fn drop(&mut self) {
        self.gpu.pool().forget_recording(self.recording);
    }
}
