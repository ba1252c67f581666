//! Between `bf16` and `f32`, in loops that vectorise for every instruction set.

use half::bf16;

use crate::cpu::{parallel, simd};
use crate::tensor::Buffer;

/// Exact.
#[inline(always)]
pub(crate) fn widen(value: bf16) -> f32 {
    f32::from_bits(u32::from(value.to_bits()) << 16)
}

/// Rounded to the nearest, ties to even; NaN stays NaN.
#[inline(always)]
pub(crate) fn narrow(value: f32) -> bf16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    let is_nan = bits & 0x7fff_ffff > 0x7f80_0000;
    bf16::from_bits(if is_nan { quiet } else { rounded } as u16)
}

/// `wide[i] = narrow[i]`.
#[inline(always)]
pub(crate) fn widen_into(narrow: &[bf16], wide: &mut [f32]) {
    for (wide, &narrow) in wide.iter_mut().zip(narrow) {
        *wide = widen(narrow);
    }
}

/// Rounds all, with all threads.
pub(crate) fn narrowed(values: &[f32]) -> Buffer<bf16> {
    let mut narrowed = Buffer::recycled(values.len());
    parallel::map(values, &mut narrowed, narrow);
    narrowed
}

/// Adds the rows of `values` to `total`.
pub(crate) fn add_rows(values: &[bf16], total: &mut [f32]) {
    simd::dispatch(
        #[inline(always)]
        || {
            for row in values.chunks_exact(total.len().max(1)) {
                for (sum, &value) in total.iter_mut().zip(row) {
                    *sum += widen(value);
                }
            }
        },
    );
}
