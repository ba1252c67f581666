//! The same products for any processor.

use half::bf16;

use super::{PANEL, Product, To, narrow, widen};
use crate::cpu::block_gemm::{Starts, Strided};
use crate::cpu::simd;

pub(super) fn multiply(product: &Product<'_>, mut to: To<'_>) {
    let Product { data, starts, depth, panel, start, used, places, .. } = *product;
    for (row, &first) in starts.iter().enumerate() {
        let mut sums = *start;
        let factors = data[first..][..depth].chunks(2).map(|pair| [pair[0], pair.get(1).copied().unwrap_or_default()]);
        for (pair, right) in factors.zip(panel.chunks_exact(2 * PANEL)) {
            add(pair, right, &mut sums);
        }
        let at = places.at(row)..places.at(row) + used;
        match &mut to {
            To::Narrow(to) => to[at].iter_mut().zip(sums).for_each(|(to, sum)| *to = narrow(sum)),
            To::Wide(to) => to[at].copy_from_slice(&sums[..used]),
            To::Added(to) => to[at].iter_mut().zip(sums).for_each(|(to, sum)| *to += sum),
        }
    }
}

pub(super) fn add_transposed<L: Starts, R: Starts>(
    left: Strided<'_, L, [bf16; 2]>,
    right: Strided<'_, R, [bf16; 2]>,
    depth: usize,
    (sums, stride): (&mut [f32], usize),
) {
    for t in 0..depth {
        let factors = &left.data[left.stride.at(t)..][..left.columns];
        let right_row = &right.data[right.stride.at(t)..][..right.columns];
        for (row, &pair) in factors.iter().enumerate() {
            add(pair, right_row.as_flattened(), &mut sums[row * stride..][..right.columns]);
        }
    }
}

/// Adds the products of a pair with those of all columns.
fn add(pair: [bf16; 2], right: &[bf16], sums: &mut [f32]) {
    let [even, odd] = pair.map(widen);
    simd::dispatch(
        #[inline(always)]
        || {
            for (sum, right) in sums.iter_mut().zip(right.as_chunks::<2>().0) {
                *sum = odd.mul_add(widen(right[1]), even.mul_add(widen(right[0]), *sum));
            }
        },
    );
}
