//! MT19937 (Matsumoto and Nishimura 1998), for the published offsets alone: whatever else is random here is Philox.

const LEN: usize = 624;
const MIDDLE: usize = 397;

/// The generator, seeded by an array of one word.
pub(super) struct MersenneTwister {
    state: [u32; LEN],
    next: usize,
}

impl MersenneTwister {
    /// `init_by_array` of the reference implementation with the key `[word]`.
    pub fn from_word(word: u32) -> Self {
        let mut state = [0u32; LEN];
        state[0] = 19_650_218;
        for i in 1..LEN {
            state[i] = (state[i - 1] ^ (state[i - 1] >> 30)).wrapping_mul(1_812_433_253).wrapping_add(i as u32);
        }
        let mut at = 1;
        let mut advance = |state: &mut [u32; LEN], factor: u32, add: u32| {
            let previous = state[at - 1];
            state[at] = (state[at] ^ (previous ^ (previous >> 30)).wrapping_mul(factor)).wrapping_add(add);
            at += 1;
            if at == LEN {
                state[0] = state[LEN - 1];
                at = 1;
            }
            at
        };
        for _ in 0..LEN {
            advance(&mut state, 1_664_525, word);
        }
        let mut position = 2; // after 624 steps from 1, one of them over the wrap
        for _ in 1..LEN {
            position = advance(&mut state, 1_566_083_941, (position as u32).wrapping_neg());
        }
        state[0] = 0x8000_0000;
        MersenneTwister { state, next: LEN }
    }

    pub fn next_u32(&mut self) -> u32 {
        if self.next == LEN {
            self.twist();
        }
        let mut word = self.state[self.next];
        self.next += 1;
        word ^= word >> 11;
        word ^= (word << 7) & 0x9d2c_5680;
        word ^= (word << 15) & 0xefc6_0000;
        word ^ (word >> 18)
    }

    fn twist(&mut self) {
        for i in 0..LEN {
            let joined = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % LEN] & 0x7fff_ffff);
            let odd = if joined & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[i] = self.state[(i + MIDDLE) % LEN] ^ (joined >> 1) ^ odd;
        }
        self.next = 0;
    }

    /// An even draw from `0..bound`, by rejection. `bound` is at least 1.
    pub fn below(&mut self, bound: u32) -> u32 {
        let shift = bound.leading_zeros();
        loop {
            let drawn = self.next_u32() >> shift;
            if drawn < bound {
                return drawn;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_outputs_are_the_published_ones() {
        let mut generator = MersenneTwister::from_word(1_000_000_207);
        let outputs = [(); 6].map(|()| generator.next_u32());
        assert_eq!(outputs, [1526224211, 377889814, 2066459913, 4071586748, 157519234, 661133601]);
    }
}
