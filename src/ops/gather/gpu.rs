//! Gathers, and scatters by a stable sort of the indices.

use super::{Layout, Reads};
use crate::driver::seam::Address;
use crate::gpu::{FLOATS, Geometry, Gpu, Kernel, Memory, Signature};
use crate::{Error, Result, Tensor};

/// As `Extents` in the kernel file: outer, source, result, inner.
type Extents = [u64; 4];

/// output, source, indices, extents
const ROWS: Kernel<(Address, Address, Address, Extents)> = Kernel::new("gather", "gather_rows", FLOATS);
/// output, source, indices, extents
const ELEMENTS: Kernel<(Address, Address, Address, Extents)> = Kernel::new("gather", "gather_elements", FLOATS);
/// keys, indices, count, extents, rows, whether indices stand for elements
const KEYS: Kernel<(Address, Address, u64, Extents, u64, u32)> = Kernel::new("gather", "gather_keys", &[]);
/// counts, keys, count, shift
const SORT_COUNT: Kernel<(Address, Address, u64, u32)> = Kernel::new("gather", "gather_sort_count", &[]);
/// counts, totals, tiles
const SORT_SCAN: Kernel<(Address, Address, u64)> = Kernel::new("gather", "gather_sort_scan", &[]);
type SortPlace = (Address, Address, Address, Address, Address, Address, u64, u32);
/// sorted keys, sorted readers, keys, readers or null, counts, totals, count, shift
const SORT_PLACE: Kernel<SortPlace> = Kernel::new("gather", "gather_sort_place", &[]);
/// starts, sorted keys, count, rows
const STARTS: Kernel<(Address, Address, u64, u64)> = Kernel::new("gather", "gather_starts", &[]);
/// partial sums, values, sorted keys, readers, starts, extents
const PARTIALS: Kernel<(Address, Address, Address, Address, Address, Extents)> =
    Kernel::new("gather", "gather_segment_partials", FLOATS);
/// output, base or null, values, partial sums or null, readers, starts, extents
const SUMS: Kernel<(Address, Address, Address, Address, Address, Address, Extents)> =
    Kernel::new("gather", "gather_segment_sums", FLOATS);

pub(crate) static KERNELS: &[Signature] = &[
    ROWS.signature(),
    ELEMENTS.signature(),
    KEYS.signature(),
    SORT_COUNT.signature(),
    SORT_SCAN.signature(),
    SORT_PLACE.signature(),
    STARTS.signature(),
    PARTIALS.signature(),
    SUMS.signature(),
];

// As in the kernel file.
const THREADS: u32 = 256;
const SORT_TILE: usize = 1024;
const DIGITS: usize = 256;
const DIGIT_BITS: u32 = DIGITS.ilog2();
const SEGMENT_TILE: usize = 64;
/// What a thread loads at once, where rows allow.
const BYTES_PER_THREAD: usize = 16;

/// A thread for each group of values of `rows` rows.
fn row_geometry(rows: usize, inner: usize, value_bytes: usize) -> Geometry {
    let per_thread = BYTES_PER_THREAD / value_bytes;
    Geometry::for_items(rows * if inner.is_multiple_of(per_thread) { inner / per_thread } else { inner }, THREADS)
}

pub(super) fn gather(gpu: &'static Gpu, layout: &Layout, source: &Tensor) -> Result<Tensor> {
    let (extents, dtype) = (layout.extents(), source.dtype());
    let output = Tensor::empty_on(gpu, &layout.result, dtype)?;
    let arguments = (output.address()?, source.address()?, layout.indices.address()?, extents.argument());
    match layout.reads {
        Reads::Rows => {
            let geometry = row_geometry(extents.outer * extents.result, extents.inner, dtype.size());
            ROWS.launch(gpu, dtype.name(), geometry, arguments)?;
        }
        Reads::Elements => {
            ELEMENTS.launch(gpu, dtype.name(), Geometry::for_items(output.elements(), THREADS), arguments)?;
        }
    }
    Ok(output)
}

impl super::Extents {
    fn argument(self) -> Extents {
        [self.outer, self.source, self.result, self.inner].map(|extent| extent as u64)
    }
}

pub(super) fn scatter(gpu: &'static Gpu, layout: &Layout, values: &Tensor, base: Option<&Tensor>) -> Result<Tensor> {
    let (dtype, readers) = (values.dtype(), Readers::sorted(gpu, layout)?);
    let extents = match layout.reads {
        Reads::Rows => layout.extents(),
        // Every element is a row.
        Reads::Elements => super::Extents { outer: 1, source: readers.rows, result: readers.count, inner: 1 },
    };
    let tiles = extents.result.div_ceil(SEGMENT_TILE);
    let partials =
        gpu.allocate(if tiles > 1 { extents.outer * tiles * 2 * extents.inner * size_of::<f32>() } else { 0 })?;
    if tiles > 1 {
        let arguments = (
            partials.address(),
            values.address()?,
            readers.keys.address(),
            readers.readers.address(),
            readers.starts.address(),
            extents.argument(),
        );
        let geometry = row_geometry(extents.outer * tiles, extents.inner, dtype.size());
        PARTIALS.launch(gpu, dtype.name(), geometry, arguments)?;
    }
    let output = Tensor::empty_on(gpu, &layout.source, dtype)?;
    let arguments = (
        output.address()?,
        base.map_or(Ok(Address::NULL), Tensor::address)?,
        values.address()?,
        partials.address(),
        readers.readers.address(),
        readers.starts.address(),
        extents.argument(),
    );
    let geometry = row_geometry(extents.outer * extents.source, extents.inner, dtype.size());
    SUMS.launch(gpu, dtype.name(), geometry, arguments)?;
    Ok(output)
}

/// The positions that read, sorted by the row that they name; in order where it is the same. All are `u32`.
pub(crate) struct Readers {
    count: usize,
    rows: usize,
    /// The rows' numbers.
    keys: Memory,
    pub readers: Memory,
    /// Where the readers of each row, of `rows` (nothing), and of the end begin among them.
    pub starts: Memory,
}

impl Readers {
    fn sorted(gpu: &'static Gpu, layout: &Layout) -> Result<Self> {
        let extents = layout.extents();
        let (count, rows) = match layout.reads {
            Reads::Rows => (extents.result, extents.source),
            Reads::Elements => (layout.result.elements(), layout.source.elements()),
        };
        Self::expect_sortable(gpu, layout.op, count, rows)?;
        let keys = gpu.allocate(count * size_of::<u32>())?;
        let elements = u32::from(layout.reads == Reads::Elements);
        let indices =
            (keys.address(), layout.indices.address()?, count as u64, extents.argument(), rows as u64, elements);
        KEYS.launch(gpu, "", Geometry::for_items(count, THREADS), indices)?;
        Self::of_keys(gpu, keys, count, rows)
    }

    /// Refuses what 32 bits cannot number.
    ///
    /// # Errors
    /// Where there are too many.
    pub(crate) fn expect_sortable(gpu: &Gpu, op: &'static str, count: usize, rows: usize) -> Result<()> {
        if count.max(rows + 2) > u32::MAX as usize {
            let message = format!("{count} indices of {rows} positions, expected fewer than 2^32 on {}", gpu.device());
            return Err(Error::shape(op, message));
        }
        Ok(())
    }

    /// Sorts `count` keys, each the number of a row or `rows` for none.
    ///
    /// # Errors
    /// Where the device has no room or refuses.
    pub(crate) fn of_keys(gpu: &'static Gpu, mut keys: Memory, count: usize, rows: usize) -> Result<Self> {
        let words = |number: usize| gpu.allocate(number * size_of::<u32>());
        let mut next_keys = words(count)?;
        let (mut readers, mut next_readers) = (words(count)?, words(count)?);
        let tiles = count.div_ceil(SORT_TILE);
        let (counts, totals) = (words(DIGITS * tiles)?, words(DIGITS)?);
        let (by_tile, by_digit) = (Geometry::blocks(tiles, THREADS), Geometry::blocks(DIGITS, THREADS));
        // The largest key is `rows`: an index outside.
        for shift in (0..(rows.max(1)).ilog2() + 1).step_by(DIGIT_BITS as usize) {
            let current = if shift == 0 { Address::NULL } else { readers.address() };
            SORT_COUNT.launch(gpu, "", by_tile, (counts.address(), keys.address(), count as u64, shift))?;
            SORT_SCAN.launch(gpu, "", by_digit, (counts.address(), totals.address(), tiles as u64))?;
            let (to, from) = ((next_keys.address(), next_readers.address()), (keys.address(), current));
            let arguments = (to.0, to.1, from.0, from.1, counts.address(), totals.address(), count as u64, shift);
            SORT_PLACE.launch(gpu, "", by_tile, arguments)?;
            std::mem::swap(&mut keys, &mut next_keys);
            std::mem::swap(&mut readers, &mut next_readers);
        }
        let starts = words(rows + 2)?;
        let arguments = (starts.address(), keys.address(), count as u64, rows as u64);
        STARTS.launch(gpu, "", Geometry::for_items(rows + 2, THREADS), arguments)?;
        Ok(Readers { count, rows, keys, readers, starts })
    }
}
