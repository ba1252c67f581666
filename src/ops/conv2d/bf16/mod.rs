//! Convolutions in `bf16`, where the processor multiplies it: pointwise ones are products of all positions, the others
//! products of patches ([`gather`]), and weight gradients sums over positions of pairs of images ([`weight_gradient`]).
//!
//! Two products for each lane are more than minimal filtering saves beside its transforms, so that is left to `f32`.

mod gather;

use super::direct::{self, Part};
use super::{Geometry, Map, scatter};
use crate::cpu::bf16::{Panels, bf16, interleave, multiply_rows, narrowed, serves};
use crate::cpu::{parallel, simd};
use crate::tensor::{Buffer, DType, Weight};

/// Whether [`apply`] computes this map of a convolution: those in one group, but for gradients of images.
pub(super) fn takes(map: Map, geometry: &Geometry, dtype: DType) -> bool {
    let is_gathered = geometry.options.groups == 1 && !geometry.is_depthwise();
    serves(dtype) && is_gathered && !(matches!(map, Map::Input) && scatter::pays(geometry))
}

/// The map's result.
pub(super) fn apply(
    map: Map,
    geometry: &Geometry,
    first: &[bf16],
    second: Weight<'_, bf16>,
    bias: Option<&[bf16]>,
) -> Buffer<bf16> {
    match map {
        Map::Output if geometry.is_pointwise() => pointwise_output(geometry, first, second, bias),
        Map::Output => gather::output(geometry, first, second, bias),
        Map::Input if geometry.is_pointwise() => {
            let weight = Panels::of_rows(second.values, geometry.out_channels, geometry.in_channels);
            multiply_rows(first, &weight, bias, positions(geometry))
        }
        Map::Input => gather::input_gradient(geometry, first, second.values, bias),
        Map::Weight => weight_gradient(geometry, first, second.values),
    }
}

fn positions(geometry: &Geometry) -> usize {
    geometry.batch * geometry.output[0] * geometry.output[1]
}

/// The weight of a pointwise convolution as [`apply`] reads it, by its own extents.
#[derive(Clone, PartialEq)]
struct Pointwise([usize; 2]);

fn pointwise_output(
    geometry: &Geometry,
    input: &[bf16],
    weight: Weight<'_, bf16>,
    bias: Option<&[bf16]>,
) -> Buffer<bf16> {
    let [depth, columns] = [geometry.in_channels, geometry.out_channels];
    let panels = weight.form(Pointwise([depth, columns]), || Panels::of_columns(weight.values, depth, columns));
    multiply_rows(input, &panels, bias, positions(geometry))
}

/// As in `f32`, of maps whose elements are those of two images side by side.
fn weight_gradient(g: &Geometry, input: &[bf16], grad: &[bf16]) -> Buffer<bf16> {
    let [input, grad] = [(input, g.input_shape()), (grad, g.output_shape())].map(|(map, shape)| {
        let image = shape.elements() / g.batch.max(1);
        pairs_of_images(map, image)
    });
    let part = Part { geometry: Geometry { batch: g.batch.div_ceil(2), ..*g }, first: 0 };
    let [input, grad] = [&input, &grad].map(|pairs| bytemuck::cast_slice(pairs));
    narrowed(&direct::weight_gradient::<[bf16; 2]>(&part, g.out_channels, input, grad))
}

/// Elements of each image beside those of the next one, a last one beside zeros.
fn pairs_of_images(map: &[bf16], image: usize) -> Buffer<bf16> {
    let mut pairs = Buffer::recycled(map.len().next_multiple_of(2 * image.max(1)));
    parallel::pieces_mut(&mut pairs, 2 * parallel::PIECE, |index, pairs| {
        let (mut at, mut pairs) = (index * parallel::PIECE, pairs.as_chunks_mut::<2>().0);
        // A piece may reach into the next two images.
        while !pairs.is_empty() {
            let (number, within) = (at / image, at % image);
            let (of_these, behind) = pairs.split_at_mut((image - within).min(pairs.len()));
            let even = &map[2 * number * image + within..][..of_these.len()];
            match map.get((2 * number + 1) * image + within..) {
                Some(odd) if !odd.is_empty() => simd::dispatch(
                    #[inline(always)]
                    || interleave(even, &odd[..even.len()], of_these),
                ),
                _ => of_these.iter_mut().zip(even).for_each(|(pair, &value)| *pair = [value, bf16::ZERO]),
            }
            (at, pairs) = (at + of_these.len(), behind);
        }
    });
    pairs
}
