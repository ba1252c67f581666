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
    /// Whether what this thread launches now is recorded.
    pub fn is_recording(&self) -> bool {
        self.pool().1.is_recording()
    }

    /// Records what `body` launches, without running it, while other threads wait with their work for the device. Memory
    /// must come from the pool, so `body` has run before; nothing where the pool did not have enough all the same, since
    /// others use it too.
    ///
    /// # Errors
    /// Those of `body`, and where it did what cannot be recorded: it waited for the device or copied from the host.
    pub fn capture<R>(&'static self, body: impl FnOnce() -> Result<R>) -> Result<Option<(Captured, R)>> {
        let _others_wait = self.turns.record();
        self.driver().begin_capture()?;
        let recording = self.pool().1.begin_recording();
        let result = body();
        // Ended in any case: a stream that stays in capture mode takes no other work.
        let graph = self.driver().end_capture();
        let enough = self.pool().1.end_recording();
        let captured = match (result, graph) {
            (Ok(result), Ok(graph)) => return Ok(Some((Captured { gpu: self, graph, recording }, result))),
            (Err(error), _) | (_, Err(error)) => Err(error),
        };
        self.pool().1.forget_recording(recording);
        if enough { captured } else { Ok(None) }
    }
}

impl Captured {
    /// Runs the recorded work.
    ///
    /// # Errors
    /// Where the device refuses, or earlier work failed.
    pub fn launch(&self) -> Result<()> {
        REPLAYS.fetch_add(1, Ordering::AcqRel);
        let _turn = self.gpu.driver();
        self.graph.launch()
    }
}

impl Drop for Captured {
    fn drop(&mut self) {
        self.gpu.pool().1.forget_recording(self.recording);
    }
}
