//! Matrix products on strided views, by the `gemm` crate: the only place that calls it.

#![allow(unsafe_code, reason = "the gemm crate takes raw pointers")]

use super::Float;
use crate::tensor::DType;

/// A matrix inside a slice: element (row, column) is at `row * row_stride + column * column_stride`.
///
/// ```
/// use gridgrad::cpu::gemm::{Into, Matrix, Threads, gemm};
/// let (a, b) = ([1.0f64, 2.0, 3.0, 4.0], [1.0, 1.0, 0.0, 1.0]);
/// let mut product = [0.0; 4];
/// let right = Matrix::row_major(&b, 2, 2).transposed();
/// gemm(&mut product, 2, Matrix::row_major(&a, 2, 2), right, Into::Overwrite, Threads::One);
/// assert_eq!(product, [3.0, 2.0, 7.0, 4.0]);
/// ```
#[derive(Clone, Copy)]
pub struct Matrix<'a, T> {
    data: &'a [T],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a, T> Matrix<'a, T> {
    /// A view with explicit strides.
    ///
    /// # Panics
    /// Where an element lies outside the slice.
    pub fn strided(data: &'a [T], rows: usize, columns: usize, row_stride: usize, column_stride: usize) -> Self {
        assert!(in_bounds(data.len(), rows, columns, row_stride, column_stride), "matrix view outside its slice");
        Matrix { data, rows, columns, row_stride, column_stride }
    }

    /// A row-major matrix that fills the slice.
    pub fn row_major(data: &'a [T], rows: usize, columns: usize) -> Self {
        Self::strided(data, rows, columns, columns, 1)
    }

    fn cast<F: bytemuck::Pod>(self) -> Matrix<'a, F>
    where
        T: bytemuck::Pod,
    {
        Matrix {
            data: bytemuck::cast_slice(self.data),
            rows: self.rows,
            columns: self.columns,
            row_stride: self.row_stride,
            column_stride: self.column_stride,
        }
    }

    /// The transposed view.
    pub fn transposed(self) -> Self {
        Matrix {
            data: self.data,
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
        }
    }
}

fn in_bounds(len: usize, rows: usize, columns: usize, row_stride: usize, column_stride: usize) -> bool {
    rows == 0 || columns == 0 || (rows - 1) * row_stride + (columns - 1) * column_stride < len
}

/// Whether a product overwrites its destination or adds to it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Into {
    /// destination = product
    Overwrite,
    /// destination += product
    Add,
}

/// The threads that one product may use.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    /// The calling thread: for products inside a parallel loop.
    One,
    /// The current rayon pool.
    All,
}

/// `destination = left · right` or `destination += left · right`. Rows of the destination are `row_stride` apart and
/// contiguous.
///
/// # Panics
/// Where the extents do not match or the destination is too short.
pub fn gemm<T: Float>(
    destination: &mut [T],
    row_stride: usize,
    left: Matrix<'_, T>,
    right: Matrix<'_, T>,
    into: Into,
    threads: Threads,
) {
    let (m, n, k) = (left.rows, right.columns, left.columns);
    assert_eq!(k, right.rows, "inner extents");
    assert!(in_bounds(destination.len(), m, n, row_stride, 1) && (n <= row_stride || m <= 1), "destination too short");
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        if into == Into::Overwrite {
            (0..m).for_each(|row| destination[row * row_stride..][..n].fill(T::ZERO));
        }
        return;
    }
    // Below this the pool's wake-up costs more than it saves.
    const PARALLEL_FLOPS: usize = 1 << 21;
    let all = threads == Threads::All && 2 * m * n * k > PARALLEL_FLOPS;
    let parallelism = if all { gemm::Parallelism::Rayon(0) } else { gemm::Parallelism::None };
    match T::DTYPE {
        DType::F32 => call::<f32>(
            bytemuck::cast_slice_mut(destination),
            row_stride,
            left.cast(),
            right.cast(),
            into,
            (0.0, 1.0),
            parallelism,
        ),
        _ => call::<f64>(
            bytemuck::cast_slice_mut(destination),
            row_stride,
            left.cast(),
            right.cast(),
            into,
            (0.0, 1.0),
            parallelism,
        ),
    }
}

fn call<F: Copy + 'static>(
    destination: &mut [F],
    row_stride: usize,
    left: Matrix<'_, F>,
    right: Matrix<'_, F>,
    into: Into,
    (zero, one): (F, F),
    parallelism: gemm::Parallelism,
) {
    let stride = |stride: usize| stride as isize;
    let (add, alpha) = if into == Into::Add { (true, one) } else { (false, zero) };
    // SAFETY: `gemm` compared the extents of all three views with their slices.
    unsafe {
        gemm::gemm(
            left.rows,
            right.columns,
            left.columns,
            destination.as_mut_ptr(),
            1,
            stride(row_stride),
            add,
            left.data.as_ptr(),
            stride(left.column_stride),
            stride(left.row_stride),
            right.data.as_ptr(),
            stride(right.column_stride),
            stride(right.row_stride),
            alpha,
            one,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Philox;

    #[test]
    fn strided_products_match_the_definition_for_any_number_of_threads() {
        for (m, n, k) in [(1, 1, 1), (3, 5, 7), (49, 32, 33), (130, 257, 300), (4, 3, 0), (1000, 96, 384)] {
            let a: Vec<f32> = (0..m * k).map(|i| Philox::new(1).uniform(i as u64) - 0.5).collect();
            let b: Vec<f32> = (0..k * n).map(|i| Philox::new(2).uniform(i as u64) - 0.5).collect();
            let run = || {
                let mut c = vec![1.0f32; m * (n + 2)];
                let right = Matrix::strided(&b, n, k, k, 1).transposed();
                gemm(&mut c, n + 2, Matrix::row_major(&a, m, k), right, Into::Add, Threads::All);
                c
            };
            let result = run();
            for row in 0..m {
                for column in 0..n {
                    let exact: f64 = (0..k).map(|i| f64::from(a[row * k + i]) * f64::from(b[column * k + i])).sum();
                    let got = f64::from(result[row * (n + 2) + column]);
                    assert!((got - exact - 1.0).abs() < 1e-5, "({m}, {n}, {k})");
                }
            }
            for threads in [1, 2, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                assert_eq!(pool.install(run), result, "({m}, {n}, {k}) with {threads} threads");
            }
        }
    }
}
