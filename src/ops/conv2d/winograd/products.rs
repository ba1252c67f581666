//! The products between the transforms: all of a panel of columns in one loop, which asks for the next one's weight while it
//! computes.

use pulp::{Simd, WithSimd};

use crate::cpu::ahead::contiguous;
use crate::cpu::block_gemm::{GROUP, LANES, Onto, Product, Strided, TransposedProduct, Writes};

/// Terms that are summed at most before they join a longer sum, which keeps errors small.
const DEPTH: usize = 64;

/// The products of some tiles with a panel of the weight.
pub(super) struct PanelProducts<'a, const P: usize> {
    /// Transformed inputs in the order (tile, product, channel).
    pub inputs: &'a [f32],
    /// Channels.
    pub depth: usize,
    /// The transformed weight from the panel on, and so all that is read soon.
    pub weight: &'a [f32],
    /// Columns of the panel.
    pub width: usize,
    /// What comes out, in the order (tile, product, column of the panel).
    pub products: &'a mut [f32],
}

impl<const P: usize> WithSimd for PanelProducts<'_, P> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (depth, width) = (self.depth, self.width);
        let count = self.products.len() / (P * P * width);
        for p in 0..P * P {
            let (panel, behind) = self.weight[p * depth * width..].split_at(depth * width);
            let product = Product {
                rows: Strided { data: &self.inputs[p * depth..], stride: P * P * depth, columns: depth },
                runs: [0],
                count,
                panel,
                width,
                destination: &mut self.products[p * width..],
                places: P * P * width,
                onto: Onto::Nothing,
                writes: Writes::Near,
                terms: depth.div_ceil(depth.div_ceil(DEPTH).max(1)),
                ahead: contiguous(&behind[..behind.len().min(depth * width)]),
            };
            product.with_simd(simd);
        }
    }
}

/// Of one product and a panel of columns the sums over the tiles of all blocks.
pub(super) struct TileSums<'a> {
    /// Block by block so many elements: transformed inputs and gradients.
    pub blocks: &'a [f32],
    pub block_len: usize,
    /// Tiles of each block but the last one, and of all.
    pub tiles: [usize; 2],
    /// Where in a block the product's inputs begin, in the order (group of channels, tile, channel of the group).
    pub inputs: usize,
    /// Where in a block the product's gradients begin, panel by panel in the order (tile, column of the panel).
    pub grads: usize,
    /// The panel's first column, and how many it has.
    pub panel: [usize; 2],
    /// (channel, column of the panel)
    pub sums: &'a mut [f32],
}

impl WithSimd for TileSums<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let ([most, all], [first, width]) = (self.tiles, self.panel);
        let grads_of = |index: usize, count: usize| {
            let start = index * self.block_len + self.grads + first * count;
            &self.blocks[start..][..width * count]
        };
        for (index, block) in self.blocks.chunks(self.block_len).enumerate() {
            let count = most.min(all - index * most);
            let inputs = &block[self.inputs..][..self.sums.len() / width * count];
            let next =
                if (index + 1) * most < all { grads_of(index + 1, most.min(all - (index + 1) * most)) } else { &[] };
            let right = Strided { data: grads_of(index, count), stride: width, columns: width };
            let share = next.len().div_ceil(self.sums.len() / width / GROUP).next_multiple_of(LANES).max(1);
            let mut next = next.chunks(share);
            for (group, sums) in self.sums.chunks_exact_mut(GROUP * width).enumerate() {
                let data = &inputs[group * count * GROUP..][..count * GROUP];
                let left = Strided { data, stride: GROUP, columns: GROUP };
                let ahead = next.next().unwrap_or_default();
                TransposedProduct { left, right, depth: count, sums, ahead }.with_simd(simd);
            }
        }
    }
}
