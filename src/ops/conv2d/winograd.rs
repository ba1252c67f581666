//! Convolutions of stride 1 by minimal filtering, after Winograd: fewer multiplications, and no larger errors.
//!
//! 4 neighbouring outputs of a kernel of r taps see 4 + r − 1 inputs. They are the upper coefficients of a product of
//! polynomials, found from its remainders by the factors of a polynomial and ∞. For r = 3 that is x (x⁴ − 1), with factors
//! x, x − 1, x + 1 and x² + 1, and for r = 5 it is x (x⁶ − 1), with x² + x + 1 and x² − x + 1 in place of x² + 1. A
//! remainder by a quadratic factor takes three multiplications, so there are 7 in place of 12, and 10 in place of 20. For a
//! map that is done in both directions: 4 × 4 outputs take 49 multiplications for 3 × 3 taps (144 directly) and 100 for
//! 5 × 5 (400). They become matrix products over channels; see Lavin & Gray, "Fast Algorithms for Convolutional Neural
//! Networks" (2016).
//!
//! The usual choice of points is real (0, ±1, ±2, …, ∞), needs 36 and 64 products, and loses digits. Here all points have
//! magnitude 1, all transforms but a scaling are sums of inputs and of three times such sums, and errors stay below those
//! of the direct sum (a test compares). With residues A, A₄ y those of 4 values and Gᵣ = S Aᵣ, S diagonal,
//!
//! - outputs are A₄ᵀ [(Gᵣ w) ⊙ (Bᵀ x)], and so is the input gradient, from the flipped kernel;
//! - the weight gradient is Gᵣᵀ Σ (A₄ y) ⊙ (Bᵀ x), summed over all tiles.
//!
//! Constants of functions and types are R, the taps of the kernel, T = R + 3, the inputs of a tile, and P, its products,
//! each in one direction.

mod products;
mod steps;
mod transforms;

use std::ops::Range;

use super::Geometry;
use crate::cpu::block_gemm::{LANES, PANEL, Writes};
use crate::cpu::packed::panels;
use crate::cpu::{Float, parallel, simd};
use crate::tensor::{Buffer, DType, Weight};
use products::{PanelProducts, TileSums};
use steps::{CollectOutput, CollectWeight, Destination, Operands, SpreadGrad, SpreadInput, SpreadWeight};

/// Outputs of a tile, in one direction.
const OUTPUTS: usize = 4;
/// Elements between planes of products, so that they do not all fall into the same sets of a cache.
const GAP: usize = LANES;

/// Whether this way is open, and better than the direct one, for the input gradient: kernels of 3 × 3 and 5 × 5, stride 1,
/// channels in whole vectors. `f64` is for references, which are direct.
pub(super) fn applies<T: Float>(g: &Geometry) -> bool {
    let options = g.options;
    let plain = options.stride == [1; 2] && options.dilation == [1; 2] && options.groups == 1;
    let whole = [g.in_channels, g.out_channels].iter().all(|&channels| channels.is_multiple_of(LANES));
    let fits = options.padding.iter().all(|&padding| padding < g.kernel[0]);
    T::DTYPE == DType::F32 && plain && whole && fits && (g.kernel == [3; 2] || g.kernel == [5; 2])
}

/// Whether that holds for output and weight gradient, too. Where an image is one tile, a weight transformed for the output,
/// 4 or 5 times the weight's size, has to be shared by many images. Training has them, inference may not; and their number must
/// not decide, or the result of an image would depend on it. The weight gradient's errors exceed the direct one's there.
pub(super) fn applies_both_ways<T: Float>(g: &Geometry) -> bool {
    applies::<T>(g) && g.output.iter().any(|&extent| extent > OUTPUTS)
}

/// The transformed weight of [`output`], by its own extents.
#[derive(Clone, PartialEq)]
struct Spread([usize; 3]);

pub(super) fn output<T: Float>(g: &Geometry, input: &[T], weight: Weight<'_, T>, bias: Option<&[T]>) -> Buffer<T> {
    let map = Map {
        batch: g.batch,
        source: bytemuck::cast_slice(input),
        extents: g.input,
        depth: g.in_channels,
        result: g.output,
        columns: g.out_channels,
        padding: g.options.padding,
    };
    let strides = [g.taps(), g.taps() * g.in_channels];
    let key = Spread([g.kernel[0], g.in_channels, g.out_channels]);
    let packed = weight.form(key, || map.packed_kernel(g.kernel[0], weight.values, strides, false));
    map.correlated(g.kernel[0], &packed, bias)
}

pub(super) fn input_gradient<T: Float>(g: &Geometry, grad: &[T], weight: &[T], bias: Option<&[T]>) -> Buffer<T> {
    let map = Map {
        batch: g.batch,
        source: bytemuck::cast_slice(grad),
        extents: g.output,
        depth: g.out_channels,
        result: g.input,
        columns: g.in_channels,
        padding: g.options.padding.map(|padding| g.kernel[0] - 1 - padding),
    };
    let strides = [g.taps() * g.in_channels, g.taps()];
    map.correlated(g.kernel[0], &map.packed_kernel(g.kernel[0], weight, strides, true), bias)
}

pub(super) fn weight_gradient<T: Float>(g: &Geometry, input: &[T], grad: &[T]) -> Buffer<T> {
    let map = Map {
        batch: g.batch,
        source: bytemuck::cast_slice(input),
        extents: g.input,
        depth: g.in_channels,
        result: g.output,
        columns: g.out_channels,
        padding: g.options.padding,
    };
    let mut output = Buffer::recycled(g.weight_shape().elements());
    let (grad, out) = (bytemuck::cast_slice(grad), bytemuck::cast_slice_mut(&mut output));
    match g.kernel[0] {
        3 => map.collect_weight::<3, 7>(&map.weight_products::<6, 7>(grad), out),
        _ => map.collect_weight::<5, 10>(&map.weight_products::<8, 10>(grad), out),
    }
    output
}

/// A convolution of a channels-last map, from `depth` channels to `columns`.
struct Map<'a> {
    batch: usize,
    source: &'a [f32],
    extents: [usize; 2],
    depth: usize,
    result: [usize; 2],
    columns: usize,
    padding: [usize; 2],
}

/// Where the window of a tile lies: offsets of its positions in a map, `None` outside.
type Window<const N: usize> = [[Option<usize>; N]; N];

impl Map<'_> {
    /// The transformed weight of a kernel of side `kernel`.
    fn packed_kernel<T: Float>(&self, kernel: usize, weight: &[T], strides: [usize; 2], flipped: bool) -> Buffer<f32> {
        let weight = bytemuck::cast_slice(weight);
        match kernel {
            3 => self.packed_weight::<3, 7>(weight, strides, flipped),
            _ => self.packed_weight::<5, 10>(weight, strides, flipped),
        }
    }

    /// The result, with the weight of [`Map::packed_kernel`].
    fn correlated<T: Float>(&self, kernel: usize, weight: &[f32], bias: Option<&[T]>) -> Buffer<T> {
        let mut output = Buffer::recycled(self.batch * self.result[0] * self.result[1] * self.columns);
        let (bias, out) = (bias.map(bytemuck::cast_slice), bytemuck::cast_slice_mut(&mut output));
        match kernel {
            3 => self.correlate::<6, 7>(weight, bias, out),
            _ => self.correlate::<8, 10>(weight, bias, out),
        }
        output
    }

    /// Lines of tiles in an image, and tiles in a line.
    fn tiles(&self) -> [usize; 2] {
        self.result.map(|extent| extent.div_ceil(OUTPUTS))
    }

    /// Image, and position in the result, of the tile of a number.
    fn place(&self, tile: usize) -> (usize, [usize; 2]) {
        let [lines, across] = self.tiles();
        (tile / across / lines, [tile / across % lines * OUTPUTS, tile % across * OUTPUTS])
    }

    fn input_window<const T: usize>(&self, tile: usize) -> Window<T> {
        let (image, corner) = self.place(tile);
        window(image, corner, self.padding, self.extents, self.depth)
    }

    fn output_window(&self, tile: usize) -> Window<OUTPUTS> {
        let (image, corner) = self.place(tile);
        window(image, corner, [0; 2], self.result, self.columns)
    }

    /// The numbers of a tile's outputs among all positions.
    fn positions(&self, tile: usize) -> Window<OUTPUTS> {
        let (image, corner) = self.place(tile);
        window(image, corner, [0; 2], self.result, 1)
    }

    /// Writes the result, block by block of whole lines of tiles.
    fn correlate<const T: usize, const P: usize>(&self, weight: &[f32], bias: Option<&[f32]>, mut rest: &mut [f32]) {
        // A block's operands should stay in the second-level cache, and be many beside a large weight.
        const BYTES: usize = 1 << 20;
        const LARGE: usize = 1 << 15;
        const MOST: usize = 64;
        /// So few would leave threads without work.
        const FEW_BLOCKS: usize = 4;
        let fitting = BYTES / (P * P * size_of::<f32>() * (self.depth + PANEL));
        let tiles = if self.depth * self.columns < LARGE { fitting.clamp(16, MOST) } else { MOST };
        let [height, width] = self.result;
        let [lines, across] = self.tiles();
        if rest.is_empty() {
            return;
        }
        let per_block = even_share(self.batch * lines, (tiles / across).max(1));
        let blocks = (self.batch * lines).div_ceil(per_block);
        let is_small = self.batch * lines * across <= FEW_BLOCKS * MOST;
        if blocks < FEW_BLOCKS && is_small && self.columns.div_ceil(PANEL) > blocks {
            return self.correlate_panels::<T, P>(weight, bias, rest);
        }
        let start = |q: usize| (q / lines * height + q % lines * OUTPUTS) * width * self.columns;
        let mut parts = Vec::new();
        for first in (0..self.batch * lines).step_by(per_block) {
            let last = (first + per_block).min(self.batch * lines);
            let (out, behind) = rest.split_at_mut(start(last) - start(first));
            parts.push((first, last, out));
            rest = behind;
        }
        parallel::pieces_mut(&mut parts, 1, |_, part| {
            let (first, last, out) = &mut part[0];
            let to = Destination::Whole { out, offset: start(*first), columns: self.columns };
            self.correlate_tiles::<T, P>(*first * across..*last * across, weight, bias, to);
        });
    }

    /// Writes the result, panel by panel of its columns: what threads share where there are few tiles.
    fn correlate_panels<const T: usize, const P: usize>(&self, weight: &[f32], bias: Option<&[f32]>, out: &mut [f32]) {
        const TOGETHER: usize = 4;
        let [lines, across] = self.tiles();
        let (count, plane) = (self.batch * lines * across, P * P * self.depth);
        let mut inputs = Buffer::<f32>::recycled(count * plane);
        parallel::pieces_mut(&mut inputs, TOGETHER * plane, |index, inputs| {
            let first = index * TOGETHER;
            let tiles = first..first + inputs.len() / plane;
            simd::with_vectors(SpreadInput::<T, P> { map: self, tiles, to: Operands::Rows(inputs) });
        });
        let widths: Vec<usize> = panels(self.columns).map(|(_, width)| width).collect();
        let mut strips = parallel::columns_mut(out, &widths);
        parallel::pieces_mut(&mut strips, 1, |panel, strip| {
            let (first, width) = (panel * PANEL, widths[panel]);
            let mut products = Buffer::<f32>::recycled(count * P * P * width);
            self.panel_products::<P>(&inputs, weight, (first, width), &mut products);
            let (products, to) = (&*products, Destination::Strip(&mut strip[0]));
            simd::with_vectors(CollectOutput::<P> {
                map: self,
                tiles: 0..count,
                products,
                first,
                bias,
                to,
                writes: Writes::Near,
            });
        });
    }

    /// The result of some tiles.
    fn correlate_tiles<const T: usize, const P: usize>(
        &self,
        tiles: Range<usize>,
        weight: &[f32],
        bias: Option<&[f32]>,
        mut to: Destination<'_, '_>,
    ) {
        let (depth, columns, count) = (self.depth, self.columns, tiles.len());
        let writes = Writes::of_large::<f32>(self.batch * self.result[0] * self.result[1] * columns);
        let mut inputs = Buffer::<f32>::recycled(count * P * P * depth);
        simd::with_vectors(SpreadInput::<T, P> { map: self, tiles: tiles.clone(), to: Operands::Rows(&mut inputs) });
        let mut products = Buffer::<f32>::recycled(count * P * P * PANEL.min(columns));
        for (first, width) in panels(columns) {
            let products = &mut products[..count * P * P * width];
            self.panel_products::<P>(&inputs, weight, (first, width), products);
            let (tiles, to) = (tiles.clone(), to.again());
            simd::with_vectors(CollectOutput::<P> { map: self, tiles, products, first, bias, to, writes });
        }
        if writes == Writes::Streamed {
            simd::finish_streaming();
        }
    }

    /// The products of all tiles of `inputs` with the panel of the weight that begins at column `first`, in the order (tile,
    /// product, column of the panel).
    fn panel_products<const P: usize>(
        &self,
        inputs: &[f32],
        weight: &[f32],
        (first, width): (usize, usize),
        products: &mut [f32],
    ) {
        let weight = &weight[first * P * P * self.depth..];
        simd::with_vectors(PanelProducts::<P> { inputs, depth: self.depth, weight, width, products });
    }

    /// Σ (A y) ⊙ (Bᵀ x), in the order (product, panel of columns, depth, column of the panel): sums over blocks of a
    /// fixed number of tiles, counted from the first image. So images whose gradient is zero, behind the others, add
    /// zeros and change no bit.
    fn weight_products<const T: usize, const P: usize>(&self, grad: &[f32]) -> Buffer<f32> {
        const BLOCK: usize = 32;
        const BYTES: usize = 16 << 20;
        let (depth, columns) = (self.depth, self.columns);
        let [lines, across] = self.tiles();
        let tiles = self.batch * lines * across;
        // Of each block, the inputs' and then the gradients' planes.
        let planes = [BLOCK * depth + GAP, BLOCK * columns + GAP];
        let block_len = P * P * (planes[0] + planes[1]);
        let blocks = (BYTES / size_of::<f32>() / block_len).clamp(4, 16).min(tiles.div_ceil(BLOCK));
        let mut operands = Buffer::<f32>::recycled(blocks * block_len);
        let mut sums = Buffer::<f32>::zeroed(P * P * depth * columns);
        for first in (0..tiles).step_by((blocks * BLOCK).max(1)) {
            let last = tiles.min(first + blocks * BLOCK);
            let used = (last - first).div_ceil(BLOCK) * block_len;
            parallel::pieces_mut(&mut operands[..used], block_len, |index, block| {
                let start = first + index * BLOCK;
                let tiles = start..last.min(start + BLOCK);
                let (inputs, grads) = block.split_at_mut(P * P * planes[0]);
                let to = Operands::Groups(inputs, planes[0]);
                simd::with_vectors(SpreadInput::<T, P> { map: self, tiles: tiles.clone(), to });
                simd::with_vectors(SpreadGrad::<P> { map: self, tiles, grad, data: grads, plane: planes[1] });
            });
            let mut parts: Vec<(usize, usize, &mut [f32])> = Vec::new();
            for (p, sums) in sums.chunks_mut(depth * columns).enumerate() {
                parts.extend(sums.chunks_mut(depth * PANEL).enumerate().map(|(panel, sums)| (p, panel * PANEL, sums)));
            }
            parallel::pieces_mut(&mut parts, 1, |_, part| {
                let (p, column, sums) = &mut part[0];
                simd::with_vectors(TileSums {
                    blocks: &operands[..used],
                    block_len,
                    tiles: [BLOCK, last - first],
                    inputs: *p * planes[0],
                    grads: P * P * planes[0] + *p * planes[1],
                    panel: [*column, sums.len() / depth],
                    sums,
                });
            });
        }
        sums
    }

    /// From (product, panel, in, out of the panel) to (out, in, tap).
    fn collect_weight<const R: usize, const P: usize>(&self, sums: &[f32], out: &mut [f32]) {
        parallel::pieces_mut(out, LANES * self.depth * R * R, |index, out| {
            simd::with_vectors(CollectWeight::<R, P> { map: self, sums, first: index * LANES, out });
        });
    }

    /// The transformed weight in the order (panel of columns, product, depth, column of the panel).
    fn packed_weight<const R: usize, const P: usize>(
        &self,
        weight: &[f32],
        strides: [usize; 2],
        flipped: bool,
    ) -> Buffer<f32> {
        let mut packed = Buffer::recycled(P * P * self.depth * self.columns);
        parallel::pieces_mut(&mut packed, P * P * self.depth * PANEL, |panel, out| {
            let kernel = |row: usize, column: usize| {
                &weight[row * strides[0] + (panel * PANEL + column) * strides[1]..][..R * R]
            };
            simd::with_vectors(SpreadWeight::<R, P, _> { depth: self.depth, kernel, flipped, out });
        });
        packed
    }
}

/// Lines of a block, at most `most` and no fewer than half of it: where there are few blocks, so many that several numbers of
/// threads can share these evenly.
fn even_share(lines: usize, most: usize) -> usize {
    const MANY: usize = 16;
    if lines.div_ceil(most) >= MANY {
        return most;
    }
    let rounds =
        |share: usize| [2, 4].map(|threads| lines.div_ceil(share).div_ceil(threads) * share).iter().sum::<usize>();
    (most.div_ceil(2)..=most).rev().min_by_key(|&share| rounds(share)).unwrap_or(most)
}

/// Positions of a square window whose corner is `padding` before `corner`.
fn window<const N: usize>(
    image: usize,
    corner: [usize; 2],
    padding: [usize; 2],
    extents: [usize; 2],
    channels: usize,
) -> Window<N> {
    let mut window = [[None; N]; N];
    for (y, line) in window.iter_mut().enumerate() {
        let y = (corner[0] + y).wrapping_sub(padding[0]);
        for (x, place) in line.iter_mut().enumerate() {
            let x = (corner[1] + x).wrapping_sub(padding[1]);
            if y < extents[0] && x < extents[1] {
                *place = Some(((image * extents[0] + y) * extents[1] + x) * channels);
            }
        }
    }
    window
}
