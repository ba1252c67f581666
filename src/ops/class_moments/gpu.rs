//! A launch for the sums, one for the squares; all blocks together.

use super::{BatchMoments, Problem, Squares};
use crate::driver::seam::Address;
use crate::gpu::{Geometry, Gpu, Kernel, Signature};
use crate::{DType, Result, Tensor};

use super::MOST_BLOCKS as MOST;

/// First features of the blocks, then the number of all.
type Offsets = [u32; MOST + 1];
/// counts, sums, features, labels, pivot, rows, features of a row, classes
const SUMS: Kernel<(Address, Address, Address, Address, Address, u32, u32, u32)> =
    Kernel::new("class_moments", "class_moments_sums", &[]);
/// squares, features, labels, pivot, rows, features of a row, classes
const DIAGONAL: Kernel<(Address, Address, Address, Address, u32, u32, u32)> =
    Kernel::new("class_moments", "class_moments_squares_diagonal", &[]);
/// squares, features, labels, pivot, rows, features of a row, classes, offsets
const FULL: Kernel<(Address, Address, Address, Address, u32, u32, u32, Offsets)> =
    Kernel::new("class_moments", "class_moments_squares_full", &[]);

pub(crate) static KERNELS: &[Signature] = &[SUMS.signature(), DIAGONAL.signature(), FULL.signature()];

// As in the kernel file.
const LANES: usize = 32;
const SLICES: usize = 8;
const TILE: usize = 64;

pub(super) fn moments(
    gpu: &'static Gpu,
    problem: &Problem,
    features: &Tensor,
    labels: &Tensor,
    pivot: &Tensor,
) -> Result<BatchMoments> {
    let [rows, pitch, classes] = [problem.rows, problem.features(), problem.classes].map(|extent| extent as u32);
    let counts = Tensor::empty_on(gpu, [problem.classes], DType::I64)?;
    let sums = Tensor::empty_on(gpu, [problem.classes, problem.features()], DType::F32)?;
    let squares = Tensor::empty_on(gpu, [problem.squares_len()], DType::F32)?;
    let block = [LANES as u32, SLICES as u32, 1];
    let across = problem.features().div_ceil(LANES) as u32;
    // A block without features still counts its classes.
    let grid = [across.max(1), problem.classes.div_ceil(SLICES) as u32, 1];
    let (from, by, origin) = (features.address()?, labels.address()?, pivot.address()?);
    let arguments = (counts.address()?, sums.address()?, from, by, origin, rows, pitch, classes);
    SUMS.launch(gpu, "", Geometry { grid, block, shared: 0 }, arguments)?;
    let to = squares.address()?;
    match problem.squares {
        Squares::Diagonal => {
            let geometry = Geometry { grid: [across, 1, 1], block, shared: 0 };
            DIAGONAL.launch(gpu, "", geometry, (to, from, by, origin, rows, pitch, classes))?;
        }
        Squares::Full => {
            let tiles = problem.widths.iter().map(|width| width.div_ceil(TILE)).max().unwrap_or(0);
            let geometry = Geometry::blocks(tiles * (tiles + 1) / 2, (LANES * SLICES) as u32);
            let geometry = Geometry { grid: [geometry.grid[0], problem.widths.len() as u32, 1], ..geometry };
            let mut offsets = [pitch; MOST + 1];
            for (block, offset) in offsets.iter_mut().enumerate().take(problem.widths.len()) {
                *offset = problem.first(block) as u32;
            }
            FULL.launch(gpu, "", geometry, (to, from, by, origin, rows, pitch, classes, offsets))?;
        }
    }
    Ok(BatchMoments { counts, sums, squares })
}
