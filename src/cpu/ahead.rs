//! What is read soon is asked for while something else is computed.

use super::block_gemm::Strided;
use super::simd;

/// Elements from one request to the next: a cache line of `f32`.
const LINE: usize = 16;

/// Rows that are read soon. Every block of a product asks for an equal share of their cache lines, one with each of its
/// terms: many requests in a row hold up the loads behind them.
pub(super) struct Ahead<'a> {
    rows: Strided<'a>,
    /// Rows that a block asks for.
    share: usize,
    /// The row that comes next, and the one at which this block ends.
    next: [usize; 2],
    /// What is left of the row before.
    run: &'a [f32],
}

impl<'a> Ahead<'a> {
    /// For a product of so many blocks.
    #[inline(always)]
    pub fn new(rows: Strided<'a>, blocks: usize) -> Self {
        let (len, blocks) = (rows.data.len(), blocks.max(1));
        // Contiguous elements are as many rows as there are blocks.
        let dense = rows.columns >= rows.stride;
        let extent = if dense { len.div_ceil(blocks).next_multiple_of(LINE).max(LINE) } else { rows.stride };
        let columns = if dense { extent } else { rows.columns };
        let rows = Strided { data: rows.data, stride: extent, columns };
        Ahead { rows, share: len.div_ceil(extent).div_ceil(blocks), next: [0; 2], run: &[] }
    }

    /// Before the terms of each block.
    #[inline(always)]
    pub fn begin_block(&mut self) {
        self.next[1] += self.share;
        self.begin_row();
    }

    #[inline(always)]
    fn begin_row(&mut self) {
        if self.next[0] < self.next[1] {
            let start = (self.next[0] * self.rows.stride).min(self.rows.data.len());
            self.run = &self.rows.data[start..][..self.rows.columns.min(self.rows.data.len() - start)];
            self.next[0] += 1;
        }
    }

    /// With each term of a block.
    #[inline(always)]
    pub fn ask(&mut self) {
        if let Some(first) = self.run.first() {
            simd::prefetch(std::slice::from_ref(first));
            self.run = self.run.get(LINE..).unwrap_or_default();
            if self.run.is_empty() {
                self.begin_row();
            }
        }
    }

    /// After the terms of each block: where they were fewer than lines, asks for the rest.
    #[inline(always)]
    pub fn finish_block(&mut self) {
        while !self.run.is_empty() {
            self.ask();
        }
    }
}

/// Contiguous elements.
pub(crate) fn contiguous(data: &[f32]) -> Strided<'_> {
    Strided { data, stride: LINE, columns: LINE }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Places of the lines that are asked for, by block.
    fn asked(rows: Strided<'_>, blocks: usize) -> Vec<Vec<usize>> {
        let mut ahead = Ahead::new(rows, blocks);
        let place = |run: &[f32]| (run.as_ptr() as usize - rows.data.as_ptr() as usize) / size_of::<f32>();
        let mut places = Vec::new();
        for _ in 0..blocks {
            ahead.begin_block();
            let mut of_block = Vec::new();
            while !ahead.run.is_empty() {
                of_block.push(place(ahead.run));
                ahead.ask();
            }
            places.push(of_block);
        }
        places
    }

    #[test]
    fn every_line_is_asked_for_once_and_blocks_share_them() {
        let data = [0.0; 200];
        assert_eq!(asked(contiguous(&data[..100]), 3), [vec![0, 16, 32], vec![48, 64, 80], vec![96]]);
        assert_eq!(asked(contiguous(&data[..10]), 2), [vec![0], vec![]]);
        assert_eq!(asked(contiguous(&[]), 2), [[0; 0]; 2]);
        // Two rows of 20 columns, 100 apart: two lines each.
        let rows = Strided { data: &data, stride: 100, columns: 20 };
        assert_eq!(asked(rows, 2), [[0, 16], [100, 116]]);
        assert_eq!(asked(rows, 1), [[0, 16, 100, 116]]);
        assert_eq!(asked(rows, 4), [vec![0, 16], vec![100, 116], vec![], vec![]]);
        // The last row is short.
        let rows = Strided { data: &data[..110], stride: 100, columns: 20 };
        assert_eq!(asked(rows, 1), [[0, 16, 100]]);
    }
}
