//! Mixing of images within a batch: mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019), in timm's batch mode. Image
//! i is mixed with the i-th from the end, all pairs alike.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::data::Pixels;
use crate::random::Draws;

/// How batches are mixed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mixing {
    /// Both parameters of mixup's beta distribution; 0 for no mixup.
    pub mixup: f64,
    /// Both parameters of CutMix's beta distribution; 0 for no CutMix.
    pub cutmix: f64,
    /// Probability that a batch is mixed.
    pub probability: f64,
    /// Probability of CutMix where both are on.
    pub switch_probability: f64,
}

impl Default for Mixing {
    fn default() -> Self {
        Mixing { mixup: 0.8, cutmix: 1.0, probability: 1.0, switch_probability: 0.5 }
    }
}

/// What is done to one batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mix {
    /// Nothing.
    None,
    /// Images are averaged, an image's own share being `own`.
    Mixup {
        /// Share of the image itself.
        own: f64,
    },
    /// The rectangle is swapped with that of the partner.
    CutMix {
        /// First row.
        top: usize,
        /// First column.
        left: usize,
        /// Number of rows.
        height: usize,
        /// Number of columns.
        width: usize,
    },
}

impl Mixing {
    /// What to do to a batch of images of `height` × `width`.
    pub fn draw(&self, height: usize, width: usize, draws: &mut Draws) -> Mix {
        let (mixup, cutmix) = (self.mixup > 0.0, self.cutmix > 0.0);
        if !(mixup || cutmix) || !draws.chance(self.probability) {
            return Mix::None;
        }
        if cutmix && (!mixup || draws.chance(self.switch_probability)) {
            let own = draws.beta(self.cutmix, self.cutmix);
            rectangle(own, height, width, draws)
        } else {
            Mix::Mixup { own: draws.beta(self.mixup, self.mixup) }
        }
    }
}

/// A rectangle of 1 - `own` of the area about a random centre, cut at the border.
fn rectangle(own: f64, height: usize, width: usize, draws: &mut Draws) -> Mix {
    let side = (1.0 - own).max(0.0).sqrt();
    let mut span = |extent: usize| {
        let half = (extent as f64 * side) as usize / 2;
        let centre = draws.below(extent);
        let start = centre.saturating_sub(half);
        (start, (centre + half).min(extent) - start)
    };
    let ((top, height), (left, width)) = (span(height), span(width));
    Mix::CutMix { top, left, height, width }
}

impl Mix {
    /// Share of an image itself in what it becomes; the partner has the rest.
    pub fn own_share(self, height: usize, width: usize) -> f64 {
        match self {
            Mix::None => 1.0,
            Mix::Mixup { own } => own,
            Mix::CutMix { height: rows, width: columns, .. } => 1.0 - (rows * columns) as f64 / (height * width) as f64,
        }
    }

    /// Mixes `images`, (batch, height, width, channels), and `targets`, (batch, classes). CutMix leaves bytes where it
    /// finds them, mixup makes floats of them.
    pub fn apply(self, images: &mut Pixels, shape: [usize; 4], targets: &mut [f32]) {
        let [batch, height, width, channels] = shape;
        let own = self.own_share(height, width) as f32;
        if self == Mix::None || batch < 2 {
            return;
        }
        each_pair(targets, batch, |a, b| average(a, b, own));
        match self {
            Mix::None => {}
            Mix::Mixup { .. } => {
                let mut floats = std::mem::replace(images, Pixels::Floats(Vec::new())).into_floats();
                each_pair(&mut floats, batch, |a, b| average(a, b, own));
                *images = Pixels::Floats(floats);
            }
            Mix::CutMix { top, left, height: rows, width: columns } => {
                let spans =
                    (top..top + rows).map(|y| (y * width + left) * channels..(y * width + left + columns) * channels);
                match images {
                    Pixels::Bytes { values, .. } => each_pair(values, batch, |a, b| swap(a, b, spans.clone())),
                    Pixels::Floats(values) => each_pair(values, batch, |a, b| swap(a, b, spans.clone())),
                }
            }
        }
    }
}

/// Calls `mix` with every pair of items, first with last. The middle one of an odd number is its own partner.
fn each_pair<T>(items: &mut [T], batch: usize, mix: impl Fn(&mut [T], &mut [T])) {
    let size = items.len() / batch;
    let (front, back) = items.split_at_mut(batch / 2 * size);
    if size > 0 {
        for (a, b) in front.chunks_exact_mut(size).zip(back.chunks_exact_mut(size).rev()) {
            mix(a, b);
        }
    }
}

/// Exchanges the parts `spans` of two images.
fn swap<T>(a: &mut [T], b: &mut [T], spans: impl Iterator<Item = Range<usize>>) {
    for span in spans {
        a[span.clone()].swap_with_slice(&mut b[span]);
    }
}

fn average(a: &mut [f32], b: &mut [f32], own: f32) {
    for (a, b) in a.iter_mut().zip(b) {
        (*a, *b) = (*a * own + *b * (1.0 - own), *b * own + *a * (1.0 - own));
    }
}

/// The target of `label` with `smoothing` of the weight spread over all of `out`'s classes (Szegedy et al. 2016).
pub(in crate::data) fn write_target(label: usize, smoothing: f64, out: &mut [f32]) {
    let rest = smoothing / out.len() as f64;
    out.fill(rest as f32);
    out[label] = (1.0 - smoothing + rest) as f32;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::ByteTable;
    use crate::random::Philox;

    /// Three images of bytes 0, 1 and 2, which stand for themselves.
    fn batch() -> (Pixels, Vec<f32>) {
        let rows = [0, 0].map(|_: u8| std::array::from_fn(|byte| byte as f32));
        let values = (0..3).flat_map(|i| vec![i; 8 * 8 * 2]).collect();
        let images = Pixels::Bytes { values, table: ByteTable::of_rows(&rows) };
        let mut targets = vec![0.0; 9];
        for (label, target) in targets.chunks_exact_mut(3).enumerate() {
            write_target(label, 0.1, target);
        }
        (images, targets)
    }

    #[test]
    fn mixup_averages_pairs_and_leaves_the_middle() {
        let (mut images, mut targets) = batch();
        Mix::Mixup { own: 0.75 }.apply(&mut images, [3, 8, 8, 2], &mut targets);
        assert!(!images.is_bytes());
        let means: Vec<f32> = images.floats().chunks(128).map(|image| image[17]).collect();
        assert_eq!(means, [0.5, 1.0, 1.5]);
        let expected = [0.9 * 0.75 + 0.1 / 3.0, 0.1 / 3.0, 0.9 * 0.25 + 0.1 / 3.0];
        assert!(targets[..3].iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{targets:?}");
    }

    #[test]
    fn cutmix_weighs_targets_by_the_area_it_swaps() {
        let (mut bytes, mut targets) = batch();
        let mix = Mix::CutMix { top: 2, left: 4, height: 4, width: 4 };
        let (mut floats, mut again) = (Pixels::Floats(bytes.clone().into_floats()), targets.clone());
        mix.apply(&mut bytes, [3, 8, 8, 2], &mut targets);
        mix.apply(&mut floats, [3, 8, 8, 2], &mut again);
        assert!(bytes.is_bytes() && !floats.is_bytes());
        assert_eq!((bytes.floats(), &targets), (floats.floats(), &again));
        let images = bytes.into_floats();
        let swapped = images[..128].iter().filter(|&&sample| sample == 2.0).count();
        assert_eq!(swapped, 4 * 4 * 2);
        assert_eq!(images[(2 * 8 + 4) * 2], 2.0);
        assert!((targets[2] - (0.9 * 0.25 + 0.1 / 3.0)).abs() < 1e-6);
        assert!(images[128..256].iter().all(|&sample| sample == 1.0));
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let mixing = Mixing { probability: 0.8, switch_probability: 0.25, ..Mixing::default() };
        let mut draws = Philox::new(11).draws();
        let (mut none, mut cut, mut share) = (0.0, 0.0, 0.0);
        for _ in 0..5000 {
            match mixing.draw(32, 32, &mut draws) {
                Mix::None => none += 1.0 / 5000.0,
                Mix::Mixup { own } => share += own / 3000.0,
                mix @ Mix::CutMix { top, left, height, width } => {
                    assert!(top + height <= 32 && left + width <= 32);
                    assert!((0.0..=1.0).contains(&mix.own_share(32, 32)));
                    cut += 1.0 / 5000.0;
                }
            }
        }
        assert!((none - 0.2_f64).abs() < 0.02 && (cut - 0.2_f64).abs() < 0.02, "{none} {cut}");
        assert!((share - 0.5_f64).abs() < 0.04, "{share}");
        let off = Mixing { mixup: 0.0, cutmix: 0.0, ..Mixing::default() };
        assert_eq!(off.draw(32, 32, &mut draws), Mix::None);
    }
}
