//! The device's clock: events in the stream, a pair for each stretch of work.

use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::sys;

use super::stream::{Stream, Turn};
use crate::Result;
use crate::driver::seam::Timer;

/// An event that notes the time, owned.
struct Event {
    stream: Arc<Stream>,
    raw: sys::CUevent,
}

// SAFETY: an event belongs to its context, not to a thread; it is used only under the stream's turn.
unsafe impl Send for Event {}

impl Event {
    /// Placed in the stream behind all work so far.
    fn record(stream: &Arc<Stream>, turn: &mut Turn<'_>) -> Result<Self> {
        let mut raw = std::ptr::null_mut();
        let flags = sys::CUevent_flags::CU_EVENT_DEFAULT as u32;
        // SAFETY: writes one pointer to a place that outlives the call; the context is current.
        turn.check("cuEventCreate", unsafe { sys::cuEventCreate(&mut raw, flags) })?;
        // SAFETY: event and stream are alive.
        match turn.check("cuEventRecord", unsafe { sys::cuEventRecord(raw, turn.raw()) }) {
            Ok(()) => Ok(Event { stream: stream.clone(), raw }),
            Err(error) => {
                // SAFETY: the event is ours, and nothing waits for it. The first error is the one to tell.
                let _ = unsafe { sys::cuEventDestroy_v2(raw) };
                Err(error)
            }
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the event is ours and not used any more.
        self.stream.quiet_turn(|turn| turn.check("cuEventDestroy", unsafe { sys::cuEventDestroy_v2(self.raw) }));
    }
}

/// From one event to another that is yet to come.
pub(super) struct Stretch(Event);

impl Stretch {
    pub(super) fn start(stream: &Arc<Stream>) -> Result<Self> {
        Event::record(stream, &mut stream.unrecorded_turn("time")?).map(Stretch)
    }
}

impl Timer for Stretch {
    fn stop(self: Box<Self>) -> Result<Duration> {
        let Stretch(first) = *self;
        let stream = first.stream.clone();
        let mut turn = stream.unrecorded_turn("time")?;
        let last = Event::record(&stream, &mut turn);
        let elapsed = last.as_ref().ok().map(|last| {
            let mut milliseconds = 0f32;
            // SAFETY: the event is alive.
            turn.check("cuEventSynchronize", unsafe { sys::cuEventSynchronize(last.raw) })?;
            // SAFETY: writes one number to a place that outlives the call; both events are recorded and done.
            let code = unsafe { sys::cuEventElapsedTime_v2(&mut milliseconds, first.raw, last.raw) };
            turn.check("cuEventElapsedTime", code)?;
            Ok(Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3))
        });
        // Events take turns of their own when dropped.
        drop(turn);
        elapsed.unwrap_or_else(|| last.map(|_| Duration::ZERO))
    }
}
