//! Products through the room of `matmul`; sums over rows here.

use crate::autograd::no_grad;
use crate::driver::seam::{Address, Epilogue};
use crate::gpu::{FLOATS, Geometry, Gpu, Kernel, Signature};
use crate::ops::matmul::Transposed;
use crate::ops::matmul::gpu::Product;
use crate::{Error, Result, Tensor};

/// sums, partial sums, values, rows, columns, rows of a block; the instance is the dtype of the values and of the sums
const COLUMN_SUM: Kernel<(Address, Address, Address, u64, u32, u64)> =
    Kernel::new("linear", "linear_column_sum", &["f32_f32", "bf16_bf16", "f16_f16", "f32_bf16", "f32_f16"]);
/// input gradient, sums, partial sums, input, output gradient, rows, columns, rows of a block
const GELU_BACKWARD: Kernel<(Address, Address, Address, Address, Address, u64, u32, u64)> =
    Kernel::new("linear", "linear_gelu_backward", FLOATS);

pub(crate) static KERNELS: &[Signature] = &[COLUMN_SUM.signature(), GELU_BACKWARD.signature()];

/// As in the kernels: columns and threads of a block.
const COLUMNS: usize = 64;
const THREADS: u32 = 256;

/// rows, in, out
type Extents = [usize; 3];

fn product(operands: [&Tensor; 2], bias: Option<&Tensor>, extents: Extents, c: Address) -> Result<Product<'static>> {
    let [rows, in_features, out_features] = extents;
    Ok(Product {
        dtype: operands[0].dtype(),
        extents: [rows, out_features, in_features],
        transposed: Transposed { left: false, right: true },
        batch: &[],
        a: operands[0].address()?,
        b: operands[1].address()?,
        c,
        epilogue: if bias.is_some() { Epilogue::Bias } else { Epilogue::None },
        bias: bias.map_or(Ok(Address::NULL), Tensor::address)?,
        auxiliary: Address::NULL,
    })
}

/// x Wᵀ + b for `operands` x (rows, in) and W (out, in), as (rows, out).
pub(super) fn linear(
    gpu: &'static Gpu,
    operands: [&Tensor; 2],
    bias: Option<&Tensor>,
    extents: Extents,
) -> Result<Tensor> {
    let output = Tensor::empty_on(gpu, [extents[0], extents[2]], operands[0].dtype())?;
    let product = product(operands, bias, extents, output.address()?)?;
    if !product.by_library(gpu)? {
        product.by_kernel(gpu)?;
    }
    Ok(output)
}

/// The GELU of [`linear`] and, with `keep`, what it was taken of.
pub(super) fn linear_gelu(
    gpu: &'static Gpu,
    operands: [&Tensor; 2],
    bias: Option<&Tensor>,
    extents: Extents,
    keep: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    let empty = || Tensor::empty_on(gpu, [extents[0], extents[2]], operands[0].dtype());
    let output = empty()?;
    // The library does not know the exact GELU, but its product may be worth a pass of our own after it.
    let affine = product(operands, bias, extents, output.address()?)?;
    if affine.by_library(gpu)? {
        let activated = no_grad(|| output.gelu())?;
        return Ok((activated, keep.then_some(output)));
    }
    let sums = keep.then(empty).transpose()?;
    let auxiliary = sums.as_ref().map_or(Ok(Address::NULL), Tensor::address)?;
    Product { epilogue: Epilogue::BiasGelu, auxiliary, ..affine }.by_kernel(gpu)?;
    Ok((output, sums))
}

/// Σ over the rows of `values` (rows, columns).
pub(super) fn column_sum(gpu: &'static Gpu, values: &Tensor) -> Result<Tensor> {
    let [rows, columns] = values.dims::<2>("linear", "a matrix")?;
    let sums = Tensor::empty_on(gpu, [columns], values.dtype())?;
    let split = Split::new(gpu, rows, columns)?;
    let partials = split.partials(gpu)?;
    let instance = format!("{dtype}_{dtype}", dtype = values.dtype());
    let (to, values) = (sums.address()?, values.address()?);
    let arguments = (to, address(&partials)?, values, rows as u64, columns as u32, split.rows_per_block as u64);
    COLUMN_SUM.launch(gpu, &instance, split.geometry(), arguments)?;
    add_partials(gpu, &sums, partials, split)?;
    Ok(sums)
}

/// dz = dy · GELU′(z) for z and dy (rows, columns), and the sum of dz over the rows.
pub(super) fn gelu_backward(gpu: &'static Gpu, input: &Tensor, grad: &Tensor) -> Result<(Tensor, Tensor)> {
    let [rows, columns] = grad.dims::<2>("linear_gelu", "a matrix")?;
    let dtype = grad.dtype();
    let gradient = Tensor::empty_on(gpu, [rows, columns], dtype)?;
    let sums = Tensor::empty_on(gpu, [columns], dtype)?;
    let split = Split::new(gpu, rows, columns)?;
    let partials = split.partials(gpu)?;
    let arguments = (
        gradient.address()?,
        sums.address()?,
        address(&partials)?,
        input.address()?,
        grad.address()?,
        rows as u64,
        columns as u32,
        split.rows_per_block as u64,
    );
    GELU_BACKWARD.launch(gpu, dtype.name(), split.geometry(), arguments)?;
    add_partials(gpu, &sums, partials, split)?;
    Ok((gradient, sums))
}

fn address(tensor: &Option<Tensor>) -> Result<Address> {
    tensor.as_ref().map_or(Ok(Address::NULL), Tensor::address)
}

fn add_partials(gpu: &'static Gpu, sums: &Tensor, partials: Option<Tensor>, split: Split) -> Result<()> {
    let Some(partials) = partials else { return Ok(()) };
    let instance = format!("f32_{}", sums.dtype());
    let geometry = Geometry { grid: [split.geometry().grid[0], 1, 1], ..split.geometry() };
    let (rows, columns) = (split.blocks as u64, split.columns as u32);
    let arguments = (sums.address()?, Address::NULL, partials.address()?, rows, columns, rows);
    COLUMN_SUM.launch(gpu, &instance, geometry, arguments)
}

/// How rows are shared out: by the shape and the number of multiprocessors alone.
#[derive(Clone, Copy, Debug)]
struct Split {
    columns: usize,
    rows_per_block: usize,
    /// Blocks that share the rows.
    blocks: usize,
}

impl Split {
    /// A block that is worth its launch has this many rows.
    const FEWEST_ROWS: usize = 64;

    fn new(gpu: &Gpu, rows: usize, columns: usize) -> Result<Self> {
        if columns > i32::MAX as usize {
            return Err(Error::shape("linear", format!("{columns} outputs: kernels count to 2³¹ − 1")));
        }
        let wanted = (4 * gpu.properties().multiprocessors as usize).div_ceil(columns.div_ceil(COLUMNS).max(1));
        let rows_per_block = rows.div_ceil(wanted.max(1)).max(Self::FEWEST_ROWS);
        Ok(Split { columns, rows_per_block, blocks: rows.div_ceil(rows_per_block).max(1) })
    }

    fn geometry(self) -> Geometry {
        let grid = [self.columns.div_ceil(COLUMNS) as u32, self.blocks as u32, 1];
        Geometry { grid, block: [THREADS, 1, 1], shared: 0 }
    }

    fn partials(self, gpu: &'static Gpu) -> Result<Option<Tensor>> {
        let partials = || Tensor::empty_on(gpu, [self.blocks, self.columns], crate::DType::F32);
        (self.blocks > 1).then(partials).transpose()
    }
}
