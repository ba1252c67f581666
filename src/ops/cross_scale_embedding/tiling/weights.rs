//! How the products of `kernels/cross_scale_embedding_weight.cu` are cut into units, blocks and tiles of positions; terms
//! as there.

use super::{Block, FEW_CHANNELS, MOST_KERNELS, Problem, Result, STEP, Tiling, Window, too_large};
use crate::gpu::Geometry;

/// As `Split` in the kernel file.
pub(in super::super) type Split = [u32; 5 + MOST_KERNELS];

/// Warps of a block, which have a unit each, steps of a unit, and groups of a tile at most. As in the kernel file.
const WARPS: usize = 16;
const DOWN: usize = 4;
const MOST_GROUPS: usize = 256;
/// Columns of `dy` that a block sums for the bias.
const BIAS_COLUMNS: usize = 32;
/// What a tile may take in bytes: two of them, with what a block looks up, fit into every GPU from compute capability 8.0
/// on. Fixed, so that sums do not depend on the device.
const STAGED: usize = 47 << 10;
/// What a unit reads of 16 groups in shared memory: 4 matrices of 512 bytes for its terms, and 2 for its columns.
const UNIT_BYTES: usize = 6 * 512;
/// To stage a byte costs as much as to read so many from shared memory.
const STAGING: usize = 2;
/// Blocks that fill every device a few times over, and positions that are worth sums of their own. Fixed likewise.
const PART_BLOCKS: usize = 512;
const SHORTEST_PART: usize = 512;

/// What a unit or a block needs of a tile: rows [first, end) of its kernel's windows, and tiles [first, end) of its
/// columns.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Need {
    rows: [usize; 2],
    columns: [usize; 2],
}

/// What is staged of each row of positions beyond their stride, and of each group.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Share {
    rows: usize,
    gradient_chunks: usize,
}

pub(in super::super) struct WeightTiling<'a> {
    tiling: Tiling<'a>,
    /// Of each kernel in a slice of channels.
    units: Vec<usize>,
    /// Units of a block at most.
    block_units: usize,
    /// Bytes of a tile at most.
    staged: usize,
}

impl<'a> WeightTiling<'a> {
    /// As [`Tiling::new`].
    pub fn new(problem: &'a Problem, windows: Vec<Window>, element: usize) -> Result<Self> {
        let channels = problem.extents[3].max(1);
        let whole = || Self::with_tiling(Tiling::cut(problem, windows.clone(), element, channels, false));
        if channels <= FEW_CHANNELS
            && let Some(tiling) = whole()
        {
            return Ok(tiling);
        }
        let sliced = Tiling::cut(problem, windows.clone(), element, 64 / element, true);
        Self::with_tiling(sliced).ok_or_else(|| too_large(problem))
    }

    /// None where no tile fits.
    fn with_tiling(mut tiling: Tiling<'a>) -> Option<Self> {
        let kernels = 0..tiling.windows.len();
        tiling.split = 0;
        tiling.tiles = kernels.clone().map(|kernel| tiling.even_tiles(kernel)).collect();
        let needs: Vec<Vec<Need>> = kernels.map(|kernel| needs(&tiling, kernel)).collect();
        let of = |block_units: usize| Some((best_block(&tiling, &needs, block_units)?, block_units));
        let candidates = [WARPS, WARPS / 4, 1].into_iter().filter_map(of);
        let ((_, staged, block), block_units) = candidates.min_by_key(|((cost, ..), _)| *cost)?;
        tiling.block = block;
        Some(WeightTiling { tiling, units: needs.iter().map(Vec::len).collect(), block_units, staged })
    }

    /// As the kernels take it. Fused multiply-adds read the windows of one group at a time, without conflicts.
    pub fn description(&self) -> super::Description {
        let swizzle = if self.tiling.element == 4 { 0 } else { self.tiling.swizzle() };
        self.tiling.describe(self.tiling.run(), swizzle)
    }

    /// As the kernels take it.
    pub fn split(&self) -> Split {
        let [part, _] = self.parts();
        let mut split = [0; 5 + MOST_KERNELS];
        let (head, units) = split.split_at_mut(5);
        let values = [self.tiles(), part, self.block_units, self.staged / 16, self.gradient_run()];
        head.copy_from_slice(&values.map(|value| value as u32));
        units.iter_mut().zip(&self.units).for_each(|(to, &units)| *to = units as u32);
        split
    }

    /// Tiles of the positions.
    fn tiles(&self) -> usize {
        self.tiling.blocks(self.tiling.block)
    }

    /// The most elements of `dy` that belong to one kernel and position wherever they are copied at once.
    fn gradient_run(&self) -> usize {
        let element = self.tiling.element;
        let divides = |run: &usize| self.tiling.windows.iter().all(|window| window.out.is_multiple_of(*run));
        [8, 4, 2, 1].into_iter().filter(|run| (4..=16).contains(&(run * element))).find(divides).unwrap_or(0)
    }

    /// Blocks of a part.
    fn blocks(&self) -> usize {
        let of_units: usize = self.units.iter().map(|units| units.div_ceil(self.block_units)).sum();
        of_units * self.tiling.channel_slices() + self.tiling.problem.out_channels().div_ceil(BIAS_COLUMNS)
    }

    /// Tiles of a part, and how many parts there are: at least one.
    fn parts(&self) -> [usize; 2] {
        let positions = self.tiling.problem.extents[0] * self.tiling.problem.output_map().iter().product::<usize>();
        let wanted = PART_BLOCKS.div_ceil(self.blocks().max(1)).min(positions.div_ceil(SHORTEST_PART)).max(1);
        let part = self.tiles().div_ceil(wanted).max(1);
        [part, self.tiles().div_ceil(part).max(1)]
    }

    /// How many parts there are.
    pub fn part_count(&self) -> usize {
        self.parts()[1]
    }

    /// Sums of a part: those of the weights, as they are packed for the forward pass, then those of the biases.
    pub fn sums(&self) -> [usize; 2] {
        [self.tiling.packed_elements(), self.tiling.problem.out_channels().next_multiple_of(4)]
    }

    /// Blocks that sum a bias need a value of each thread in shared memory.
    pub fn geometry(&self) -> Geometry {
        let threads = 32 * WARPS;
        Geometry {
            grid: [self.blocks() as u32, self.part_count() as u32, 1],
            block: [threads as u32, 1, 1],
            shared: (2 * self.staged).max(4 * threads) as u32,
        }
    }
}

/// What each unit of a kernel needs, in their order: strips, pieces, steps.
fn needs(tiling: &Tiling<'_>, kernel: usize) -> Vec<Need> {
    let (side, width, step_chunks) = (tiling.windows[kernel].side, tiling.tiles[kernel], STEP / tiling.chunk());
    let mut needs = Vec::new();
    let mut column = 0;
    for strip in tiling.strips().filter(|strip| strip.kernel == kernel) {
        let down = strip.steps.div_ceil(DOWN);
        let chunk = |unit: usize| unit * strip.steps / down * step_chunks;
        for _ in 0..tiling.pieces(&strip) {
            let rows = |unit: usize| {
                [chunk(unit) / strip.row_chunks, chunk(unit + 1).div_ceil(strip.row_chunks).min(side)]
            };
            needs.extend((0..down).map(|unit| Need { rows: rows(unit), columns: [column, column + width] }));
            column += width;
        }
    }
    needs
}

/// The shares of the blocks of all kernels, each with how many blocks have it.
fn shares(tiling: &Tiling<'_>, needs: &[Vec<Need>], block_units: usize) -> Vec<(Share, usize)> {
    let mut shares: Vec<(Share, usize)> = Vec::new();
    for needs in needs.iter().filter(|needs| !needs.is_empty()) {
        let each = needs.len().div_ceil(needs.len().div_ceil(block_units));
        for needs in needs.chunks(each) {
            let first_row = needs.iter().map(|need| need.rows[0]).min().unwrap_or(0);
            let end_row = needs.iter().map(|need| need.rows[1]).max().unwrap_or(0);
            let columns = 8 * (needs[needs.len() - 1].columns[1] - needs[0].columns[0]);
            let share = Share { rows: end_row - first_row, gradient_chunks: columns / tiling.chunk() | 1 };
            match shares.iter_mut().find(|(other, _)| *other == share) {
                Some((_, count)) => *count += 1,
                None => shares.push((share, 1)),
            }
        }
    }
    shares
}

/// Of the tiles that fit the one that costs least: its cost, the bytes that it takes at most, and the tile.
fn best_block(tiling: &Tiling<'_>, needs: &[Vec<Need>], block_units: usize) -> Option<(usize, usize, Block)> {
    let shares = shares(tiling, needs, block_units);
    let units: usize = needs.iter().map(Vec::len).sum();
    let ([map_rows, _], map_columns) = (tiling.problem.output_map(), tiling.map_columns());
    let batch = tiling.problem.extents[0].max(1);
    let blocks = parts_of(map_columns).flat_map(|columns| {
        parts_of(map_rows).flat_map(move |rows| {
            let images = if [rows, columns] == [map_rows, map_columns] { batch.min(MOST_GROUPS) } else { 1 };
            parts_of(images).map(move |images| Block { images, rows, columns, band: 1 })
        })
    });
    let groups = |block: &Block| block.images * block.rows * block.columns;
    let costs = blocks.filter(|block| groups(block) <= MOST_GROUPS).filter_map(|block| {
        let steps = groups(&block).div_ceil(16);
        let bytes = |share: &Share| {
            let rows = (block.rows - 1) * tiling.problem.stride + share.rows;
            let pixels = (block.images * rows * tiling.pitch(block)).next_multiple_of(8);
            16 * (pixels + steps * 16 * share.gradient_chunks)
        };
        let most = shares.iter().map(|(share, _)| bytes(share)).max().unwrap_or(0);
        let staged: usize = shares.iter().map(|(share, count)| bytes(share) * count).sum();
        let cost = tiling.blocks(block) * (staged * STAGING + steps * units * UNIT_BYTES);
        (most <= STAGED).then_some((cost, most, block))
    });
    costs.min_by_key(|(cost, ..)| *cost)
}

/// Lengths of pieces that an extent can be cut into, from the longest on.
fn parts_of(extent: usize) -> impl Iterator<Item = usize> {
    let lengths = (1..=extent.max(1)).map(move |count| extent.max(1).div_ceil(count));
    let mut before = 0;
    lengths.filter(move |&length| std::mem::replace(&mut before, length) != length)
}
