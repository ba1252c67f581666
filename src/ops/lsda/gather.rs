//! Rows of a group's tokens, copied for a run of heads at once: only reads of long runs are ones that a processor fetches
//! ahead.

use std::ops::Range;

use crate::cpu::small_gemm::LANES;
use crate::cpu::{Float, Stored};

/// Where the elements of heads lie in the rows of a tensor.
#[derive(Clone, Copy)]
pub(super) struct Part {
    /// Elements of a row.
    pub row: usize,
    /// The first element of the first head.
    pub channel: usize,
    /// Elements of a head.
    pub width: usize,
}

/// Copies some heads' channels of a group's tokens to `out` (head, token, padded width); the padding becomes 0.
#[inline(always)]
pub(super) fn gather<S: Stored<T>, T: Float>(
    source: &[S],
    part: Part,
    heads: usize,
    tokens: &[usize],
    padded: usize,
    out: &mut [T],
) {
    let Part { row, channel, width } = part;
    for (place, &token) in tokens.iter().enumerate() {
        let source = source[token * row + channel..][..heads * width].chunks_exact(width);
        for (source, out) in source.zip(out[place * padded..].chunks_mut(tokens.len() * padded)) {
            // Whole vectors by value, where there are some: a call to copy a few of them costs more.
            let ((vectors, _), (out, rest)) = (source.as_chunks::<LANES>(), out[..padded].as_chunks_mut::<LANES>());
            if width == padded {
                for (out, source) in out.iter_mut().zip(vectors) {
                    *out = S::load_all(source);
                }
            } else {
                let out = out.as_flattened_mut();
                for (out, source) in out.iter_mut().zip(source) {
                    *out = source.load();
                }
                out[width..].fill(T::ZERO);
            }
            debug_assert!(rest.is_empty(), "padded widths are whole vectors");
        }
    }
}

/// Like [`gather`], to (head, width, padded tokens): the transposes of every head's rows, times `factor`.
#[inline(always)]
#[allow(clippy::needless_range_loop, reason = "one index for four rows")]
pub(super) fn gather_transposed<S: Stored<T>, T: Float>(
    source: &[S],
    part: Part,
    heads: usize,
    tokens: &[usize],
    (padded_tokens, factor): (usize, T),
    out: &mut [T],
) {
    const SIDE: usize = 4;
    let Part { row, channel, width } = part;
    for (head, out) in out.chunks_exact_mut(width * padded_tokens).take(heads).enumerate() {
        let channel = channel + head * width;
        let (fours, rest) = tokens.as_chunks::<SIDE>();
        for (number, four) in fours.iter().enumerate() {
            let mut rows: [&[[S; SIDE]]; SIDE] = [&[]; SIDE];
            for (row_out, &token) in rows.iter_mut().zip(four) {
                *row_out = source[token * row + channel..][..width].as_chunks::<SIDE>().0;
            }
            for at in 0..width / SIDE {
                let [a, b, c, d] = rows;
                let square = [S::load_all(&a[at]), S::load_all(&b[at]), S::load_all(&c[at]), S::load_all(&d[at])];
                for column in 0..SIDE {
                    let transposed = [square[0][column], square[1][column], square[2][column], square[3][column]];
                    let transposed = transposed.map(
                        #[inline(always)]
                        |value| value * factor,
                    );
                    let to = (at * SIDE + column) * padded_tokens + number * SIDE;
                    out[to..to + SIDE].copy_from_slice(&transposed);
                }
            }
        }
        for column in 0..width {
            let out = &mut out[column * padded_tokens..][..padded_tokens];
            let first = if column < width / SIDE * SIDE { tokens.len() - rest.len() } else { 0 };
            for (out, &token) in out[first..].iter_mut().zip(&tokens[first..]) {
                *out = source[token * row + channel + column].load() * factor;
            }
            out[tokens.len()..].fill(T::ZERO);
        }
    }
}

/// The bytes of some tokens' rows, of `row` elements, that fall to `head` of `heads`: one run for each token.
pub(super) fn shares_of_rows<S>(tokens: &[usize], row: usize, [head, heads]: [usize; 2], runs: &mut Vec<Range<usize>>) {
    let (bytes, at) = (row * size_of::<S>(), |head: usize| row * head / heads * size_of::<S>());
    runs.extend(tokens.iter().map(|token| token * bytes + at(head)..token * bytes + at(head + 1)));
}
