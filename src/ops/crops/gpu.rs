//! A thread for each value.

use super::{Extents, OP};
use crate::driver::seam::Address;
use crate::gpu::{Geometry, Gpu, Kernel, Signature};
use crate::{DType, Error, Result, Tensor};

/// output, images, plan, mean, deviation, extents: models, batch, images, height, width, channels
const CROPS: Kernel<(Address, Address, Address, Address, Address, [u32; 6])> = Kernel::new("crops", "crops", &["f32"]);

pub(crate) static KERNELS: &[Signature] = &[CROPS.signature()];

pub(super) fn crops(gpu: &'static Gpu, inputs: [&Tensor; 4], extents: Extents) -> Result<Tensor> {
    let Extents { models, batch, samples, height, width, channels } = extents;
    let output = Tensor::empty_on(gpu, extents.output(), DType::F32)?;
    let mut counted = [0; 6];
    for (to, extent) in counted.iter_mut().zip([models, batch, samples, height, width, channels]) {
        let refuse = |_| Error::shape(OP, format!("extent {extent}: kernels count to 2³² − 1"));
        *to = u32::try_from(extent).map_err(refuse)?;
    }
    let [images, plan, mean, deviation] = inputs;
    let arguments =
        (output.address()?, images.address()?, plan.address()?, mean.address()?, deviation.address()?, counted);
    CROPS.launch(gpu, "f32", Geometry::for_items(output.elements(), 256), arguments)?;
    Ok(output)
}
