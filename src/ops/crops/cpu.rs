//! Image by image.

use super::{Extents, PLAN};
use crate::cpu::parallel;
use crate::tensor::Buffer;

pub(super) fn crops(images: &[u8], plan: &[i64], mean: &[f32], deviation: &[f32], extents: Extents) -> Buffer<f32> {
    let Extents { models, batch, height, width, channels, .. } = extents;
    let size = height * width * channels;
    let mut output = Buffer::recycled(models * batch * size);
    parallel::pieces_mut(&mut output, size, |number, output| {
        let (own, model) = (&plan[number * PLAN..][..PLAN], number / batch * channels);
        let Ok(image) = usize::try_from(own[0]) else {
            output.fill(0.0);
            return;
        };
        let image = &images[image * size..][..size];
        for (at, out) in output.iter_mut().enumerate() {
            let (channel, column, row) = (at % channels, at / channels % width, at / channels / width);
            let column = if own[3] == 0 { column } else { width - 1 - column };
            let (y, x) = (row as i64 + own[1], column as i64 + own[2]);
            let inside = (0..height as i64).contains(&y) && (0..width as i64).contains(&x);
            let byte = if inside { image[(y as usize * width + x as usize) * channels + channel] } else { 0 };
            *out = (f32::from(byte) / 255.0 - mean[model + channel]) / deviation[model + channel];
        }
    });
    output
}
