//! Parallel loops whose results do not depend on the number of threads: work is cut into pieces whose size depends on
//! the problem alone, each piece writes its own part of the output, and sums over pieces run in order afterwards.

use rayon::prelude::*;

use super::{Float, simd};
use crate::tensor::{Buffer, Element};

/// Elements per piece of an elementwise loop: a few of these fill a core's L1 cache.
pub const PIECE: usize = 8192;

/// How many of so many pieces a thread takes at once. Left to itself rayon hands out quarters where there are two threads;
/// whoever is done first then waits for the last one.
fn together(pieces: usize) -> usize {
    const SHARES: usize = 128;
    pieces.div_ceil(SHARES).max(1)
}

/// Calls `body(index, piece)` for consecutive pieces of `piece_len` elements (the last may be shorter), in parallel
/// where there are several.
pub fn pieces_mut<T: Send>(output: &mut [T], piece_len: usize, body: impl Fn(usize, &mut [T]) + Sync + Send) {
    // The loop is compiled once per element type, not once per body.
    fn run<T: Send>(output: &mut [T], piece_len: usize, body: &(dyn Fn(usize, &mut [T]) + Sync + Send)) {
        let pieces = output.par_chunks_mut(piece_len).enumerate();
        let together = together(pieces.len());
        pieces.with_max_len(together).for_each(|(index, piece)| body(index, piece));
    }
    let piece_len = piece_len.max(1);
    if output.len() <= piece_len {
        if !output.is_empty() {
            body(0, output);
        }
    } else {
        run(output, piece_len, &body);
    }
}

/// Like [`pieces_mut`], over two outputs that are cut into the same number of pieces, each with its own length.
pub fn pieces_mut2<A: Send, B: Send>(
    (first, first_len): (&mut [A], usize),
    (second, second_len): (&mut [B], usize),
    body: impl Fn(usize, &mut [A], &mut [B]) + Sync + Send,
) {
    let pieces = first.par_chunks_mut(first_len.max(1)).zip(second.par_chunks_mut(second_len.max(1)));
    let together = together(pieces.len());
    pieces.with_max_len(together).enumerate().for_each(|(index, (first, second))| body(index, first, second));
}

/// The rows of a matrix, each cut into pieces of these widths: for every width the pieces of all rows, a strip of columns.
pub fn columns_mut<'a, T>(rows: &'a mut [T], widths: &[usize]) -> Vec<Vec<&'a mut [T]>> {
    let len: usize = widths.iter().sum();
    let count = rows.len() / len.max(1);
    let mut strips: Vec<Vec<&mut [T]>> = widths.iter().map(|_| Vec::with_capacity(count)).collect();
    for mut row in rows.chunks_exact_mut(len.max(1)) {
        for (strip, &width) in strips.iter_mut().zip(widths) {
            strip.extend(row.split_off_mut(..width));
        }
    }
    strips
}

/// Calls `body(index)` for each index below `count`, in parallel.
pub fn indices(count: usize, body: impl Fn(usize) + Sync + Send) {
    fn run(count: usize, body: &(dyn Fn(usize) + Sync + Send)) {
        (0..count).into_par_iter().with_max_len(together(count)).for_each(body);
    }
    if count <= 1 {
        (0..count).for_each(body);
    } else {
        run(count, &body);
    }
}

/// A copy in a local variable, where a closure's parameters become registers.
#[inline(always)]
fn by_value<F: Copy>(f: F) -> F {
    f
}

/// `output[i] = f(input[i])`. What `f` holds, it should hold by value (`move`): a parameter behind a reference could
/// change with every write, for all the compiler knows, and so would keep the loop from being vectorised.
#[inline(always)]
pub fn map<A: Element, B: Element>(input: &[A], output: &mut [B], f: impl Fn(A) -> B + Copy + Sync + Send) {
    pieces_mut(output, PIECE, |index, piece| {
        let input = &input[index * PIECE..][..piece.len()];
        simd::dispatch(
            #[inline(always)]
            || {
                let f = by_value(f);
                for (out, &a) in piece.iter_mut().zip(input) {
                    *out = f(a);
                }
            },
        );
    });
}

/// `output[i] = f(left[i], right[i])`.
#[inline(always)]
pub fn zip_map<A: Element, B: Element, C: Element>(
    left: &[A],
    right: &[B],
    output: &mut [C],
    f: impl Fn(A, B) -> C + Copy + Sync + Send,
) {
    pieces_mut(output, PIECE, |index, piece| {
        let left = &left[index * PIECE..][..piece.len()];
        let right = &right[index * PIECE..][..piece.len()];
        simd::dispatch(
            #[inline(always)]
            || {
                let f = by_value(f);
                for (out, (&a, &b)) in piece.iter_mut().zip(left.iter().zip(right)) {
                    *out = f(a, b);
                }
            },
        );
    });
}

/// Updates `output[i]` from itself and `input[i]`.
#[inline(always)]
pub fn update<A: Element, B: Element>(output: &mut [B], input: &[A], f: impl Fn(&mut B, A) + Copy + Sync + Send) {
    pieces_mut(output, PIECE, |index, piece| {
        let input = &input[index * PIECE..][..piece.len()];
        simd::dispatch(
            #[inline(always)]
            || {
                let f = by_value(f);
                for (out, &a) in piece.iter_mut().zip(input) {
                    f(out, a);
                }
            },
        );
    });
}

/// Sums over `count` items into `width` accumulators: `body(range, sums)` adds the items of `range` to zeroed `sums`.
///
/// Items are cut into at most 64 ranges of at least `grain`, by their number alone; the partial sums are added in order.
pub fn accumulate<T: Float>(
    count: usize,
    grain: usize,
    width: usize,
    body: impl Fn(std::ops::Range<usize>, &mut [T]) + Sync + Send,
) -> Buffer<T> {
    let partition = Partition::new(count, grain);
    let mut partial = Buffer::<T>::zeroed(partition.parts * width);
    pieces_mut(&mut partial, width, |part, sums| body(partition.range(part), sums));
    partition.total(partial, width)
}

/// Like [`accumulate`], for items that also produce output: item i owns elements `i * item_len..` of `output`, and
/// `body(range, piece, sums)` writes those of its items.
pub fn accumulate_writing<T: Float>(
    output: &mut [T],
    item_len: usize,
    grain: usize,
    width: usize,
    body: impl Fn(std::ops::Range<usize>, &mut [T], &mut [T]) + Sync + Send,
) -> Buffer<T> {
    let partition = Partition::new(output.len() / item_len.max(1), grain);
    let mut partial = Buffer::<T>::zeroed(partition.parts * width);
    let pieces = output.par_chunks_mut((partition.per_part * item_len).max(1));
    let sums = partial.par_chunks_mut(width.max(1));
    pieces
        .zip(sums)
        .with_max_len(1)
        .enumerate()
        .for_each(|(part, (piece, sums))| body(partition.range(part), piece, sums));
    partition.total(partial, width)
}

/// How [`accumulate`] cuts its items.
struct Partition {
    count: usize,
    per_part: usize,
    parts: usize,
}

impl Partition {
    fn new(count: usize, grain: usize) -> Self {
        const PARTS: usize = 64;
        let per_part = count.div_ceil(PARTS).max(grain).max(1);
        Partition { count, per_part, parts: count.div_ceil(per_part).max(1) }
    }

    fn range(&self, part: usize) -> std::ops::Range<usize> {
        part * self.per_part..self.count.min((part + 1) * self.per_part)
    }

    fn total<T: Float>(&self, partial: Buffer<T>, width: usize) -> Buffer<T> {
        if self.parts == 1 {
            return partial;
        }
        let mut total = Buffer::<T>::recycled(width);
        pieces_mut(&mut total, PIECE, |index, sums| {
            let at = index * PIECE;
            sums.copy_from_slice(&partial[at..][..sums.len()]);
            for part in 1..self.parts {
                let addend = &partial[part * width + at..][..sums.len()];
                sums.iter_mut().zip(addend).for_each(|(sum, &value)| *sum += value);
            }
        });
        total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_the_same_for_any_number_of_threads() {
        let values: Vec<f32> = (0..100_000).map(|i| (i as f32 * 0.37).sin()).collect();
        let sum = || {
            accumulate::<f32>(values.len(), 16, 3, |range, sums| {
                for i in range {
                    sums[i % 3] += values[i];
                }
            })
            .to_vec()
        };
        let reference = sum();
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            assert_eq!(pool.install(sum), reference);
        }
        assert_eq!(accumulate::<f32>(0, 1, 2, |_, _| ()).to_vec(), [0.0, 0.0]);
    }
}
