//! Features from the boundary of the object that a cell belongs to (Xu et al. 2020, "Boundary-aware dense feature
//! indicator for single-stage 3D object detection from point clouds"): a depthwise convolution whose taps lie on a
//! predicted box, and a score of how many points lie there.
//!
//! Frames: a bird's-eye map has row i along y and column j along x, in cells of given size; the heading θ is counted
//! from +x towards +y. In the frame of a box u is along its heading and v to the left of it. Seen from a cell, the box
//! reaches t to the front, b to the rear, l to the left and r to the right, all in metres.

pub(crate) mod cost;
mod cpu;
mod density;
pub(crate) mod gpu;
mod points;

use cpu::Problem;

use crate::autograd::{Backward, Function, record};
use crate::tensor::{Place, place};
use crate::{DType, Error, Result, Tensor, dispatch_float};

pub(crate) use density::gpu as density_gpu;
pub use density::{MapRange, boundary_density};

const OP: &str = "denfi_conv";

/// How [`denfi_conv`] reads its regression map.
///
/// ```
/// use gridgrad::ops::denfi::{DenfiOptions, denfi_conv};
/// use gridgrad::{DType, Tensor};
/// let options = DenfiOptions::new(12, [1.0, 1.0]);
/// let features = Tensor::ones([1, 5, 5, 8], DType::F32)?;
/// // Raw values of 0: boxes that reach one metre to each side, and head along x.
/// let boundary = Tensor::zeros([1, 5, 5, 4 + 2 * 12], DType::F32)?;
/// let weight = Tensor::ones([8, 1, 3, 3], DType::F32)?;
/// let sampled = denfi_conv(&features, &boundary, &weight, options)?;
/// assert_eq!(sampled.narrow(1, 2, 1)?.narrow(2, 2, 1)?.to_vec::<f32>()?, [9.0; 8]);
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DenfiOptions {
    /// Bins n of the heading over the full turn.
    pub bins: usize,
    /// Height (along y) and width (along x) of a cell, in metres.
    pub cell: [f64; 2],
    /// Factor on the extents of boxes, about their centre.
    pub scale: f64,
    /// Whether residuals are clamped to \[−1, 1\], so that a heading stays in its bin: for inference.
    pub clamp_residual: bool,
    /// Whether gradients flow to the regression map. It is not the default: the map learns from its own losses.
    pub boundary_grad: bool,
}

impl DenfiOptions {
    /// Boxes as predicted, without clamp and without gradients to the regression map.
    pub fn new(bins: usize, cell: [f64; 2]) -> Self {
        DenfiOptions { bins, cell, scale: 1.0, clamp_residual: false, boundary_grad: false }
    }

    /// Down and across.
    fn cells_per_metre(&self) -> [f64; 2] {
        self.cell.map(|metres| 1.0 / metres)
    }

    fn check(&self) -> Result<()> {
        let cells = self.cells_per_metre().map(|count| count as f32);
        let fits = self.cell.iter().all(|metres| *metres > 0.0) && cells.iter().all(|c| c.is_finite() && *c > 0.0);
        if !fits || !self.scale.is_finite() || self.bins == 0 || self.bins > 1 << 16 {
            let expected = "a cell of positive extents, a finite scale, 1 to 65536 bins";
            return Err(Error::argument(OP, format!("{self:?}, expected {expected}")));
        }
        Ok(())
    }
}

/// The largest extent of a map: up to there `f32` counts cells exactly.
const MOST_CELLS: usize = 1 << 24;

fn check_extents(op: &'static str, height: usize, width: usize) -> Result<()> {
    if height.max(width) > MOST_CELLS || u32::try_from(height * width).is_err() {
        let message = format!("a map of {height} by {width} cells, expected at most 2^24 a side and 2^32 in all");
        return Err(Error::shape(op, message));
    }
    Ok(())
}

/// A depthwise 3 × 3 convolution of `input` (batch, height, width, channels) whose taps are, for each cell, the corners,
/// the middles of the edges and the centre of a box (DENFIConv, section 4 of the specification in the paper's terms; the
/// 1 × 1 part that follows is [`linear`](super::linear)). The result has the shape of `input`.
///
/// `boundary` (batch, height, width, 4 + 2 bins) is the raw output of a regression head, in the dtype of `input` or in
/// `f32`: logarithms of (l, t, r, b), clamped to ±7, then a score for each bin and a residual for each bin. The heading
/// is θ = (2 k + residual_k) π / bins for the first bin k of the largest score. `weight` (channels, 1, 3, 3) has the
/// layout of a convolution with a group for each channel: its rows are v from right to left, its columns u from rear to
/// front. So with θ = 0 and sides of one cell this is that convolution, with padding 1.
///
/// Samples are bilinear. A tap whose place is not in (−1, height) × (−1, width) is 0 and gives no gradient, and
/// neighbours outside of the map count as 0. A box that is not a number makes its cell's output NaN. First derivatives
/// only, with respect to `input`, `weight` and, with [`DenfiOptions::boundary_grad`], `boundary`. Cost: 45 multiply-adds
/// for each element.
///
/// # Errors
/// Where shapes, dtypes or devices do not fit, or an option is out of its range.
pub fn denfi_conv(input: &Tensor, boundary: &Tensor, weight: &Tensor, options: DenfiOptions) -> Result<Tensor> {
    options.check()?;
    let problem = check(input, boundary, weight, options)?;
    let dtype = input.dtype();
    let output = match place(OP, &[input, boundary, weight])? {
        Place::Gpu(gpu) => gpu::forward(gpu, &problem, input, boundary, weight)?,
        Place::Host => dispatch_float!(OP, dtype, T => {
            let (x, raw, w) = (input.floats::<T>(OP)?, boundary.floats::<T>(OP)?, weight.floats::<T>(OP)?);
            Tensor::from_floats(cpu::forward(&problem, &x, &raw, &w), input.shape(), dtype)
        })?,
    };
    let boundary = if options.boundary_grad { boundary.clone() } else { boundary.detach() };
    let rule = |_| DenfiRule { input: input.clone(), boundary: boundary.clone(), weight: weight.clone(), problem };
    Ok(record(output, &[input, &boundary, weight], rule))
}

fn check(input: &Tensor, boundary: &Tensor, weight: &Tensor, options: DenfiOptions) -> Result<Problem> {
    let [batch, height, width, channels] = input.dims(OP, "input (batch, height, width, channels)")?;
    input.expect_float(OP)?;
    weight.expect_dtype(OP, input.dtype())?;
    check_extents(OP, height, width)?;
    let problem = Problem { batch, height, width, channels, options };
    let wanted = [batch, height, width, problem.outputs()];
    if **boundary.shape() != wanted {
        let message = format!("boundary {} for input {}, expected {wanted:?}", boundary.shape(), input.shape());
        return Err(Error::shape(OP, message));
    }
    if **weight.shape() != [channels, 1, 3, 3] {
        let message = format!("weight {} for input {}, expected ({channels}, 1, 3, 3)", weight.shape(), input.shape());
        return Err(Error::shape(OP, message));
    }
    let half = matches!(input.dtype(), DType::Bf16 | DType::F16);
    if boundary.dtype() != input.dtype() && !(half && boundary.dtype() == DType::F32) {
        let expected = format!("{} as the input{}", input.dtype(), if half { ", or f32" } else { "" });
        return Err(Error::DType { op: OP, got: boundary.dtype(), expected });
    }
    Ok(problem)
}

struct DenfiRule {
    input: Tensor,
    boundary: Tensor,
    weight: Tensor,
    problem: Problem,
}

impl DenfiRule {
    fn on_host(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let Self { input, boundary, weight, problem } = self;
        let (grad, dtype) = (backward.grad(), backward.grad().dtype());
        dispatch_float!(OP, dtype, T => {
            let (x, raw, w) = (input.floats::<T>(OP)?, boundary.floats::<T>(OP)?, weight.floats::<T>(OP)?);
            let dy = grad.floats::<T>(OP)?;
            let for_input = || Tensor::from_floats(cpu::input_gradient(problem, &raw, &w, &dy), input.shape(), dtype);
            let for_boundary = || {
                let gradient = cpu::boundary_gradient(problem, &x, &raw, &w, &dy);
                Tensor::from_floats(gradient, boundary.shape(), boundary.dtype())
            };
            let for_weight = || Tensor::from_floats(cpu::weight_gradient(problem, &x, &raw, &dy), weight.shape(), dtype);
            Ok(vec![
                backward.needs(0).then(for_input).transpose()?,
                backward.needs(1).then(for_boundary).transpose()?,
                backward.needs(2).then(for_weight).transpose()?,
            ])
        })
    }
}

impl Function for DenfiRule {
    fn name(&self) -> &'static str {
        OP
    }

    fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        backward.first_order_only(OP)?;
        let Self { input, boundary, weight, problem } = self;
        let grad = backward.grad();
        let Place::Gpu(gpu) = place(OP, &[input, boundary, weight, grad])? else { return self.on_host(backward) };
        let for_input = || gpu::input_gradient(gpu, problem, boundary, weight, grad);
        let for_boundary = || gpu::boundary_gradient(gpu, problem, input, boundary, weight, grad);
        let for_weight = || gpu::weight_gradient(gpu, problem, input, boundary, grad);
        Ok(vec![
            backward.needs(0).then(for_input).transpose()?,
            backward.needs(1).then(for_boundary).transpose()?,
            backward.needs(2).then(for_weight).transpose()?,
        ])
    }
}
