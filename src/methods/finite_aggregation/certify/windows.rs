//! Sums over the classifiers that each bucket feeds.

use std::ops::AddAssign;

use super::super::Spread;

/// Largest weight of one classifier.
const MAX_WEIGHT: usize = 3;
/// Buckets whose sums stay in the fastest cache while one offset after the other is added.
const BLOCK: usize = 8192;
/// Histograms that are filled in turn, as increments of one and the same count wait for each other.
const LANES: usize = 4;

/// For one weight per classifier, 0 to 3, the sum over the `d` classifiers of each of the `n` buckets. Holds its memory
/// from one call to the next.
pub(super) struct Windows<'a> {
    spread: &'a Spread,
    /// Twice one behind the other, so that a window never wraps around.
    weights: Vec<u8>,
    narrow: Vec<u8>,
    wide: Vec<u32>,
    histogram: Vec<usize>,
}

impl<'a> Windows<'a> {
    pub fn new(spread: &'a Spread) -> Self {
        Windows { spread, weights: Vec::new(), narrow: Vec::new(), wide: Vec::new(), histogram: Vec::new() }
    }

    pub fn spread(&self) -> &'a Spread {
        self.spread
    }

    /// The fewest buckets whose sums add up to `target` or more, the largest taken first; `None` where all of them
    /// together don't.
    pub fn fewest(&mut self, target: usize, weights: impl Iterator<Item = u8>) -> Option<usize> {
        if target == 0 {
            return Some(0);
        }
        self.add(weights);
        self.count();
        let (mut missing, mut buckets) = (target, 0);
        for (sum, &count) in self.histogram.iter().enumerate().skip(1).rev() {
            let take = count.min(missing.div_ceil(sum));
            buckets += take;
            missing = missing.saturating_sub(take * sum);
            if missing == 0 {
                return Some(buckets);
            }
        }
        None
    }

    /// Calls `found` with every bucket whose sum is `target` or more.
    pub fn reaching(&mut self, target: usize, weights: impl Iterator<Item = u8>, mut found: impl FnMut(usize)) {
        self.add(weights);
        let reached = |sum: usize| sum >= target;
        if self.is_narrow() {
            (0..self.narrow.len()).filter(|&bucket| reached(self.narrow[bucket].into())).for_each(&mut found);
        } else {
            (0..self.wide.len()).filter(|&bucket| reached(self.wide[bucket] as usize)).for_each(&mut found);
        }
    }

    fn is_narrow(&self) -> bool {
        self.spread.d() <= usize::from(u8::MAX) / MAX_WEIGHT
    }

    fn add(&mut self, weights: impl Iterator<Item = u8>) {
        self.weights.clear();
        self.weights.extend(weights);
        self.weights.extend_from_within(..);
        if self.is_narrow() {
            add_windows(&self.weights, self.spread, &mut self.narrow);
        } else {
            add_windows(&self.weights, self.spread, &mut self.wide);
        }
    }

    fn count(&mut self) {
        let values = MAX_WEIGHT * self.spread.d() + 1;
        self.histogram.clear();
        self.histogram.resize(LANES * values, 0);
        if self.is_narrow() {
            count_values(&self.narrow, values, &mut self.histogram);
        } else {
            count_values(&self.wide, values, &mut self.histogram);
        }
        let (total, rest) = self.histogram.split_at_mut(values);
        for lane in rest.chunks_exact(values) {
            total.iter_mut().zip(lane).for_each(|(total, count)| *total += count);
        }
        self.histogram.truncate(values);
    }
}

fn add_windows<T: Copy + Default + AddAssign + From<u8>>(weights: &[u8], spread: &Spread, sums: &mut Vec<T>) {
    sums.clear();
    sums.resize(spread.n(), T::default());
    for (block, sums) in sums.chunks_mut(BLOCK).enumerate() {
        for offset in spread.offsets() {
            let start = block * BLOCK + offset;
            let fed = &weights[start..start + sums.len()];
            sums.iter_mut().zip(fed).for_each(|(sum, &weight)| *sum += T::from(weight));
        }
    }
}

fn count_values<T: Copy>(sums: &[T], values: usize, histogram: &mut [usize])
where
    u32: From<T>,
{
    let (fours, rest) = sums.as_chunks::<LANES>();
    for four in fours {
        for (lane, &sum) in four.iter().enumerate() {
            histogram[lane * values + u32::from(sum) as usize] += 1;
        }
    }
    rest.iter().for_each(|&sum| histogram[u32::from(sum) as usize] += 1);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_follow_the_spread_in_both_widths() {
        for (k, d) in [(1, 1), (7, 1), (3, 4), (5, 85), (5, 86), (120, 90)] {
            let spread = Spread::new(k, d).unwrap();
            let weights: Vec<u8> = (0..spread.n()).map(|i| (i * i % 7 % 4) as u8).collect();
            let sum = |bucket| spread.classifiers_of(bucket).map(|i| usize::from(weights[i])).sum::<usize>();
            let mut sums: Vec<usize> = (0..spread.n()).map(sum).collect();
            let mut windows = Windows::new(&spread);
            for target in [0, 1, 5, 3 * d, 10 * d, sums.iter().sum(), sums.iter().sum::<usize>() + 1] {
                let mut reaching = Vec::new();
                windows.reaching(target, weights.iter().copied(), |bucket| reaching.push(bucket));
                let expected: Vec<usize> = (0..spread.n()).filter(|&bucket| sum(bucket) >= target).collect();
                assert_eq!(reaching, expected, "{k} {d} {target}");
            }
            sums.sort_unstable_by(|a, b| b.cmp(a));
            for target in 0..sums.iter().sum::<usize>() + 2 {
                let mut total = 0;
                let expected = (0..=sums.len()).find(|&m| {
                    total = sums[..m].iter().sum();
                    total >= target
                });
                assert_eq!(windows.fewest(target, weights.iter().copied()), expected, "{k} {d} {target}");
                if target > 40 {
                    break;
                }
            }
        }
    }
}
