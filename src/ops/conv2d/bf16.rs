//! Pointwise convolutions in `bf16`, where the processor multiplies it: products of all positions.

use super::Map;
use super::geometry::Geometry;
use crate::cpu::bf16::{Panels, bf16, multiply_rows, multiply_transposed, serves};
use crate::tensor::{Buffer, DType, Shape};

/// Whether [`apply`] computes this convolution.
pub(super) fn takes(geometry: &Geometry, dtype: DType) -> bool {
    serves(dtype) && geometry.is_pointwise()
}

/// The result and its shape.
pub(super) fn apply(
    map: Map,
    geometry: &Geometry,
    [first, second]: [&[bf16]; 2],
    bias: Option<&[bf16]>,
) -> (Buffer<bf16>, Shape) {
    let Geometry { batch, output: [height, width], in_channels, out_channels, .. } = *geometry;
    let positions = batch * height * width;
    match map {
        Map::Output => {
            let weight = Panels::of_columns(second, in_channels, out_channels);
            (multiply_rows(first, &weight, bias, positions), geometry.output_shape())
        }
        Map::Input => {
            let weight = Panels::of_rows(second, out_channels, in_channels);
            (multiply_rows(first, &weight, bias, positions), geometry.input_shape())
        }
        Map::Weight => {
            let input = Panels::of_rows(first, positions, in_channels);
            let grad = Panels::of_rows(second, positions, out_channels);
            (multiply_transposed(&grad, &input), geometry.weight_shape())
        }
    }
}
