//! Which way a convolution takes: [`depthwise`], those of stride 1 by [`winograd`], single positions as a matrix product,
//! gradients of images by [`scatter`], all others [`direct`].

use super::direct::Part;
use super::patches::tile_rows;
use super::{Geometry, Map, depthwise, direct, scatter, winograd};
use crate::cpu::block_gemm::Writes;
use crate::cpu::packed::{Packed, ahead};
use crate::cpu::{Float, parallel};
use crate::tensor::{Buffer, Weight};

/// A weight as [`output`] reads it, by its own extents.
#[derive(Clone, PartialEq)]
struct Pointwise([usize; 2]);

/// The map's result.
pub(super) fn apply<T: Float>(
    map: Map,
    g: &Geometry,
    first: &[T],
    second: Weight<'_, T>,
    bias: Option<&[T]>,
) -> Buffer<T> {
    match map {
        Map::Output => output(g, first, second, bias),
        Map::Input => input_gradient(g, first, second.values, bias),
        Map::Weight => weight_gradient(g, first, second.values),
    }
}

fn output<T: Float>(g: &Geometry, input: &[T], weight: Weight<'_, T>, bias: Option<&[T]>) -> Buffer<T> {
    if g.is_depthwise() {
        return depthwise::output(g, input, weight.values, bias);
    }
    if winograd::applies_both_ways::<T>(g) {
        return winograd::output(g, input, weight, bias);
    }
    if g.is_pointwise() {
        let extents = [g.in_channels, g.out_channels];
        let packed = || Packed::transposed(weight.values, extents[0], extents[1]);
        return pointwise(input, &weight.form(Pointwise(extents), packed), bias, rows_of(g.batch, g.output), extents);
    }
    direct::output(&[Part { geometry: *g, first: 0 }], g.out_channels, input, &[weight], bias)
}

fn input_gradient<T: Float>(g: &Geometry, grad: &[T], weight: &[T], bias: Option<&[T]>) -> Buffer<T> {
    if g.is_depthwise() {
        return depthwise::input_gradient(g, grad, weight, bias);
    }
    if winograd::applies::<T>(g) {
        return winograd::input_gradient(g, grad, weight, bias);
    }
    if g.is_pointwise() {
        let weight = Packed::new(weight, g.out_channels, g.in_channels);
        return pointwise(grad, &weight, bias, rows_of(g.batch, g.input), [g.out_channels, g.in_channels]);
    }
    if scatter::pays(g) {
        return scatter::input_gradient(g, grad, weight, bias);
    }
    direct::input_gradient(&[Part { geometry: *g, first: 0 }], g.out_channels, grad, &[weight], bias)
}

fn rows_of(batch: usize, [height, width]: [usize; 2]) -> usize {
    batch * height * width
}

/// rows · weight + bias, a tile of rows at a time.
fn pointwise<T: Float>(
    data: &[T],
    weight: &Packed<T>,
    bias: Option<&[T]>,
    rows: usize,
    [depth, columns]: [usize; 2],
) -> Buffer<T> {
    let mut output = Buffer::recycled(rows * columns);
    let (tile, writes) = (tile_rows(rows), Writes::of_large::<T>(rows * columns));
    parallel::pieces_mut(&mut output, tile * columns, |index, out| {
        let (at, len) = (index * tile * depth, out.len() / columns * depth);
        weight.rows(&data[at..at + len], bias, out, writes, ahead(data, at + len, len));
    });
    output
}

fn weight_gradient<T: Float>(g: &Geometry, input: &[T], grad: &[T]) -> Buffer<T> {
    if g.is_depthwise() {
        return depthwise::weight_gradient(g, input, grad);
    }
    if winograd::applies_both_ways::<T>(g) {
        return winograd::weight_gradient(g, input, grad);
    }
    direct::weight_gradient(&Part { geometry: *g, first: 0 }, g.out_channels, input, grad)
}
