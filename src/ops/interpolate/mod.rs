//! Maps of another size.

use std::sync::Arc;

use crate::ops::resample::{Axis, Rule, resample};
use crate::{Error, Result, Tensor};

/// How values between the positions of a map are found. With `align_corners` the centres of the corner pixels keep
/// their place, otherwise the corners of the map do.
///
/// ```
/// use gridgrad::ops::{Interpolation, interpolate};
/// use gridgrad::{DType, Tensor};
/// let map = Tensor::ones([1, 4, 4, 2], DType::F32)?;
/// assert_eq!(interpolate(&map, [8, 6], Interpolation::Nearest)?.shape().to_vec(), [1, 8, 6, 2]);
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interpolation {
    /// The pixel in which the position lies.
    Nearest,
    /// Linear along each axis, between two pixels.
    Bilinear {
        /// Whether the centres of the corner pixels keep their place.
        align_corners: bool,
    },
    /// Cubic convolution along each axis, among four pixels, with a = −0.75 (Keys 1981, equation 4).
    Bicubic {
        /// Whether the centres of the corner pixels keep their place.
        align_corners: bool,
    },
}

/// Brings `input` (batch, height, width, channels) to `size` (height, width). Pixels beyond the border repeat it. Every
/// output reads the same number of pixels when the map shrinks, too: nothing is smoothed first.
///
/// Derivatives of every order.
///
/// # Errors
/// Where `input` is not such a map, either size has an extent of 0, or the dtype is not floating point.
pub fn interpolate(input: &Tensor, size: [usize; 2], interpolation: Interpolation) -> Result<Tensor> {
    const OP: &str = "interpolate";
    let [_, height, width, _] = input.dims(OP, "input (batch, height, width, channels)")?;
    if [height, width].contains(&0) || size.contains(&0) {
        return Err(Error::shape(OP, format!("input {} to size {size:?}: extents must be positive", input.shape())));
    }
    // The tables grow with the size, so a size that no tensor can have is refused before.
    crate::Shape::from([size[0], size[1], input.shape()[3].max(1)]).checked_elements(OP, size_of::<f64>())?;
    resample(OP, input, [&axis(height, size[0], interpolation), &axis(width, size[1], interpolation)])
}

fn axis(input: usize, output: usize, interpolation: Interpolation) -> Arc<Axis> {
    let row = |position: usize| match interpolation {
        Interpolation::Nearest => vec![(((position as u128 * input as u128) / output as u128) as usize, 1.0)],
        Interpolation::Bilinear { align_corners } => {
            let at = source(position, input, output, align_corners).max(0.0);
            let (first, t) = (at.floor() as usize, at - at.floor());
            taps(input, [(first as isize, 1.0 - t), (first as isize + 1, t)])
        }
        Interpolation::Bicubic { align_corners } => {
            let at = source(position, input, output, align_corners);
            let (first, t) = (at.floor() as isize, at - at.floor());
            taps(input, [-1, 0, 1, 2].map(|offset| (first + offset, cubic(t - offset as f64))))
        }
    };
    let rule = match interpolation {
        Interpolation::Nearest => Rule::Nearest,
        Interpolation::Bilinear { align_corners } => Rule::Linear { align_corners },
        Interpolation::Bicubic { align_corners } => Rule::Cubic { align_corners },
    };
    Axis::new(rule, input, (0..output).map(row))
}

/// The place among the input's pixels, which lie at the integers, of output pixel `position`.
fn source(position: usize, input: usize, output: usize, align_corners: bool) -> f64 {
    let position = position as f64;
    match align_corners {
        true if output == 1 => 0.0,
        true => position * ((input - 1) as f64 / (output - 1) as f64),
        false => (position + 0.5) * (input as f64 / output as f64) - 0.5,
    }
}

/// Moves positions beyond the border onto it, and joins those that meet there.
fn taps<const N: usize>(input: usize, taps: [(isize, f64); N]) -> Vec<(usize, f64)> {
    let mut joined: Vec<(usize, f64)> = Vec::with_capacity(N);
    for (position, weight) in taps {
        let position = position.clamp(0, input as isize - 1) as usize;
        match joined.last_mut() {
            Some((last, sum)) if *last == position => *sum += weight,
            _ => joined.push((position, weight)),
        }
    }
    joined
}

/// The cubic convolution kernel at distance `x`.
fn cubic(x: f64) -> f64 {
    const A: f64 = -0.75;
    let x = x.abs();
    if x <= 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A
    } else {
        0.0
    }
}
