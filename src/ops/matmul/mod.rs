//! Batched matrix products.

mod bf16;
pub(crate) mod cost;
mod cpu;
pub(crate) mod gpu;

use crate::autograd::{Backward, Function, record};
use crate::tensor::{Place, Shape, place};
use crate::{Error, Result, Tensor, dispatch_float};

/// Which operands of a product are read as their transposes (of the last two axes).
///
/// ```
/// use gridgrad::ops::Transposed;
/// use gridgrad::{DType, Tensor};
/// let (q, k) = (Tensor::ones([2, 5, 8], DType::F32)?, Tensor::ones([2, 7, 8], DType::F32)?);
/// let scores = q.matmul_transposed(&k, Transposed { left: false, right: true })?;
/// assert_eq!(scores.shape().to_vec(), [2, 5, 7]);
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Transposed {
    /// The left operand is stored as (…, k, m).
    pub left: bool,
    /// The right operand is stored as (…, n, k).
    pub right: bool,
}

impl Tensor {
    /// The product of (…, m, k) and (…, k, n), shape (…, m, n). Axes in front of the last two broadcast.
    ///
    /// # Errors
    /// Where an operand has fewer than two axes, the inner extents differ, or the batch axes do not broadcast.
    pub fn matmul(&self, rhs: &Tensor) -> Result<Tensor> {
        self.matmul_transposed(rhs, Transposed::default())
    }

    /// Like [`Tensor::matmul`], with operands read as their transposes in place, without a copy.
    ///
    /// # Errors
    /// As [`Tensor::matmul`].
    pub fn matmul_transposed(&self, rhs: &Tensor, transposed: Transposed) -> Result<Tensor> {
        let dtype = self.dtype();
        self.expect_float("matmul")?;
        rhs.expect_dtype("matmul", dtype)?;
        let refuse = || Error::shape("matmul", format!("{} by {} ({transposed:?})", self.shape(), rhs.shape()));
        let (Some((left_batch, left)), Some((right_batch, right))) =
            (self.shape().split_last_chunk::<2>(), rhs.shape().split_last_chunk::<2>())
        else {
            return Err(refuse());
        };
        let [m, k] = if transposed.left { [left[1], left[0]] } else { *left };
        let [inner, n] = if transposed.right { [right[1], right[0]] } else { *right };
        if k != inner {
            return Err(refuse());
        }
        let batch = Shape::from(left_batch).broadcast(&Shape::from(right_batch), "matmul")?;
        let output = match place("matmul", &[self, rhs])? {
            Place::Gpu(gpu) => gpu::matmul(gpu, [self, rhs], transposed, [m, n, k], &batch)?,
            Place::Host => {
                let offsets = |operand: &[usize]| batch_offsets(operand, &batch);
                let (left_batches, right_batches) = (offsets(left_batch), offsets(right_batch));
                let problem = cpu::Problem { extents: [m, n, k], transposed, left_batches, right_batches };
                let shape = [&batch[..], &[m, n]].concat();
                if crate::cpu::bf16::serves(dtype) {
                    Tensor::from_buffer(bf16::matmul(&problem, self.data()?, rhs.data()?), shape)?
                } else {
                    dispatch_float!("matmul", dtype, T => {
                    let product = cpu::matmul::<T>(&problem, &self.floats("matmul")?, &rhs.floats("matmul")?);
                        Tensor::from_floats(product, shape, dtype)
                    })?
                }
            }
        };
        Ok(record(output, &[self, rhs], |_| MatmulRule { left: self.clone(), right: rhs.clone(), transposed }))
    }
}

/// For each matrix of the broadcast batch, in order, the number of the operand's matrix.
fn batch_offsets(operand: &[usize], batch: &Shape) -> Vec<usize> {
    let missing = batch.len() - operand.len();
    let strides = Shape::from(operand).strides();
    let number = |mut index: usize| {
        let mut matrix = 0;
        for axis in (0..batch.len()).rev() {
            let position = index % batch[axis];
            index /= batch[axis];
            if axis >= missing && operand[axis - missing] != 1 {
                matrix += position * strides[axis - missing];
            }
        }
        matrix
    };
    (0..batch.elements()).map(number).collect()
}

/// The axes in front of the last two.
fn batch_of(operand: &Tensor) -> &[usize] {
    &operand.shape()[..operand.rank() - 2]
}

/// The rows of all matrices as one.
fn all_rows(operand: &Tensor) -> Result<Tensor> {
    let columns = operand.shape()[operand.rank() - 1];
    let rows = operand.shape()[..operand.rank() - 1].iter().product();
    operand.reshape([rows, columns])
}

struct MatmulRule {
    left: Tensor,
    right: Tensor,
    transposed: Transposed,
}

impl Function for MatmulRule {
    fn name(&self) -> &'static str {
        "matmul"
    }

    /// With C = A B: dA = dC Bᵀ and dB = Aᵀ dC, and their transposes where an operand is stored transposed.
    fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let (a, b, grad) = (&self.left, &self.right, backward.grad());
        let Transposed { left: at, right: bt } = self.transposed;
        let product = |x: &Tensor, left: bool, y: &Tensor, right: bool, like: &Tensor| {
            // One matrix for a whole batch: its gradient is one product of all rows.
            if left && !right && batch_of(like).iter().all(|&extent| extent == 1) && batch_of(x) == batch_of(y) {
                return all_rows(x)?
                    .matmul_transposed(&all_rows(y)?, Transposed { left, right })?
                    .reshape(like.shape());
            }
            x.matmul_transposed(y, Transposed { left, right })?.sum_to(like.shape())
        };
        let da = match (backward.needs(0), at) {
            (false, _) => None,
            (true, false) => Some(product(grad, false, b, !bt, a)?),
            (true, true) => Some(product(b, bt, grad, true, a)?),
        };
        let db = match (backward.needs(1), bt) {
            (false, _) => None,
            (true, false) => Some(product(a, !at, grad, false, b)?),
            (true, true) => Some(product(grad, true, a, at, b)?),
        };
        Ok(vec![da, db])
    }
}
