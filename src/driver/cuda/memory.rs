//! Memory of the device, and copies to and from it.

use std::sync::Arc;

use cudarc::driver::sys::{self, CUresult};

use super::Gpu;
use super::stream::{Stream, Turn, lock};
use crate::Result;
use crate::driver::seam::Address;

/// Asks for memory in stream order. Where there is none, waits for what is being freed, gives the pool's reserve back
/// and asks once more: a reserve of small pieces may stand in the way of a large one.
pub(super) fn allocate(turn: &mut Turn<'_>, pool: sys::CUmemoryPool, bytes: usize) -> Result<Address> {
    let mut address = 0;
    // SAFETY: writes one address to a place that outlives the call; the stream is alive and its context current.
    let ask = |address: &mut u64, turn: &Turn<'_>| unsafe { sys::cuMemAllocAsync(address, bytes.max(1), turn.raw()) };
    let mut code = ask(&mut address, turn);
    if code == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
        turn.synchronize()?;
        // SAFETY: the pool is the device's default one, which always exists.
        turn.check("cuMemPoolTrimTo", unsafe { sys::cuMemPoolTrimTo(pool, 0) })?;
        code = ask(&mut address, turn);
    }
    turn.check_memory("cuMemAllocAsync", code, bytes)?;
    Ok(Address(address))
}

/// Gives memory back in stream order.
pub(super) fn free(turn: &mut Turn<'_>, address: u64) -> Result<()> {
    // SAFETY: the seam's callers pass what `allocate` gave them, once; work already in the stream is done before.
    turn.check("cuMemFreeAsync", unsafe { sys::cuMemFreeAsync(address, turn.raw()) })
}

impl Gpu {
    pub(super) fn free_now_or_with_the_graph(&self, address: Address) {
        self.stream.quiet_turn(|turn| match turn.capture() {
            Some(capture) => {
                capture.freed.push(address.0);
                Ok(())
            }
            None => free(turn, address.0),
        });
    }

    pub(super) fn copy_to_device(&self, from: &[u8], to: Address) -> Result<()> {
        if from.is_empty() {
            return Ok(());
        }
        let mut turn = self.stream.unrecorded_turn("upload")?;
        lock(&self.staging).upload(&mut turn, from, to)
    }

    pub(super) fn copy_to_host(&self, from: Address, to: &mut [u8]) -> Result<()> {
        if to.is_empty() {
            return Ok(());
        }
        let mut turn = self.stream.unrecorded_turn("download")?;
        // SAFETY: `from` has `to.len()` bytes by the seam's contract; `to` is borrowed until the wait below is over.
        let code = unsafe { sys::cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from.0, to.len(), turn.raw()) };
        turn.check("cuMemcpyDtoHAsync", code)?;
        turn.synchronize()
    }

    pub(super) fn copy_within(&self, from: Address, to: Address, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let mut turn = self.stream.turn()?;
        // SAFETY: both have `bytes` bytes by the seam's contract.
        let code = unsafe { sys::cuMemcpyDtoDAsync_v2(to.0, from.0, bytes, turn.raw()) };
        turn.check("cuMemcpyDtoDAsync", code)
    }

    pub(super) fn set_bytes(&self, to: Address, byte: u8, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let mut turn = self.stream.turn()?;
        // SAFETY: `to` has `bytes` bytes by the seam's contract.
        turn.check("cuMemsetD8Async", unsafe { sys::cuMemsetD8Async(to.0, byte, bytes, turn.raw()) })
    }
}

/// Page-locked memory through which uploads go.
///
/// The driver's own staging would not do: it documents that an asynchronous copy from pageable memory *might* be done
/// with that memory on return, and one from memory that some other library has page-locked is not. So the bytes are
/// copied here first, and the source is free. Small uploads share a half; only when both halves are full does an
/// upload wait, for the copies out of the older one.
pub(super) struct Staging {
    stream: Arc<Stream>,
    memory: *mut u8,
    /// Of each half: recorded behind the last copy out of it.
    drained: [sys::CUevent; 2],
    half: usize,
    used: usize,
}

// SAFETY: the memory and the events are used only under the stream's turn, on whichever thread has it.
unsafe impl Send for Staging {}

/// Bytes of one half: large enough that a copy takes longer than its launch.
const HALF: usize = 4 << 20;

impl Staging {
    pub(super) fn new(stream: Arc<Stream>) -> Result<Self> {
        let nothing = std::ptr::null_mut();
        let mut staging =
            Staging { stream: stream.clone(), memory: std::ptr::null_mut(), drained: [nothing; 2], half: 0, used: 0 };
        let mut turn = stream.turn()?;
        let mut memory = std::ptr::null_mut();
        // SAFETY: writes one pointer to a place that outlives the call; the context is current.
        turn.check("cuMemAllocHost", unsafe { sys::cuMemAllocHost_v2(&mut memory, 2 * HALF) })?;
        staging.memory = memory.cast();
        for event in &mut staging.drained {
            let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
            // SAFETY: as above.
            turn.check("cuEventCreate", unsafe { sys::cuEventCreate(event, flags) })?;
        }
        drop(turn);
        Ok(staging)
    }

    fn upload(&mut self, turn: &mut Turn<'_>, from: &[u8], to: Address) -> Result<()> {
        let mut done = 0;
        while done < from.len() {
            if self.used == HALF {
                self.turn_over(turn)?;
            }
            let bytes = (HALF - self.used).min(from.len() - done);
            // SAFETY: `half * HALF + used + bytes` is at most `2 * HALF`, and no copy reads this part of the memory:
            // those of this half lie before `used`, unless drained.
            let staged = unsafe {
                let staged = self.memory.add(self.half * HALF + self.used);
                std::ptr::copy_nonoverlapping(from[done..].as_ptr(), staged, bytes);
                staged
            };
            self.used = (self.used + bytes.next_multiple_of(64)).min(HALF);
            let to = to.offset(done).0;
            // SAFETY: `to` has room for the rest of `from` by the seam's contract; `staged` is not written again before
            // this copy is done.
            let code = unsafe { sys::cuMemcpyHtoDAsync_v2(to, staged.cast(), bytes, turn.raw()) };
            turn.check("cuMemcpyHtoDAsync", code)?;
            done += bytes;
        }
        Ok(())
    }

    /// Goes on in the other half, once it is drained.
    fn turn_over(&mut self, turn: &mut Turn<'_>) -> Result<()> {
        let (full, next) = (self.drained[self.half], self.drained[1 - self.half]);
        // SAFETY (both): the events live as long as `self`. One that was never recorded is done.
        turn.check("cuEventRecord", unsafe { sys::cuEventRecord(full, turn.raw()) })?;
        turn.check("cuEventSynchronize", unsafe { sys::cuEventSynchronize(next) })?;
        (self.half, self.used) = (1 - self.half, 0);
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        let stream = self.stream.clone();
        stream.quiet_turn(|turn| {
            turn.synchronize()?;
            for event in self.drained.into_iter().filter(|event| !event.is_null()) {
                // SAFETY: the event is ours, and nothing waits for it.
                turn.check("cuEventDestroy", unsafe { sys::cuEventDestroy_v2(event) })?;
            }
            if self.memory.is_null() {
                return Ok(());
            }
            // SAFETY: the memory is ours, and all copies out of it are done.
            turn.check("cuMemFreeHost", unsafe { sys::cuMemFreeHost(self.memory.cast()) })
        });
    }
}
