//! Dropout of attention probabilities: which pair of a query and a key goes by which random number.

use crate::cpu::Float;
use crate::random::Philox;
use crate::{Error, Result};

/// Decisions of a block of random numbers: 16 bits each, which is fine enough for a rate and halves their cost.
const DECISIONS: usize = 8;
/// Keys that share blocks, and the blocks that they share. Block b has the keys 2b and 2b + 1 of every eight: on a GPU
/// these are in one lane's registers.
const KEYS: usize = 32;
const BLOCKS: usize = KEYS / DECISIONS;

/// As `Dropout` of kernels/common/lsda.cuh.
#[derive(Clone, Copy)]
pub(super) struct Dropout {
    /// Of 65536: the smallest number that keeps.
    threshold: u32,
    /// Factor of what is kept: 0 where nothing is.
    pub scale: f64,
    stream: Philox,
}

impl Dropout {
    /// `None` where the rate `p` is below 2⁻¹⁷ and so rounds to 0.
    pub fn new(op: &'static str, p: f64, stream: Philox) -> Result<Option<Self>> {
        if !(0.0..=1.0).contains(&p) {
            return Err(Error::argument(op, format!("probability {p}, expected a number from 0 to 1")));
        }
        const RANGE: f64 = 65536.0;
        let threshold = (p * RANGE).round();
        let scale = if threshold < RANGE { RANGE / (RANGE - threshold) } else { 0.0 };
        Ok((threshold > 0.0).then_some(Dropout { threshold: threshold as u32, scale, stream }))
    }

    /// As the kernels take it, in words of 32 bits; all 0 for no dropout.
    pub fn argument(dropout: Option<Self>) -> [u32; 16] {
        let mut words = [0; 16];
        if let Some(Dropout { threshold, scale, stream }) = dropout {
            words[..14].copy_from_slice(&stream.argument());
            (words[14], words[15]) = (threshold, (scale as f32).to_bits());
        }
        words
    }

    /// The factors, 0 or the scale, of a query's probabilities in groups of up to `tokens`. `query` counts the queries
    /// of all images and heads.
    #[inline(always)]
    pub fn factors<T: Float>(&self, query: usize, tokens: usize, factors: &mut [T]) {
        let first = query as u64 * (tokens.div_ceil(KEYS) * BLOCKS) as u64;
        let scale = T::from_f64(self.scale);
        for (part, factors) in factors.chunks_mut(KEYS).enumerate() {
            let blocks = self.stream.blocks::<BLOCKS>(first + (part * BLOCKS) as u64);
            for (key, factor) in factors.iter_mut().enumerate() {
                let number = blocks[key % DECISIONS / 2][key / DECISIONS] >> (key % 2 * 16) & 0xFFFF;
                *factor = if number >= self.threshold { scale } else { T::ZERO };
            }
        }
    }
}
