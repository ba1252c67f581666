//! Features of a network's blocks: means of their maps over a few cells, for probes and scores of how well they tell
//! classes apart (Wang et al. 2019, "DBP: Discrimination based block-level pruning for deep model acceleration").

pub(crate) mod cost;
mod cpu;
pub(crate) mod gpu;

use crate::autograd::{Backward, Function, SavedOutput, record};
use crate::tensor::{Place, Shape, place};
use crate::{DType, Error, Result, Tensor, dispatch_float};

/// The most maps of a call.
const MOST_MAPS: usize = 512;

/// Maps of one batch, and the cells that they are pooled to.
#[derive(Clone)]
struct Problem {
    batch: usize,
    /// Cells a side.
    cells: usize,
    /// Height, width and channels of each.
    maps: Vec<[usize; 3]>,
}

impl Problem {
    fn new(op: &'static str, maps: &[&Tensor], cells: usize) -> Result<Self> {
        let Some((first, rest)) = maps.split_first().filter(|_| maps.len() <= MOST_MAPS) else {
            return Err(Error::argument(op, format!("{} maps, expected 1 to {MOST_MAPS}", maps.len())));
        };
        if cells == 0 || cells > 1 << 10 {
            return Err(Error::argument(op, format!("{cells} cells a side, expected 1 to 1024")));
        }
        first.expect_float(op)?;
        rest.iter().try_for_each(|map| map.expect_dtype(op, first.dtype()))?;
        let mut shapes = Vec::with_capacity(maps.len());
        for map in maps {
            let [batch, height, width, channels] = map.dims(op, "maps (batch, height, width, channels)")?;
            if batch != first.shape()[0] || height * width == 0 || u32::try_from(height * width).is_err() {
                let message = format!("map {}, expected {} images with positions", map.shape(), first.shape()[0]);
                return Err(Error::shape(op, message));
            }
            shapes.push([height, width, channels]);
        }
        let problem = Problem { batch: first.shape()[0], cells, maps: shapes };
        let blocks = problem.batch.saturating_mul(problem.features());
        if problem.features() > u32::MAX as usize || blocks > 1 << 40 {
            let message = format!("{} features of {} images are too many", problem.features(), problem.batch);
            return Err(Error::shape(op, message));
        }
        Ok(problem)
    }

    /// Features of a map.
    fn width(&self, number: usize) -> usize {
        self.cells * self.cells * self.maps[number][2]
    }

    /// The first feature of a map.
    fn first(&self, number: usize) -> usize {
        (0..number).map(|before| self.width(before)).sum()
    }

    /// Features of an image.
    fn features(&self) -> usize {
        self.first(self.maps.len())
    }

    fn shapes(&self) -> impl Iterator<Item = [usize; 4]> + '_ {
        self.maps.iter().map(|&[height, width, channels]| [self.batch, height, width, channels])
    }
}

/// Features are statistics: `f32`, or `f64` where the maps are.
fn features_dtype(maps: DType) -> DType {
    if maps == DType::F64 { DType::F64 } else { DType::F32 }
}

/// The means of `maps`, each (batch, height, width, channels), over `cells` × `cells` cells: (batch, features) in `f32`
/// (`f64` for such maps). Features are map by map, within a map cell by cell, and within a cell channel by channel, so
/// that map l has cells² · channels of them. Cell a of p reaches from ⌊a h / p⌋ to ⌈(a + 1) h / p⌉, as in
/// [`adaptive_avg_pool2d`](super::adaptive_avg_pool2d). One launch for all maps on a GPU. First derivatives only.
///
/// # Errors
/// Where there are no maps or more than 512, a map has other axes, another batch, another dtype or no positions, or
/// `cells` is not from 1 to 1024.
///
/// ```
/// use gridgrad::{DType, Tensor, ops};
/// let (early, late) = (Tensor::ones([2, 8, 8, 3], DType::F32)?, Tensor::ones([2, 4, 4, 5], DType::F32)?);
/// assert_eq!(ops::pooled_features(&[&early, &late], 2)?.shape().to_vec(), [2, 4 * 3 + 4 * 5]);
/// # Ok::<(), gridgrad::Error>(())
/// ```
pub fn pooled_features(maps: &[&Tensor], cells: usize) -> Result<Tensor> {
    const OP: &str = "pooled_features";
    let problem = Problem::new(OP, maps, cells)?;
    let dtype = maps[0].dtype();
    let features = match place(OP, maps)? {
        Place::Gpu(gpu) => gpu::forward(gpu, &problem, maps)?,
        Place::Host => pool_on_host(OP, &problem, maps)?,
    };
    Ok(record(features, maps, |_| PoolRule { problem, dtype }))
}

fn pool_on_host(op: &'static str, problem: &Problem, maps: &[&Tensor]) -> Result<Tensor> {
    let dtype = maps[0].dtype();
    dispatch_float!(op, dtype, T => {
        let values = maps.iter().map(|map| map.floats::<T>(op)).collect::<Result<Vec<_>>>()?;
        let values: Vec<&[T]> = values.iter().map(|values| &**values).collect();
        let features = cpu::forward(problem, &values);
        Tensor::from_floats(features, [problem.batch, problem.features()], features_dtype(dtype))
    })
}

struct PoolRule {
    problem: Problem,
    /// Of the maps.
    dtype: DType,
}

impl Function for PoolRule {
    fn name(&self) -> &'static str {
        "pooled_features"
    }

    fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let (op, grad) = (self.name(), backward.grad());
        backward.first_order_only(op)?;
        if let Place::Gpu(gpu) = place(op, &[grad])? {
            return Ok(gpu::backward(gpu, &self.problem, self.dtype, grad)?.into_iter().map(Some).collect());
        }
        let gradient = |(number, shape): (usize, [usize; 4])| {
            if !backward.needs(number) {
                return Ok(None);
            }
            dispatch_float!(op, self.dtype, T => {
                let gradient = cpu::backward(&self.problem, number, &grad.floats::<T>(op)?);
                Tensor::from_floats(gradient, shape, self.dtype).map(Some)
            })
        };
        self.problem.shapes().enumerate().map(gradient).collect()
    }
}

const FUSED: &str = "add_relu_gap";

/// The end of a residual block with the features of its output: y = relu(`input` + `residual`), both (batch, height,
/// width, channels), and the means of y as [`pooled_features`] has them, written in one pass on a GPU. First derivatives
/// only, of both results.
///
/// # Errors
/// As [`pooled_features`], and where the two maps differ in shape or dtype.
pub fn add_relu_gap(input: &Tensor, residual: &Tensor, cells: usize) -> Result<(Tensor, Tensor)> {
    let problem = Problem::new(FUSED, &[input], cells)?;
    residual.expect_dtype(FUSED, input.dtype())?;
    if residual.shape() != input.shape() {
        let message = format!("residual {}, expected {} as the input", residual.shape(), input.shape());
        return Err(Error::shape(FUSED, message));
    }
    let (output, features) = match place(FUSED, &[input, residual])? {
        Place::Gpu(gpu) => gpu::add_relu_gap(gpu, &problem, input, residual)?,
        Place::Host => {
            let dtype = input.dtype();
            let output = dispatch_float!(FUSED, dtype, T => {
                let output = cpu::add_relu(&input.floats::<T>(FUSED)?, &residual.floats::<T>(FUSED)?);
                Tensor::from_floats(output, input.shape(), dtype)
            })?;
            let features = pool_on_host(FUSED, &problem, &[&output])?;
            (output, features)
        }
    };
    let saved = output.clone();
    let inputs = [input, residual];
    let rule = |output| SumRule { output, problem: problem.clone() };
    let output = record(output, &inputs, rule);
    let features = record(features, &inputs, |_| FeaturesRule { output: saved, problem });
    Ok((output, features))
}

/// From the gradient of the output.
struct SumRule {
    output: SavedOutput,
    problem: Problem,
}

impl Function for SumRule {
    fn name(&self) -> &'static str {
        FUSED
    }

    fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        backward.first_order_only(FUSED)?;
        let (output, grad) = (backward.output(&self.output), backward.grad());
        let gradient = match place(FUSED, &[&output, grad])? {
            Place::Gpu(gpu) => gpu::add_relu_gap_backward(gpu, &self.problem, &output, Some(grad), None)?,
            Place::Host => dispatch_float!(FUSED, grad.dtype(), T => {
                let gradient = cpu::mask(&output.floats::<T>(FUSED)?, &grad.floats::<T>(FUSED)?);
                Tensor::from_floats(gradient, grad.shape(), grad.dtype())
            })?,
        };
        Ok(vec![Some(gradient.clone()), Some(gradient)])
    }
}

/// From the gradient of the features.
struct FeaturesRule {
    output: Tensor,
    problem: Problem,
}

impl Function for FeaturesRule {
    fn name(&self) -> &'static str {
        FUSED
    }

    fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        backward.first_order_only(FUSED)?;
        let (output, grad) = (&self.output, backward.grad());
        let shape: &Shape = output.shape();
        let gradient = match place(FUSED, &[output, grad])? {
            Place::Gpu(gpu) => gpu::add_relu_gap_backward(gpu, &self.problem, output, None, Some(grad))?,
            Place::Host => dispatch_float!(FUSED, output.dtype(), T => {
                let spread = cpu::backward(&self.problem, 0, &grad.floats::<T>(FUSED)?);
                Tensor::from_floats(cpu::mask(&output.floats::<T>(FUSED)?, &spread), shape, output.dtype())
            })?,
        };
        Ok(vec![Some(gradient.clone()), Some(gradient)])
    }
}
