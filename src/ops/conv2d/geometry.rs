//! The extents of a convolution.

use super::Conv2dOptions;
use crate::tensor::Shape;
use crate::{Error, Result};

/// Extents of a convolution that has been checked. A transposed convolution runs it from output to input.
#[derive(Clone, Copy)]
pub(in crate::ops) struct Geometry {
    pub batch: usize,
    pub input: [usize; 2],
    pub output: [usize; 2],
    pub in_channels: usize,
    pub out_channels: usize,
    pub kernel: [usize; 2],
    pub options: Conv2dOptions,
}

impl Geometry {
    pub fn input_shape(&self) -> Shape {
        [self.batch, self.input[0], self.input[1], self.in_channels].into()
    }

    pub fn output_shape(&self) -> Shape {
        [self.batch, self.output[0], self.output[1], self.out_channels].into()
    }

    pub fn weight_shape(&self) -> Shape {
        [self.out_channels, self.group_inputs(), self.kernel[0], self.kernel[1]].into()
    }

    pub fn taps(&self) -> usize {
        self.kernel[0] * self.kernel[1]
    }

    /// Input channels of one group.
    pub fn group_inputs(&self) -> usize {
        self.in_channels / self.options.groups
    }

    /// Output channels of one group.
    pub fn group_outputs(&self) -> usize {
        self.out_channels / self.options.groups
    }

    /// Whether every position is mapped by itself: a matrix product of all positions.
    pub fn is_pointwise(&self) -> bool {
        let Conv2dOptions { stride, padding, groups, .. } = self.options;
        self.kernel == [1; 2] && stride == [1; 2] && padding == [0; 2] && groups == 1 && self.input == self.output
    }

    /// Whether every channel is convolved by itself.
    pub fn is_depthwise(&self) -> bool {
        self.options.groups == self.in_channels && self.out_channels == self.in_channels
    }

    /// The convolution of `maps` (batch, height, width, channels) with weights (out, in / groups, kernel height, kernel
    /// width).
    pub fn forward(op: &'static str, maps: [usize; 4], weights: [usize; 4], options: Conv2dOptions) -> Result<Self> {
        Self::check(op, weights, options)?;
        let ([batch, height, width, in_channels], [out_channels, group_inputs, kernel @ ..]) = (maps, weights);
        let (map, weight, input) = (Shape::from(maps), Shape::from(weights), [height, width]);
        if group_inputs.checked_mul(options.groups) != Some(in_channels) {
            let message = format!("input {map}, weight {weight}, {} groups", options.groups);
            return Err(Error::shape(op, message));
        }
        let extent = |axis: usize| {
            let padded = options.padding[axis].checked_mul(2).and_then(|both| both.checked_add(input[axis]));
            let free = padded.zip(window(kernel[axis], options.dilation[axis])).and_then(|(p, w)| p.checked_sub(w));
            free.map(|free| free / options.stride[axis] + 1).ok_or_else(|| {
                Error::shape(op, format!("kernel {kernel:?} is larger than input {map} with {options:?}"))
            })
        };
        let output = [extent(0)?, extent(1)?];
        let geometry = Geometry { batch, input, output, in_channels, out_channels, kernel, options };
        geometry.output_shape().checked_elements(op, size_of::<f64>())?;
        Ok(geometry)
    }

    /// What both directions demand of the weight (out, in / groups, kernel height, kernel width) and the options.
    pub fn check(op: &'static str, weight: [usize; 4], options: Conv2dOptions) -> Result<()> {
        let Conv2dOptions { stride, dilation, groups, .. } = options;
        if stride.contains(&0) || dilation.contains(&0) || groups == 0 {
            return Err(Error::argument(op, format!("stride, dilation and groups must be positive, got {options:?}")));
        }
        if weight.contains(&0) || !weight[0].is_multiple_of(groups) {
            let message = format!("weight {} is empty or does not divide into {groups} groups", Shape::from(weight));
            return Err(Error::shape(op, message));
        }
        Ok(())
    }
}

/// The extent that a kernel with gaps covers.
pub(super) fn window(kernel: usize, dilation: usize) -> Option<usize> {
    (kernel - 1).checked_mul(dilation)?.checked_add(1)
}
