//! Scores and a linear probe from moments, in `f64` on the host.

use super::{ClassMoments, OP, Squares};
use crate::{Error, Result};

/// The scatter of one block's features: of f features, matrices (f, f) row by row, or their diagonals (f) where only
/// those are kept. `total` = `within` + `between`.
#[derive(Clone, Debug, PartialEq)]
pub struct Scatter {
    /// The mean of all rows.
    pub mean: Vec<f64>,
    /// Of rows about the mean of all, divided by their number.
    pub total: Vec<f64>,
    /// Of rows about the mean of their class, divided by the number of all.
    pub within: Vec<f64>,
    /// Of the classes' means about the mean of all, by their shares of the rows.
    pub between: Vec<f64>,
    full: bool,
}

impl Scatter {
    fn features(&self) -> usize {
        self.mean.len()
    }

    /// The diagonal of one of the matrices.
    fn diagonal(&self, matrix: &[f64]) -> Vec<f64> {
        let step = if self.full { self.features() + 1 } else { 1 };
        matrix.iter().copied().step_by(step).take(self.features()).collect()
    }

    fn trace(&self, matrix: &[f64]) -> f64 {
        self.diagonal(matrix).iter().sum()
    }
}

/// How far classes are apart, compared with how far they spread. With ρ = ε tr(S_w) / f; where tr(S_w) is 0 all are +∞ if
/// classes differ, else 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FisherScores {
    /// tr((S_w + ρ I)⁻¹ S_b). It grows with the number of features: compare blocks of equal width. `None` where only
    /// diagonals are kept.
    pub fisher: Option<f64>,
    /// tr(S_b) / tr(S_w).
    pub ratio: f64,
    /// The mean over features of S_b / (S_w + ρ).
    pub diagonal: f64,
}

/// A linear classifier of standardised features z = (g − mean) / √(variance + 1e-5), fitted by ridge regression to the
/// classes' indicators.
#[derive(Clone, Debug, PartialEq)]
pub struct RidgeProbe {
    /// (classes, features), for z.
    pub weight: Vec<f64>,
    /// (classes), for z.
    pub bias: Vec<f64>,
    /// Of the features.
    pub mean: Vec<f64>,
    /// √(variance + 1e-5) of the features.
    pub deviation: Vec<f64>,
}

impl RidgeProbe {
    /// The score of each class for the features of one row; features beyond those of the probe are ignored.
    pub fn scores(&self, features: &[f64]) -> Vec<f64> {
        let normed = features.iter().zip(self.mean.iter().zip(&self.deviation));
        let z: Vec<f64> = normed.map(|(value, (mean, deviation))| (value - mean) / deviation).collect();
        let rows = self.bias.iter().enumerate();
        rows.map(|(class, bias)| bias + dot(&self.weight[class * self.mean.len()..][..z.len()], &z)).collect()
    }

    /// The class of the largest score; of equal ones the lowest.
    pub fn predict(&self, features: &[f64]) -> usize {
        let scores = self.scores(features);
        (1..scores.len()).fold(0, |best, class| if scores[class] > scores[best] { class } else { best })
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The lower factor L of a symmetric positive definite matrix A = L Lᵀ, (n, n).
struct Cholesky {
    factor: Vec<f64>,
    n: usize,
}

impl Cholesky {
    /// `None` where the matrix is not positive definite.
    fn new(mut matrix: Vec<f64>, n: usize) -> Option<Self> {
        for i in 0..n {
            for j in 0..=i {
                let sum = matrix[i * n + j] - dot(&matrix[i * n..][..j], &matrix[j * n..][..j]);
                if i > j {
                    matrix[i * n + j] = sum / matrix[j * n + j];
                } else if sum > 0.0 {
                    matrix[i * n + i] = sum.sqrt();
                } else {
                    return None;
                }
            }
        }
        Some(Cholesky { factor: matrix, n })
    }

    /// x of A x = b, in place of b.
    fn solve(&self, b: &mut [f64]) {
        let (l, n) = (&self.factor, self.n);
        for i in 0..n {
            b[i] = (b[i] - dot(&l[i * n..][..i], &b[..i])) / l[i * n + i];
        }
        for i in (0..n).rev() {
            let behind: f64 = (i + 1..n).map(|k| l[k * n + i] * b[k]).sum();
            b[i] = (b[i] - behind) / l[i * n + i];
        }
    }
}

impl ClassMoments {
    /// Means and scatter of a block's features; empty classes do not count.
    ///
    /// # Errors
    /// Where there is no such block, or no rows.
    pub fn scatter(&self, block: usize) -> Result<Scatter> {
        let (Some(&own), Some(pivot)) = (self.problem.widths.get(block), &self.pivot) else {
            let message = format!("block {block} of {}, {} rows", self.problem.widths.len(), self.rows());
            return Err(Error::argument(OP, format!("{message}, expected a block with rows")));
        };
        if self.rows() == 0 {
            return Err(Error::argument(OP, "no row has a label that is a class"));
        }
        let (rows, first, full) =
            (self.rows() as f64, self.problem.first(block), self.problem.squares == Squares::Full);
        let shift: Vec<f64> = self.total()[first..][..own].iter().map(|sum| sum / rows).collect();
        let entries = if full { own * own } else { own };
        let place = |entry: usize| if full { (entry / own, entry % own) } else { (entry, entry) };
        let squares = &self.squares[self.problem.first_square(block)..][..entries];
        let total: Vec<f64> = (squares.iter().enumerate())
            .map(|(entry, square)| square / rows - shift[place(entry).0] * shift[place(entry).1])
            .collect();
        let mut between = vec![0.0; entries];
        for (class, &count) in self.counts.iter().enumerate().filter(|(_, count)| **count > 0) {
            let apart = self.apart(class, block, &shift);
            for (entry, sum) in between.iter_mut().enumerate() {
                *sum += count as f64 / rows * apart[place(entry).0] * apart[place(entry).1];
            }
        }
        let within = total.iter().zip(&between).map(|(total, between)| total - between).collect();
        let mean = pivot[first..].iter().zip(&shift).map(|(pivot, shift)| pivot + shift).collect();
        Ok(Scatter { mean, total, within, between, full })
    }

    /// From the mean of all rows to that of a class that has some; `shift` is from the pivot to the former.
    fn apart(&self, class: usize, block: usize, shift: &[f64]) -> Vec<f64> {
        let sums = &self.sums[class * self.problem.features() + self.problem.first(block)..];
        sums.iter().zip(shift).map(|(sum, shift)| sum / self.counts[class] as f64 - shift).collect()
    }

    /// Scores of a block, with ε = `epsilon`, at least 0; 1e-3 is usual.
    ///
    /// # Errors
    /// As [`ClassMoments::scatter`], and where `epsilon` is not such a number, or so small that S_w is singular.
    pub fn fisher_scores(&self, block: usize, epsilon: f64) -> Result<FisherScores> {
        if !(epsilon >= 0.0 && epsilon.is_finite()) {
            return Err(Error::argument(OP, format!("epsilon {epsilon}, expected a number from 0 on")));
        }
        let scatter = self.scatter(block)?;
        let (n, full) = (scatter.features(), scatter.full);
        let (within, between) = (scatter.trace(&scatter.within), scatter.trace(&scatter.between));
        // What rounding leaves of a variance that is 0.
        let nothing = 1e-14 * scatter.trace(&scatter.total);
        if within <= nothing {
            let score = if between > 0.0 { f64::INFINITY } else { 0.0 };
            return Ok(FisherScores { fisher: full.then_some(score), ratio: score, diagonal: score });
        }
        let rho = epsilon * within / n as f64;
        let pairs = scatter.diagonal(&scatter.between).into_iter().zip(scatter.diagonal(&scatter.within));
        // A feature that is constant within all classes and over them says nothing.
        let share =
            |(between, within): (f64, f64)| if between <= 0.0 { 0.0 } else { between / (within.max(0.0) + rho) };
        let diagonal = pairs.map(share).sum::<f64>() / n as f64;
        let fisher = if full { Some(fisher(&scatter, rho)?) } else { None };
        Ok(FisherScores { fisher, ratio: between / within, diagonal })
    }

    /// The probe W, b that minimises Σ |W z + b − indicator of the class|² + n λ |W|² over the rows of `block`, with
    /// λ = `penalty` > 0; 1e-2 is usual.
    ///
    /// # Errors
    /// As [`ClassMoments::scatter`], and where only diagonals are kept or `penalty` is not positive.
    pub fn ridge_probe(&self, block: usize, penalty: f64) -> Result<RidgeProbe> {
        let scatter = self.scatter(block)?;
        if !(scatter.full && penalty > 0.0 && penalty.is_finite()) {
            let message = format!("{:?} squares and penalty {penalty}", self.problem.squares);
            return Err(Error::argument(OP, format!("{message}, expected Full and a positive number")));
        }
        let (n, rows) = (scatter.features(), self.rows() as f64);
        let variances = scatter.diagonal(&scatter.total);
        let deviation: Vec<f64> = variances.iter().map(|variance| (variance.max(0.0) + 1e-5).sqrt()).collect();
        let entry = |i: usize| {
            let ridge = if i / n == i % n { penalty } else { 0.0 };
            scatter.total[i] / (deviation[i / n] * deviation[i % n]) + ridge
        };
        let factor = Cholesky::new((0..n * n).map(entry).collect(), n).ok_or_else(not_definite)?;
        let (first, pivot) = (self.problem.first(block), self.pivot.as_deref().unwrap_or(&[]));
        let shift: Vec<f64> = scatter.mean.iter().zip(&pivot[first..]).map(|(mean, pivot)| mean - pivot).collect();
        let mut weight = Vec::with_capacity(self.counts.len() * n);
        let mut bias = Vec::with_capacity(self.counts.len());
        for (class, &count) in self.counts.iter().enumerate() {
            let share = count as f64 / rows;
            // Σ z (indicator − share) / n: z has mean 0.
            let mut row = vec![0.0; n];
            if count > 0 {
                let apart = self.apart(class, block, &shift);
                row = apart.iter().zip(&deviation).map(|(apart, deviation)| share * apart / deviation).collect();
            }
            factor.solve(&mut row);
            weight.extend(row);
            bias.push(share);
        }
        Ok(RidgeProbe { weight, bias, mean: scatter.mean, deviation })
    }
}

fn not_definite() -> Error {
    Error::argument(OP, "the scatter within classes is singular; expected a larger epsilon or penalty")
}

/// tr((S_w + ρ I)⁻¹ S_b).
fn fisher(scatter: &Scatter, rho: f64) -> Result<f64> {
    let n = scatter.features();
    let mut matrix = scatter.within.clone();
    (0..n).for_each(|i| matrix[i * n + i] += rho);
    let factor = Cholesky::new(matrix, n).ok_or_else(not_definite)?;
    let mut trace = 0.0;
    for column in 0..n {
        // S_b is symmetric: a row is a column.
        let mut solution = scatter.between[column * n..][..n].to_vec();
        factor.solve(&mut solution);
        trace += solution[column];
    }
    Ok(trace)
}
