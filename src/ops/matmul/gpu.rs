//! Products by the vendor's library where it takes them, else by our kernels: a block for each tile of the result.

use super::Transposed;
use crate::driver::seam::{Address, Epilogue, MatrixProduct};
use crate::gpu::{FLOATS, Geometry, Gpu, Kernel, Signature};
use crate::tensor::Shape;
use crate::{DType, Error, Result, Tensor};

/// output, auxiliary, bias, whether a GELU follows, partials, a, b, m, n, k, depth of a part, strides of the output's rows and
/// columns, matrices; for each axis of the batch the extent and the strides of a and b
type ProductArguments = (
    Address,
    Address,
    Address,
    u32,
    Address,
    Address,
    Address,
    u32,
    u32,
    u32,
    u32,
    u64,
    u64,
    u32,
    [u32; BATCH_AXES],
    [u64; BATCH_AXES],
    [u64; BATCH_AXES],
);
const INSTANCES: &[&str] =
    &["nn_f32", "nn_bf16", "nn_f16", "nt_f32", "nt_bf16", "nt_f16", "tn_f32", "tn_bf16", "tn_f16"];
const LARGE: Kernel<ProductArguments> = Kernel::new("matmul", "matmul_large", INSTANCES);
const SMALL: Kernel<ProductArguments> = Kernel::new("matmul", "matmul_small", INSTANCES);
const SCALAR: Kernel<ProductArguments> = Kernel::new("matmul", "matmul_scalar", INSTANCES);
/// output, auxiliary, bias, whether a GELU follows, partials, parts, elements, n
const SPLIT_SUM: Kernel<(Address, Address, Address, u32, Address, u32, u64, u32)> =
    Kernel::new("matmul", "matmul_split_sum", FLOATS);

pub(crate) static KERNELS: &[Signature] =
    &[LARGE.signature(), SMALL.signature(), SCALAR.signature(), SPLIT_SUM.signature()];

/// As in the kernels: axes of a batch.
const BATCH_AXES: usize = 4;
/// What kernels count to.
const LARGEST: usize = i32::MAX as usize;
/// A part of k has a multiple of this many terms: every tile's step divides it.
const STEP: usize = 32;
/// The fewest terms that a part of a split product is worth.
const PART: usize = 256;

/// What is multiplied. Addresses are of tensors that the caller holds.
#[derive(Clone, Copy)]
pub(crate) struct Product<'a> {
    pub dtype: DType,
    /// m, n, k
    pub extents: [usize; 3],
    pub transposed: Transposed,
    pub batch: &'a [Axis],
    pub a: Address,
    pub b: Address,
    pub c: Address,
    /// Other than `None` only for a right operand that alone is transposed.
    pub epilogue: Epilogue,
    /// (n), or null, with [`Epilogue::BiasGelu`] too
    pub bias: Address,
    /// As `c`, or null
    pub auxiliary: Address,
}

/// An axis of a batch: extent, and the elements from one operand's matrix to the next, 0 where it is broadcast.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Axis {
    pub extent: usize,
    pub strides: [usize; 2],
}

/// The axes of a broadcast batch, those that are one after the other for both operands merged. `sizes` are the elements
/// of each operand's matrices.
fn batch_axes(batch: &Shape, operands: [&[usize]; 2], sizes: [usize; 2]) -> Vec<Axis> {
    let mut axes: Vec<Axis> = Vec::new();
    let mut strides = sizes;
    for from_back in 1..=batch.len() {
        let extent = batch[batch.len() - from_back];
        let mut axis = Axis { extent, strides: [0; 2] };
        for (operand, (stride, next)) in operands.iter().zip(axis.strides.iter_mut().zip(&mut strides)) {
            let own = operand.len().checked_sub(from_back).map_or(1, |position| operand[position]);
            if own != 1 {
                *stride = *next;
                *next *= own;
            }
        }
        match axes.last_mut() {
            _ if extent == 1 => {}
            Some(last) if (0..2).all(|i| axis.strides[i] == last.strides[i] * last.extent) => last.extent *= extent,
            _ => axes.push(axis),
        }
    }
    axes.reverse();
    axes
}

/// The product of two tensors whose shapes fit; `batch` is their broadcast batch.
pub(super) fn matmul(
    gpu: &'static Gpu,
    [left, right]: [&Tensor; 2],
    transposed: Transposed,
    [m, n, k]: [usize; 3],
    batch: &Shape,
) -> Result<Tensor> {
    let output = Tensor::empty_on(gpu, [&batch[..], &[m, n]].concat(), left.dtype())?;
    let operands = [left, right].map(|operand| &operand.shape()[..operand.rank() - 2]);
    let mut axes = batch_axes(batch, operands, [m * k, k * n]);
    let mut extents = [m, n, k];
    // The rows of all left matrices by one right matrix.
    if let [Axis { extent, strides: [_, 0] }] = axes[..]
        && !transposed.left
        && axes[0].strides[0] != 0
        && m * extent <= LARGEST
    {
        extents[0] *= extent;
        axes.clear();
    }
    let product = Product {
        dtype: left.dtype(),
        extents,
        transposed,
        batch: &axes,
        a: left.address()?,
        b: right.address()?,
        c: output.address()?,
        epilogue: Epilogue::None,
        bias: Address::NULL,
        auxiliary: Address::NULL,
    };
    if !product.by_library(gpu)? {
        product.by_kernel(gpu)?;
    }
    Ok(output)
}

impl Product<'_> {
    fn matrices(&self) -> usize {
        self.batch.iter().map(|axis| axis.extent).product()
    }

    /// Offers the product to the vendor's library; false where there is none or it does not take it.
    pub fn by_library(&self, gpu: &Gpu) -> Result<bool> {
        let [m, n, k] = self.extents;
        let [stride_a, stride_b] = match self.batch {
            [] => [0, 0],
            [axis] => axis.strides,
            _ => return Ok(false),
        };
        let (batch, Transposed { left: transpose_a, right: transpose_b }) = (self.matrices(), self.transposed);
        if [m, n, k, batch].contains(&0) {
            return Ok(false);
        }
        let Product { dtype, a, b, c, bias, epilogue, .. } = *self;
        let product = MatrixProduct {
            dtype,
            m,
            n,
            k,
            batch,
            stride_a,
            stride_b,
            transpose_a,
            transpose_b,
            a,
            b,
            c,
            bias,
            epilogue,
        };
        crate::driver::matrix_product(&*gpu.driver(), &product)
    }

    /// The product by our kernels.
    pub fn by_kernel(&self, gpu: &'static Gpu) -> Result<()> {
        let [m, n, k] = self.extents;
        if self.matrices() * m * n == 0 {
            return Ok(());
        }
        if [m, n, k, self.matrices()].iter().any(|&extent| extent > LARGEST) {
            let message = format!("{m} by {k} by {n}, {} times: kernels count to 2³¹ − 1", self.matrices());
            return Err(Error::shape("matmul", message));
        }
        if let [outer, inner @ ..] = self.batch
            && self.batch.len() > BATCH_AXES
        {
            return (0..outer.extent).try_for_each(|index| self.part(*outer, inner, index).by_kernel(gpu));
        }
        // Only the kernels of this layout have an epilogue, which the models' affine maps need.
        let transposed = Transposed { left: false, right: true };
        if self.epilogue != Epilogue::None && self.transposed != transposed {
            let message = format!("{:?} after a product of layout {:?}", self.epilogue, self.transposed);
            return Err(Error::argument("matmul", message));
        }
        let plan = Plan::new(self, gpu.properties().multiprocessors as usize);
        if plan.parts == 1 {
            return self.launch(gpu, plan, Address::NULL);
        }
        let elements = self.matrices() * m * n;
        let partials = Tensor::empty_on(gpu, [plan.parts, elements], DType::F32)?;
        self.launch(gpu, plan, partials.address()?)?;
        let (parts, elements) = (plan.parts as u32, elements as u64);
        let (c, partials) = (self.c, partials.address()?);
        let arguments = (c, self.auxiliary, self.bias, self.activate(), partials, parts, elements, n as u32);
        SPLIT_SUM.launch(gpu, self.dtype.name(), Geometry::for_items(elements as usize, 256), arguments)
    }

    fn activate(&self) -> u32 {
        u32::from(self.epilogue == Epilogue::BiasGelu)
    }

    /// The products of one index along the outermost axis.
    fn part<'a>(&self, outer: Axis, inner: &'a [Axis], index: usize) -> Product<'a> {
        let [m, n, _] = self.extents;
        let matrices: usize = inner.iter().map(|axis| axis.extent).product();
        let offset = |address: Address, elements: usize| address.offset(index * elements * self.dtype.size());
        Product {
            batch: inner,
            a: offset(self.a, outer.strides[0]),
            b: offset(self.b, outer.strides[1]),
            c: offset(self.c, matrices * m * n),
            ..*self
        }
    }

    fn launch(&self, gpu: &Gpu, plan: Plan, partials: Address) -> Result<()> {
        let [m, n, k] = self.extents;
        let mut batch = ([1; BATCH_AXES], [0; BATCH_AXES], [0; BATCH_AXES]);
        for (position, axis) in (BATCH_AXES - self.batch.len()..).zip(self.batch) {
            batch.0[position] = axis.extent as u32;
            (batch.1[position], batch.2[position]) = (axis.strides[0] as u64, axis.strides[1] as u64);
        }
        let (mut sides, mut operands) = ([m, n], [self.a, self.b]);
        let mut strides = [n as u64, 1];
        let layout = match self.transposed {
            Transposed { left: false, right: false } => "nn",
            Transposed { left: false, right: true } => "nt",
            Transposed { left: true, right: false } => "tn",
            Transposed { left: true, right: true } => {
                sides.reverse();
                operands.reverse();
                strides.reverse();
                (batch.1, batch.2) = (batch.2, batch.1);
                "nn"
            }
        };
        let (kernel, side, threads) = match plan.tile {
            Tile::Large => (&LARGE, 128, 256),
            Tile::Small => (&SMALL, 64, 128),
            Tile::Scalar => (&SCALAR, 64, 128),
        };
        let tiles = sides[0].div_ceil(side) * sides[1].div_ceil(side);
        let matrices = self.matrices();
        let grid = [tiles as u32, plan.parts as u32, matrices.min(65535) as u32];
        let arguments = (
            self.c,
            self.auxiliary,
            self.bias,
            self.activate(),
            partials,
            operands[0],
            operands[1],
            sides[0] as u32,
            sides[1] as u32,
            k as u32,
            plan.depth as u32,
            strides[0],
            strides[1],
            matrices as u32,
            batch.0,
            batch.1,
            batch.2,
        );
        let geometry = Geometry { grid, block: [threads, 1, 1], shared: 0 };
        kernel.launch(gpu, &format!("{layout}_{}", self.dtype), geometry, arguments)
    }
}

/// Which of the kernels' tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tile {
    Large,
    Small,
    Scalar,
}

/// How a product is cut into blocks: by its shape and the number of multiprocessors alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    tile: Tile,
    /// Parts of k.
    parts: usize,
    /// Terms of a part, but for the last.
    depth: usize,
}

impl Plan {
    fn new(product: &Product<'_>, multiprocessors: usize) -> Self {
        let [m, n, k] = product.extents;
        let matrices = product.matrices();
        let tiles = |side: usize| m.div_ceil(side) * n.div_ceil(side) * matrices;
        let tile = match product.rows_in_runs() {
            true if tiles(128) >= multiprocessors => Tile::Large,
            true => Tile::Small,
            false => Tile::Scalar,
        };
        // Two blocks for each multiprocessor where the tiles alone do not give it one.
        let blocks = if tile == Tile::Large { tiles(128) } else { tiles(64) };
        let wanted = if blocks < multiprocessors { (2 * multiprocessors).div_ceil(blocks) } else { 1 };
        let depth = k.div_ceil(wanted.min(k / PART).max(1)).next_multiple_of(STEP);
        Plan { tile, parts: k.div_ceil(depth.max(1)).max(1), depth }
    }
}

impl Product<'_> {
    /// Whether the operands can be read 16 bytes at a time: their rows are whole multiples of that. In f32, rows along
    /// k are read element by element anyway.
    fn rows_in_runs(&self) -> bool {
        let [m, n, k] = self.extents;
        let whole = |width: usize| (width * self.dtype.size()).is_multiple_of(16);
        let along_k = self.dtype == DType::F32 || whole(k);
        let left = if self.transposed.left { whole(m) } else { along_k };
        let right = if self.transposed.right { along_k } else { whole(n) };
        left && right
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_merge_where_both_operands_allow_it() {
        let axes = |batch: &[usize], left: &[usize], right: &[usize]| {
            let axes = batch_axes(&batch.into(), [left, right], [10, 100]);
            axes.iter().map(|axis| (axis.extent, axis.strides)).collect::<Vec<_>>()
        };
        assert_eq!(axes(&[], &[], &[]), []);
        assert_eq!(axes(&[2, 3], &[2, 3], &[2, 3]), [(6, [10, 100])]);
        assert_eq!(axes(&[2, 3], &[2, 3], &[]), [(6, [10, 0])]);
        assert_eq!(axes(&[1, 1], &[1], &[1, 1]), []);
        assert_eq!(axes(&[2, 3, 4], &[2, 1, 4], &[3, 1]), [(2, [40, 0]), (3, [0, 100]), (4, [10, 0])]);
    }

    #[test]
    fn plans_cover_k_and_fill_the_device() {
        let plan = |extents, transposed| {
            let product = Product {
                dtype: DType::Bf16,
                extents,
                transposed,
                batch: &[],
                a: Address::NULL,
                b: Address::NULL,
                c: Address::NULL,
                epilogue: Epilogue::None,
                bias: Address::NULL,
                auxiliary: Address::NULL,
            };
            Plan::new(&product, 132)
        };
        let (plain, left) = (Transposed::default(), Transposed { left: true, right: false });
        assert_eq!(plan([25088, 384, 96], plain), Plan { tile: Tile::Large, parts: 1, depth: 96 });
        assert_eq!(plan([64, 64, 0], plain), Plan { tile: Tile::Small, parts: 1, depth: 0 });
        assert_eq!(plan([64, 64, 31], plain), Plan { tile: Tile::Scalar, parts: 1, depth: 32 });
        assert_eq!(plan([384, 96, 25088], left), Plan { tile: Tile::Small, parts: 22, depth: 1152 });
        assert_eq!(plan([1, 1, 1000], plain), Plan { tile: Tile::Scalar, parts: 3, depth: 352 });
    }
}
