//! What the classifiers answered: one class each, or a score for every class.

use std::cmp::Ordering;

use rayon::prelude::*;

use crate::{Error, Result};

/// Most classes of a table.
const MAX_CLASSES: usize = u16::MAX as usize;
/// Samples that are written together where columns become rows: a cache line of votes.
const BLOCK: usize = 32;

/// The class that each classifier answers for each sample: (samples, classifiers). The number of classes itself stands
/// for an abstention, which counts for nobody.
///
/// ```
/// use gridgrad::methods::finite_aggregation::Votes;
/// let votes = Votes::new(1, 3, 2, vec![0, 1, 2])?; // one sample; the third classifier abstains
/// assert_eq!(votes.counts(0), [1, 1]);
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Votes {
    samples: usize,
    classifiers: usize,
    classes: usize,
    values: Vec<u16>,
}

impl Votes {
    /// A table from its rows, one for each sample.
    ///
    /// # Errors
    /// `Argument` where there is no class or no classifier, there are more than 65,535 classes, or a vote is above the
    /// number of classes; `Shape` where `values` has another length than `samples·classifiers`.
    pub fn new(samples: usize, classifiers: usize, classes: usize, values: Vec<u16>) -> Result<Self> {
        check_shape("votes", &[samples, classifiers], classes, values.len())?;
        if let Some(at) = values.par_iter().position_first(|&vote| usize::from(vote) > classes) {
            let message = format!(
                "sample {}, classifier {}: got vote {}, expected 0 to {} or {classes} for an abstention",
                at / classifiers,
                at % classifiers,
                values[at],
                classes - 1
            );
            return Err(Error::argument("votes", message));
        }
        Ok(Votes { samples, classifiers, classes, values })
    }

    /// A table from its columns: `columns[i]` has the votes of classifier `i`, one for each sample.
    ///
    /// # Errors
    /// As [`new`](Votes::new), and `Shape` where columns differ in length.
    pub fn from_columns(classes: usize, columns: &[Vec<u16>]) -> Result<Self> {
        let samples = columns.first().map_or(0, Vec::len);
        let values = rows_of("votes", samples, 1, columns)?;
        Votes::new(samples, columns.len(), classes, values)
    }

    /// Each classifier votes for the class with its largest score: the first such class, see [`Scores`].
    ///
    /// # Errors
    /// None that scores can cause, as they were checked when they were built.
    pub fn from_scores(scores: &Scores) -> Result<Self> {
        let Scores { samples, classifiers, classes, .. } = *scores;
        let mut values = vec![0; samples * classifiers];
        let rows = values.par_chunks_mut(classifiers).enumerate();
        rows.for_each(|(sample, row)| row.copy_from_slice(&scores.tops(sample)));
        Votes::new(samples, classifiers, classes, values)
    }

    /// Number of samples.
    pub fn samples(&self) -> usize {
        self.samples
    }

    /// Number of classifiers.
    pub fn classifiers(&self) -> usize {
        self.classifiers
    }

    /// Number of classes; as a vote, an abstention.
    pub fn classes(&self) -> usize {
        self.classes
    }

    /// All votes, row by row.
    pub fn values(&self) -> &[u16] {
        &self.values
    }

    /// The votes on `sample`, one for each classifier.
    ///
    /// # Panics
    /// Where `sample` is not below [`samples`](Votes::samples), as indexing does.
    pub fn of_sample(&self, sample: usize) -> &[u16] {
        &self.values[sample * self.classifiers..(sample + 1) * self.classifiers]
    }

    /// How many classifiers vote for each class.
    ///
    /// # Panics
    /// As [`of_sample`](Votes::of_sample).
    pub fn counts(&self, sample: usize) -> Vec<usize> {
        let mut counts = vec![0; self.classes + 1];
        for &vote in self.of_sample(sample) {
            counts[usize::from(vote)] += 1;
        }
        counts.truncate(self.classes);
        counts
    }
}

/// The numbers of a score table. Integers keep all of their digits.
#[derive(Clone, Debug, PartialEq)]
pub enum ScoreValues {
    /// As networks compute them.
    F32(Vec<f32>),
    /// Double precision.
    F64(Vec<f64>),
    /// Integers.
    I64(Vec<i64>),
}

impl ScoreValues {
    fn len(&self) -> usize {
        match self {
            ScoreValues::F32(values) => values.len(),
            ScoreValues::F64(values) => values.len(),
            ScoreValues::I64(values) => values.len(),
        }
    }
}

/// The score of every class by every classifier for every sample: (samples, classifiers, classes), larger is better.
///
/// Of equal scores the smaller class comes first. A score that is not a number is below all numbers, so a classifier
/// whose scores are all NaN votes for class 0.
#[derive(Clone, Debug, PartialEq)]
pub struct Scores {
    samples: usize,
    classifiers: usize,
    classes: usize,
    values: ScoreValues,
}

impl Scores {
    /// A table from its rows.
    ///
    /// # Errors
    /// `Argument` where there is no class or no classifier, or there are more than 65,535 classes; `Shape` where
    /// `values` has another length than `samples·classifiers·classes`.
    pub fn new(samples: usize, classifiers: usize, classes: usize, values: ScoreValues) -> Result<Self> {
        check_shape("scores", &[samples, classifiers, classes], classes, values.len())?;
        Ok(Scores { samples, classifiers, classes, values })
    }

    /// A table from its columns: `columns[i]` has the scores of classifier `i`, (samples, classes).
    ///
    /// # Errors
    /// As [`new`](Scores::new), and `Shape` where columns differ in length, or hold no whole number of rows.
    pub fn from_columns(classes: usize, columns: &[Vec<f32>]) -> Result<Self> {
        let len = columns.first().map_or(0, Vec::len);
        if classes == 0 || !len.is_multiple_of(classes) {
            return Err(Error::shape("scores", format!("got columns of {len} scores for {classes} classes")));
        }
        let values = rows_of("scores", len / classes, classes, columns)?;
        Scores::new(len / classes, columns.len(), classes, ScoreValues::F32(values))
    }

    /// Number of samples.
    pub fn samples(&self) -> usize {
        self.samples
    }

    /// Number of classifiers.
    pub fn classifiers(&self) -> usize {
        self.classifiers
    }

    /// Number of classes.
    pub fn classes(&self) -> usize {
        self.classes
    }

    /// All scores, row by row.
    pub fn values(&self) -> &ScoreValues {
        &self.values
    }

    /// The best class of every classifier for `sample`.
    ///
    /// # Panics
    /// Where `sample` is not below [`samples`](Scores::samples), as indexing does.
    pub fn tops(&self, sample: usize) -> Vec<u16> {
        let range = self.range(sample);
        match &self.values {
            ScoreValues::F32(values) => tops(&values[range], self.classes, total_f32).collect(),
            ScoreValues::F64(values) => tops(&values[range], self.classes, total_f64).collect(),
            ScoreValues::I64(values) => tops(&values[range], self.classes, Ord::cmp).collect(),
        }
    }

    /// For every classifier, whether it ranks class `a` before class `b` for `sample`.
    ///
    /// # Panics
    /// Where `sample`, `a` or `b` is out of range, as indexing does.
    pub fn prefers(&self, sample: usize, a: usize, b: usize) -> Vec<bool> {
        let range = self.range(sample);
        match &self.values {
            ScoreValues::F32(values) => prefers(&values[range], self.classes, a, b, total_f32),
            ScoreValues::F64(values) => prefers(&values[range], self.classes, a, b, total_f64),
            ScoreValues::I64(values) => prefers(&values[range], self.classes, a, b, Ord::cmp),
        }
    }

    /// The sums of the scores of several versions of the same classifiers, trained with different seeds: boosted DPA
    /// (DPA*, Rezaei et al. 2023), whose sums count as one classifier's scores. Versions are added in order.
    ///
    /// # Errors
    /// `Argument` where there is no version, or a sum of integers is beyond 64 bits; `Shape` where versions differ in
    /// extents or kind of numbers.
    pub fn boosted(versions: &[Scores]) -> Result<Self> {
        let Some((first, more)) = versions.split_first() else {
            return Err(Error::argument("boosted", "got no versions of the scores, expected at least one"));
        };
        let mut sum = first.clone();
        for version in more {
            sum.add(version)?;
        }
        Ok(sum)
    }

    /// Adds another version.
    ///
    /// # Errors
    /// As [`boosted`](Scores::boosted).
    pub(super) fn add(&mut self, other: &Scores) -> Result<()> {
        let extents = |scores: &Scores| [scores.samples, scores.classifiers, scores.classes];
        let (own, theirs) = (extents(self), extents(other));
        let differ = || Error::shape("boosted", format!("got scores {theirs:?} after {own:?}, or of another type"));
        if own != theirs {
            return Err(differ());
        }
        match (&mut self.values, &other.values) {
            (ScoreValues::F32(sum), ScoreValues::F32(more)) => sum.iter_mut().zip(more).for_each(|(s, m)| *s += m),
            (ScoreValues::F64(sum), ScoreValues::F64(more)) => sum.iter_mut().zip(more).for_each(|(s, m)| *s += m),
            (ScoreValues::I64(sum), ScoreValues::I64(more)) => {
                for (sum, &more) in sum.iter_mut().zip(more) {
                    *sum = sum.checked_add(more).ok_or_else(|| {
                        Error::argument("boosted", format!("the sum of scores {sum} and {more} is beyond 64 bits"))
                    })?;
                }
            }
            _ => return Err(differ()),
        }
        Ok(())
    }

    fn range(&self, sample: usize) -> std::ops::Range<usize> {
        let row = self.classifiers * self.classes;
        sample * row..(sample + 1) * row
    }
}

/// Numbers by size, with -0 equal to 0 and NaN below all.
fn total_f32(a: &f32, b: &f32) -> Ordering {
    a.partial_cmp(b).unwrap_or_else(|| b.is_nan().cmp(&a.is_nan()))
}

/// As [`total_f32`].
fn total_f64(a: &f64, b: &f64) -> Ordering {
    a.partial_cmp(b).unwrap_or_else(|| b.is_nan().cmp(&a.is_nan()))
}

/// The first class with the largest score, for each run of `classes` scores.
fn tops<T>(values: &[T], classes: usize, order: impl Fn(&T, &T) -> Ordering) -> impl Iterator<Item = u16> {
    values.chunks_exact(classes).map(move |scores| {
        let better = |best: usize, class: usize| match order(&scores[class], &scores[best]) {
            Ordering::Greater => class,
            _ => best,
        };
        (0..classes).fold(0, better) as u16
    })
}

/// Whether class `a` comes before class `b`, for each run of `classes` scores.
fn prefers<T>(values: &[T], classes: usize, a: usize, b: usize, order: impl Fn(&T, &T) -> Ordering) -> Vec<bool> {
    let before = |scores: &[T]| order(&scores[b], &scores[a]).then(a.cmp(&b)).is_lt();
    values.chunks_exact(classes).map(before).collect()
}

/// Checks that a table with `extents` has a class and a classifier, and `len` numbers.
fn check_shape(op: &'static str, extents: &[usize], classes: usize, len: usize) -> Result<()> {
    if classes == 0 || classes > MAX_CLASSES || extents[1] == 0 {
        let message =
            format!("got {} classifiers and {classes} classes, expected at least 1 and 1 to {MAX_CLASSES}", extents[1]);
        return Err(Error::argument(op, message));
    }
    let expected = extents.iter().try_fold(1usize, |size, &extent| size.checked_mul(extent));
    if expected != Some(len) {
        return Err(Error::shape(op, format!("got {len} numbers for a table of {extents:?}")));
    }
    Ok(())
}

/// Columns of `samples` runs of `width` numbers as rows: for each sample the runs of all columns.
fn rows_of<T: Copy + Default + Send + Sync>(
    op: &'static str,
    samples: usize,
    width: usize,
    columns: &[Vec<T>],
) -> Result<Vec<T>> {
    if let Some(index) = columns.iter().position(|column| column.len() != samples * width) {
        let message = format!(
            "column {index} has {} numbers, expected {} as the first one",
            columns[index].len(),
            samples * width
        );
        return Err(Error::shape(op, message));
    }
    let row = columns.len() * width;
    let mut rows = vec![T::default(); samples * row];
    rows.par_chunks_mut((BLOCK * row).max(1)).enumerate().for_each(|(block, rows)| {
        for (index, column) in columns.iter().enumerate() {
            let part = column[block * BLOCK * width..].chunks_exact(width);
            for (row, numbers) in rows.chunks_exact_mut(row).zip(part) {
                row[index * width..(index + 1) * width].copy_from_slice(numbers);
            }
        }
    });
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_become_rows() {
        let columns: Vec<Vec<u16>> = (0..7).map(|i| (0..100).map(|s| (s * 3 + i) % 5).collect()).collect();
        let votes = Votes::from_columns(5, &columns).unwrap();
        for sample in 0..100 {
            let row: Vec<u16> = columns.iter().map(|column| column[sample]).collect();
            assert_eq!(votes.of_sample(sample), row);
        }
        let columns = [vec![1.0f32, 2.0, 3.0, 4.0], vec![5.0, 6.0, 7.0, 8.0]];
        let scores = Scores::from_columns(2, &columns).unwrap();
        assert_eq!(scores.values(), &ScoreValues::F32(vec![1.0, 2.0, 5.0, 6.0, 3.0, 4.0, 7.0, 8.0]));
        assert!(Scores::from_columns(3, &columns).is_err() && Scores::from_columns(0, &columns).is_err());
        assert!(Votes::from_columns(5, &[vec![1], vec![1, 2]]).unwrap_err().to_string().contains("column 1"));
        assert!(Votes::from_columns(5, &[]).is_err());
    }

    #[test]
    fn ties_go_to_the_first_class_and_nan_comes_last() {
        let nan = f32::NAN;
        let rows = [[1.0, 3.0, 3.0], [nan, 0.0, -0.0], [nan, nan, nan], [nan, f32::NEG_INFINITY, nan]];
        let scores = Scores::new(1, 4, 3, ScoreValues::F32(rows.as_flattened().to_vec())).unwrap();
        assert_eq!(Votes::from_scores(&scores).unwrap().values(), [1, 1, 0, 1]);
        assert_eq!(scores.prefers(0, 0, 2), [false, false, true, true]);
        assert_eq!(scores.prefers(0, 2, 1), [false; 4]);
        assert_eq!(scores.prefers(0, 1, 2), [true; 4]);
        let large = ScoreValues::I64(vec![i64::MAX - 1, i64::MAX]);
        assert_eq!(Votes::from_scores(&Scores::new(1, 1, 2, large).unwrap()).unwrap().values(), [1]);
    }

    #[test]
    fn versions_are_added() {
        let scores = |values: &[i64]| Scores::new(1, 1, values.len(), ScoreValues::I64(values.to_vec())).unwrap();
        let sum = Scores::boosted(&[scores(&[1, 2]), scores(&[3, -5]), scores(&[0, 1])]).unwrap();
        assert_eq!(sum, scores(&[4, -2]));
        let message = |versions: &[Scores]| Scores::boosted(versions).unwrap_err().to_string();
        assert!(message(&[]).contains("no versions"));
        assert!(message(&[scores(&[1, 2]), scores(&[1])]).contains("[1, 1, 1] after [1, 1, 2]"));
        assert!(message(&[scores(&[i64::MAX]), scores(&[1])]).contains("64 bits"));
        let floats = Scores::new(1, 1, 1, ScoreValues::F32(vec![1.0])).unwrap();
        assert!(message(&[scores(&[1]), floats]).contains("another type"));
    }

    #[test]
    fn tables_that_do_not_fit_are_refused() {
        let message = |result: Result<Votes>| result.unwrap_err().to_string();
        assert!(message(Votes::new(2, 3, 2, vec![0; 5])).contains("5 numbers for a table of [2, 3]"));
        assert!(message(Votes::new(usize::MAX, 3, 2, vec![0; 5])).contains("5 numbers"));
        assert!(message(Votes::new(1, 0, 2, vec![])).contains("0 classifiers"));
        assert!(message(Votes::new(1, 1, 0, vec![0])).contains("0 classes"));
        let text = message(Votes::new(2, 2, 2, vec![0, 2, 1, 3]));
        assert!(text.contains("sample 1, classifier 1") && text.contains("vote 3"), "{text}");
        assert!(Scores::new(1, 2, 3, ScoreValues::F64(vec![0.0; 5])).is_err());
    }
}
