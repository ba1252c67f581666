//! A thread for 16 bytes of an output pixel; the axes' entries follow from their rules.

use super::{Axis, Rule};
use crate::driver::seam::Address;
use crate::gpu::{FLOATS, Geometry, Gpu, Kernel, Signature};
use crate::tensor::Shape;
use crate::{Error, Result, Tensor};

/// As `Axis` in the kernel file.
type AxisArgument = [u32; 9];

/// output, input, batch, channels, vertical, horizontal
const RESAMPLE: Kernel<(Address, Address, u64, u64, AxisArgument, AxisArgument)> =
    Kernel::new("resample", "resample", FLOATS);

pub(crate) static KERNELS: &[Signature] = &[RESAMPLE.signature()];

const THREADS: u32 = 256;
/// What a thread loads at once, where the channels allow.
const BYTES_PER_THREAD: usize = 16;

impl Axis {
    /// # Errors
    /// Where a number does not fit the kernel's.
    fn argument(&self, op: &'static str) -> Result<AxisArgument> {
        let (kind, [align_corners, kernel, stride, padding, include_pad]) = match self.rule {
            Rule::Nearest => (0, [0; 5]),
            Rule::Linear { align_corners } => (1, [usize::from(align_corners), 0, 0, 0, 0]),
            Rule::Cubic { align_corners } => (2, [usize::from(align_corners), 0, 0, 0, 0]),
            Rule::Windows { kernel, stride, padding, count_include_pad } => {
                (3, [0, kernel, stride, padding, usize::from(count_include_pad)])
            }
            Rule::Adaptive => (4, [0; 5]),
        };
        let (input, output) = if self.transposed { (self.output(), self.input) } else { (self.input, self.output()) };
        let numbers =
            [kind, input, output, usize::from(self.transposed), align_corners, kernel, stride, padding, include_pad];
        if let Some(large) = numbers.iter().find(|&&number| number >= 1 << 30) {
            let message = format!("an extent of {large} ({:?}), expected less than 2^30 on a GPU", self.rule);
            return Err(Error::shape(op, message));
        }
        Ok(numbers.map(|number| number as u32))
    }
}

pub(super) fn resample(
    gpu: &'static Gpu,
    op: &'static str,
    input: &Tensor,
    shape: Shape,
    [vertical, horizontal]: [&std::sync::Arc<Axis>; 2],
) -> Result<Tensor> {
    let ([batch, channels], dtype) = ([shape[0], shape[3]], input.dtype());
    let output = Tensor::empty_on(gpu, shape, dtype)?;
    let per_thread = BYTES_PER_THREAD / dtype.size();
    let threads = if channels % per_thread == 0 { output.elements() / per_thread } else { output.elements() };
    let axes = (vertical.argument(op)?, horizontal.argument(op)?);
    let arguments = (output.address()?, input.address()?, batch as u64, channels as u64, axes.0, axes.1);
    RESAMPLE.launch(gpu, dtype.name(), Geometry::for_items(threads, THREADS), arguments)?;
    Ok(output)
}
