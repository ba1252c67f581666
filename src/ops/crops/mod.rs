//! Batches gathered by index from a set of images that stays where it is.

pub(crate) mod cost;
mod cpu;
pub(crate) mod gpu;

use crate::tensor::{Place, place};
use crate::{DType, Error, Result, Tensor};

const OP: &str = "crops_each";

/// Numbers of a plan for each sample.
const PLAN: usize = 4;

/// For every model a batch of shifted, perhaps mirrored and normalised images, (models, batch, height, width, channels)
/// in `f32`: (x / 255 − mean) / deviation. Not differentiable.
///
/// `images` is (samples, height, width, channels) in `u8`; `mean` and `deviation` are (models, channels) in `f32`, of
/// values from 0 to 1. `plan` (models, batch, 4) in `i64` says of each sample (image, top, left, flip): result (y, x)
/// is pixel (y + top, x' + left) with x' = x, or mirrored where flip is not 0; beyond the image it is a black one. So an
/// offset of −p to p is a crop of the image with p black pixels around it. Image −1 is padding, all zeros.
///
/// On a GPU the plan is not looked at by the host: an image beyond the last is NaN.
///
/// ```
/// use gridgrad::{Tensor, ops};
/// let images = Tensor::new(&[0u8, 255, 51, 102], [1, 2, 2, 1])?;
/// let plan = Tensor::new(&[0i64, 0, 0, 1], [1, 1, 4])?; // mirrored
/// let (mean, deviation) = (Tensor::new(&[0f32], [1, 1])?, Tensor::new(&[1f32], [1, 1])?);
/// let batch = ops::crops_each(&images, &plan, &mean, &deviation)?;
/// assert_eq!(batch.to_vec::<f32>()?, [1.0, 0.0, 0.4, 0.2]);
/// # Ok::<(), gridgrad::Error>(())
/// ```
///
/// # Errors
/// Where shapes, dtypes or devices do not fit, or on the host an image is not one of the set.
pub fn crops_each(images: &Tensor, plan: &Tensor, mean: &Tensor, deviation: &Tensor) -> Result<Tensor> {
    let [samples, height, width, channels] = images.dims::<4>(OP, "images (samples, height, width, channels)")?;
    let [models, batch, numbers] = plan.dims::<3>(OP, "plan (models, batch, 4)")?;
    images.expect_dtype(OP, DType::U8)?;
    plan.expect_dtype(OP, DType::I64)?;
    for vector in [mean, deviation] {
        vector.expect_dtype(OP, DType::F32)?;
        if **vector.shape() != [models, channels] {
            let message = format!("{} for plan {} and images {}", vector.shape(), plan.shape(), images.shape());
            return Err(Error::shape(OP, message));
        }
    }
    if numbers != PLAN {
        return Err(Error::shape(OP, format!("plan {}, expected (models, batch, 4)", plan.shape())));
    }
    let extents = Extents { models, batch, samples, height, width, channels };
    match place(OP, &[images, plan, mean, deviation])? {
        Place::Gpu(gpu) => gpu::crops(gpu, [images, plan, mean, deviation], extents),
        Place::Host => {
            let plan = plan.data::<i64>()?;
            if let Some(sample) = plan.chunks(PLAN).map(|own| own[0]).find(|&image| image >= samples as i64) {
                return Err(Error::argument(OP, format!("the plan names image {sample} of {samples}")));
            }
            let values = cpu::crops(images.data()?, plan, mean.data()?, deviation.data()?, extents);
            Tensor::from_buffer(values, extents.output())
        }
    }
}

/// What is asked for, checked.
#[derive(Clone, Copy)]
struct Extents {
    models: usize,
    batch: usize,
    samples: usize,
    height: usize,
    width: usize,
    channels: usize,
}

impl Extents {
    fn output(self) -> [usize; 5] {
        [self.models, self.batch, self.height, self.width, self.channels]
    }
}
