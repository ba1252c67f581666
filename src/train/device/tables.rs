//! Tables of tensors that one launch takes by value, and how its blocks divide them.

use super::THREADS;
use crate::driver::seam::Address;
use crate::gpu::{Geometry, Gpu, Kernel, Memory};
use crate::{Result, Tensor};

/// As `MOST` in the kernel file: rows of a table.
pub(in crate::train) const MOST: usize = 512;
/// As `PIECE`: elements of a block.
const PIECE: usize = 4096;

/// A column of a table, by value.
pub(in crate::train) type Column<T> = [T; MOST];

/// partials, count, first block, gradients, elements
pub(super) const GRADIENT_SQUARES: Kernel<(Address, u32, Column<u32>, Column<u64>, Column<u64>)> =
    Kernel::new("training", "gradient_squares", &[]);

/// Tensors in `f32` that a launch goes over, and the division of their elements among blocks.
pub(in crate::train) struct Table {
    parts: Vec<Part>,
}

/// As many rows as a launch takes.
pub(in crate::train) struct Part {
    /// Rows in use.
    pub count: u32,
    /// The first block of each row.
    pub first_block: Column<u32>,
    /// Where each row's tensor begins.
    pub addresses: Column<u64>,
    /// Elements of each row.
    pub elements: Column<u64>,
    /// Number of the first row in the whole list.
    pub first_row: usize,
    blocks: u32,
}

impl Table {
    /// The table of `tensors`, all on one GPU.
    pub fn new<'a>(tensors: impl Iterator<Item = &'a Tensor>) -> Result<Self> {
        let rows: Vec<(u64, usize)> =
            tensors.map(|tensor| Ok((tensor.address()?.0, tensor.elements()))).collect::<Result<_>>()?;
        Ok(Self::of_rows(&rows))
    }

    /// The table of addresses and numbers of elements.
    fn of_rows(rows: &[(u64, usize)]) -> Self {
        let part = |(number, rows): (usize, &[(u64, usize)])| {
            let mut part = Part {
                count: rows.len() as u32,
                first_block: [0; MOST],
                addresses: [0; MOST],
                elements: [0; MOST],
                first_row: number * MOST,
                blocks: 0,
            };
            for (row, &(address, elements)) in rows.iter().enumerate() {
                part.first_block[row] = part.blocks;
                part.addresses[row] = address;
                part.elements[row] = elements as u64;
                part.blocks += elements.div_ceil(PIECE) as u32;
            }
            part
        };
        Table { parts: rows.chunks(MOST).enumerate().map(part).collect() }
    }

    /// What each launch takes.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// Blocks of all launches.
    pub fn blocks(&self) -> u32 {
        self.parts.iter().map(|part| part.blocks).sum()
    }

    /// For each block, the sum of the squares of its elements, in `f64`.
    pub fn squares(&self, gpu: &'static Gpu) -> Result<Memory> {
        let partials = gpu.allocate(8 * self.blocks() as usize)?;
        let mut first = 0;
        for part in &self.parts {
            let arguments =
                (partials.address().offset(8 * first), part.count, part.first_block, part.addresses, part.elements);
            GRADIENT_SQUARES.launch(gpu, "", part.geometry(), arguments)?;
            first += part.blocks as usize;
        }
        Ok(partials)
    }
}

impl Part {
    /// A block for each piece of each tensor.
    pub fn geometry(&self) -> Geometry {
        Geometry::blocks(self.blocks as usize, THREADS)
    }

    /// A column of the rows of this part, from the values of all rows.
    pub fn column<T: Copy + Default>(&self, all: &[T]) -> Column<T> {
        let mut column = [T::default(); MOST];
        let rows = self.count as usize;
        column[..rows].copy_from_slice(&all[self.first_row..self.first_row + rows]);
        column
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_follow_each_other_and_rows_spill_into_a_second_launch() {
        let rows: Vec<(u64, usize)> = (0..600).map(|row| (row as u64, [1, 4096, 4097, 0][row % 4])).collect();
        let table = Table::of_rows(&rows);
        assert_eq!(table.parts().iter().map(|part| part.count).collect::<Vec<_>>(), [512, 88]);
        assert_eq!(table.blocks(), 600 / 4 * (1 + 1 + 2));
        assert_eq!(table.parts()[0].first_block[..6], [0, 1, 2, 4, 4, 5]);
        assert_eq!(table.parts()[1].first_row, 512);
        assert_eq!(table.parts()[1].column(&(0..600).collect::<Vec<u64>>())[..2], [512, 513]);
    }
}
