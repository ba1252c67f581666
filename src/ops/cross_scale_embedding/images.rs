//! What an embedding's input is: layout, dtype and normalisation of its pixels.

use crate::cpu::{Float, parallel};
use crate::tensor::Buffer;
use crate::{DType, Error, Result, Tensor};

const OP: &str = "cross_scale_embedding";

/// Order of an image's axes in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ImageLayout {
    /// (batch, height, width, channels)
    #[default]
    ChannelsLast,
    /// (batch, channels, height, width)
    ChannelsFirst,
}

/// Subtracts the mean of each channel and divides by its deviation. Bytes count as 0 to 1.
#[derive(Clone, Debug, PartialEq)]
pub struct PixelNormalisation {
    /// Mean of each channel.
    pub mean: Vec<f32>,
    /// Standard deviation of each channel.
    pub deviation: Vec<f32>,
}

/// The value of a channel's pixel is `factor` · stored + `shift`.
#[derive(Clone, Copy)]
pub(super) struct Scale {
    pub factor: f64,
    pub shift: f64,
}

/// The checked format of an input.
pub(super) struct Images {
    pub layout: ImageLayout,
    /// The input's own.
    pub dtype: DType,
    /// For each channel; empty where pixels count as they are.
    pub scales: Vec<Scale>,
    /// batch, height, width, channels
    pub extents: [usize; 4],
}

impl Images {
    /// For an embedding whose weights are `dtype`.
    pub fn new(
        input: &Tensor,
        layout: ImageLayout,
        normalise: Option<&PixelNormalisation>,
        dtype: DType,
    ) -> Result<Self> {
        let extents = match layout {
            ImageLayout::ChannelsLast => input.dims::<4>(OP, "input (batch, height, width, channels)")?,
            ImageLayout::ChannelsFirst => {
                let [batch, channels, height, width] = input.dims::<4>(OP, "input (batch, channels, height, width)")?;
                [batch, height, width, channels]
            }
        };
        if ![dtype, DType::F32, DType::U8].contains(&input.dtype()) {
            let message = format!("input of {}; expected {dtype} as the weights, f32 or u8", input.dtype());
            return Err(Error::argument(OP, message));
        }
        let channels = extents[3];
        let unit = if input.dtype() == DType::U8 { 1.0 / 255.0 } else { 1.0 };
        let scales = match normalise {
            None if input.dtype() == DType::U8 => vec![Scale { factor: unit, shift: 0.0 }; channels],
            None => Vec::new(),
            Some(PixelNormalisation { mean, deviation }) => {
                let usable = mean.iter().all(|mean| mean.is_finite())
                    && deviation.iter().all(|deviation| deviation.is_finite() && *deviation > 0.0);
                if mean.len() != channels || deviation.len() != channels || !usable {
                    let message = format!(
                        "mean {mean:?} and deviation {deviation:?}; expected finite numbers, deviations above 0, for \
                         each of {channels} channels"
                    );
                    return Err(Error::argument(OP, message));
                }
                let scale = |(&mean, &deviation): (&f32, &f32)| {
                    let factor = 1.0 / f64::from(deviation);
                    Scale { factor: unit * factor, shift: -f64::from(mean) * factor }
                };
                mean.iter().zip(deviation).map(scale).collect()
            }
        };
        Ok(Images { layout, dtype: input.dtype(), scales, extents })
    }

    /// Whether the input is what the products take, element by element.
    pub fn is_plain(&self, dtype: DType) -> bool {
        self.layout == ImageLayout::ChannelsLast && self.dtype == dtype && self.scales.is_empty()
    }

    /// The pixels' values, channels last.
    fn values<T: Float>(&self, input: &Tensor) -> Result<Buffer<T>> {
        match self.dtype {
            DType::U8 => {
                let bytes = input.data::<u8>()?;
                Ok(self.arrange(|at| T::from_f64(f64::from(bytes[at]))))
            }
            DType::F32 => {
                let pixels = input.data::<f32>()?;
                Ok(self.arrange(|at| T::from_f64(f64::from(pixels[at]))))
            }
            _ => {
                let pixels = input.floats::<T>(OP)?;
                Ok(self.arrange(|at| pixels[at]))
            }
        }
    }

    /// The pixels' values, channels last, as `dtype` holds them.
    pub fn rounded<T: Float>(&self, input: &Tensor, dtype: DType) -> Result<Buffer<T>> {
        let values = self.values::<T>(input)?;
        if dtype.size() >= size_of::<T>() {
            return Ok(values);
        }
        let rounded = Tensor::from_floats(values, self.extents, dtype)?;
        Ok(Buffer::copy_of(&rounded.floats::<T>(OP)?))
    }

    fn arrange<T: Float>(&self, stored: impl Fn(usize) -> T + Sync) -> Buffer<T> {
        let [batch, height, width, channels] = self.extents;
        let scales: Vec<[T; 2]> =
            self.scales.iter().map(|scale| [T::from_f64(scale.factor), T::from_f64(scale.shift)]).collect();
        let mut values = Buffer::recycled(batch * height * width * channels);
        parallel::pieces_mut(&mut values, width * channels, |line, values| {
            for (i, value) in values.iter_mut().enumerate() {
                let (x, channel) = (i / channels, i % channels);
                *value = stored(self.place(line, x, channel));
                if let Some([factor, shift]) = scales.get(channel) {
                    *value = value.mul_add(*factor, *shift);
                }
            }
        });
        values
    }

    /// Where pixel `x` of a line of all images lies in memory.
    fn place(&self, line: usize, x: usize, channel: usize) -> usize {
        let [_, height, width, channels] = self.extents;
        match self.layout {
            ImageLayout::ChannelsLast => (line * width + x) * channels + channel,
            ImageLayout::ChannelsFirst => ((line / height * channels + channel) * height + line % height) * width + x,
        }
    }

    /// The stored pixels' gradient from that of their values.
    pub fn gradient<T: Float>(&self, values: &[T]) -> Buffer<T> {
        let [_, _, width, channels] = self.extents;
        let mut gradient = Buffer::zeroed(values.len());
        for (i, &value) in values.iter().enumerate() {
            let (line, x, channel) = (i / (width * channels), i / channels % width, i % channels);
            let factor = self.scales.get(channel).map_or(1.0, |scale| scale.factor);
            gradient[self.place(line, x, channel)] = value * T::from_f64(factor);
        }
        gradient
    }
}
