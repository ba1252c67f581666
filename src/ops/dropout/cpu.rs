//! Masks made where they are used: writing and reading them would cost more than computing them again.

use super::Mask;
use crate::cpu::{Float, Stored, parallel, simd};
use crate::random::Philox;
use crate::tensor::Buffer;

/// Blocks of random numbers computed side by side, so that their rounds fill vector registers.
const BLOCKS: usize = 16;

/// Numbers per block.
const WORDS: usize = 4;

/// One decision per element.
pub(super) fn elements<S: Stored<T>, T: Float>(input: &[S], mask: Mask, stream: Philox) -> Buffer<S> {
    let mut output = Buffer::recycled(input.len());
    let scale = T::from_f64(mask.scale);
    parallel::pieces_mut(&mut output, parallel::PIECE, |index, piece| {
        let at = index * parallel::PIECE;
        let input = &input[at..][..piece.len()];
        simd::dispatch(
            #[inline(always)]
            || {
                let (mask, scale) = (mask, scale);
                let chunks = piece.chunks_mut(BLOCKS * WORDS).zip(input.chunks(BLOCKS * WORDS));
                for (chunk, (output, input)) in chunks.enumerate() {
                    let first = (at / WORDS + chunk * BLOCKS) as u64;
                    let words = stream.blocks::<BLOCKS>(first);
                    for (y, (&x, &bits)) in output.iter_mut().zip(input.iter().zip(words.as_flattened())) {
                        *y = S::store(x.load() * if mask.keeps(bits) { scale } else { T::ZERO });
                    }
                }
            },
        );
    });
    output
}

/// One decision for each `sample_len` consecutive elements.
pub(super) fn samples<S: Stored<T>, T: Float>(input: &[S], sample_len: usize, mask: Mask, stream: Philox) -> Buffer<S> {
    let mut output = Buffer::recycled(input.len());
    let scale = T::from_f64(mask.scale);
    parallel::pieces_mut(&mut output, parallel::PIECE, |index, piece| {
        let (mut at, mut piece) = (index * parallel::PIECE, piece);
        while !piece.is_empty() {
            let sample = at / sample_len;
            let (part, rest) = piece.split_at_mut(piece.len().min((sample + 1) * sample_len - at));
            let factor = if mask.keeps(stream.bits(sample as u64)) { scale } else { T::ZERO };
            let input = &input[at..][..part.len()];
            simd::dispatch(
                #[inline(always)]
                || {
                    for (y, &x) in part.iter_mut().zip(input) {
                        *y = S::store(x.load() * factor);
                    }
                },
            );
            at += part.len();
            piece = rest;
        }
    });
    output
}
