//! Host memory for tensors: 64-byte aligned, recycled between steps.
//!
//! Freshly mapped pages cost several times more to write than reused ones, so freed buffers return to an arena that keeps
//! its pages. Once the first training steps have filled it, later ones map nothing. It gives free pages back before it
//! holds more than 1.25 times the peak of live bytes (plus 64 MiB).

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::Mutex;

use super::Element;
use super::arena::{Arena, Block};

const LINE: usize = 64;
/// Smaller buffers come from the allocator: its own caches serve them well.
const POOLED_LINES: usize = 64;
const SLACK_BYTES: usize = 64 << 20;

#[allow(unsafe_code, reason = "bytemuck's derive checks the layout that its unsafe impl promises")]
mod line {
    #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
    #[repr(C, align(64))]
    pub struct CacheLine([u8; super::LINE]);
}
use line::CacheLine;

/// Bytes of tensor memory in use by this process.
///
/// ```
/// use gridgrad::{DType, Tensor, tensor::memory_stats};
/// let x = Tensor::zeros([1000, 1000], DType::F32)?;
/// assert!(memory_stats().live >= 4_000_000);
/// # drop(x);
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryStats {
    /// Bytes held by live tensors and scratch buffers.
    pub live: usize,
    /// The largest value that `live` has had since the start or the last [`reset_peak`].
    pub peak: usize,
    /// Bytes freed by tensors and kept for the next request; on a CPU that and what else lies on their pages.
    pub cached: usize,
    /// Requests that the cache could not serve.
    pub allocations: u64,
}

struct Pool {
    arena: Arena,
    stats: MemoryStats,
}

static POOL: Mutex<Pool> =
    Mutex::new(Pool { arena: Arena::new(), stats: MemoryStats { live: 0, peak: 0, cached: 0, allocations: 0 } });

fn pool() -> std::sync::MutexGuard<'static, Pool> {
    // The pool's invariants hold between its statements, so a panic elsewhere does not spoil it.
    POOL.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Tensor memory in use now.
pub fn memory_stats() -> MemoryStats {
    pool().stats
}

/// Starts a new measurement of the peak.
pub fn reset_peak() {
    let mut pool = pool();
    pool.stats.peak = pool.stats.live;
}

/// Gives all cached memory back to the system.
pub fn release_cached() {
    let mut pool = pool();
    pool.arena.give_back();
    pool.count_cached();
}

impl Pool {
    fn take(&mut self, bytes: usize) -> Option<Block> {
        let before = self.arena.touched();
        let block = self.arena.take(bytes)?;
        self.stats.live += bytes;
        self.stats.peak = self.stats.peak.max(self.stats.live);
        if self.arena.touched() > before {
            self.stats.allocations += 1;
            if self.arena.touched() > self.stats.peak + self.stats.peak / 4 + SLACK_BYTES {
                self.arena.give_back();
            }
        }
        self.count_cached();
        Some(block)
    }

    fn put(&mut self, block: Block) {
        self.stats.live -= block.len();
        self.arena.put(block);
        self.count_cached();
    }

    fn count_cached(&mut self) {
        self.stats.cached = self.arena.touched().saturating_sub(self.stats.live);
    }
}

/// Where some whole cache lines lie.
enum Memory {
    Own(Vec<CacheLine>),
    Pooled(Block),
}

impl Memory {
    fn of(lines: usize) -> Self {
        let pooled = if lines >= POOLED_LINES { pool().take(lines * LINE) } else { None };
        pooled.map_or_else(|| Memory::Own(bytemuck::zeroed_vec(lines)), Memory::Pooled)
    }
}

impl Deref for Memory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Memory::Own(lines) => bytemuck::cast_slice(lines),
            Memory::Pooled(block) => block,
        }
    }
}

impl DerefMut for Memory {
    fn deref_mut(&mut self) -> &mut [u8] {
        match self {
            Memory::Own(lines) => bytemuck::cast_slice_mut(lines),
            Memory::Pooled(block) => block,
        }
    }
}

/// Untyped aligned memory.
pub(crate) struct Bytes {
    memory: Memory,
    len: usize,
}

impl Bytes {
    pub fn recycled(len: usize) -> Self {
        #[allow(unused_mut)]
        let mut memory = Memory::of(len.div_ceil(LINE));
        // An element that an op forgets to write shows up as NaN in debug builds.
        #[cfg(debug_assertions)]
        memory.fill(0xFF);
        Bytes { memory, len }
    }

    pub fn as_slice<T: Element>(&self) -> &[T] {
        bytemuck::cast_slice(&self.memory[..self.len / size_of::<T>() * size_of::<T>()])
    }

    pub fn as_mut_slice<T: Element>(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(&mut self.memory[..self.len / size_of::<T>() * size_of::<T>()])
    }

    pub fn raw(&self) -> &[u8] {
        &self.memory[..self.len]
    }

    pub fn raw_mut(&mut self) -> &mut [u8] {
        &mut self.memory[..self.len]
    }

    pub fn copy(&self) -> Self {
        let mut copy = Bytes::recycled(self.len);
        copy.raw_mut().copy_from_slice(self.raw());
        copy
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        if let Memory::Pooled(block) = std::mem::replace(&mut self.memory, Memory::Own(Vec::new())) {
            pool().put(block);
        }
    }
}

/// A slice of `T` in recycled memory: an op's output on the host, or its scratch space.
///
/// ```
/// use gridgrad::{Tensor, tensor::Buffer};
/// let squares = Buffer::<f32>::from_fn(4, |i| (i * i) as f32);
/// assert_eq!(Tensor::from_buffer(squares, [2, 2])?.to_vec::<f32>()?, [0.0, 1.0, 4.0, 9.0]);
/// # Ok::<(), gridgrad::Error>(())
/// ```
pub struct Buffer<T> {
    bytes: Bytes,
    element: PhantomData<T>,
}

impl<T: Element> Buffer<T> {
    /// `len` elements with unspecified values: whoever asks writes every one of them.
    pub fn recycled(len: usize) -> Self {
        Buffer { bytes: Bytes::recycled(len * size_of::<T>()), element: PhantomData }
    }

    /// `len` zeros.
    pub fn zeroed(len: usize) -> Self {
        let mut buffer = Self::recycled(len);
        buffer.fill(T::zeroed());
        buffer
    }

    /// A copy of `values`.
    pub fn copy_of(values: &[T]) -> Self {
        let mut buffer = Self::recycled(values.len());
        buffer.copy_from_slice(values);
        buffer
    }

    /// `len` elements, each given by its index.
    pub fn from_fn(len: usize, mut value: impl FnMut(usize) -> T) -> Self {
        let mut buffer = Self::recycled(len);
        buffer.iter_mut().enumerate().for_each(|(i, slot)| *slot = value(i));
        buffer
    }

    pub(crate) fn into_bytes(self) -> Bytes {
        self.bytes
    }
}

impl<T: Element> Deref for Buffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        self.bytes.as_slice()
    }
}

impl<T: Element> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        self.bytes.as_mut_slice()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_reused() {
        let first = Buffer::<f32>::zeroed(100_003);
        let address = first.as_ptr() as usize;
        assert_eq!(address % LINE, 0);
        assert_eq!(first.len(), 100_003);
        assert!(first.iter().all(|&v| v == 0.0));
        drop(first);
        assert!(memory_stats().cached > 0);
    }
}
