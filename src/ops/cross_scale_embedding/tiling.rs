//! How a layer is cut into blocks, pieces and slices for the products of `kernels/cross_scale_embedding.cu`; terms as in
//! `kernels/common/embedding_tile.cuh`.

mod weights;

use super::cpu::{Kernel as Window, Problem};
use crate::{Error, Result};
pub(super) use weights::{Split, WeightTiling};

/// As `MOST_KERNELS` in the kernel files.
pub(super) const MOST_KERNELS: usize = 16;
/// As `Tiling` in the kernel files.
pub(super) type Description = [u32; 14 + 2 * MOST_KERNELS];

/// Groups of a block, terms of a step, warps side by side, and tiles of 8 columns of a piece.
const GROUPS: usize = 128;
const STEP: usize = 16;
const WARPS: usize = 4;
const MOST_TILES: usize = 4;
/// Elements of a step's tile.
const FRAGMENT: usize = STEP * 8;
/// What a block may stage in bytes: with what is exchanged it fits into every GPU from compute capability 8.0 on, and
/// twice into the multiprocessors of those with the most. Fixed, so that sums do not depend on the device.
const STAGED: usize = 76 << 10;
/// For the parts of products that warps exchange.
const EXCHANGED: usize = 16 << 10;
/// A piece of so many steps is worth sharing among the warps side by side.
const SHARED_STEPS: usize = 32;
/// Up to so many channels are staged all together; beyond, in slices of 64 bytes.
const FEW_CHANNELS: usize = 16;

/// Columns of a kernel that are cut into pieces together.
struct Strip {
    kernel: usize,
    columns: usize,
    /// Of a row of the windows.
    row_chunks: usize,
    steps: usize,
    /// Chunks from the beginning of a group's largest window to the end of the strip's run.
    reach: usize,
}

/// The groups of a block.
#[derive(Clone, Copy)]
struct Block {
    images: usize,
    rows: usize,
    columns: usize,
    band: usize,
}

pub(super) struct Tiling<'a> {
    problem: &'a Problem,
    /// From the largest to the smallest.
    windows: Vec<Window>,
    element: usize,
    group: usize,
    slice_channels: usize,
    /// Slices of channels, and of rows where a tile would not fit otherwise, are staged one after the other.
    sliced: bool,
    joint: Vec<bool>,
    tiles: Vec<usize>,
    /// Chunks that a group's windows take in a row of the tile.
    reach: usize,
    split: usize,
    block: Block,
}

impl<'a> Tiling<'a> {
    /// For elements of `element` bytes; `windows` from the largest to the smallest.
    pub fn new(problem: &'a Problem, windows: Vec<Window>, element: usize) -> Result<Self> {
        let channels = problem.extents[3].max(1);
        let whole = Self::cut(problem, windows.clone(), element, channels, false);
        if channels <= FEW_CHANNELS
            && let Some(tiling) = whole.with_block()
        {
            return Ok(tiling);
        }
        let sliced = Self::cut(problem, windows, element, 64 / element, true);
        sliced.with_block().ok_or_else(|| too_large(problem))
    }

    /// Everything but the block.
    fn cut(problem: &'a Problem, windows: Vec<Window>, element: usize, slice_channels: usize, sliced: bool) -> Self {
        let step = problem.stride * slice_channels * element;
        let group = (1..=16).find(|group| (group * step).is_multiple_of(16)).unwrap_or(16);
        let block = Block { images: 1, rows: 1, columns: 1, band: 1 };
        let kernels = windows.len();
        let mut tiling = Tiling {
            problem,
            windows,
            element,
            group,
            slice_channels,
            sliced,
            joint: vec![false; kernels],
            tiles: vec![1; kernels],
            reach: 0,
            split: 0,
            block,
        };
        for kernel in 0..kernels {
            let out = tiling.windows[kernel].out;
            let area = |positions: usize| -> usize {
                let strips = (0..group).step_by(positions);
                strips.map(|position| tiling.row_chunks(kernel, position, positions) * tiles(positions * out)).sum()
            };
            tiling.joint[kernel] = area(group) < area(1);
        }
        tiling.reach = tiling.strips().map(|strip| strip.reach).max().unwrap_or(1);
        tiling.choose_tiles();
        tiling
    }

    /// Tiles of the pieces of each kernel, and which pieces the warps share.
    fn choose_tiles(&mut self) {
        if self.sliced {
            // One width for all, such that the fewest warps have nothing to do.
            let pieces = |width: usize| self.strips().map(|strip| tiles(strip.columns).div_ceil(width)).sum::<usize>();
            let cost = |width: &usize| (pieces(*width).div_ceil(WARPS) * width, MOST_TILES - width);
            let width = (1..=MOST_TILES).min_by_key(cost).unwrap_or(MOST_TILES);
            self.tiles.fill(width);
            return;
        }
        for kernel in 0..self.windows.len() {
            self.tiles[kernel] = self.even_tiles(kernel);
        }
        let shared = self.strips().take_while(|strip| strip.steps >= SHARED_STEPS);
        self.split = shared.map(|strip| self.pieces(&strip)).sum();
    }

    /// Tiles of a piece, such that pieces are the fewest and equally wide.
    fn even_tiles(&self, kernel: usize) -> usize {
        let wanted = tiles(self.columns(kernel)).max(1);
        wanted.div_ceil(wanted.div_ceil(MOST_TILES))
    }

    fn positions(&self, kernel: usize) -> usize {
        if self.joint[kernel] { self.group } else { 1 }
    }

    fn columns(&self, kernel: usize) -> usize {
        self.positions(kernel) * self.windows[kernel].out
    }

    fn pieces(&self, strip: &Strip) -> usize {
        strip.columns.div_ceil(self.tiles[strip.kernel] * 8)
    }

    /// Elements of a chunk of 16 bytes.
    fn chunk(&self) -> usize {
        16 / self.element
    }

    /// Where the run of a row begins among the elements of a group's largest window.
    fn begin(&self, kernel: usize, position: usize) -> usize {
        let inset = (self.problem.largest() - self.windows[kernel].side) / 2;
        (inset + position * self.problem.stride) * self.slice_channels
    }

    fn row_chunks(&self, kernel: usize, position: usize, positions: usize) -> usize {
        let front = self.begin(kernel, position) % self.chunk();
        let side = self.windows[kernel].side + (positions - 1) * self.problem.stride;
        (front + side * self.slice_channels).div_ceil(self.chunk())
    }

    fn strips(&self) -> impl Iterator<Item = Strip> {
        (0..self.windows.len()).flat_map(move |kernel| {
            let positions = self.positions(kernel);
            (0..self.group).step_by(positions).map(move |position| {
                let row_chunks = self.row_chunks(kernel, position, positions);
                Strip {
                    kernel,
                    columns: self.columns(kernel),
                    row_chunks,
                    steps: (self.windows[kernel].side * row_chunks * self.chunk()).div_ceil(STEP),
                    reach: self.begin(kernel, position) / self.chunk() + row_chunks,
                }
            })
        })
    }

    fn channel_slices(&self) -> usize {
        self.problem.extents[3].div_ceil(self.slice_channels).max(1)
    }

    /// Groups of a row of the map.
    fn map_columns(&self) -> usize {
        self.problem.output_map()[1].div_ceil(self.group)
    }

    /// Chunks from a group to the next.
    fn group_chunks(&self) -> usize {
        self.group * self.problem.stride * self.slice_channels / self.chunk()
    }

    fn pitch(&self, block: Block) -> usize {
        (block.columns - 1) * self.group_chunks() + self.reach
    }

    fn tile_rows(&self, block: Block) -> usize {
        (block.rows - 1) * self.problem.stride + block.band
    }

    /// Of one of the tiles that are staged.
    fn tile_bytes(&self, block: Block) -> usize {
        (block.images * self.tile_rows(block) * self.pitch(block)).next_multiple_of(8) * 16
    }

    /// Tiles in shared memory: where there may be slices, one is used while the next is on its way.
    fn buffers(&self) -> usize {
        if self.sliced { 2 } else { 1 }
    }

    fn blocks(&self, block: Block) -> usize {
        let [rows, _] = self.problem.output_map();
        let images = self.problem.extents[0].div_ceil(block.images);
        images * rows.div_ceil(block.rows) * self.map_columns().div_ceil(block.columns)
    }

    /// The tiling with the fewest blocks that stage the least; none where nothing fits.
    fn with_block(mut self) -> Option<Self> {
        let [rows, _] = self.problem.output_map();
        let (columns, largest) = (self.map_columns(), self.problem.largest());
        let fits = |block: &Block| self.tile_bytes(*block) * self.buffers() <= STAGED;
        let whole = (1..=columns.min(GROUPS)).flat_map(|columns_of_block| {
            let most = (GROUPS / columns_of_block).min(rows);
            (1..=most).map(move |rows_of_block| {
                let map = rows_of_block == rows && columns_of_block == columns;
                let images = if map { GROUPS / (rows * columns) } else { 1 };
                Block { images, rows: rows_of_block, columns: columns_of_block, band: largest }
            })
        });
        let whole = whole.flat_map(|block| (1..=block.images).map(move |images| Block { images, ..block }));
        let best = whole.filter(fits).min_by_key(|block| (self.blocks(*block), self.tile_bytes(*block)));
        let banded = || {
            let mut bands = (1..largest).rev().map(|band| Block { images: 1, rows: 1, columns: 1, band });
            if self.sliced { bands.find(fits) } else { None }
        };
        self.block = best.or_else(banded)?;
        Some(self)
    }

    /// As the kernels take it; `run` elements can be copied at once as they are.
    pub fn description(&self, run: usize) -> Description {
        self.describe(run, self.swizzle())
    }

    /// So that equal chunks of neighbouring groups lie in different banks.
    fn swizzle(&self) -> usize {
        if self.group_chunks().is_multiple_of(2) { 7 } else { 0 }
    }

    fn describe(&self, run: usize, swizzle: usize) -> Description {
        let Block { images, rows, columns, band } = self.block;
        let (slices, bands) = (self.channel_slices(), self.problem.largest().div_ceil(band));
        let head = [
            self.group,
            images,
            rows,
            columns,
            self.slice_channels,
            slices,
            band,
            bands,
            self.tile_rows(self.block),
            self.pitch(self.block),
            swizzle,
            self.split,
            self.rounds(),
            run,
        ];
        let mut description = [0; 14 + 2 * MOST_KERNELS];
        let (front, lists) = description.split_at_mut(head.len());
        front.copy_from_slice(&head.map(|value| value as u32));
        for kernel in 0..self.windows.len() {
            lists[kernel] = u32::from(self.joint[kernel]);
            lists[MOST_KERNELS + kernel] = self.tiles[kernel] as u32;
        }
        description
    }

    /// The most elements whose copies do not cross the border of the map, nor an alignment.
    pub fn run(&self) -> usize {
        let [_, _, width, channels] = self.problem.extents;
        let (margin, step) = (self.problem.padding() * channels, self.problem.stride * self.group * channels);
        let extents = if self.sliced { [channels; 3] } else { [width * channels, margin, step] };
        let divides = |run: &usize| run * self.element >= 4 && extents.iter().all(|extent| extent.is_multiple_of(*run));
        [8, 4, 2, 1].into_iter().filter(|run| run * self.element <= 16).find(divides).unwrap_or(0)
    }

    fn rounds(&self) -> usize {
        let pieces: usize = self.strips().map(|strip| self.pieces(&strip)).sum();
        (pieces - self.split).div_ceil(WARPS)
    }

    fn slices(&self) -> usize {
        self.channel_slices() * self.problem.largest().div_ceil(self.block.band)
    }

    /// Whether a block has all channels of its positions.
    pub fn is_complete(&self) -> bool {
        self.slices() == 1
    }

    /// Elements of all packed weights.
    pub fn packed_elements(&self) -> usize {
        let of = |strip: Strip| self.pieces(&strip) * self.channel_slices() * strip.steps * self.tiles[strip.kernel];
        self.strips().map(of).sum::<usize>() * FRAGMENT
    }

    /// Blocks along x and y, and their shared memory in bytes.
    pub fn launch(&self) -> ([usize; 2], usize) {
        let exchanged = if self.split > 0 { EXCHANGED } else { 0 };
        let rounds = if self.is_complete() { 1 } else { self.rounds() };
        ([self.blocks(self.block), rounds], self.tile_bytes(self.block) * self.buffers() + exchanged)
    }
}

fn too_large(problem: &Problem) -> Error {
    let message = format!("kernel {}: a row of its window does not fit into shared memory", problem.largest());
    Error::argument("cross_scale_embedding", message)
}

/// Tiles of 8 columns.
fn tiles(columns: usize) -> usize {
    columns.div_ceil(8)
}
