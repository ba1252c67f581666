//! Rotation, shift, scale and shear.

use serde::{Deserialize, Serialize};

use super::resize::Interpolation;
use crate::data::Image;
use crate::random::Draws;

/// An affine map from output to input coordinates: (x, y) → (`m[0]`·x + `m[1]`·y + `m[2]`, `m[3]`·x + `m[4]`·y +
/// `m[5]`), in pixels, with pixel centres at halves.
pub type Matrix = [f64; 6];

/// `image` seen through `matrix`, at its own size. What lies outside shows `fill`, one value a channel. Bicubic weights
/// are those of cubic convolution with a = -1, as Pillow has it for transforms (and for these alone).
pub fn warp(image: &Image, matrix: &Matrix, fill: [u8; 3], interpolation: Interpolation) -> Image {
    match image.channels {
        1 => warp_channels::<1>(image, matrix, [fill[0]], interpolation),
        _ => warp_channels::<3>(image, matrix, fill, interpolation),
    }
}

fn warp_channels<const C: usize>(image: &Image, matrix: &Matrix, fill: [u8; C], interpolation: Interpolation) -> Image {
    let (height, width) = (image.height as f64, image.width as f64);
    let mut pixels = Vec::with_capacity(image.pixels.len());
    for out_y in 0..image.height {
        for out_x in 0..image.width {
            let (x, y) = (out_x as f64 + 0.5, out_y as f64 + 0.5);
            let in_x = matrix[0] * x + matrix[1] * y + matrix[2];
            let in_y = matrix[3] * x + matrix[4] * y + matrix[5];
            let inside = in_x >= 0.0 && in_x < width && in_y >= 0.0 && in_y < height;
            pixels.extend(match interpolation {
                _ if !inside => fill,
                Interpolation::Bilinear => sample::<C, 2>(image, in_x - 0.5, in_y - 0.5, linear_weights),
                Interpolation::Bicubic => sample::<C, 4>(image, in_x - 0.5, in_y - 0.5, cubic_weights),
            });
        }
    }
    Image { height: image.height, width: image.width, channels: C, pixels }
}

fn linear_weights(t: f32) -> [f32; 2] {
    [1.0 - t, t]
}

fn cubic_weights(t: f32) -> [f32; 4] {
    let s = 1.0 - t;
    [-t * s * s, 1.0 + t * t * (t - 2.0), 1.0 + s * s * (s - 2.0), -s * t * t]
}

/// The value between pixels at (`x`, `y`), from `TAPS` pixels each way; those beyond the border repeat it.
#[inline]
fn sample<const C: usize, const TAPS: usize>(
    image: &Image,
    x: f64,
    y: f64,
    weights: impl Fn(f32) -> [f32; TAPS],
) -> [u8; C] {
    let clamp = |at: isize, side: usize| at.clamp(0, side as isize - 1) as usize;
    let reach = TAPS as isize / 2 - 1;
    // Rounds down, as coordinates are at least -0.5; `floor` is a call on processors without the instruction.
    let (left, top) = ((x + 1.0) as isize - 1, (y + 1.0) as isize - 1);
    let (across, down) = (weights((x - left as f64) as f32), weights((y - top as f64) as f32));
    let columns: [usize; TAPS] = std::array::from_fn(|i| C * clamp(left + i as isize - reach, image.width));
    let mut sums = [0.5_f32; C];
    for (i, &weight) in down.iter().enumerate() {
        let row = image.row(clamp(top + i as isize - reach, image.height));
        let mut along = [0.0_f32; C];
        for (&column, &factor) in columns.iter().zip(&across) {
            for (sum, &sample) in along.iter_mut().zip(&row[column..column + C]) {
                *sum += factor * f32::from(sample);
            }
        }
        for (sum, value) in sums.iter_mut().zip(along) {
            *sum += weight * value;
        }
    }
    // The cast saturates and cuts, so with the half above it rounds.
    sums.map(|sum| sum as u8)
}

/// `matrix` taken about the middle of an image of `height` × `width`.
fn about_centre(matrix: [f64; 4], height: usize, width: usize) -> Matrix {
    let [a, b, c, d] = matrix;
    let (x, y) = (width as f64 / 2.0, height as f64 / 2.0);
    [a, b, x - a * x - b * y, c, d, y - c * x - d * y]
}

/// The matrix that turns an image counter-clockwise by `degrees` about its middle.
pub fn rotation(degrees: f64, height: usize, width: usize) -> Matrix {
    let (sin, cos) = degrees.to_radians().sin_cos();
    about_centre([cos, -sin, sin, cos], height, width)
}

/// Random rotation, shift and scale about the middle (torchvision's `RandomAffine` without shear); black shows where
/// the image ends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RandomAffine {
    /// Largest rotation either way, in degrees.
    pub degrees: f64,
    /// Largest shift either way along each axis, as a share of that side.
    pub translate: f64,
    /// Smallest and largest factor of scale.
    pub scale: [f64; 2],
}

impl RandomAffine {
    /// A random view of `image`.
    pub fn apply(&self, image: &Image, interpolation: Interpolation, draws: &mut Draws) -> Image {
        let (sin, cos) = draws.range(-self.degrees, self.degrees).to_radians().sin_cos();
        let shift_x = draws.range(-self.translate, self.translate) * image.width as f64;
        let shift_y = draws.range(-self.translate, self.translate) * image.height as f64;
        let shrink = 1.0 / draws.range(self.scale[0], self.scale[1]);
        let turn = [cos * shrink, -sin * shrink, sin * shrink, cos * shrink];
        let mut matrix = about_centre(turn, image.height, image.width);
        matrix[2] -= matrix[0] * shift_x + matrix[1] * shift_y;
        matrix[5] -= matrix[3] * shift_x + matrix[4] * shift_y;
        warp(image, &matrix, [0; 3], interpolation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Philox;

    const BOTH: [Interpolation; 2] = [Interpolation::Bilinear, Interpolation::Bicubic];

    fn ramp(height: usize, width: usize, channels: usize) -> Image {
        let pixels = (0..height * width * channels).map(|i| (i * 7 % 251) as u8).collect();
        Image::new(height, width, channels, pixels).unwrap()
    }

    #[test]
    fn the_identity_changes_nothing_and_whole_shifts_move_pixels() {
        for (interpolation, channels) in BOTH.into_iter().flat_map(|i| [(i, 1), (i, 3)]) {
            let image = ramp(5, 6, channels);
            assert_eq!(warp(&image, &[1.0, 0.0, 0.0, 0.0, 1.0, 0.0], [9; 3], interpolation), image);
            let shifted = warp(&image, &[1.0, 0.0, 2.0, 0.0, 1.0, -1.0], [9; 3], interpolation);
            assert!(shifted.row(0).iter().all(|&sample| sample == 9));
            assert_eq!(shifted.row(1)[..4 * channels], image.row(0)[2 * channels..]);
            assert!(shifted.row(1)[4 * channels..].iter().all(|&sample| sample == 9));
        }
    }

    #[test]
    fn a_quarter_turn_is_counter_clockwise() {
        let image = Image::new(2, 2, 1, vec![10, 20, 30, 40]).unwrap();
        for interpolation in BOTH {
            let turned = warp(&image, &rotation(90.0, 2, 2), [0; 3], interpolation);
            assert_eq!(turned.pixels(), [20, 40, 10, 30]);
        }
    }

    #[test]
    fn weights_sum_to_one_and_halves_are_known() {
        assert_eq!(cubic_weights(0.5), [-0.125, 0.625, 0.625, -0.125]);
        for t in [0.0, 0.1, 0.25, 0.9] {
            assert!((cubic_weights(t).iter().sum::<f32>() - 1.0).abs() < 1e-6);
        }
        let row = Image::new(1, 2, 1, vec![10, 31]).unwrap();
        let between = warp(&row, &[1.0, 0.0, 0.5, 0.0, 1.0, 0.0], [0; 3], Interpolation::Bilinear);
        assert_eq!(between.pixels(), [21, 0]);
    }

    #[test]
    fn a_random_view_stays_within_its_bounds() {
        let still = RandomAffine { degrees: 0.0, translate: 0.0, scale: [1.0, 1.0] };
        let image = ramp(9, 9, 1);
        let mut draws = Philox::new(4).draws();
        assert_eq!(still.apply(&image, Interpolation::Bicubic, &mut draws), image);
        let mut dot = Image::filled(41, 41, 1, 0);
        dot.pixels[20 * 41 + 20] = 255;
        let shift = RandomAffine { degrees: 30.0, translate: 0.1, scale: [1.0, 1.0] };
        let mut far = 0;
        for _ in 0..200 {
            let moved = shift.apply(&dot, Interpolation::Bilinear, &mut draws);
            let (at, _) = moved.pixels.iter().enumerate().max_by_key(|(_, sample)| **sample).unwrap();
            let distance = (at / 41).abs_diff(20).max((at % 41).abs_diff(20));
            assert!(distance <= 5, "{distance}");
            far += usize::from(distance >= 3);
        }
        assert!(far > 40, "{far}");
    }
}
