//! The context and the one stream of a device, and whose turn it is to use them.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;

use cudarc::driver::sys::{self, CUresult};

use super::errors::{self, Room};
use crate::tensor::Device;
use crate::{Error, Result};

/// Locks, also after another thread has panicked: what the mutexes of this driver hold is whole between any two calls.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A device's primary context, and a stream of our own: the legacy stream cannot be captured.
pub(super) struct Stream {
    device: Device,
    handle: sys::CUdevice,
    context: sys::CUcontext,
    raw: sys::CUstream,
    /// Wait after every launch, so that a failure is known to be of that launch.
    synchronous: bool,
    state: Mutex<State>,
}

// SAFETY: a context and its streams belong to the process, not to a thread; the driver API takes them from any thread
// on which the context is current. Every use goes through a `Turn`, which holds the mutex and has made it current.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

/// What is known of the work in the stream.
#[derive(Default)]
struct State {
    /// The last work that was accepted.
    launched: String,
    /// An error of a call that could not return one.
    deferred: Option<Error>,
    /// Why the device is lost, once it is.
    lost: Option<String>,
    capture: Option<Capture>,
}

/// A recording under way.
pub(super) struct Capture {
    /// Only the thread that began a recording may end it.
    pub thread: ThreadId,
    /// The first thing that could not be recorded.
    pub refused: Option<&'static str>,
    /// Memory given back meanwhile: what was recorded may use it each time it runs.
    pub freed: Vec<u64>,
}

impl Stream {
    /// Retains the primary context of a device and makes a stream in it.
    pub(super) fn new(device: Device, handle: sys::CUdevice, synchronous: bool) -> Result<Self> {
        let mut context = std::ptr::null_mut();
        // SAFETY: writes one pointer to a place that outlives the call; `handle` came from `cuDeviceGet`.
        unavailable(device, "cuDevicePrimaryCtxRetain", unsafe {
            sys::cuDevicePrimaryCtxRetain(&mut context, handle)
        })?;
        let raw = std::ptr::null_mut();
        let mut stream = Stream { device, handle, context, raw, synchronous, state: Mutex::default() };
        // SAFETY: the context was retained just above.
        unavailable(device, "cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(context) })?;
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: writes one pointer to a place that outlives the call; the context is current.
        unavailable(device, "cuStreamCreate", unsafe { sys::cuStreamCreate(&mut stream.raw, flags) })?;
        Ok(stream)
    }

    pub(super) fn device(&self) -> Device {
        self.device
    }

    /// Waits for the others, makes the context current on this thread, and reports what was left unreported.
    pub(super) fn turn(&self) -> Result<Turn<'_>> {
        let mut turn = Turn { stream: self, state: lock(&self.state) };
        if let Some(reason) = &turn.state.lost {
            return Err(Error::DeviceLost { device: self.device, reason: reason.clone() });
        }
        if let Some(error) = turn.state.deferred.take() {
            return Err(error);
        }
        // SAFETY: the context is retained until `self` is dropped.
        turn.check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.context) })?;
        Ok(turn)
    }

    /// A turn for something that cannot be recorded: refused while a recording is under way, which then fails too.
    pub(super) fn unrecorded_turn(&self, call: &'static str) -> Result<Turn<'_>> {
        let mut turn = self.turn()?;
        if let Some(capture) = &mut turn.state.capture {
            capture.refused.get_or_insert(call);
            let reason = "cannot be recorded; do it before the recording begins".into();
            return Err(Error::Gpu { device: self.device, call, reason });
        }
        Ok(turn)
    }

    /// A turn for what cannot report errors: they are kept for the next call. Nothing happens on a lost device.
    pub(super) fn quiet_turn(&self, work: impl FnOnce(&mut Turn<'_>) -> Result<()>) {
        let mut turn = Turn { stream: self, state: lock(&self.state) };
        if turn.state.lost.is_some() {
            return;
        }
        // SAFETY: the context is retained until `self` is dropped.
        let bound = turn.check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.context) });
        if let Err(error) = bound.and_then(|()| work(&mut turn)) {
            turn.state.deferred.get_or_insert(error);
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: both were made in `new` and are used by nothing any more: whoever uses them owns a share of `self`. A
        // stream that still has work is destroyed after it. Errors here are those of earlier work, reported already or
        // of interest to nobody.
        unsafe {
            sys::cuCtxSetCurrent(self.context);
            if !self.raw.is_null() {
                sys::cuStreamDestroy_v2(self.raw);
            }
            sys::cuDevicePrimaryCtxRelease_v2(self.handle);
        }
    }
}

/// For calls before there is anything to lose: every code but success means that the device cannot be had.
pub(super) fn unavailable(device: Device, call: &str, code: CUresult) -> Result<()> {
    match code {
        CUresult::CUDA_SUCCESS => Ok(()),
        code => Err(Error::DeviceUnavailable {
            device,
            reason: format!("{call}: {code:?}; see with `nvidia-smi` whether another program holds the GPU"),
        }),
    }
}

/// The right to use the stream: its context is current on this thread, and no other thread is at it.
pub(super) struct Turn<'a> {
    stream: &'a Stream,
    state: MutexGuard<'a, State>,
}

impl Turn<'_> {
    /// The stream's handle.
    pub(super) fn raw(&self) -> sys::CUstream {
        self.stream.raw
    }

    /// The recording under way, if any.
    pub(super) fn capture(&mut self) -> &mut Option<Capture> {
        &mut self.state.capture
    }

    /// Ok where the code is success.
    pub(super) fn check(&mut self, call: &'static str, code: CUresult) -> Result<()> {
        match code {
            CUresult::CUDA_SUCCESS => Ok(()),
            code if errors::is_sticky(code) => Err(self.lose(call, code)),
            code => Err(errors::refusal(self.stream.device, call, code, None)),
        }
    }

    /// As [`Turn::check`], for a call that asked for memory of the device.
    pub(super) fn check_memory(&mut self, call: &'static str, code: CUresult, requested: usize) -> Result<()> {
        if code != CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return self.check(call, code);
        }
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes two integers to places that outlive the call; the context is current.
        self.check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
        Err(errors::refusal(self.stream.device, call, code, Some(Room { requested, free, total })))
    }

    /// Notes what the stream was given; `name` writes its name.
    pub(super) fn launched(&mut self, name: impl FnOnce(&mut String)) -> Result<()> {
        self.state.launched.clear();
        name(&mut self.state.launched);
        if self.stream.synchronous && self.state.capture.is_none() { self.synchronize() } else { Ok(()) }
    }

    /// Waits for all work in the stream.
    pub(super) fn synchronize(&mut self) -> Result<()> {
        // SAFETY: the stream lives as long as `self.stream`.
        let code = unsafe { sys::cuStreamSynchronize(self.raw()) };
        self.check("cuStreamSynchronize", code)
    }

    fn lose(&mut self, call: &'static str, code: CUresult) -> Error {
        let reason = errors::loss(call, code, &self.state.launched, self.stream.synchronous);
        self.state.lost = Some(reason.clone());
        Error::DeviceLost { device: self.stream.device, reason }
    }
}
