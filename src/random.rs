//! Counter-based random numbers (Philox 4×32-10, Salmon et al., SC 2011).
//!
//! A number depends on the seed, the stream and its index alone, never on how many were drawn before or by which
//! thread. A run can be resumed, split over workers or moved to another device without changing its numbers.
//!
//! ```
//! use gridgrad::random::Philox;
//! let stream = Philox::new(7).stream("augment").fork(3);
//! assert_eq!(stream.uniform(10), stream.uniform(10));
//! ```

use crate::driver::seam::Address;

/// One stream of random numbers, addressed by index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Philox {
    key: [u32; 2],
    stream: u64,
    cell: Option<Cell>,
}

/// Where a GPU's kernels read the number of an ancestor of a stream, so that a recorded launch draws new numbers every
/// time it is repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cell {
    address: Address,
    /// From the ancestor to the stream: the first `depth` of them.
    forks: [u64; Cell::DEEPEST],
    depth: usize,
}

impl Cell {
    const DEEPEST: usize = 3;

    /// `None` where the path is too long for a kernel's argument: then the number is passed by value.
    fn fork(mut self, index: u64) -> Option<Self> {
        *self.forks.get_mut(self.depth)? = index;
        self.depth += 1;
        Some(self)
    }
}

impl Philox {
    /// The root stream of `seed`.
    pub fn new(seed: u64) -> Self {
        Philox { key: [seed as u32, (seed >> 32) as u32], stream: 0, cell: None }
    }

    /// An independent stream, numbered within this one.
    pub fn fork(self, index: u64) -> Self {
        let [a, b, ..] = self.block_at(index, u64::MAX - self.stream);
        let stream = (u64::from(b) << 32) | u64::from(a);
        Philox { key: self.key, stream, cell: self.cell.and_then(|cell| cell.fork(index)) }
    }

    /// This stream, whose number kernels read from device memory at `address`. On the host it stays what it is.
    pub(crate) fn in_cell(self, address: Address) -> Self {
        Philox { cell: Some(Cell { address, forks: [0; Cell::DEEPEST], depth: 0 }), ..self }
    }

    /// The stream as a kernel's parameter: `RandomStream` in `kernels/common/philox.cuh`, in words of 32 bits.
    pub(crate) fn argument(self) -> [u32; 14] {
        let Cell { address, forks, depth } =
            self.cell.unwrap_or(Cell { address: Address::NULL, forks: [0; Cell::DEEPEST], depth: 0 });
        let mut words = [0; 14];
        words[..2].copy_from_slice(&self.key);
        words[6] = depth as u32;
        for (pair, value) in [(2, self.stream), (4, address.0), (8, forks[0]), (10, forks[1]), (12, forks[2])] {
            (words[pair], words[pair + 1]) = (value as u32, (value >> 32) as u32);
        }
        words
    }

    /// An independent stream, named within this one.
    pub fn stream(self, name: &str) -> Self {
        // FNV-1a: stable over platforms and releases, unlike the standard library's hasher.
        let hash =
            name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        self.fork(hash)
    }

    /// Seed and stream number, enough to rebuild this stream on another device.
    pub fn state(self) -> (u64, u64) {
        ((u64::from(self.key[1]) << 32) | u64::from(self.key[0]), self.stream)
    }

    /// The four 32-bit words of block `index`.
    #[inline]
    pub fn block(self, index: u64) -> [u32; 4] {
        self.block_at(index, self.stream)
    }

    /// Blocks `first` to `first + N − 1`, computed side by side, so that inside
    /// [`simd::dispatch`](crate::cpu::simd::dispatch) they fill vector registers.
    #[inline(always)]
    pub fn blocks<const N: usize>(self, first: u64) -> [[u32; 4]; N] {
        let words: [[u32; N]; 4] = self.words_at(first, self.stream);
        let mut blocks = [[0; 4]; N];
        for (number, block) in blocks.iter_mut().enumerate() {
            *block = [words[0][number], words[1][number], words[2][number], words[3][number]];
        }
        blocks
    }

    #[inline(always)]
    fn block_at(self, index: u64, stream: u64) -> [u32; 4] {
        let [[a], [b], [c], [d]] = self.words_at(index, stream);
        [a, b, c, d]
    }

    /// Word w of block `first + i` at `[w][i]`.
    #[inline(always)]
    #[allow(
        clippy::needless_range_loop,
        reason = "iterators over the four words would hide that the loop is a vector's"
    )]
    fn words_at<const N: usize>(self, first: u64, stream: u64) -> [[u32; N]; 4] {
        let mut counter = [[0; N], [0; N], [stream as u32; N], [(stream >> 32) as u32; N]];
        for block in 0..N {
            let index = first.wrapping_add(block as u64);
            (counter[0][block], counter[1][block]) = (index as u32, (index >> 32) as u32);
        }
        let mut key = self.key;
        for round in 0..10 {
            if round > 0 {
                key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
            }
            for block in 0..N {
                let low = u64::from(counter[0][block]) * 0xD251_1F53;
                let high = u64::from(counter[2][block]) * 0xCD9E_8D57;
                (counter[0][block], counter[1][block], counter[2][block], counter[3][block]) = (
                    (high >> 32) as u32 ^ counter[1][block] ^ key[0],
                    high as u32,
                    (low >> 32) as u32 ^ counter[3][block] ^ key[1],
                    low as u32,
                );
            }
        }
        counter
    }

    /// Number `index`: 32 uniform bits.
    #[inline]
    pub fn bits(self, index: u64) -> u32 {
        self.block(index / 4)[(index % 4) as usize]
    }

    /// Number `index`, uniform in [0, 1), with 24 bits.
    #[inline]
    pub fn uniform(self, index: u64) -> f32 {
        unit(self.bits(index))
    }

    /// Number `index`, uniform in [0, 1), with 53 bits.
    #[inline]
    pub fn uniform_f64(self, index: u64) -> f64 {
        let [a, b, ..] = self.block(index);
        ((u64::from(a) << 21) ^ (u64::from(b) >> 11)) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Number `index`, standard normal (Box-Muller, in f64).
    #[inline]
    pub fn normal(self, index: u64) -> f64 {
        let [a, b, c, d] = self.block(index);
        let word =
            |low: u32, high: u32| ((u64::from(low) << 21) ^ (u64::from(high) >> 11)) as f64 / (1u64 << 53) as f64;
        // 1 - u is in (0, 1], so the logarithm is finite.
        (-2.0 * (1.0 - word(a, b)).ln()).sqrt() * (std::f64::consts::TAU * word(c, d)).cos()
    }

    /// Number `index`, an integer below `bound` (0 where `bound` is 0). The bias is below `bound` / 2⁶⁴.
    #[inline]
    pub fn below(self, index: u64, bound: usize) -> usize {
        let [a, b, ..] = self.block(index);
        let wide = (u128::from(b) << 32) | u128::from(a);
        ((wide * bound as u128) >> 64) as usize
    }

    /// A permutation of `0..len` (Fisher-Yates).
    pub fn permutation(self, len: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..len).collect();
        for last in (1..len).rev() {
            order.swap(last, self.below(last as u64, last + 1));
        }
        order
    }

    /// A reader that hands out the numbers of this stream one after another.
    pub fn draws(self) -> Draws {
        Draws { stream: self, next: 0 }
    }
}

#[inline(always)]
fn unit(bits: u32) -> f32 {
    (bits >> 8) as f32 * (1.0 / 16_777_216.0)
}

/// Sequential access to a [`Philox`] stream, for code whose number of draws depends on what it drew.
///
/// ```
/// use gridgrad::random::Philox;
/// let mut draws = Philox::new(1).draws();
/// assert!((0.0..1.0).contains(&draws.uniform()) && draws.below(6) < 6);
/// ```
#[derive(Clone, Debug)]
pub struct Draws {
    stream: Philox,
    next: u64,
}

impl Draws {
    fn advance(&mut self) -> u64 {
        self.next += 1;
        self.next - 1
    }

    /// Uniform in [0, 1).
    pub fn uniform(&mut self) -> f64 {
        let index = self.advance();
        self.stream.uniform_f64(index)
    }

    /// Uniform in [`low`, `high`).
    pub fn range(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.uniform()
    }

    /// An integer below `bound` (0 where `bound` is 0).
    pub fn below(&mut self, bound: usize) -> usize {
        let index = self.advance();
        self.stream.below(index, bound)
    }

    /// True with probability `p`.
    pub fn chance(&mut self, p: f64) -> bool {
        self.uniform() < p
    }

    /// Standard normal.
    pub fn normal(&mut self) -> f64 {
        let index = self.advance();
        self.stream.normal(index)
    }

    /// Beta(`a`, `b`), by the ratio of two gamma variates; `a` and `b` positive.
    pub fn beta(&mut self, a: f64, b: f64) -> f64 {
        let (x, y) = (self.gamma(a), self.gamma(b));
        if x + y > 0.0 { x / (x + y) } else { 0.5 }
    }

    /// Gamma(`shape`, 1) (Marsaglia and Tsang 2000).
    pub fn gamma(&mut self, shape: f64) -> f64 {
        if shape < 1.0 {
            let boost = (1.0 - self.uniform()).powf(1.0 / shape);
            return self.gamma(shape + 1.0) * boost;
        }
        let d = shape - 1.0 / 3.0;
        let c = 1.0 / (9.0 * d).sqrt();
        loop {
            let x = self.normal();
            let v = (1.0 + c * x).powi(3);
            if v > 0.0 && (1.0 - self.uniform()).ln() < 0.5 * x * x + d - d * v + d * v.ln() {
                return d * v;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_the_published_known_answers() {
        // Random123 distribution, kat_vectors: philox 4x32 10.
        assert_eq!(Philox::new(0).block(0), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        let ones = Philox { key: [u32::MAX; 2], stream: u64::MAX, cell: None };
        assert_eq!(ones.block(u64::MAX), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    }

    #[test]
    fn blocks_side_by_side_are_those_one_by_one() {
        let stream = Philox::new(5).stream("blocks");
        // Across a carry into the upper half of the counter, and around the end.
        for first in [0, (1 << 32) - 5, u64::MAX - 6] {
            for (block, words) in stream.blocks::<16>(first).into_iter().enumerate() {
                assert_eq!(words, stream.block(first.wrapping_add(block as u64)));
            }
        }
    }

    #[test]
    fn moments_are_those_of_the_distributions() {
        let stream = Philox::new(3).stream("moments");
        let n = 20_000;
        let mean = (0..n).map(|i| f64::from(stream.uniform(i))).sum::<f64>() / n as f64;
        assert!((mean - 0.5).abs() < 0.01, "{mean}");
        let variance = (0..n).map(|i| stream.normal(i).powi(2)).sum::<f64>() / n as f64;
        assert!((variance - 1.0).abs() < 0.04, "{variance}");
        let mut draws = stream.draws();
        let beta = (0..n).map(|_| draws.beta(0.8, 0.8)).sum::<f64>() / n as f64;
        assert!((beta - 0.5).abs() < 0.02, "{beta}");
    }

    #[test]
    fn a_permutation_holds_every_index_once() {
        let mut order = Philox::new(1).permutation(1000);
        assert_ne!(order[..4], [0, 1, 2, 3]);
        order.sort_unstable();
        assert!(order.iter().enumerate().all(|(i, &v)| i == v));
        assert!(Philox::new(1).permutation(0).is_empty());
    }
}
