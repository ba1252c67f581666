//! How the products of `kernels/cross_scale_embedding_weight.cu` are cut into units, blocks and tiles of positions; terms
//! as there.

use super::{Block, FEW_CHANNELS, MOST_KERNELS, Problem, Result, STEP, Tiling, Window, too_large};
use crate::gpu::Geometry;

/// As `Split` in the kernel file.
pub(in super::super) type Split = [u32; 4 + 2 * MOST_KERNELS];

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
/// And a tile as much as so many: what its barrier and the way of its first bytes take.
const BARRIER: usize = 64 << 10;
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
    /// Of each kernel in a slice of channels, and how many of them a block has at most.
    units: Vec<[usize; 2]>,
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
        let cuts: Vec<Vec<Cut>> = kernels.map(|kernel| cuts(&tiling, &needs(&tiling, kernel))).collect();
        let best = Best::of_all(&tiling, &cuts)?;
        tiling.block = best.block;
        let units = cuts.iter().zip(&best.chosen).map(|(cuts, &chosen)| [cuts[chosen].units, cuts[chosen].each]);
        Some(WeightTiling { units: units.collect(), staged: best.staged, tiling })
    }

    /// As the kernels take it. Fused multiply-adds read the windows of one group at a time, without conflicts.
    pub fn description(&self) -> super::Description {
        let swizzle = if self.tiling.element == 4 { 0 } else { self.tiling.swizzle() };
        self.tiling.describe(self.tiling.run(), swizzle)
    }

    /// As the kernels take it.
    pub fn split(&self) -> Split {
        let [part, _] = self.parts();
        let mut split = [0; 4 + 2 * MOST_KERNELS];
        let (head, lists) = split.split_at_mut(4);
        head.copy_from_slice(&[self.tiles(), part, self.staged / 16, self.gradient_run()].map(|value| value as u32));
        for (kernel, units) in self.units.iter().enumerate() {
            for (list, &value) in units.iter().enumerate() {
                lists[list * MOST_KERNELS + kernel] = value as u32;
            }
        }
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
        let of_units: usize = self.units.iter().map(|&[units, each]| units.div_ceil(each)).sum();
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
            let rows =
                |unit: usize| [chunk(unit) / strip.row_chunks, chunk(unit + 1).div_ceil(strip.row_chunks).min(side)];
            needs.extend((0..down).map(|unit| Need { rows: rows(unit), columns: [column, column + width] }));
            column += width;
        }
    }
    needs
}

/// A way to share a kernel's units out.
struct Cut {
    units: usize,
    /// Of a block at most.
    each: usize,
    /// What its blocks stage, with how many of them do.
    shares: Vec<(Share, usize)>,
}

/// From the fewest blocks on.
fn cuts(tiling: &Tiling<'_>, needs: &[Need]) -> Vec<Cut> {
    let cut = |blocks: usize| {
        let each = needs.len().div_ceil(blocks.max(1)).max(1);
        let mut shares: Vec<(Share, usize)> = Vec::new();
        for needs in needs.chunks(each) {
            let first_row = needs.iter().map(|need| need.rows[0]).min().unwrap_or(0);
            let end_row = needs.iter().map(|need| need.rows[1]).max().unwrap_or(0);
            let columns = 8 * (needs[needs.len() - 1].columns[1] - needs[0].columns[0]);
            let share = Share { rows: end_row - first_row, gradient_chunks: (columns / tiling.chunk()) | 1 };
            match shares.iter_mut().find(|(other, _)| *other == share) {
                Some((_, count)) => *count += 1,
                None => shares.push((share, 1)),
            }
        }
        Cut { units: needs.len(), each, shares }
    };
    [16, 8, 4, 2, 1].into_iter().map(|units: usize| cut(needs.len().div_ceil(units))).collect()
}

/// A tile of positions with the cuts of all kernels for which it fits.
struct Best {
    cost: usize,
    block: Block,
    /// Bytes that are staged at most.
    staged: usize,
    /// Of each kernel.
    chosen: Vec<usize>,
}

impl Best {
    /// None where no tile fits.
    fn of_all(tiling: &Tiling<'_>, cuts: &[Vec<Cut>]) -> Option<Self> {
        let ([map_rows, _], map_columns) = (tiling.problem.output_map(), tiling.map_columns());
        let batch = tiling.problem.extents[0].max(1);
        let blocks = parts_of(map_columns).flat_map(|columns| {
            parts_of(map_rows).flat_map(move |rows| {
                let images = if [rows, columns] == [map_rows, map_columns] { batch.min(MOST_GROUPS) } else { 1 };
                parts_of(images).map(move |images| Block { images, rows, columns, band: 1 })
            })
        });
        let fits = blocks.filter(|block| groups(block) <= MOST_GROUPS);
        fits.filter_map(|block| Self::of(tiling, cuts, block)).min_by_key(|best| best.cost)
    }

    fn of(tiling: &Tiling<'_>, cuts: &[Vec<Cut>], block: Block) -> Option<Self> {
        let mut best = Best { cost: 0, block, staged: 0, chosen: Vec::with_capacity(cuts.len()) };
        let steps = groups(&block).div_ceil(16);
        for cuts in cuts {
            let most = |cut: &Cut| cut.shares.iter().map(|(share, _)| share.bytes(tiling, block)).max().unwrap_or(0);
            let (chosen, staged) = cuts.iter().map(most).enumerate().find(|&(_, bytes)| bytes <= STAGED)?;
            let of_blocks = cuts[chosen].shares.iter();
            best.cost +=
                of_blocks.map(|(share, n)| n * (share.bytes(tiling, block) * STAGING + BARRIER)).sum::<usize>();
            best.cost += steps * cuts[chosen].units * UNIT_BYTES;
            best.staged = best.staged.max(staged);
            best.chosen.push(chosen);
        }
        best.cost *= tiling.blocks(block);
        Some(best)
    }
}

impl Share {
    /// What it takes of a tile.
    fn bytes(&self, tiling: &Tiling<'_>, block: Block) -> usize {
        let rows = (block.rows - 1) * tiling.problem.stride + self.rows;
        let pixels = (block.images * rows * tiling.pitch(block)).next_multiple_of(8);
        16 * (pixels + groups(&block).next_multiple_of(16) * self.gradient_chunks)
    }
}

fn groups(block: &Block) -> usize {
    block.images * block.rows * block.columns
}

/// Lengths of pieces that an extent can be cut into, from the longest on.
fn parts_of(extent: usize) -> impl Iterator<Item = usize> {
    let lengths = (1..=extent.max(1)).map(move |count| extent.max(1).div_ceil(count));
    let mut before = 0;
    lengths.filter(move |&length| std::mem::replace(&mut before, length) != length)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A layer, its kernels from the largest to the smallest.
    fn problem(extents: [usize; 4], kernels: &[[usize; 2]], stride: usize) -> Problem {
        let kernels = kernels.iter().map(|&[side, out]| Window { side, out }).collect();
        Problem { extents, kernels, stride }
    }

    fn tiling(problem: &Problem, element: usize) -> WeightTiling<'_> {
        WeightTiling::new(problem, problem.kernels.clone(), element).unwrap()
    }

    /// Bytes that are staged for each position, of pixels and of `dy`.
    fn staged(tiling: &WeightTiling<'_>) -> [usize; 2] {
        let (plan, block) = (&tiling.tiling, tiling.tiling.block);
        let [mut pixels, mut gradients] = [0; 2];
        for (kernel, &[_, each]) in tiling.units.iter().enumerate() {
            let cuts = cuts(plan, &needs(plan, kernel));
            for (share, count) in &cuts.iter().find(|cut| cut.each == each).unwrap().shares {
                let of_gradient = groups(&block).next_multiple_of(16) * share.gradient_chunks * 16;
                pixels += count * (share.bytes(plan, block) - of_gradient);
                gradients += count * of_gradient;
            }
        }
        let positions = plan.problem.extents[0] * plan.problem.output_map().iter().product::<usize>();
        [pixels, gradients].map(|bytes| bytes * plan.channel_slices() * tiling.tiles() / positions)
    }

    /// CrossFormer-S at batch 256.
    fn layers() -> [Problem; 4] {
        let between = |side, channels| problem([256, side, side, channels], &[[4, channels], [2, channels]], 2);
        let stem = problem([256, 224, 224, 3], &[[32, 12], [16, 12], [8, 24], [4, 48]], 4);
        [stem, between(56, 96), between(28, 192), between(14, 384)]
    }

    #[test]
    fn layers_of_the_models_stage_what_the_kernel_file_says() {
        let kilobytes = layers().map(|layer| {
            let [pixels, gradients] = staged(&tiling(&layer, 2));
            format!("{:.1}", (pixels + gradients) as f64 / 1e3)
        });
        assert_eq!(kilobytes, ["1.3", "4.8", "16.5", "57.2"]);
    }

    #[test]
    fn units_have_all_rows_of_all_columns_and_tiles_fit() {
        let odd = problem([3, 13, 29, 5], &[[31, 3], [7, 50], [3, 1]], 3);
        for layer in layers().into_iter().chain([odd, problem([1, 1, 1, 1], &[[1, 1]], 1)]) {
            for element in [2, 4] {
                let cut = tiling(&layer, element);
                assert!(cut.staged <= STAGED && cut.staged.is_multiple_of(16));
                assert!(groups(&cut.tiling.block) <= MOST_GROUPS);
                let [part, parts] = cut.parts();
                assert!(part * parts >= cut.tiles() && part * (parts - 1) < cut.tiles());
                for (kernel, window) in cut.tiling.windows.iter().enumerate() {
                    let needs = needs(&cut.tiling, kernel);
                    let [units, each] = cut.units[kernel];
                    assert!(units == needs.len() && (1..=WARPS).contains(&each));
                    for piece in needs.chunk_by(|a, b| a.columns == b.columns) {
                        assert_eq!((piece[0].rows[0], piece[piece.len() - 1].rows[1]), (0, window.side));
                        assert!(piece.windows(2).all(|pair| pair[1].rows[0] <= pair[0].rows[1]));
                    }
                }
            }
        }
    }

    /// What the op's own tests are there for.
    #[test]
    fn small_layers_have_parts_of_one_tile_and_of_several() {
        for element in [2, 4] {
            let many = problem([1, 64, 43, 1], &[[3, 3], [1, 2]], 1);
            let [part, parts] = tiling(&many, element).parts();
            assert!(part == 1 && parts > 1, "{part} {parts}");
            let one = problem([1, 22, 23, 16], &[[5, 4]], 1);
            let [part, parts] = tiling(&one, element).parts();
            assert!(part > 1 && parts == 1, "{part} {parts}");
        }
    }

    #[test]
    fn extents_are_cut_into_pieces_of_every_useful_length() {
        assert_eq!(parts_of(7).collect::<Vec<_>>(), [7, 4, 3, 2, 1]);
        assert_eq!(parts_of(0).collect::<Vec<_>>(), [1]);
    }
}
