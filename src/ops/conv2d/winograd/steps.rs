//! The vector loops around the products: tiles spread into operands, products collected into results.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::transforms::{Scratch, collect_square, input_square, scaled, spread_square};
use super::{Map, OUTPUTS, Window};
use crate::cpu::block_gemm::{GROUP, LANES, PANEL, Writes, load, store};
use crate::cpu::simd;

/// The value at a place of a window from `channel` on, zeros outside of the map.
#[inline(always)]
fn load_at<S: Simd>(simd: S, data: &[f32], place: Option<usize>, channel: usize) -> S::f32s {
    match place {
        Some(at) => load::<S>(data, at + channel),
        None => simd.splat_f32s(0.0),
    }
}

/// Where transformed inputs go.
pub(super) enum Operands<'a> {
    /// In the order (tile, product, channel).
    Rows(&'a mut [f32]),
    /// Planes of products, so far apart, each in the order (group of channels, tile, channel of the group).
    Groups(&'a mut [f32], usize),
}

/// Bᵀ x B of some tiles.
pub(super) struct SpreadInput<'a, const T: usize, const P: usize> {
    pub map: &'a Map<'a>,
    pub tiles: Range<usize>,
    pub to: Operands<'a>,
}

impl<const T: usize, const P: usize> WithSimd for SpreadInput<'_, T, P> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let (depth, count) = (self.map.depth, self.tiles.len());
        let mut scratch: Scratch<_, T, P> = [[simd.splat_f32s(0.0); T]; P];
        for (t, tile) in self.tiles.enumerate() {
            let window = self.map.input_window::<T>(tile);
            for channel in (0..depth).step_by(S::F32_LANES) {
                input_square(
                    simd,
                    &mut scratch,
                    #[inline(always)]
                    |y, x| load_at(simd, self.map.source, window[y][x], channel),
                    #[inline(always)]
                    |i, j, value| match &mut self.to {
                        Operands::Rows(data) => {
                            store::<S>(data, (t * P * P + i * P + j) * depth + channel, value);
                        }
                        Operands::Groups(data, plane) => {
                            let lanes = S::F32_LANES.min(GROUP);
                            let values: &[f32] = bytemuck::cast_slice(std::slice::from_ref(&value));
                            for (part, values) in values.chunks_exact(lanes).enumerate() {
                                let channel = channel + part * lanes;
                                let at = (i * P + j) * *plane + (channel / GROUP * count + t) * GROUP + channel % GROUP;
                                data[at..at + lanes].copy_from_slice(values);
                            }
                        }
                    },
                );
            }
        }
    }
}

/// A y Aᵀ of some tiles of a gradient, in panels.
pub(super) struct SpreadGrad<'a, const P: usize> {
    pub map: &'a Map<'a>,
    pub tiles: Range<usize>,
    pub grad: &'a [f32],
    pub data: &'a mut [f32],
    pub plane: usize,
}

impl<const P: usize> WithSimd for SpreadGrad<'_, P> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (count, columns) = (self.tiles.len(), self.map.columns);
        let mut scratch: Scratch<_, OUTPUTS, P> = [[simd.splat_f32s(0.0); OUTPUTS]; P];
        for (t, tile) in self.tiles.enumerate() {
            let window = self.map.output_window(tile);
            for column in (0..columns).step_by(S::F32_LANES) {
                let panel = column / PANEL * PANEL;
                let start = panel * count + t * PANEL.min(columns - panel) + column - panel;
                spread_square(
                    simd,
                    &mut scratch,
                    #[inline(always)]
                    |y, x| load_at(simd, self.grad, window[y][x], column),
                    #[inline(always)]
                    |i, j, value| store::<S>(self.data, (i * P + j) * self.plane + start, value),
                );
            }
        }
    }
}

/// Aᵀ z A of a panel of some tiles, with the bias.
pub(super) struct CollectOutput<'a, 'b, const P: usize> {
    pub map: &'a Map<'a>,
    pub tiles: Range<usize>,
    pub products: &'a [f32],
    /// The panel's first column.
    pub first: usize,
    pub bias: Option<&'a [f32]>,
    pub to: Destination<'a, 'b>,
    pub writes: Writes,
}

/// Where results go.
pub(super) enum Destination<'a, 'b> {
    /// Rows of all columns, those that begin at `offset` of the result.
    Whole { out: &'a mut [f32], offset: usize, columns: usize },
    /// Of every position the columns of one panel.
    Strip(&'a mut [&'b mut [f32]]),
}

impl<'b> Destination<'_, 'b> {
    pub fn again(&mut self) -> Destination<'_, 'b> {
        match self {
            Destination::Whole { out, offset, columns } => {
                Destination::Whole { out, offset: *offset, columns: *columns }
            }
            Destination::Strip(rows) => Destination::Strip(rows),
        }
    }

    /// Where the columns of a position go that are `within` the panel that begins at column `first`.
    #[inline(always)]
    fn at(&mut self, position: usize, first: usize, within: usize) -> &mut [f32] {
        match self {
            Destination::Whole { out, offset, columns } => &mut out[position * *columns - *offset + first + within..],
            Destination::Strip(rows) => &mut rows[position][within..],
        }
    }
}

impl<const P: usize> WithSimd for CollectOutput<'_, '_, P> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let width = self.products.len() / (self.tiles.len() * P * P);
        let zero = simd.splat_f32s(0.0);
        let mut scratch: Scratch<_, P, OUTPUTS> = [[zero; P]; OUTPUTS];
        for (tile, products) in self.tiles.zip(self.products.chunks_exact(P * P * width)) {
            let window: Window<OUTPUTS> = self.map.positions(tile);
            for within in (0..width).step_by(S::F32_LANES) {
                let bias = self.bias.map_or(zero, |bias| load::<S>(bias, self.first + within));
                collect_square(
                    simd,
                    &mut scratch,
                    #[inline(always)]
                    |i, j| load::<S>(products, (i * P + j) * width + within),
                    #[inline(always)]
                    |y, x, value| {
                        if let Some(position) = window[y][x] {
                            let value = simd.add_f32s(value, bias);
                            let out = &mut self.to.at(position, self.first, within)[..S::F32_LANES];
                            if self.writes == Writes::Streamed {
                                simd::stream::<S>(out, value);
                            } else {
                                store::<S>(out, 0, value);
                            }
                        }
                    },
                );
            }
        }
    }
}

/// Gᵀ z G of [`LANES`] columns from `first`.
pub(super) struct CollectWeight<'a, const R: usize, const P: usize> {
    pub map: &'a Map<'a>,
    pub sums: &'a [f32],
    pub first: usize,
    pub out: &'a mut [f32],
}

impl<const R: usize, const P: usize> WithSimd for CollectWeight<'_, R, P> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (depth, columns) = (self.map.depth, self.map.columns);
        let panel = self.first / PANEL * PANEL;
        let width = PANEL.min(columns - panel);
        let mut scratch: Scratch<_, P, R> = [[simd.splat_f32s(0.0); P]; R];
        for row in 0..depth {
            for offset in (0..LANES).step_by(S::F32_LANES) {
                collect_square(
                    simd,
                    &mut scratch,
                    #[inline(always)]
                    |i, j| {
                        let at = ((i * P + j) * columns + panel) * depth + row * width + self.first - panel + offset;
                        scaled::<S, P>(simd, [i, j], load::<S>(self.sums, at))
                    },
                    #[inline(always)]
                    |y, x, value| {
                        let lanes: &[f32] = bytemuck::cast_slice(std::slice::from_ref(&value));
                        for (lane, &value) in lanes.iter().enumerate() {
                            self.out[((offset + lane) * depth + row) * R * R + y * R + x] = value;
                        }
                    },
                );
            }
        }
    }
}

/// G w Gᵀ of one panel.
pub(super) struct SpreadWeight<'a, const R: usize, const P: usize, K> {
    pub depth: usize,
    /// The taps from a row of the depth to a column of the panel.
    pub kernel: K,
    pub flipped: bool,
    pub out: &'a mut [f32],
}

impl<'w, const R: usize, const P: usize, K: Fn(usize, usize) -> &'w [f32]> WithSimd for SpreadWeight<'_, R, P, K> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let width = self.out.len() / (P * P * self.depth);
        let mut scratch: Scratch<_, R, P> = [[simd.splat_f32s(0.0); R]; P];
        for row in 0..self.depth {
            for first in (0..width).step_by(S::F32_LANES) {
                let mut taps = [[simd.splat_f32s(0.0); R]; R];
                for lane in 0..S::F32_LANES {
                    let kernel = (self.kernel)(row, first + lane);
                    for (tap, values) in taps.as_flattened_mut().iter_mut().enumerate() {
                        let lanes: &mut [f32] = bytemuck::cast_slice_mut(std::slice::from_mut(values));
                        lanes[lane] = kernel[if self.flipped { R * R - 1 - tap } else { tap }];
                    }
                }
                spread_square(
                    simd,
                    &mut scratch,
                    #[inline(always)]
                    |y, x| taps[y][x],
                    #[inline(always)]
                    |i, j, value| {
                        let value = scaled::<S, P>(simd, [i, j], value);
                        store::<S>(self.out, ((i * P + j) * self.depth + row) * width + first, value);
                    },
                );
            }
        }
    }
}
