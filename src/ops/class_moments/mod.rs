//! How well features tell classes apart: moments by class in one pass over the data, and from them scores and a linear
//! probe without any training (Wang et al. 2019, "DBP: Discrimination based block-level pruning for deep model
//! acceleration"). No gradient flows here: the network is frozen.

pub(crate) mod cost;
mod cpu;
pub(crate) mod gpu;
mod scores;

use crate::tensor::{Place, place};
use crate::{DType, Error, Result, Tensor, dispatch_float};

pub use scores::{FisherScores, RidgeProbe, Scatter};

const OP: &str = "class_moments";

/// The most blocks of a call.
const MOST_BLOCKS: usize = 512;

/// Which second moments are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Squares {
    /// Those of each feature: enough for [`FisherScores::diagonal`] and [`FisherScores::ratio`].
    Diagonal,
    /// The matrix of each block.
    Full,
}

/// Moments of a batch about a pivot, on the device of the features.
#[derive(Clone, Debug)]
pub struct BatchMoments {
    /// Rows of each class, (classes), `i64`.
    pub counts: Tensor,
    /// Σ (g − pivot) of each class, (classes, features).
    pub sums: Tensor,
    /// Σ (g − pivot)², (features); or the blocks' matrices Σ (g − pivot) (g − pivot)ᵀ, row by row, one after the other.
    pub squares: Tensor,
}

/// Extents of one call.
#[derive(Clone, Debug, PartialEq)]
struct Problem {
    rows: usize,
    /// Features of each block.
    widths: Vec<usize>,
    classes: usize,
    squares: Squares,
}

impl Problem {
    fn features(&self) -> usize {
        self.widths.iter().sum()
    }

    /// The first feature of a block.
    fn first(&self, block: usize) -> usize {
        self.widths[..block].iter().sum()
    }

    fn squares_len(&self) -> usize {
        match self.squares {
            Squares::Diagonal => self.features(),
            Squares::Full => self.widths.iter().map(|width| width * width).sum(),
        }
    }

    /// Where the squares of a block begin.
    fn first_square(&self, block: usize) -> usize {
        match self.squares {
            Squares::Diagonal => self.first(block),
            Squares::Full => self.widths[..block].iter().map(|width| width * width).sum(),
        }
    }

    fn check(&self) -> Result<()> {
        let most_features = 1 << 24;
        if self.widths.is_empty() || self.widths.len() > MOST_BLOCKS || self.classes == 0 || self.classes > 1 << 18 {
            let message = format!("{} blocks and {} classes", self.widths.len(), self.classes);
            return Err(Error::argument(OP, format!("{message}, expected 1 to {MOST_BLOCKS} and 1 to 262144")));
        }
        if self.widths.iter().any(|&width| width > most_features) || self.features() > most_features {
            return Err(Error::shape(OP, "more than 2^24 features"));
        }
        Ok(())
    }
}

/// Moments of a batch of `features` (rows, features), `f32` (`f64` on the processor as well), by their `labels` (rows),
/// `i64`. The features of block l are the next `widths[l]` of each row, as
/// [`pooled_features`](super::pooled_features) lays them out. A row whose label is not a class, below 0 say, does not
/// count. `pivot` (features) is taken from each row: without it, or far from the mean, variances computed in `f32` would
/// be differences of large numbers. [`ClassMoments`] chooses it and adds up batches. Not differentiable.
///
/// # Errors
/// Where shapes, dtypes or devices do not fit, or there are no blocks, more than 512, or no classes.
pub fn class_moments(
    features: &Tensor,
    labels: &Tensor,
    pivot: &Tensor,
    widths: &[usize],
    classes: usize,
    squares: Squares,
) -> Result<BatchMoments> {
    let [rows, width] = features.dims(OP, "features (rows, features)")?;
    let problem = Problem { rows, widths: widths.to_vec(), classes, squares };
    problem.check()?;
    labels.expect_dtype(OP, DType::I64)?;
    if !matches!(features.dtype(), DType::F32 | DType::F64) {
        return Err(Error::DType { op: OP, got: features.dtype(), expected: "f32 or f64".into() });
    }
    pivot.expect_dtype(OP, features.dtype())?;
    let fits = problem.features() == width && **labels.shape() == [rows] && **pivot.shape() == [width];
    if !fits || u32::try_from(rows).is_err() {
        let got = format!("features {}, labels {}, pivot {}", features.shape(), labels.shape(), pivot.shape());
        let expected = format!("expected (rows, {0}), (rows) and ({0})", problem.features());
        return Err(Error::shape(OP, format!("{got}, {expected}")));
    }
    match place(OP, &[features, labels, pivot])? {
        Place::Gpu(gpu) => gpu::moments(gpu, &problem, features, labels, pivot),
        Place::Host => dispatch_float!(OP, features.dtype(), T => {
            let (values, origin) = (features.floats::<T>(OP)?, pivot.floats::<T>(OP)?);
            let (counts, sums, squares) = cpu::moments(&problem, &values, labels.data()?, &origin);
            let squares_len = squares.len();
            Ok(BatchMoments {
                counts: Tensor::from_buffer(counts, [classes])?,
                sums: Tensor::from_buffer(sums, [classes, width])?,
                squares: Tensor::from_buffer(squares, [squares_len])?,
            })
        }),
    }
}

/// Moments of a whole set of features by class, added up in `f64` on the host, batch by batch; see [`class_moments`] for
/// features, blocks and labels. Any split of the data into batches gives the same moments, up to rounding.
///
/// ```
/// use gridgrad::Tensor;
/// use gridgrad::ops::class_moments::{ClassMoments, Squares};
/// // Two classes with one feature: 0 and 2, 10 and 12.
/// let mut moments = ClassMoments::new(&[1], 2, Squares::Full)?;
/// moments.add(&Tensor::new(&[0.0f32, 2.0, 10.0, 12.0], [4, 1])?, &Tensor::new(&[0i64, 0, 1, 1], [4])?)?;
/// let scatter = moments.scatter(0)?;
/// assert_eq!((scatter.mean[0], scatter.within[0], scatter.between[0]), (6.0, 1.0, 25.0));
/// assert_eq!(moments.fisher_scores(0, 1e-3)?.ratio, 25.0);
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ClassMoments {
    problem: Problem,
    counts: Vec<u64>,
    /// (classes, features), about the pivot.
    sums: Vec<f64>,
    squares: Vec<f64>,
    /// Of the first batch that has rows.
    pivot: Option<Vec<f64>>,
}

impl ClassMoments {
    /// Of no data yet.
    ///
    /// # Errors
    /// Where there are no blocks, more than 512, or no classes.
    pub fn new(widths: &[usize], classes: usize, squares: Squares) -> Result<Self> {
        let problem = Problem { rows: 0, widths: widths.to_vec(), classes, squares };
        problem.check()?;
        Ok(ClassMoments {
            counts: vec![0; classes],
            sums: vec![0.0; classes * problem.features()],
            squares: vec![0.0; problem.squares_len()],
            pivot: None,
            problem,
        })
    }

    /// Adds a batch. Its moments are computed where it is and copied to the host, which waits for that.
    ///
    /// # Errors
    /// As [`class_moments`], and where a block has features that are not numbers: then nothing is added.
    pub fn add(&mut self, features: &Tensor, labels: &Tensor) -> Result<()> {
        let [rows, width] = features.dims(OP, "features (rows, features)")?;
        if rows == 0 && width == self.problem.features() {
            return Ok(());
        }
        let pivot = match &self.pivot {
            Some(pivot) => pivot.clone(),
            // The moments do not depend on it; `f32` values stay exact.
            None => features.detach().mean(&[0], false)?.to_f64_vec()?,
        };
        let on_device = Tensor::new(&pivot, [pivot.len()])?.cast(features.dtype())?.to_device(features.device())?;
        let Problem { widths, classes, squares, .. } = &self.problem;
        let batch = class_moments(features, labels, &on_device, widths, *classes, *squares)?;
        let (sums, squares) = (batch.sums.to_f64_vec()?, batch.squares.to_f64_vec()?);
        self.expect_finite(&sums, &squares)?;
        let counts = batch.counts.to_vec::<i64>()?;
        self.counts.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count.unsigned_abs());
        self.sums.iter_mut().zip(sums).for_each(|(sum, value)| *sum += value);
        self.squares.iter_mut().zip(squares).for_each(|(sum, value)| *sum += value);
        self.pivot = Some(pivot);
        Ok(())
    }

    /// Names the first block whose features were not numbers.
    fn expect_finite(&self, sums: &[f64], squares: &[f64]) -> Result<()> {
        let (problem, width) = (&self.problem, self.problem.features());
        for (block, &own) in problem.widths.iter().enumerate() {
            let first = problem.first(block);
            let finite = |row: &[f64]| row[first..][..own].iter().all(|value| value.is_finite());
            let end = problem.first_square(block + 1);
            let squares = &squares[problem.first_square(block)..end];
            if !sums.chunks_exact(width.max(1)).all(finite) || !squares.iter().all(|value| value.is_finite()) {
                return Err(Error::argument(OP, format!("block {block} has features that are not finite")));
            }
        }
        Ok(())
    }

    /// Adds the moments of other data, about whatever pivot.
    ///
    /// # Errors
    /// Where blocks, classes or kind of squares differ.
    pub fn merge(&mut self, other: &ClassMoments) -> Result<()> {
        if self.problem != other.problem {
            let message = format!("moments of {:?} with those of {:?}", other.problem, self.problem);
            return Err(Error::shape(OP, message));
        }
        let Some(from) = &other.pivot else { return Ok(()) };
        let mut moved = other.clone();
        if let Some(to) = &self.pivot {
            let shift: Vec<f64> = to.iter().zip(from).map(|(to, from)| to - from).collect();
            moved.move_pivot(&shift);
        } else {
            self.pivot = Some(from.clone());
        }
        self.counts.iter_mut().zip(&moved.counts).for_each(|(sum, count)| *sum += count);
        self.sums.iter_mut().zip(&moved.sums).for_each(|(sum, value)| *sum += value);
        self.squares.iter_mut().zip(&moved.squares).for_each(|(sum, value)| *sum += value);
        Ok(())
    }

    /// With δ the shift, n the rows and S the sum over classes: squares − δ Sᵀ − S δᵀ + n δ δᵀ, and of each class its
    /// sum − count δ.
    fn move_pivot(&mut self, shift: &[f64]) {
        let total = self.total();
        let rows = self.rows() as f64;
        for (block, &own) in self.problem.widths.iter().enumerate() {
            let (first, square) = (self.problem.first(block), self.problem.first_square(block));
            let moved = |f: usize, h: usize| {
                let [f, h] = [first + f, first + h];
                rows * shift[f] * shift[h] - shift[f] * total[h] - total[f] * shift[h]
            };
            match self.problem.squares {
                Squares::Diagonal => (0..own).for_each(|f| self.squares[square + f] += moved(f, f)),
                Squares::Full => (0..own * own).for_each(|i| self.squares[square + i] += moved(i / own, i % own)),
            }
        }
        for (sums, &count) in self.sums.chunks_exact_mut(shift.len().max(1)).zip(&self.counts) {
            sums.iter_mut().zip(shift).for_each(|(sum, shift)| *sum -= count as f64 * shift);
        }
    }

    /// Σ over classes of the sums.
    fn total(&self) -> Vec<f64> {
        let width = self.problem.features();
        let mut total = vec![0.0; width];
        for sums in self.sums.chunks_exact(width.max(1)) {
            total.iter_mut().zip(sums).for_each(|(total, sum)| *total += sum);
        }
        total
    }

    /// Rows of each class.
    pub fn counts(&self) -> &[u64] {
        &self.counts
    }

    /// Rows of all classes.
    pub fn rows(&self) -> u64 {
        self.counts.iter().sum()
    }
}
