//! Recording launches, and running the recording.
//!
//! What is recorded should have run once before: the first use of a kernel, of ours or of cuBLASLt, may load code, which
//! the driver cannot do in a recording.

use std::sync::Arc;

use cudarc::driver::sys;

use super::Gpu;
use super::memory;
use super::stream::{Capture, Turn};
use crate::driver::seam::Graph;
use crate::{Error, Result};

/// A recording that the driver has prepared to run.
struct CudaGraph {
    /// Keeps the modules of the recorded kernels, and the stream.
    gpu: Arc<Gpu>,
    executable: sys::CUgraphExec,
    /// Memory that was given back during the recording: each run may use it.
    freed: Vec<u64>,
}

// SAFETY: an executable graph belongs to its context, not to a thread; it is used only under the stream's turn.
unsafe impl Send for CudaGraph {}

impl Gpu {
    pub(super) fn start_recording(&self) -> Result<()> {
        let mut turn = self.stream.turn()?;
        if turn.capture().is_some() {
            return Err(self.refuse("begin_capture", "a recording is under way already".into()));
        }
        // Other threads may allocate and copy meanwhile through other streams: only this thread's calls are watched.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive, and not the legacy one.
        let code = unsafe { sys::cuStreamBeginCapture_v2(turn.raw(), mode) };
        turn.check("cuStreamBeginCapture", code)?;
        let thread = std::thread::current().id();
        *turn.capture() = Some(Capture { thread, refused: None, freed: Vec::new() });
        Ok(())
    }

    pub(super) fn finish_recording(self: &Arc<Self>) -> Result<Box<dyn Graph>> {
        let mut turn = self.stream.turn()?;
        let Some(capture) = turn.capture().take() else {
            return Err(self.refuse("end_capture", "no recording is under way".into()));
        };
        if capture.thread != std::thread::current().id() {
            *turn.capture() = Some(capture);
            return Err(self.refuse("end_capture", "only the thread that began the recording can end it".into()));
        }
        match self.instantiate(&mut turn, capture.refused) {
            Ok(executable) => {
                let graph = CudaGraph { gpu: self.clone(), executable, freed: capture.freed };
                Ok(Box::new(graph))
            }
            Err(error) => {
                for address in capture.freed {
                    memory::free(&mut turn, address)?;
                }
                Err(error)
            }
        }
    }

    /// Ends the recording in every case, and prepares it to run where nothing in it was `refused`.
    fn instantiate(&self, turn: &mut Turn<'_>, refused: Option<&'static str>) -> Result<sys::CUgraphExec> {
        let mut graph = std::ptr::null_mut();
        // SAFETY: writes one pointer to a place that outlives the call; this thread began the capture of the stream.
        let ended = unsafe { sys::cuStreamEndCapture(turn.raw(), &mut graph) };
        let ended = turn.check("cuStreamEndCapture", ended);
        let mut executable = std::ptr::null_mut();
        let outcome = match refused {
            Some(call) => Err(self.refuse("end_capture", format!("{call} was called, which cannot be recorded"))),
            None => ended.and_then(|()| {
                // SAFETY: writes one pointer to a place that outlives the call; `graph` was just recorded.
                let code = unsafe { sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0) };
                turn.check("cuGraphInstantiate", code)
            }),
        };
        if !graph.is_null() {
            // SAFETY: `graph` is ours; what was instantiated from it lives on without it.
            turn.check("cuGraphDestroy", unsafe { sys::cuGraphDestroy(graph) })?;
        }
        outcome.map(|()| executable)
    }

    fn refuse(&self, call: &'static str, reason: String) -> Error {
        Error::Gpu { device: self.stream.device(), call, reason }
    }
}

impl Graph for CudaGraph {
    fn launch(&self) -> Result<()> {
        let mut turn = self.gpu.stream.turn()?;
        // SAFETY: the executable lives until `self` is dropped; its launches were unsafe, and their caller has promised
        // that their arguments stay valid for as long as the recording is run.
        turn.check("cuGraphLaunch", unsafe { sys::cuGraphLaunch(self.executable, turn.raw()) })?;
        turn.launched(|name| name.push_str("of a recorded graph"))
    }
}

impl Drop for CudaGraph {
    fn drop(&mut self) {
        self.gpu.stream.quiet_turn(|turn| {
            // SAFETY: the executable is ours; the driver keeps one that still runs until it is done.
            turn.check("cuGraphExecDestroy", unsafe { sys::cuGraphExecDestroy(self.executable) })?;
            for &address in &self.freed {
                memory::free(turn, address)?;
            }
            Ok(())
        });
    }
}
