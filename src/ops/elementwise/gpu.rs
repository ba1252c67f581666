//! A thread for each element.

use crate::driver::seam::Address;
use crate::gpu::{Geometry, Gpu, Kernel, Signature};
use crate::tensor::Shape;
use crate::{DType, Result, Tensor};

/// output, input, elements; the instance is the input's dtype and the output's
const CAST: Kernel<(Address, Address, u64)> = Kernel::new(
    "elementwise",
    "cast",
    &[
        "f32_bf16", "f32_f16", "f32_i64", "f32_u8", "bf16_f32", "bf16_f16", "bf16_i64", "bf16_u8", "f16_f32",
        "f16_bf16", "f16_i64", "f16_u8", "i64_f32", "i64_bf16", "i64_f16", "i64_u8", "u8_f32", "u8_bf16", "u8_f16",
        "u8_i64",
    ],
);
/// output, value, elements
const FILL: Kernel<(Address, f64, u64)> = Kernel::new("elementwise", "fill", &["f32", "bf16", "f16", "i64", "u8"]);

pub(crate) static KERNELS: &[Signature] = &[CAST.signature(), FILL.signature()];

const THREADS: u32 = 256;

/// The values of `input` as `dtype`, which is another one.
pub(crate) fn cast(gpu: &'static Gpu, input: &Tensor, dtype: DType) -> Result<Tensor> {
    let output = Tensor::empty_on(gpu, input.shape(), dtype)?;
    let instance = format!("{}_{dtype}", input.dtype());
    let arguments = (output.address()?, input.address()?, input.elements() as u64);
    CAST.launch(gpu, &instance, Geometry::for_items(input.elements(), THREADS), arguments)?;
    Ok(output)
}

/// A tensor filled with `value`.
pub(crate) fn full(gpu: &'static Gpu, shape: impl Into<Shape>, value: f64, dtype: DType) -> Result<Tensor> {
    let output = Tensor::empty_on(gpu, shape, dtype)?;
    let geometry = Geometry::for_items(output.elements(), THREADS);
    FILL.launch(gpu, dtype.name(), geometry, (output.address()?, value, output.elements() as u64))?;
    Ok(output)
}
