//! A thread for each box.

use super::Problem;
use crate::driver::seam::Address;
use crate::gpu::{FLOATS, Geometry, Gpu, Kernel, Signature};
use crate::{Result, Tensor};

/// As `CountMap` in the kernel file; the last four are the bits of `f32`.
type Description = [u32; 7];

/// output, boxes, counts, boxes in all, description
const FORWARD: Kernel<(Address, Address, Address, u64, Description)> =
    Kernel::new("boundary_density", "boundary_density_forward", FLOATS);
/// gradient of the boxes, of the output, boxes, counts, boxes in all, description
const BACKWARD: Kernel<(Address, Address, Address, Address, u64, Description)> =
    Kernel::new("boundary_density", "boundary_density_backward", FLOATS);

pub(crate) static KERNELS: &[Signature] = &[FORWARD.signature(), BACKWARD.signature()];

/// As in the kernel file.
const THREADS: u32 = 256;

impl Problem {
    fn description(&self) -> Description {
        let bits = |value: f64| (value as f32).to_bits();
        let [rows, columns] = self.cells_per_metre().map(bits);
        let [x0, y0] = [self.range.x[0], self.range.y[0]].map(bits);
        [self.height as u32, self.width as u32, self.boxes as u32, x0, y0, rows, columns]
    }

    fn geometry(&self) -> Geometry {
        Geometry::for_items(self.batch * self.boxes, THREADS)
    }
}

pub(super) fn forward(gpu: &'static Gpu, problem: &Problem, boxes: &Tensor, counts: &Tensor) -> Result<Tensor> {
    let output = Tensor::empty_on(gpu, [problem.batch, problem.boxes, 3], boxes.dtype())?;
    let total = (problem.batch * problem.boxes) as u64;
    let arguments = (output.address()?, boxes.address()?, counts.address()?, total, problem.description());
    FORWARD.launch(gpu, boxes.dtype().name(), problem.geometry(), arguments)?;
    Ok(output)
}

pub(super) fn backward(
    gpu: &'static Gpu,
    problem: &Problem,
    boxes: &Tensor,
    counts: &Tensor,
    grad: &Tensor,
) -> Result<Tensor> {
    let gradient = Tensor::empty_on(gpu, boxes.shape(), boxes.dtype())?;
    let total = (problem.batch * problem.boxes) as u64;
    let arguments =
        (gradient.address()?, grad.address()?, boxes.address()?, counts.address()?, total, problem.description());
    BACKWARD.launch(gpu, boxes.dtype().name(), problem.geometry(), arguments)?;
    Ok(gradient)
}
