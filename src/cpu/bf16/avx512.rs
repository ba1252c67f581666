//! The products in AVX-512 with its `bf16` extension: blocks of 8 rows by two vectors of 16 sums, which hide the latency of
//! the instruction. For each pair of the depth a block loads two vectors of the panel and 8 pairs, each for two products.

#![allow(
    unsafe_code,
    reason = "loads and stores of vectors, and functions of an instruction set that is asked for first"
)]

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _mm512_add_ps, _mm512_castps_si512, _mm512_cvtne2ps_pbh, _mm512_dpbf16_ps,
    _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mask_storeu_epi16, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps,
    _mm512_set1_ps, _mm512_setzero_ps, _mm512_setzero_si512, _mm512_storeu_ps, _mm512_stream_si512,
};
use std::mem::transmute;

use half::bf16;

use super::{GROUP, PANEL, Product, To, has_instructions};
use crate::cpu::block_gemm::{Starts, Strided};

/// Sums of a vector.
const LANES: usize = 16;
/// Vectors of a panel.
const VECTORS: usize = PANEL / LANES;

/// As [`Product::run`].
pub(super) fn multiply(product: &Product<'_>, to: To<'_>) {
    assert!(has_instructions(), "AVX-512 with bf16");
    // SAFETY: the processor has the instructions.
    unsafe { all_rows(product, to) }
}

/// As [`super::add_transposed`].
pub(super) fn add_transposed<L: Starts, R: Starts>(
    left: Strided<'_, L, [bf16; 2]>,
    right: Strided<'_, R, [bf16; 2]>,
    depth: usize,
    sums: (&mut [f32], usize),
) {
    assert!(has_instructions(), "AVX-512 with bf16");
    if right.columns == PANEL {
        // SAFETY: the processor has the instructions.
        unsafe { all_groups::<L, R, VECTORS>(left, right, depth, sums) }
    } else {
        // SAFETY: as above.
        unsafe { all_groups::<L, R, 1>(left, right, depth, sums) }
    }
}

type Block<const R: usize, const V: usize> = [[__m512; V]; R];

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn all_rows(product: &Product<'_>, mut to: To<'_>) {
    let mut first = 0;
    while first < product.starts.len() {
        let to = &mut to;
        first += match product.starts.len() - first {
            GROUP.. => rows::<GROUP>(product, first, to),
            4.. => rows::<4>(product, first, to),
            2.. => rows::<2>(product, first, to),
            _ => rows::<1>(product, first, to),
        };
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn rows<const R: usize>(product: &Product<'_>, first: usize, to: &mut To<'_>) -> usize {
    let Product { data, starts, depth, panel, start, used, places, streamed } = *product;
    let start = [load_sums(&start[..LANES]), load_sums(&start[LANES..])];
    let mut sums: Block<R, VECTORS> = [start; R];
    let mut left: [&[[bf16; 2]]; R] = [&[]; R];
    let mut last = [[bf16::ZERO; 2]; R];
    for r in 0..R {
        let (whole, rest) = data[starts[first + r]..][..depth].as_chunks::<2>();
        left[r] = &whole[..depth / 2];
        last[r][0] = rest.first().copied().unwrap_or_default();
    }
    let (panel, _) = panel.as_chunks::<{ 2 * PANEL }>();
    for (pair, right) in panel[..depth / 2].iter().enumerate() {
        let mut factors = [[bf16::ZERO; 2]; R];
        for r in 0..R {
            factors[r] = left[r][pair];
        }
        add(&factors, right.as_chunks().0, &mut sums);
    }
    if !depth.is_multiple_of(2) {
        add(&last, panel[depth / 2].as_chunks().0, &mut sums);
    }
    for (r, sums) in sums.into_iter().enumerate() {
        let at = places.at(first + r);
        match to {
            To::Narrow(to) => store_narrow(&mut to[at..at + used], sums, streamed),
            To::Wide(to) => {
                let (low, high) = to[at..at + used].split_at_mut(used.min(LANES));
                store_wide(low, sums[0]);
                store_wide(high, sums[1]);
            }
            To::Added(to) => {
                let (low, high) = to[at..at + used].split_at_mut(used.min(LANES));
                store_wide(low, _mm512_add_ps(load_wide(low), sums[0]));
                store_wide(high, _mm512_add_ps(load_wide(high), sums[1]));
            }
        }
    }
    R
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn all_groups<L: Starts, R: Starts, const V: usize>(
    left: Strided<'_, L, [bf16; 2]>,
    right: Strided<'_, R, [bf16; 2]>,
    depth: usize,
    (sums, stride): (&mut [f32], usize),
) {
    for first in (0..left.columns).step_by(GROUP) {
        let mut block: Block<GROUP, V> = [[_mm512_setzero_ps(); V]; GROUP];
        let left_data = &left.data[first..];
        for t in 0..depth {
            let Some(factors) = left_data[left.stride.at(t)..][..GROUP].first_chunk() else { return };
            add(factors, &right.data[right.stride.at(t)..][..V * LANES], &mut block);
        }
        for (r, block) in block.into_iter().enumerate() {
            let row = &mut sums[(first + r) * stride..][..V * LANES];
            for (row, block) in row.chunks_exact_mut(LANES).zip(block) {
                let sum = _mm512_add_ps(load_sums(row), block);
                store_sums(row, sum);
            }
        }
    }
}

/// Adds the products of a pair of each row with a pair of all columns.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn add<const R: usize, const V: usize>(factors: &[[bf16; 2]; R], right: &[[bf16; 2]], sums: &mut Block<R, V>) {
    let mut columns = [as_pairs(_mm512_setzero_si512()); V];
    for (v, columns) in columns.iter_mut().enumerate() {
        *columns = load_pairs(&right[v * LANES..][..LANES]);
    }
    for (sums, factors) in sums.iter_mut().zip(factors) {
        // As a number: a broadcast from memory, without a way through other registers.
        let factors = as_pairs(_mm512_castps_si512(_mm512_set1_ps(bytemuck::cast(*factors))));
        for (sum, columns) in sums.iter_mut().zip(columns) {
            *sum = _mm512_dpbf16_ps(*sum, factors, columns);
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn as_pairs(bits: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits, of which any are valid.
    unsafe { transmute::<__m512i, __m512bh>(bits) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_pairs(from: &[[bf16; 2]]) -> __m512bh {
    assert_eq!(from.len(), LANES);
    // SAFETY: the slice is as long as the vector; the load needs no alignment.
    as_pairs(unsafe { _mm512_loadu_si512(from.as_ptr().cast()) })
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_sums(from: &[f32]) -> __m512 {
    assert_eq!(from.len(), LANES);
    // SAFETY: the slice is as long as the vector; the load needs no alignment.
    unsafe { _mm512_loadu_ps(from.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store_sums(to: &mut [f32], value: __m512) {
    assert_eq!(to.len(), LANES);
    // SAFETY: the slice is as long as the vector; the store needs no alignment.
    unsafe { _mm512_storeu_ps(to.as_mut_ptr(), value) }
}

/// As many elements as `from` has, and zeros.
#[inline]
#[target_feature(enable = "avx512f")]
fn load_wide(from: &[f32]) -> __m512 {
    assert!(from.len() <= LANES);
    let mask = ((1u32 << from.len()) - 1) as u16;
    // SAFETY: the mask has one bit for each element of the slice, and the others are not read.
    unsafe { _mm512_maskz_loadu_ps(mask, from.as_ptr()) }
}

/// The first elements of a vector, as many as `to` has.
#[inline]
#[target_feature(enable = "avx512f")]
fn store_wide(to: &mut [f32], value: __m512) {
    assert!(to.len() <= LANES);
    let mask = ((1u32 << to.len()) - 1) as u16;
    // SAFETY: the mask has one bit for each element of the slice, and the others are not written.
    unsafe { _mm512_mask_storeu_ps(to.as_mut_ptr(), mask, value) }
}

/// The first elements of two vectors, rounded, as many as `to` has.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn store_narrow(to: &mut [bf16], [low, high]: [__m512; VECTORS], streamed: bool) {
    assert!(to.len() <= PANEL);
    let mask = ((1u64 << to.len()) - 1) as u32;
    let rounded = _mm512_cvtne2ps_pbh(high, low);
    // SAFETY: both are 512 bits, of which any are valid.
    let bits = unsafe { transmute::<__m512bh, __m512i>(rounded) };
    if streamed && to.len() == PANEL && to.as_ptr().addr().is_multiple_of(64) {
        // SAFETY: the slice is as long as the vector and begins on a line, as was just checked; who asked for streaming
        // orders what was written before it is read.
        unsafe { _mm512_stream_si512(to.as_mut_ptr().cast(), bits) };
    } else {
        // SAFETY: the mask has one bit for each element of the slice, and the others are not written.
        unsafe { _mm512_mask_storeu_epi16(to.as_mut_ptr().cast(), mask, bits) };
    }
}
