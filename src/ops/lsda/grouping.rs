//! Which tokens attend to each other.

use crate::{Error, Result};

/// How the tokens of a map are cut into groups (CrossFormer, section 3.2).
///
/// A token (y, x) of the map has the position (y + origin) in the grid of groups. Rows `group[0]` apart in steps of
/// `interval[0]` belong together, and columns likewise:
///
/// | mode | group | interval |
/// |---|---|---|
/// | short distance (SDA) | G, G | 1, 1 |
/// | long distance (LDA) | G, G | I, I |
/// | one group over the map | H, W | 1, 1 |
/// | LDA with fixed interval (legacy dense code) | ⌈H / I⌉, ⌈W / I⌉ | I, I |
///
/// Groups at the edge of the map simply have fewer tokens; this equals padding the map and masking the padding.
///
/// ```
/// use gridgrad::ops::lsda::Grouping;
/// // A map of 8 × 8 tokens: four squares of neighbours, or four groups of tokens two apart.
/// assert_eq!(Grouping::short(4).group_of_token(8, 8)[..8], [0, 0, 0, 0, 1, 1, 1, 1]);
/// assert_eq!(Grouping::long(4, 2).group_of_token(8, 8)[..8], [0, 1, 0, 1, 0, 1, 0, 1]);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grouping {
    /// Tokens of a full group along y and x.
    pub group: [usize; 2],
    /// Distance between neighbours of a group along y and x.
    pub interval: [usize; 2],
    /// Rows and columns of padding before the map.
    pub origin: [usize; 2],
}

impl Grouping {
    /// Adjacent tokens: squares of `group` × `group`.
    pub fn short(group: usize) -> Self {
        Self::long(group, 1)
    }

    /// Tokens `interval` apart, `group` × `group` of them.
    pub fn long(group: usize, interval: usize) -> Self {
        Grouping { group: [group; 2], interval: [interval; 2], origin: [0; 2] }
    }

    /// Rows of the position bias table: (2 G_h − 1)(2 G_w − 1).
    pub fn table_rows(&self) -> usize {
        (2 * self.group[0] - 1) * (2 * self.group[1] - 1)
    }

    /// The groups of a map of `height` × `width` tokens, in the order (region y, region x, phase y, phase x).
    pub fn groups(&self, height: usize, width: usize) -> Vec<Group> {
        let [rows, columns] = [self.lines(0, height), self.lines(1, width)];
        let mut groups = Vec::with_capacity(rows.len() * columns.len());
        for row_region in rows.chunks(self.interval[0]) {
            for column_region in columns.chunks(self.interval[1]) {
                for &rows in row_region {
                    groups.extend(column_region.iter().map(|&columns| Group { rows, columns }));
                }
            }
        }
        groups.retain(|group| group.len() > 0);
        groups
    }

    /// For each token of a map of `height` × `width`, row-major, the number of its group in [`Grouping::groups`].
    pub fn group_of_token(&self, height: usize, width: usize) -> Vec<usize> {
        let mut numbers = vec![0; height * width];
        for (number, group) in self.groups(height, width).iter().enumerate() {
            group.tokens(width).for_each(|token| numbers[token] = number);
        }
        numbers
    }

    /// The lines of one axis: for each region and phase, which positions of the map belong together.
    fn lines(&self, axis: usize, extent: usize) -> Vec<Line> {
        let (group, interval, origin) = (self.group[axis], self.interval[axis], self.origin[axis]);
        let period = group * interval;
        let regions = (extent + origin).div_ceil(period);
        let line = |region: usize, phase: usize| {
            let base = region * period + phase;
            // Steps that would fall before the map, then those inside of it.
            let skipped = origin.saturating_sub(base).div_ceil(interval).min(group);
            let first = base + skipped * interval - origin.min(base + skipped * interval);
            let inside = extent.saturating_sub(first).div_ceil(interval).min(group - skipped);
            Line { first, step: interval, count: inside }
        };
        (0..regions).flat_map(|region| (0..interval).map(move |phase| line(region, phase))).collect()
    }

    pub(super) fn check(&self, op: &'static str) -> Result<()> {
        let zero = self.group.contains(&0) || self.interval.contains(&0);
        let large =
            [0, 1].iter().any(|&axis| self.group[axis].checked_mul(self.interval[axis]).is_none_or(|p| p > 1 << 30));
        if zero || large || self.origin.iter().zip(self.group).zip(self.interval).any(|((&o, g), i)| o >= g * i) {
            let expected = "group and interval at least 1, their product below 2³⁰, origin below it";
            return Err(Error::argument(op, format!("{self:?}; expected {expected}")));
        }
        Ok(())
    }
}

/// Positions `first`, `first + step`, …, `count` of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Line {
    /// First position.
    pub first: usize,
    /// Distance to the next.
    pub step: usize,
    /// Number of positions.
    pub count: usize,
}

/// Tokens that attend to each other: every row of one line by every column of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    /// Rows of the map.
    pub rows: Line,
    /// Columns of the map.
    pub columns: Line,
}

impl Group {
    /// Number of tokens.
    #[allow(clippy::len_without_is_empty, reason = "groups are never empty")]
    pub fn len(&self) -> usize {
        self.rows.count * self.columns.count
    }

    /// Token numbers y · width + x, in the order of local positions, row-major.
    pub fn tokens(&self, width: usize) -> impl Iterator<Item = usize> + use<> {
        let Group { rows, columns } = *self;
        (0..rows.count).flat_map(move |row| {
            let start = (rows.first + row * rows.step) * width + columns.first;
            (0..columns.count).map(move |column| start + column * columns.step)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Philox;

    /// The group key of the specification's table.
    fn key(position: usize, group: usize, interval: usize) -> (usize, usize) {
        (position / (group * interval), position % interval)
    }

    #[test]
    fn groups_partition_the_map_and_agree_with_the_keys() {
        let mut draws = Philox::new(1).draws();
        for _ in 0..300 {
            let (height, width) = (1 + draws.below(70), 1 + draws.below(70));
            let group = [1 + draws.below(14), 1 + draws.below(14)];
            let interval = [1 + draws.below(8), 1 + draws.below(8)];
            let origin = [draws.below(group[0] * interval[0]), draws.below(group[1] * interval[1])];
            let grouping = Grouping { group, interval, origin };
            let groups = grouping.groups(height, width);
            let mut seen = vec![0; height * width];
            for members in &groups {
                let keys: std::collections::HashSet<_> = members
                    .tokens(width)
                    .map(|token| {
                        seen[token] += 1;
                        let (y, x) = (token / width + origin[0], token % width + origin[1]);
                        (key(y, group[0], interval[0]), key(x, group[1], interval[1]))
                    })
                    .collect();
                assert_eq!(keys.len(), 1, "{grouping:?}");
                assert!(members.tokens(width).is_sorted());
            }
            assert!(seen.iter().all(|&count| count == 1), "{grouping:?} on {height}×{width}");
        }
    }

    #[test]
    fn full_maps_have_the_official_order_and_count() {
        let groups = Grouping::long(7, 8).groups(56, 56);
        assert_eq!(groups.len(), 64);
        assert_eq!(groups[9].tokens(56).next(), Some(56 + 1));
        assert_eq!(Grouping::short(7).groups(56, 56)[9].tokens(56).next(), Some(7 * 56 + 7));
        assert_eq!(Grouping::long(5, 1), Grouping::short(5));
        assert!(Grouping::long(0, 1).check("lsda").is_err());
    }
}
