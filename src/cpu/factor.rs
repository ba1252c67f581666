//! What sums of products over rows are made of: numbers, or pairs of `bf16`.

use half::bf16;

use super::block_gemm::{self, Starts, Strided};
use super::{Float, simd};

/// An element of matrices whose products are summed over rows.
pub trait Factor: bytemuck::Pod + Send + Sync {
    /// What products are summed in, of the same size.
    type Sum: Float;

    /// `sums += leftᵀ · right`, as [`block_gemm::multiply_transposed`].
    fn multiply_transposed<L: Starts, R: Starts>(
        left: Strided<'_, L, Self>,
        right: Strided<'_, R, Self>,
        depth: usize,
        sums: &mut [Self::Sum],
        ahead: &[Self],
    );
}

impl Factor for f32 {
    type Sum = f32;

    fn multiply_transposed<L: Starts, R: Starts>(
        left: Strided<'_, L>,
        right: Strided<'_, R>,
        depth: usize,
        sums: &mut [f32],
        ahead: &[f32],
    ) {
        block_gemm::multiply_transposed(left, right, depth, sums, ahead);
    }
}

/// For references, so simple.
impl Factor for f64 {
    type Sum = f64;

    fn multiply_transposed<L: Starts, R: Starts>(
        left: Strided<'_, L, f64>,
        right: Strided<'_, R, f64>,
        depth: usize,
        sums: &mut [f64],
        _: &[f64],
    ) {
        simd::dispatch(
            #[inline(always)]
            || {
                for t in 0..depth {
                    let factors = &left.data[left.stride.at(t)..][..left.columns];
                    let right_row = &right.data[right.stride.at(t)..][..right.columns];
                    for (&factor, sums) in factors.iter().zip(sums.chunks_exact_mut(right.columns)) {
                        sums.iter_mut().zip(right_row).for_each(|(sum, &value)| *sum += factor * value);
                    }
                }
            },
        );
    }
}

/// Elements of two rows side by side: both products enter the sum.
impl Factor for [bf16; 2] {
    type Sum = f32;

    fn multiply_transposed<L: Starts, R: Starts>(
        left: Strided<'_, L, Self>,
        right: Strided<'_, R, Self>,
        depth: usize,
        sums: &mut [f32],
        _: &[Self],
    ) {
        let stride = right.columns;
        super::bf16::add_transposed(left, right, depth, (sums, stride));
    }
}
