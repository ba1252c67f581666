//! Where a tensor's values are.

use std::sync::Arc;

use super::buffer::Bytes;
use super::forms::Forms;
use super::{Device, Element, Inner, Shape, Tensor};
use crate::autograd::{Backward, Function, record};
use crate::driver::seam::Address;
use crate::gpu::{Gpu, Memory};
use crate::{DType, Error, Result};

/// Values on the host or on a GPU.
pub(crate) enum Storage {
    /// With what ops have made of the values.
    Host(Bytes, Forms),
    Gpu(Memory),
}

impl Storage {
    pub fn host(&self, op: &'static str) -> Result<&Bytes> {
        match self {
            Storage::Host(bytes, _) => Ok(bytes),
            Storage::Gpu(memory) => Err(Error::NotOnHost { op, device: memory.gpu().device() }),
        }
    }

    /// The values for writing; forms of those from before are dropped.
    pub fn host_mut(&mut self, op: &'static str) -> Result<&mut Bytes> {
        match self {
            Storage::Host(bytes, forms) => {
                forms.clear();
                Ok(bytes)
            }
            Storage::Gpu(memory) => Err(Error::NotOnHost { op, device: memory.gpu().device() }),
        }
    }

    pub fn copy(&self) -> Result<Self> {
        Ok(match self {
            Storage::Host(bytes, _) => Storage::Host(bytes.copy(), Forms::default()),
            Storage::Gpu(memory) => Storage::Gpu(memory.copy()?),
        })
    }
}

/// Where the tensors of an op are, and so which of its two implementations runs.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    /// In the host's memory: the processor computes.
    Host,
    /// On a GPU, the same for all.
    Gpu(&'static Gpu),
}

/// Where `tensors` are.
///
/// # Errors
/// [`Error::DeviceMismatch`] where they are not all in one place.
pub(crate) fn place(op: &'static str, tensors: &[&Tensor]) -> Result<Place> {
    let Some((first, rest)) = tensors.split_first() else { return Ok(Place::Host) };
    let left = first.device();
    if let Some(right) = rest.iter().map(|tensor| tensor.device()).find(|right| *right != left) {
        return Err(Error::DeviceMismatch { op, left, right });
    }
    Ok(first.gpu().map_or(Place::Host, Place::Gpu))
}

impl Tensor {
    /// Where the memory is.
    pub fn device(&self) -> Device {
        self.gpu().map_or(Device::Cpu, Gpu::device)
    }

    /// The GPU that holds the values, if one does.
    pub(crate) fn gpu(&self) -> Option<&'static Gpu> {
        self.memory().map(Memory::gpu)
    }

    /// The device memory, if the values are in one.
    pub(crate) fn memory(&self) -> Option<&Memory> {
        match &*self.0.storage {
            Storage::Host(..) => None,
            Storage::Gpu(memory) => Some(memory),
        }
    }

    /// The address of the values in device memory: an argument for kernels.
    ///
    /// # Errors
    /// Where the values are on the host.
    pub(crate) fn address(&self) -> Result<Address> {
        let not_there = || Error::Autograd("a kernel was given a tensor of the host".into());
        self.memory().map(Memory::address).ok_or_else(not_there)
    }

    /// The address for writing: in place if nobody else holds the memory, else that of a copy that replaces it. For
    /// leaves, as [`Tensor::data_mut`].
    pub(crate) fn address_mut(&mut self) -> Result<Address> {
        self.make_unique()?;
        self.address()
    }

    /// A tensor in device memory with unspecified values: an op's output, of which its kernel writes every element.
    ///
    /// # Errors
    /// Where the dtype is `f64`, which GPU kernels do not compute in, or the device has no room.
    pub(crate) fn empty_on(gpu: &'static Gpu, shape: impl Into<Shape>, dtype: DType) -> Result<Self> {
        let shape = shape.into();
        if dtype == DType::F64 {
            return Err(gpu_dtype(gpu.device(), dtype));
        }
        let bytes = shape.checked_elements("Tensor::empty_on", dtype.size())? * dtype.size();
        Ok(Self::from_storage(Storage::Gpu(gpu.allocate(bytes)?), shape, dtype))
    }

    /// The same values on `device`. Gradients flow back to where this tensor is.
    ///
    /// # Errors
    /// Where this machine or this build does not offer the device (the error says why), it has no room, or the dtype is
    /// `f64` and the device a GPU.
    pub fn to_device(&self, device: Device) -> Result<Self> {
        if device == self.device() {
            return Ok(self.clone());
        }
        let moved = match device {
            Device::Cpu => self.downloaded()?,
            _ if self.gpu().is_some() => self.downloaded()?.uploaded(device)?,
            _ => self.uploaded(device)?,
        };
        Ok(record(moved, &[self], |_| ToDeviceRule { from: self.device() }))
    }

    fn uploaded(&self, device: Device) -> Result<Self> {
        let gpu = Gpu::open(device)?;
        if self.dtype() == DType::F64 {
            return Err(gpu_dtype(device, DType::F64));
        }
        let memory = gpu.upload(self.raw_bytes()?)?;
        Ok(Self::from_storage(Storage::Gpu(memory), self.shape().clone(), self.dtype()))
    }

    fn downloaded(&self) -> Result<Self> {
        let Some(memory) = self.memory() else { return Ok(self.detach()) };
        let mut bytes = Bytes::recycled(memory.bytes());
        memory.read(bytes.raw_mut())?;
        Ok(Self::from_storage(Storage::Host(bytes, Forms::default()), self.shape().clone(), self.dtype()))
    }

    /// A copy of the values, row-major.
    ///
    /// # Errors
    /// Where `T` is not the tensor's element type, or the device refuses the copy.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        self.expect_dtype("Tensor::to_vec", T::DTYPE)?;
        match &*self.0.storage {
            Storage::Host(bytes, _) => Ok(bytes.as_slice().to_vec()),
            Storage::Gpu(memory) => {
                let mut values = vec![T::zeroed(); self.elements()];
                memory.read(bytemuck::cast_slice_mut(&mut values))?;
                Ok(values)
            }
        }
    }

    /// Overwrites the values with those of `source`, of the same shape and dtype, which may be on another device. The
    /// address stays where nobody else holds the memory. For leaves, as [`Tensor::data_mut`].
    pub(crate) fn overwrite(&mut self, source: &Tensor) -> Result<()> {
        if source.shape() != self.shape() {
            let message = format!("values of shape {} for {}", source.shape(), self.shape());
            return Err(Error::shape("Tensor::overwrite", message));
        }
        source.expect_dtype("Tensor::overwrite", self.dtype())?;
        self.make_unique()?;
        match (self.memory(), source.memory()) {
            (Some(to), Some(from)) if to.gpu().device() == from.gpu().device() => to.copy_from(from),
            (Some(to), None) => to.write(source.raw_bytes()?),
            (Some(to), Some(_)) => to.write(source.downloaded()?.raw_bytes()?),
            (None, from) => {
                let moved = if from.is_some() { source.downloaded()? } else { source.clone() };
                let values = moved.raw_bytes()?;
                self.unique_storage()?.host_mut("Tensor::overwrite")?.raw_mut().copy_from_slice(values);
                Ok(())
            }
        }
    }

    /// Moves the values to `device`; the identity stays. For leaves, as [`Tensor::data_mut`].
    pub(crate) fn move_to(&mut self, device: Device) -> Result<()> {
        let moved = self.detach().to_device(device)?;
        self.0 = Arc::new(Inner { storage: Arc::clone(&moved.0.storage), ..(*self.0).clone() });
        Ok(())
    }

    /// Exchanges the values of two leaves of the same shape and dtype; the identities stay.
    pub(crate) fn swap_values(&mut self, other: &mut Tensor) {
        debug_assert!(self.shape() == other.shape() && self.dtype() == other.dtype());
        let with = |tensor: &Tensor, storage: &Arc<Storage>| {
            Tensor(Arc::new(Inner { storage: Arc::clone(storage), ..(*tensor.0).clone() }))
        };
        (*self, *other) = (with(self, &other.0.storage), with(other, &self.0.storage));
    }

    pub(super) fn make_unique(&mut self) -> Result<()> {
        if Arc::get_mut(&mut self.0).is_none() {
            self.0 = Arc::new((*self.0).clone());
        }
        let inner = Arc::get_mut(&mut self.0).ok_or_else(unreachable)?;
        if Arc::get_mut(&mut inner.storage).is_none() {
            inner.storage = Arc::new(inner.storage.copy()?);
        }
        Ok(())
    }

    pub(super) fn unique_storage(&mut self) -> Result<&mut Storage> {
        self.make_unique()?;
        Arc::get_mut(&mut self.0).and_then(|inner| Arc::get_mut(&mut inner.storage)).ok_or_else(unreachable)
    }
}

fn unreachable() -> Error {
    Error::Autograd("a tensor that was just made unique is shared".into())
}

fn gpu_dtype(device: Device, got: DType) -> Error {
    let expected = format!("f32, bf16, f16, i64 or u8: {device} does not compute in {got}");
    Error::DType { op: "to_device", got, expected }
}

struct ToDeviceRule {
    from: Device,
}

impl Function for ToDeviceRule {
    fn name(&self) -> &'static str {
        "to_device"
    }

    fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(backward.grad().to_device(self.from)?)])
    }
}
