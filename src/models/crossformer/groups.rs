//! Which grouping each block uses on a map.

use super::config::{AttentionPattern, CrossFormerConfig, GroupSchedule, Kind};
use crate::ops::lsda::Grouping;

/// How one block's attention sees a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockGrouping {
    /// The groups.
    pub grouping: Grouping,
    /// Whether tokens of a group lie apart.
    pub long_distance: bool,
}

impl CrossFormerConfig {
    /// The grouping of `block` in `stage` on a map of `height` × `width`.
    pub fn block_grouping(&self, stage: usize, block: usize, [height, width]: [usize; 2]) -> BlockGrouping {
        let group = self.block_group_size(stage, block);
        let (shorter, longer) = (height.min(width), height.max(width));
        let is_classifier = self.kind == Kind::Classifier;
        if shorter <= group {
            // A group of the longer side over a padded map is the whole map, which needs no padding.
            let whole = Grouping { group: [height, width], interval: [1; 2], origin: [0; 2] };
            let grouping =
                if self.kind == Kind::Backbone { whole } else { self.pad(Grouping::short(shorter), [height, width]) };
            return BlockGrouping { grouping, long_distance: false };
        }
        let long_distance = match self.attention {
            AttentionPattern::Alternate => block % 2 == 1,
            AttentionPattern::Short => false,
            AttentionPattern::Long => true,
        };
        if !long_distance {
            return BlockGrouping { grouping: self.pad(Grouping::short(group), [height, width]), long_distance };
        }
        let interval = match self.adaptive_interval {
            true => (if is_classifier { height } else { longer }).div_ceil(group),
            false => self.interval[stage],
        };
        let grouping = if self.kind == Kind::LegacyBackbone {
            let spanned = [height.div_ceil(interval), width.div_ceil(interval)];
            Grouping { group: spanned, interval: [interval; 2], origin: [0; 2] }
        } else {
            self.pad(Grouping::long(group, interval), [height, width])
        };
        BlockGrouping { grouping, long_distance }
    }

    /// Moves the groups' origin where padding is split over both sides.
    fn pad(&self, grouping: Grouping, map: [usize; 2]) -> Grouping {
        if self.pad_type == 0 || self.kind != Kind::Classifier {
            return grouping;
        }
        let period = grouping.group[0] * grouping.interval[0];
        Grouping { origin: map.map(|extent| (extent.next_multiple_of(period) - extent) / 2), ..grouping }
    }

    /// The group size of a block by the schedule, which goes by the resolution of `img_size`.
    pub fn block_group_size(&self, stage: usize, block: usize) -> usize {
        let listed = self.group_size[stage];
        let resolution = |stage: usize| self.img_size[0] / self.patch_stride / self.merge_stride.pow(stage as u32);
        let number = self.depths[..stage].iter().sum::<usize>() + block;
        let total = self.depths.iter().sum::<usize>();
        let (first, own) = (resolution(0) as f64, resolution(stage) as f64);
        let share = 4.0 / first + number as f64 * (1.0 - 4.0 / first) / total as f64;
        let linear = own * share;
        let half = (own / 2.0).floor();
        let is_third = stage == 2;
        let size = match self.group_type {
            GroupSchedule::Constant => return listed,
            GroupSchedule::SevenFourteen => return if is_third && block < 4 { (listed / 2).max(1) } else { listed },
            GroupSchedule::Linear => linear,
            GroupSchedule::LinearDiv if linear > half => {
                if linear > 0.75 * own || !is_third {
                    own
                } else {
                    half
                }
            }
            GroupSchedule::Alter if linear > half => {
                if number % 2 == 1 || !is_third {
                    own
                } else {
                    half
                }
            }
            GroupSchedule::LinearDiv | GroupSchedule::Alter => linear,
        };
        (size.ceil() as usize).max(4)
    }
}
