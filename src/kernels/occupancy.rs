//! How many blocks of a kernel a multiprocessor holds at once, by the published limits.

/// What a multiprocessor has.
///
/// From the table of technical specifications per compute capability in the CUDA C++ Programming Guide. All have 65,536
/// registers, in four parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Multiprocessor {
    /// 90 for compute capability 9.0.
    pub architecture: u32,
    /// Threads at most.
    pub threads: u32,
    /// Blocks at most.
    pub blocks: u32,
    /// Shared memory, in bytes.
    pub shared: u32,
}

/// The multiprocessors that machine code is compiled for.
pub const MULTIPROCESSORS: [Multiprocessor; 6] = [
    Multiprocessor { architecture: 80, threads: 2048, blocks: 32, shared: 164 << 10 },
    Multiprocessor { architecture: 86, threads: 1536, blocks: 16, shared: 100 << 10 },
    Multiprocessor { architecture: 89, threads: 1536, blocks: 24, shared: 100 << 10 },
    Multiprocessor { architecture: 90, threads: 2048, blocks: 32, shared: 228 << 10 },
    Multiprocessor { architecture: 100, threads: 2048, blocks: 32, shared: 228 << 10 },
    Multiprocessor { architecture: 120, threads: 1536, blocks: 24, shared: 100 << 10 },
];

/// Of the shared memory, what the system keeps for itself in every block.
const RESERVED: u64 = 1 << 10;

/// Blocks that a multiprocessor holds at once, and the share of its threads that they are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Occupancy {
    /// Blocks.
    pub blocks: u32,
    /// From 0 to 1.
    pub share: f64,
}

impl Multiprocessor {
    /// For blocks of `threads` with `registers` each and `shared` bytes of shared memory, static and dynamic. No block
    /// fits where one asks for more than there is.
    pub fn occupancy(self, threads: u32, registers: u32, shared: u64) -> Occupancy {
        let warps = threads.max(1).div_ceil(32);
        // Registers are given to warps by 256, from one of four parts with 16,384 each.
        let by_registers = 16_384 / (registers.max(1) * 32).next_multiple_of(256) * 4 / warps;
        let by_shared = u64::from(self.shared) / (shared.min(u64::MAX / 2) + RESERVED).next_multiple_of(128);
        let by_shared = u32::try_from(by_shared).unwrap_or(u32::MAX);
        let blocks = self.blocks.min(self.threads / (warps * 32)).min(by_registers).min(by_shared);
        Occupancy { blocks, share: f64::from(blocks * warps * 32) / f64::from(self.threads) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against NVIDIA's occupancy calculator: threads, registers, bytes of shared memory; blocks for 8.0, 8.6, 8.9, 9.0.
    #[test]
    fn occupancy_is_that_of_the_published_calculator() {
        for (threads, registers, shared, expected) in [
            (256, 32, 0, [8, 6, 6, 8]),
            (256, 40, 0, [6, 6, 6, 6]),
            (256, 64, 0, [4, 4, 4, 4]),
            (128, 128, 0, [4, 4, 4, 4]),
            (128, 255, 0, [2, 2, 2, 2]),
            (1024, 64, 0, [1, 1, 1, 1]),
            (1024, 32, 0, [2, 1, 1, 2]),
            (32, 32, 0, [32, 16, 24, 32]),
            (128, 32, 48 << 10, [3, 2, 2, 4]),
            (128, 32, 99 << 10, [1, 1, 1, 2]),
            (128, 32, 227 << 10, [0, 0, 0, 1]),
        ] {
            let blocks = [0, 1, 2, 3].map(|card| MULTIPROCESSORS[card].occupancy(threads, registers, shared).blocks);
            assert_eq!(blocks, expected, "{threads} threads, {registers} registers, {shared} bytes");
        }
    }

    #[test]
    fn the_share_counts_whole_warps() {
        assert_eq!(MULTIPROCESSORS[3].occupancy(256, 64, 0).share, 0.5);
        assert_eq!(MULTIPROCESSORS[3].occupancy(48, 64, 0), Occupancy { blocks: 16, share: 0.5 });
        assert_eq!(MULTIPROCESSORS[0].occupancy(0, 0, u64::MAX).blocks, 0);
    }
}
