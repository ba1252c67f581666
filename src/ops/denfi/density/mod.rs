//! How many points lie on the boundary of a box.

mod cpu;
pub(crate) mod gpu;

use super::check_extents;
use crate::autograd::{Backward, Function, record};
use crate::tensor::{Place, place};
use crate::{DType, Error, Result, Tensor, dispatch_float};

const OP: &str = "boundary_density";

/// What a bird's-eye map covers, in metres: from where to where along x (columns) and along y (rows).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MapRange {
    /// Along x.
    pub x: [f64; 2],
    /// Along y.
    pub y: [f64; 2],
}

/// Extents of one call.
#[derive(Clone, Copy)]
struct Problem {
    batch: usize,
    boxes: usize,
    height: usize,
    width: usize,
    range: MapRange,
}

impl Problem {
    /// Down and across.
    fn cells_per_metre(&self) -> [f64; 2] {
        let MapRange { x, y } = self.range;
        [self.height as f64 / (y[1] - y[0]), self.width as f64 / (x[1] - x[0])]
    }
}

/// Whether the points of boxes lie on their boundary, as those of a laser scanner do: for each box the mean of
/// ln(1 + count) at its corners and the middles of its edges, that at its centre, and the difference of the two. The
/// result is (batch, boxes, 3): boundary, centre, contrast.
///
/// `boxes` (batch, boxes, 7) are (x, y, z, dx, dy, dz, θ): centre, length along the heading, width, height, in metres,
/// and the heading in radians from +x towards +y. They had better be `f32`: half types are coarse for metres. `counts`
/// (batch, height, width), `i64`, has the number of points in each cell of the map over `range`. It is read bilinearly,
/// cells outside of the map as empty; a negative count is NaN. First derivatives only, with respect to `boxes`; those by
/// z and dz are 0.
///
/// A score may be weighed by 1 + κ tanh(contrast).
///
/// # Errors
/// Where shapes, dtypes or devices do not fit, or the range is empty or not finite.
pub fn boundary_density(boxes: &Tensor, counts: &Tensor, range: MapRange) -> Result<Tensor> {
    let problem = check(boxes, counts, range)?;
    let dtype = boxes.dtype();
    let output = match place(OP, &[boxes, counts])? {
        Place::Gpu(gpu) => gpu::forward(gpu, &problem, boxes, counts)?,
        Place::Host => dispatch_float!(OP, dtype, T => {
            let output = cpu::forward(&problem, &boxes.floats::<T>(OP)?, counts.data()?);
            Tensor::from_floats(output, [problem.batch, problem.boxes, 3], dtype)
        })?,
    };
    Ok(record(output, &[boxes], |_| DensityRule { boxes: boxes.clone(), counts: counts.clone(), problem }))
}

fn check(boxes: &Tensor, counts: &Tensor, range: MapRange) -> Result<Problem> {
    let [batch, number, values] = boxes.dims(OP, "boxes (batch, boxes, 7)")?;
    let [maps, height, width] = counts.dims(OP, "counts (batch, height, width)")?;
    boxes.expect_float(OP)?;
    counts.expect_dtype(OP, DType::I64)?;
    if values != 7 || maps != batch || number > u32::MAX as usize {
        let message = format!("boxes {} with counts {}", boxes.shape(), counts.shape());
        let expected = "expected (batch, boxes, 7) and (batch, height, width)";
        return Err(Error::shape(OP, format!("{message}, {expected}")));
    }
    check_extents(OP, height, width)?;
    let fits = |[from, to]: [f64; 2]| (to - from).is_finite() && ((to - from) as f32) > 0.0;
    if !fits(range.x) || !fits(range.y) {
        return Err(Error::argument(OP, format!("{range:?}, expected finite ranges that are not empty")));
    }
    Ok(Problem { batch, boxes: number, height, width, range })
}

struct DensityRule {
    boxes: Tensor,
    counts: Tensor,
    problem: Problem,
}

impl Function for DensityRule {
    fn name(&self) -> &'static str {
        OP
    }

    fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        backward.first_order_only(OP)?;
        let (Self { boxes, counts, problem }, grad) = (self, backward.grad());
        let gradient = match place(OP, &[boxes, counts, grad])? {
            Place::Gpu(gpu) => gpu::backward(gpu, problem, boxes, counts, grad)?,
            Place::Host => dispatch_float!(OP, boxes.dtype(), T => {
                let values = (boxes.floats::<T>(OP)?, grad.floats::<T>(OP)?);
                let gradient = cpu::backward(problem, &values.0, counts.data()?, &values.1);
                Tensor::from_floats(gradient, boxes.shape(), boxes.dtype())
            })?,
        };
        Ok(vec![Some(gradient)])
    }
}
