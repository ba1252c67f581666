//! A thread for a few neighbouring elements.

use super::{Binary, Unary};
use crate::driver::seam::Address;
use crate::gpu::{FLOATS, Geometry, Gpu, Kernel, Signature};
use crate::ops::strided::{self, Column, broadcast_strides, collapse, columns};
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
/// output, input, elements, function, its two parameters
const UNARY_FORWARD: Kernel<(Address, Address, u64, u32, f32, f32)> = Kernel::new("unary", "unary_forward", FLOATS);
/// input gradient, saved input or output, output gradient, elements, function, its two parameters
const UNARY_BACKWARD: Kernel<(Address, Address, Address, u64, u32, f32, f32)> =
    Kernel::new("unary", "unary_backward", FLOATS);
/// output, left, right, elements, function, whether rows are multiples of 16 bytes, number of axes, extents, left steps,
/// right steps
type BinaryArguments = (Address, Address, Address, u64, u32, u32, u32, Column, Column, Column);
const BINARY: Kernel<BinaryArguments> = Kernel::new("binary", "binary", FLOATS);
/// output, mask, where it is not 0, where it is 0, elements
const SELECT: Kernel<(Address, Address, Address, Address, u64)> = Kernel::new("binary", "select", FLOATS);

pub(crate) static KERNELS: &[Signature] = &[
    CAST.signature(),
    FILL.signature(),
    UNARY_FORWARD.signature(),
    UNARY_BACKWARD.signature(),
    BINARY.signature(),
    SELECT.signature(),
];

/// Elements of a thread in `unary.cu`.
const UNARY_WIDTH: usize = 4;
/// Elements of a thread in a cast between floating-point types.
const CAST_WIDTH: usize = 8;

/// Elements in 16 bytes.
fn widest(dtype: DType) -> usize {
    16 / dtype.size()
}

/// A thread for `width` of `elements`.
fn geometry(elements: usize, width: usize) -> Geometry {
    strided::geometry(elements.div_ceil(width))
}

/// The values of `input` as `dtype`, which is another one.
pub(crate) fn cast(gpu: &'static Gpu, input: &Tensor, dtype: DType) -> Result<Tensor> {
    let output = Tensor::empty_on(gpu, input.shape(), dtype)?;
    let instance = format!("{}_{dtype}", input.dtype());
    let arguments = (output.address()?, input.address()?, input.elements() as u64);
    let width = if dtype.is_float() && input.dtype() != DType::I64 { CAST_WIDTH } else { 1 };
    CAST.launch(gpu, &instance, geometry(input.elements(), width), arguments)?;
    Ok(output)
}

/// A tensor filled with `value`.
pub(crate) fn full(gpu: &'static Gpu, shape: impl Into<Shape>, value: f64, dtype: DType) -> Result<Tensor> {
    let output = Tensor::empty_on(gpu, shape, dtype)?;
    if value.to_bits() == 0 {
        output.memory().map_or(Ok(()), |memory| memory.fill(0))?;
        return Ok(output);
    }
    let geometry = geometry(output.elements(), widest(dtype));
    FILL.launch(gpu, dtype.name(), geometry, (output.address()?, value, output.elements() as u64))?;
    Ok(output)
}

/// The function's number and its two parameters, as `Unary` in the kernel file has them.
fn code(function: Unary) -> (u32, f64, f64) {
    match function {
        Unary::Neg => (0, 0.0, 0.0),
        Unary::Abs => (1, 0.0, 0.0),
        Unary::Square => (2, 0.0, 0.0),
        Unary::Sqrt => (3, 0.0, 0.0),
        Unary::Recip => (4, 0.0, 0.0),
        Unary::Exp => (5, 0.0, 0.0),
        Unary::Ln => (6, 0.0, 0.0),
        Unary::Sin => (7, 0.0, 0.0),
        Unary::Cos => (8, 0.0, 0.0),
        Unary::Tanh => (9, 0.0, 0.0),
        Unary::Sigmoid => (10, 0.0, 0.0),
        Unary::Erf => (11, 0.0, 0.0),
        Unary::Relu => (12, 0.0, 0.0),
        Unary::LeakyRelu(slope) => (13, slope, 0.0),
        Unary::Silu => (14, 0.0, 0.0),
        Unary::Gelu => (15, 0.0, 0.0),
        Unary::Softplus => (16, 0.0, 0.0),
        Unary::Scale(factor) => (17, factor, 0.0),
        Unary::Shift(offset) => (18, offset, 0.0),
        Unary::Powf(power) => (19, power, power - 1.0),
        Unary::Clamp(low, high) => (20, low, high),
    }
}

pub(super) fn unary(gpu: &'static Gpu, function: Unary, input: &Tensor) -> Result<Tensor> {
    let output = Tensor::empty_on(gpu, input.shape(), input.dtype())?;
    let (elements, (code, p, q)) = (input.elements(), code(function));
    let arguments = (output.address()?, input.address()?, elements as u64, code, p as f32, q as f32);
    UNARY_FORWARD.launch(gpu, input.dtype().name(), geometry(elements, UNARY_WIDTH), arguments)?;
    Ok(output)
}

pub(super) fn unary_backward(gpu: &'static Gpu, function: Unary, saved: &Tensor, grad: &Tensor) -> Result<Tensor> {
    let gradient = Tensor::empty_on(gpu, grad.shape(), grad.dtype())?;
    let (elements, (code, p, q)) = (grad.elements(), code(function));
    let arguments = (gradient.address()?, saved.address()?, grad.address()?, elements as u64, code, p as f32, q as f32);
    UNARY_BACKWARD.launch(gpu, grad.dtype().name(), geometry(elements, UNARY_WIDTH), arguments)?;
    Ok(gradient)
}

pub(super) fn binary(
    gpu: &'static Gpu,
    function: Binary,
    left: &Tensor,
    right: &Tensor,
    shape: &Shape,
) -> Result<Tensor> {
    let output = Tensor::empty_on(gpu, shape, left.dtype())?;
    let (left, right) = ((left.address()?, left.shape()), (right.address()?, right.shape()));
    binary_into(gpu, function, output.address()?, left, right, (shape, output.dtype()))?;
    Ok(output)
}

/// `sum` += `addend`, which has the same shape and dtype.
pub(super) fn accumulate(gpu: &'static Gpu, sum: &mut Tensor, addend: &Tensor) -> Result<()> {
    let output = sum.address_mut()?;
    let (left, right) = ((output, sum.shape()), (addend.address()?, addend.shape()));
    binary_into(gpu, Binary::Add, output, left, right, (sum.shape(), sum.dtype()))
}

fn binary_into(
    gpu: &'static Gpu,
    function: Binary,
    output: Address,
    (left, left_shape): (Address, &Shape),
    (right, right_shape): (Address, &Shape),
    (shape, dtype): (&Shape, DType),
) -> Result<()> {
    let axes = collapse(shape, [&broadcast_strides(left_shape, shape), &broadcast_strides(right_shape, shape)]);
    let (rank, extents, [left_steps, right_steps]) = columns(function.name(), &axes)?;
    let (elements, widest) = (shape.elements(), widest(dtype));
    // A single row may end anywhere, others must begin at a multiple of an access.
    let wide = rank <= 1 || axes.last().is_some_and(|axis| axis.extent % widest == 0);
    let geometry = geometry(elements, if wide { widest } else { 1 });
    let function = function as u32;
    let arguments =
        (output, left, right, elements as u64, function, u32::from(wide), rank, extents, left_steps, right_steps);
    BINARY.launch(gpu, dtype.name(), geometry, arguments)
}

/// All three have the same shape.
pub(super) fn select(gpu: &'static Gpu, mask: &Tensor, on_true: &Tensor, on_false: &Tensor) -> Result<Tensor> {
    let (elements, dtype) = (mask.elements(), mask.dtype());
    let output = Tensor::empty_on(gpu, mask.shape(), dtype)?;
    let arguments = (output.address()?, mask.address()?, on_true.address()?, on_false.address()?, elements as u64);
    SELECT.launch(gpu, dtype.name(), geometry(elements, widest(dtype)), arguments)?;
    Ok(output)
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use super::*;
    use crate::Device;
    use crate::ops::add_in_place;

    #[test]
    fn gradients_add_up_where_they_are_unless_somebody_else_sees_them() {
        for dtype in [DType::F32, DType::Bf16, DType::F16] {
            let tensor = |value: f64| Tensor::full([13], value, dtype)?.to_device(Device::Emulated);
            let (sum, addend) = (tensor(1.5).unwrap(), tensor(0.25).unwrap());
            let address = sum.address().unwrap();
            let sum = add_in_place(sum, &addend).unwrap();
            assert_eq!(sum.address().unwrap(), address);
            let seen = sum.clone();
            let next = add_in_place(sum, &addend).unwrap();
            assert_ne!(next.address().unwrap(), address);
            assert_eq!((seen.to_f64_vec().unwrap(), next.to_f64_vec().unwrap()), (vec![1.75; 13], vec![2.0; 13]));
        }
    }
}
