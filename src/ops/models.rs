//! The leading model axis: many networks of one architecture computed by one op.

use std::sync::Arc;

use crate::tensor::{Buffer, Element, Place};
use crate::{Device, Error, Result, Tensor};

/// How many samples of each model's batch are real, for the ops over a leading model axis. The samples behind them are
/// padding, which lets models with batches of different sizes share a launch: it has no part in any sum, and results
/// and gradients there are zero or multiples of zero.
///
/// The numbers of a model depend on its own real samples alone: not on the models beside it, on their number or order,
/// or on the padding. Sums over samples are cut into pieces of fixed size from the front, or by the model's own count.
///
/// ```
/// use gridgrad::ops::{Counts, Conv2dOptions, conv2d_each};
/// use gridgrad::{DType, Device, Tensor};
/// let counts = Counts::new(&[3, 2], Device::Cpu)?;
/// let maps = Tensor::ones([2, 3, 8, 8, 4], DType::F32)?; // (models, samples, height, width, channels)
/// let weights = Tensor::ones([2, 16, 4, 1, 1], DType::F32)?; // (models, out, in, height, width)
/// let output = conv2d_each(&maps, &weights, None, &counts, Conv2dOptions::default())?;
/// assert_eq!(output.shape().to_vec(), [2, 3, 8, 8, 16]);
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Counts {
    list: Arc<[usize]>,
    on_device: OnDevice,
}

/// What kernels are told.
#[derive(Clone, Debug)]
enum OnDevice {
    /// Nothing: there is no padding.
    Full,
    /// Nothing: the counts are for the processor.
    Absent,
    /// (models), `i64`
    Counts(Tensor),
}

impl Counts {
    /// The counts of the models in their order, for ops on `device`.
    ///
    /// # Errors
    /// Where there is no model, a count is 0, or the device has no room.
    pub fn new(counts: &[usize], device: Device) -> Result<Self> {
        if counts.is_empty() || counts.contains(&0) {
            let message = format!("samples of each model {counts:?}: expected one model or more, each with a sample");
            return Err(Error::argument("Counts::new", message));
        }
        let on_device = if device == Device::Cpu {
            OnDevice::Absent
        } else {
            let list: Vec<i64> = counts.iter().map(|&count| count as i64).collect();
            OnDevice::Counts(Tensor::new(&list, [counts.len()])?.to_device(device)?)
        };
        Ok(Counts { list: counts.into(), on_device })
    }

    /// `models` models of `batch` samples without padding, for ops on any device.
    pub fn full(models: usize, batch: usize) -> Self {
        Counts { list: vec![batch; models].into(), on_device: OnDevice::Full }
    }

    /// Number of models.
    pub fn models(&self) -> usize {
        self.list.len()
    }

    /// The count of each model.
    pub fn list(&self) -> &[usize] {
        &self.list
    }

    /// For kernels: `None` where there is no padding.
    pub(crate) fn tensor(&self, op: &'static str) -> Result<Option<&Tensor>> {
        match &self.on_device {
            OnDevice::Full => Ok(None),
            OnDevice::Counts(tensor) => Ok(Some(tensor)),
            OnDevice::Absent => {
                Err(Error::argument(op, "the counts are on the host; give `Counts::new` the tensors' device"))
            }
        }
    }

    /// Whether they fit tensors with `models` models of `batch` samples, in `place`.
    pub(crate) fn check(&self, op: &'static str, [models, batch]: [usize; 2], place: Place) -> Result<()> {
        let fits = |&count: &usize| match self.on_device {
            OnDevice::Full => count == batch,
            _ => count <= batch,
        };
        if self.models() != models || !self.list.iter().all(fits) {
            let message = format!("counts {:?} for {models} models of {batch} samples", self.list);
            return Err(Error::shape(op, message));
        }
        if let Place::Gpu(gpu) = place {
            // A grid has so many blocks across the models.
            const MOST: usize = 65_535;
            if models > MOST {
                return Err(Error::shape(op, format!("{models} models: a launch takes {MOST} at most")));
            }
            let left = gpu.device();
            let right = self.tensor(op)?.map_or(left, Tensor::device);
            if left != right {
                return Err(Error::DeviceMismatch { op, left, right });
            }
        }
        Ok(())
    }

    /// One result for all models, on the host: `run(model, count)` returns the elements of the real samples of a model,
    /// which begin every `model_len` elements; zeros follow.
    pub(crate) fn collect<T: Element>(
        &self,
        model_len: usize,
        run: impl Fn(usize, usize) -> Buffer<T> + Sync + Send,
    ) -> Buffer<T> {
        if let [count] = *self.list {
            let own = run(0, count);
            if own.len() == model_len {
                return own;
            }
        }
        let mut output = Buffer::recycled(self.models() * model_len);
        crate::cpu::parallel::pieces_mut(&mut output, model_len, |model, output| {
            let own = run(model, self.list[model]);
            output[..own.len()].copy_from_slice(&own);
            output[own.len()..].fill(T::zeroed());
        });
        output
    }
}
