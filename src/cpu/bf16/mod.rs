//! Products of `bf16` matrices with sums in `f32`, for processors that have AVX-512 with its `bf16` extension, whose
//! instruction takes two multiply-adds for each `f32` lane: twice the rate of `f32`.
//!
//! Operands stay `bf16`. The right one is packed into panels; rows of the left one are read as they lie, two
//! neighbouring elements at once. A block of 8 rows by one panel stays in registers over the whole depth, in the order of
//! the depth, two terms at a time, whatever the number of rows and threads. Results are rounded once.
//!
//! The instruction treats subnormal numbers as zero and adds in another order than a chain of `f32` sums, so bits differ
//! between processors with and without it. Where it is missing, ops convert to `f32`; the portable form of the products
//! here serves tests.

#[cfg(target_arch = "x86_64")]
mod avx512;
mod convert;
mod panels;
mod portable;
mod products;
#[cfg(test)]
mod tests;

use std::cell::Cell;

pub(crate) use convert::{add_rows, narrow, narrowed, widen, widen_into};
pub(crate) use half::bf16;
pub(crate) use panels::{Panels, PanelsView, interleave, pairs};
pub(crate) use products::{
    block_rows, is_streamed, multiply_by_panels, multiply_rows, multiply_transposed, narrow_rows, shares_panels,
};

use super::block_gemm::{Starts, Strided};
use crate::tensor::DType;

/// Columns of a panel.
pub(crate) const PANEL: usize = 32;
/// Rows of a block, and columns of the left operand of [`add_transposed`] that it takes at once.
pub(crate) const GROUP: usize = 8;

thread_local! {
    static FORBIDDEN: Cell<bool> = const { Cell::new(false) };
}

/// Runs `body` as on a processor without these instructions, as far as this thread starts the ops: for tests.
#[doc(hidden)]
pub fn without_instructions<R>(body: impl FnOnce() -> R) -> R {
    let before = FORBIDDEN.replace(true);
    let result = body();
    FORBIDDEN.set(before);
    result
}

/// Whether ops on tensors of this dtype compute their products here.
pub(crate) fn serves(dtype: DType) -> bool {
    dtype == DType::Bf16 && has_instructions() && !FORBIDDEN.get()
}

/// Whether the processor has the instructions.
pub fn has_instructions() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512bf16")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// Where a product goes: rows of the panel's width, or of what is left of it.
pub(crate) enum To<'a> {
    /// Rounded.
    Narrow(&'a mut [bf16]),
    /// The sums as they are.
    Wide(&'a mut [f32]),
    /// The sums, added to what is there.
    Added(&'a mut [f32]),
}

/// Where the rows of a product's result begin.
#[derive(Clone, Copy)]
pub(crate) enum Places<'a> {
    /// So far apart.
    Apart(usize),
    /// One place for each row.
    Listed(&'a [usize]),
}

impl Places<'_> {
    #[inline(always)]
    fn at(self, row: usize) -> usize {
        match self {
            Places::Apart(stride) => row * stride,
            Places::Listed(places) => places[row],
        }
    }
}

/// Rows of `depth` elements which begin at `starts` in `data`, to be multiplied by a panel.
pub(crate) struct Product<'a> {
    pub data: &'a [bf16],
    pub starts: &'a [usize],
    pub depth: usize,
    /// Pairs × [`PANEL`] × 2.
    pub panel: &'a [bf16],
    /// What sums begin with.
    pub start: &'a [f32; PANEL],
    /// Columns that are written.
    pub used: usize,
    pub places: Places<'a>,
    /// Whether whole lines of a rounded result go past the caches.
    pub streamed: bool,
}

impl Product<'_> {
    fn check(&self, to: &To<'_>) {
        assert!(self.used <= PANEL && self.panel.len() == pairs(self.depth) * 2 * PANEL, "panel");
        let len = match to {
            To::Narrow(to) => to.len(),
            To::Wide(to) | To::Added(to) => to.len(),
        };
        // Places of a list are looked at when a row is written.
        match self.places {
            Places::Apart(stride) => {
                let last = self.starts.len().saturating_sub(1);
                assert!(self.starts.is_empty() || last * stride + self.used <= len, "result");
            }
            Places::Listed(places) => assert_eq!(places.len(), self.starts.len(), "places"),
        }
    }

    /// `to = rows · panel`.
    ///
    /// # Panics
    /// Where extents do not match or a row leaves its slice.
    pub fn run(&self, to: To<'_>) {
        self.check(&to);
        #[cfg(target_arch = "x86_64")]
        if has_instructions() {
            return avx512::multiply(self, to);
        }
        portable::multiply(self, to);
    }
}

/// `sums += leftᵀ · right` for rows of pairs: `left` has a multiple of [`GROUP`] columns, `right` [`PANEL`] or half of it. Rows
/// of the sums, one for each column of `left` and as long as those of `right`, are `stride` apart.
///
/// # Panics
/// Where extents do not match or a row leaves its data.
pub(crate) fn add_transposed<L: Starts, R: Starts>(
    left: Strided<'_, L, [bf16; 2]>,
    right: Strided<'_, R, [bf16; 2]>,
    depth: usize,
    (sums, stride): (&mut [f32], usize),
) {
    assert!(left.columns.is_multiple_of(GROUP), "left");
    assert!(right.columns == PANEL || right.columns == PANEL / 2, "right");
    assert!(left.columns == 0 || (left.columns - 1) * stride + right.columns <= sums.len(), "sums");
    #[cfg(target_arch = "x86_64")]
    if has_instructions() {
        return avx512::add_transposed(left, right, depth, (sums, stride));
    }
    portable::add_transposed(left, right, depth, (sums, stride));
}
