//! Host memory for tensors: 64-byte aligned, recycled between steps.
//!
//! Freshly mapped pages cost several times more to write than reused ones, so freed buffers wait in a pool for the
//! next request of their size class. Once the first training step has filled the pool, later steps map nothing. The
//! pool never holds the process above 1.25 times the peak of live bytes (plus 64 MiB).

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::Mutex;

use super::Element;

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
    /// Bytes freed by tensors and kept for the next request.
    pub cached: usize,
    /// Requests that the cache could not serve.
    pub allocations: u64,
}

#[derive(Default)]
struct Pool {
    free: BTreeMap<usize, Vec<Vec<CacheLine>>>,
    stats: MemoryStats,
}

static POOL: Mutex<Pool> =
    Mutex::new(Pool { free: BTreeMap::new(), stats: MemoryStats { live: 0, peak: 0, cached: 0, allocations: 0 } });

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
    pool.free.clear();
    pool.stats.cached = 0;
}

impl Pool {
    fn take(&mut self, lines: usize) -> Option<Vec<CacheLine>> {
        self.stats.live += lines * LINE;
        self.stats.peak = self.stats.peak.max(self.stats.live);
        if let Some(found) = self.free.get_mut(&lines).and_then(Vec::pop) {
            self.stats.cached -= lines * LINE;
            return Some(found);
        }
        self.stats.allocations += 1;
        let limit = self.stats.peak + self.stats.peak / 4 + SLACK_BYTES;
        while self.stats.live + self.stats.cached > limit {
            let Some(mut largest) = self.free.last_entry() else { break };
            match largest.get_mut().pop() {
                Some(freed) => self.stats.cached -= freed.len() * LINE,
                None => drop(largest.remove()),
            }
        }
        None
    }

    fn put(&mut self, lines: Vec<CacheLine>) {
        self.stats.live -= lines.len() * LINE;
        self.stats.cached += lines.len() * LINE;
        self.free.entry(lines.len()).or_default().push(lines);
    }
}

/// Rounds up to one of eight sizes per power of two, so that nearby sizes share their buffers.
fn size_class(lines: usize) -> usize {
    if lines < POOLED_LINES {
        return lines;
    }
    let step = (lines.next_power_of_two() / 16).max(1);
    lines.next_multiple_of(step)
}

/// Zeros in memory that was not in the pool.
fn fresh(lines: usize) -> Vec<CacheLine> {
    let mut memory = Vec::with_capacity(lines);
    super::pages::prefer_huge(memory.spare_capacity_mut());
    memory.resize(lines, bytemuck::Zeroable::zeroed());
    memory
}

/// Untyped aligned memory.
pub(crate) struct Bytes {
    lines: Vec<CacheLine>,
    len: usize,
}

impl Bytes {
    pub fn recycled(len: usize) -> Self {
        let lines = size_class(len.div_ceil(LINE));
        let pooled = if lines >= POOLED_LINES { pool().take(lines) } else { None };
        #[allow(unused_mut)]
        let mut lines = pooled.unwrap_or_else(|| fresh(lines));
        // An element that an op forgets to write shows up as NaN in debug builds.
        #[cfg(debug_assertions)]
        bytemuck::cast_slice_mut::<CacheLine, u8>(&mut lines).fill(0xFF);
        Bytes { lines, len }
    }

    pub fn as_slice<T: Element>(&self) -> &[T] {
        &bytemuck::cast_slice(&self.lines)[..self.len / size_of::<T>()]
    }

    pub fn as_mut_slice<T: Element>(&mut self) -> &mut [T] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len / size_of::<T>()]
    }

    pub fn raw(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }

    pub fn raw_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }

    pub fn copy(&self) -> Self {
        let mut copy = Bytes::recycled(self.len);
        copy.lines.copy_from_slice(&self.lines);
        copy
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        if self.lines.len() >= POOLED_LINES {
            pool().put(std::mem::take(&mut self.lines));
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

    #[test]
    fn size_classes_waste_little_and_are_stable() {
        for lines in 1..100_000 {
            let class = size_class(lines);
            assert!(class >= lines && class as f64 <= lines as f64 * 1.13, "{lines} -> {class}");
            assert_eq!(size_class(class), class);
        }
    }
}
