//! Random erasing (Zhong et al. 2020) of normalised images, with timm's parameters.

use serde::{Deserialize, Serialize};

use crate::random::Draws;

/// What an erased rectangle shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErasingMode {
    /// Standard normal noise, every sample on its own.
    Pixel,
    /// Zero, the mean colour.
    Constant,
}

/// Replaces random rectangles.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RandomErasing {
    /// Probability that an image is changed.
    pub probability: f64,
    /// Smallest and largest area of all rectangles together, as a share of the image.
    pub area: [f64; 2],
    /// Smallest and largest height by width; drawn uniformly on a log scale.
    pub ratio: [f64; 2],
    /// Number of rectangles.
    pub count: usize,
    /// What they show.
    pub mode: ErasingMode,
}

impl Default for RandomErasing {
    fn default() -> Self {
        RandomErasing {
            probability: 0.25,
            area: [0.02, 1.0 / 3.0],
            ratio: [0.3, 1.0 / 0.3],
            count: 1,
            mode: ErasingMode::Pixel,
        }
    }
}

impl RandomErasing {
    /// Erases in one image, a slice of `height` × `width` × `channels`. A rectangle that does not fit is drawn again,
    /// ten times at most; then it is left out.
    pub fn apply(&self, image: &mut [f32], height: usize, width: usize, channels: usize, draws: &mut Draws) {
        if !draws.chance(self.probability) {
            return;
        }
        for _ in 0..self.count {
            let Some([top, left, rows, columns]) = self.rectangle(height, width, draws) else { continue };
            for row in image.chunks_exact_mut(width * channels).skip(top).take(rows) {
                for sample in &mut row[left * channels..(left + columns) * channels] {
                    *sample = match self.mode {
                        ErasingMode::Pixel => draws.normal() as f32,
                        ErasingMode::Constant => 0.0,
                    };
                }
            }
        }
    }

    /// Top, left, height and width.
    fn rectangle(&self, height: usize, width: usize, draws: &mut Draws) -> Option<[usize; 4]> {
        for _ in 0..10 {
            let area = draws.range(self.area[0], self.area[1]) * (height * width) as f64 / self.count as f64;
            let ratio = draws.range(self.ratio[0].ln(), self.ratio[1].ln()).exp();
            let rows = (area * ratio).sqrt().round() as usize;
            let columns = (area / ratio).sqrt().round() as usize;
            if rows < height && columns < width {
                return Some([draws.below(height - rows + 1), draws.below(width - columns + 1), rows, columns]);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Philox;

    #[test]
    fn area_and_frequency_are_those_asked_for() {
        let erasing = RandomErasing { mode: ErasingMode::Constant, ratio: [0.5, 2.0], ..RandomErasing::default() };
        let mut draws = Philox::new(6).draws();
        let (mut hit, mut area, count) = (0, 0.0, 4000);
        for _ in 0..count {
            let mut image = vec![1.0_f32; 64 * 64 * 3];
            erasing.apply(&mut image, 64, 64, 3, &mut draws);
            let share = image.iter().filter(|&&sample| sample == 0.0).count() as f64 / image.len() as f64;
            assert!(share == 0.0 || (0.017..0.345).contains(&share), "{share}");
            hit += usize::from(share > 0.0);
            area += share;
        }
        let (frequency, mean) = (hit as f64 / f64::from(count), area / hit as f64);
        assert!((frequency - 0.25).abs() < 0.02, "{frequency}");
        assert!((mean - (0.02 + 1.0 / 3.0) / 2.0).abs() < 0.01, "{mean}");
    }

    #[test]
    fn pixel_mode_writes_standard_normal_noise() {
        let erasing = RandomErasing { probability: 1.0, area: [0.3, 0.3], ..RandomErasing::default() };
        let mut image = vec![100.0_f32; 128 * 128];
        erasing.apply(&mut image, 128, 128, 1, &mut Philox::new(7).draws());
        let noise: Vec<f32> = image.into_iter().filter(|&sample| sample != 100.0).collect();
        let mean = noise.iter().sum::<f32>() / noise.len() as f32;
        let variance = noise.iter().map(|v| v * v).sum::<f32>() / noise.len() as f32;
        assert!(noise.len() > 4000 && mean.abs() < 0.06 && (variance - 1.0).abs() < 0.08, "{mean} {variance}");
    }

    #[test]
    fn a_rectangle_that_never_fits_is_left_out() {
        let erasing = RandomErasing { probability: 1.0, area: [1.0, 1.0], ..RandomErasing::default() };
        let mut image = vec![1.0_f32; 4];
        erasing.apply(&mut image, 2, 2, 1, &mut Philox::new(7).draws());
        assert_eq!(image, [1.0; 4]);
    }
}
