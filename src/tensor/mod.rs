//! Tensors: a shape, an element type, a device and immutable, shared, row-major memory.
//!
//! A [`Tensor`] is cheap to clone. [`Tensor::reshape`](crate::Tensor::reshape) shares memory; every other change of
//! layout is an op that copies. Ops live in [`crate::ops`]; those on one tensor are methods here as well.
//!
//! ```
//! use gridgrad::Tensor;
//! let x = Tensor::new(&[1.0f32, 2.0, 3.0, 4.0], [2, 2])?;
//! assert_eq!(x.matmul(&x)?.to_vec::<f32>()?, [7.0, 10.0, 15.0, 22.0]);
//! # Ok::<(), gridgrad::Error>(())
//! ```

mod arena;
mod buffer;
mod device;
mod dtype;
mod forms;
mod shape;
mod storage;

use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::autograd::Node;
use crate::cpu::Float;
use crate::random::Philox;
use crate::{Error, Result};

pub use buffer::{Buffer, MemoryStats, memory_stats, release_cached, reset_peak};
pub use device::Device;
pub use dtype::{DType, Element};
pub use shape::Shape;

use buffer::Bytes;
use forms::Forms;
pub(crate) use forms::Weight;
use storage::Storage;
pub(crate) use storage::{Place, place};

/// Identifies a tensor on the tape. Later tensors have larger numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TensorId(u64);

impl TensorId {
    fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        TensorId(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// An n-dimensional array. See the [module documentation](self).
///
/// ```
/// use gridgrad::{DType, Tensor};
/// let x = Tensor::new(&[1.0f32, -2.0, 3.0], [3])?.variable()?;
/// let loss = x.relu()?.square()?.sum_all()?;
/// assert_eq!(loss.item()?, 10.0);
/// assert_eq!(loss.backward()?.get(&x).unwrap().to_vec::<f32>()?, [2.0, 0.0, 6.0]);
/// assert_eq!(x.cast(DType::Bf16)?.dtype(), DType::Bf16);
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone)]
pub struct Tensor(Arc<Inner>);

#[derive(Clone)]
struct Inner {
    id: TensorId,
    shape: Shape,
    dtype: DType,
    storage: Arc<Storage>,
    node: Option<Arc<Node>>,
    is_variable: bool,
}

impl Tensor {
    fn from_bytes(bytes: Bytes, shape: Shape, dtype: DType) -> Self {
        Self::from_storage(Storage::Host(bytes, Forms::default()), shape, dtype)
    }

    fn from_storage(storage: Storage, shape: Shape, dtype: DType) -> Self {
        let storage = Arc::new(storage);
        Tensor(Arc::new(Inner { id: TensorId::next(), shape, dtype, storage, node: None, is_variable: false }))
    }

    /// A tensor of `shape` with a copy of `values` in row-major order.
    ///
    /// # Errors
    /// Where the number of values is not the shape's.
    pub fn new<T: Element>(values: &[T], shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        let elements = shape.checked_elements("Tensor::new", size_of::<T>())?;
        if values.len() != elements {
            let message = format!("{} values for shape {shape}, which has {elements}", values.len());
            return Err(Error::shape("Tensor::new", message));
        }
        Self::from_buffer(Buffer::copy_of(values), shape)
    }

    /// A tensor that takes over a buffer: how ops return their results.
    ///
    /// # Errors
    /// Where the number of elements is not the shape's.
    pub fn from_buffer<T: Element>(buffer: Buffer<T>, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        if buffer.len() != shape.elements() {
            let message = format!("{} values for shape {shape}, which has {}", buffer.len(), shape.elements());
            return Err(Error::shape("Tensor::from_buffer", message));
        }
        Ok(Self::from_bytes(buffer.into_bytes(), shape, T::DTYPE))
    }

    /// Like [`Tensor::from_buffer`], rounded to `dtype` where that is a half-precision type.
    ///
    /// # Errors
    /// Where the number of elements is not the shape's, or `dtype` is not a floating-point type.
    pub fn from_floats<T: Float>(buffer: Buffer<T>, shape: impl Into<Shape>, dtype: DType) -> Result<Self> {
        Self::from_stored(buffer, shape, dtype)
    }

    /// [`Tensor::from_floats`] for what [`Tensor::stored`] gave.
    pub(crate) fn from_stored<S: Element>(buffer: Buffer<S>, shape: impl Into<Shape>, dtype: DType) -> Result<Self> {
        Self::from_buffer(buffer, shape)?.cast_values(dtype)
    }

    /// A scalar: a tensor without axes.
    pub fn scalar<T: Element>(value: T) -> Self {
        Self::from_bytes(Buffer::copy_of(&[value]).into_bytes(), Shape::default(), T::DTYPE)
    }

    /// `shape` filled with `value`, rounded to `dtype`.
    ///
    /// # Errors
    /// Where the shape is too large for the address range.
    pub fn full(shape: impl Into<Shape>, value: f64, dtype: DType) -> Result<Self> {
        let shape = shape.into();
        let elements = shape.checked_elements("Tensor::full", dtype.size())?;
        fn filled<T: Element>(elements: usize, value: f64) -> Bytes {
            let mut buffer = Buffer::recycled(elements);
            buffer.fill(T::from_f64(value));
            buffer.into_bytes()
        }
        let bytes = crate::dispatch_dtype!(dtype, T => filled::<T>(elements, value));
        Ok(Self::from_bytes(bytes, shape, dtype))
    }

    /// `shape` filled with zeros.
    ///
    /// # Errors
    /// As [`Tensor::full`].
    pub fn zeros(shape: impl Into<Shape>, dtype: DType) -> Result<Self> {
        Self::full(shape, 0.0, dtype)
    }

    /// `shape` filled with ones.
    ///
    /// # Errors
    /// As [`Tensor::full`].
    pub fn ones(shape: impl Into<Shape>, dtype: DType) -> Result<Self> {
        Self::full(shape, 1.0, dtype)
    }

    /// This tensor's shape, dtype and device, filled with `value`.
    ///
    /// # Errors
    /// Where the device has no room.
    pub fn full_like(&self, value: f64) -> Result<Self> {
        match self.gpu() {
            None => Self::full(self.shape(), value, self.dtype()),
            Some(gpu) => crate::ops::gpu::full(gpu, self.shape(), value, self.dtype()),
        }
    }

    /// Standard normal numbers of `stream`: element i is the stream's number i, in `f64`, rounded to `dtype`.
    ///
    /// # Errors
    /// As [`Tensor::full`].
    pub fn randn(shape: impl Into<Shape>, dtype: DType, stream: Philox) -> Result<Self> {
        Self::from_index(shape, dtype, |i| stream.normal(i as u64))
    }

    /// Numbers of `stream`, uniform in [`low`, `high`).
    ///
    /// # Errors
    /// As [`Tensor::full`].
    pub fn uniform(shape: impl Into<Shape>, low: f64, high: f64, dtype: DType, stream: Philox) -> Result<Self> {
        Self::from_index(shape, dtype, |i| low + (high - low) * stream.uniform_f64(i as u64))
    }

    /// Element i, in row-major order, is `value(i)` rounded to `dtype`.
    ///
    /// # Errors
    /// As [`Tensor::full`].
    pub fn from_index(shape: impl Into<Shape>, dtype: DType, value: impl Fn(usize) -> f64) -> Result<Self> {
        let shape = shape.into();
        let elements = shape.checked_elements("Tensor::from_index", dtype.size())?;
        let bytes =
            crate::dispatch_dtype!(dtype, T => Buffer::<T>::from_fn(elements, |i| T::from_f64(value(i))).into_bytes());
        Ok(Self::from_bytes(bytes, shape, dtype))
    }

    /// This tensor's place in the order of creation.
    pub fn id(&self) -> TensorId {
        self.0.id
    }

    /// Extents of the axes, outermost first.
    pub fn shape(&self) -> &Shape {
        &self.0.shape
    }

    /// Number of axes.
    pub fn rank(&self) -> usize {
        self.0.shape.len()
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.0.shape.elements()
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.0.dtype
    }

    /// The extents as an array, for ops that want exactly `N` axes.
    pub(crate) fn dims<const N: usize>(&self, op: &'static str, axes: &str) -> Result<[usize; N]> {
        <[usize; N]>::try_from(&**self.shape())
            .map_err(|_| Error::shape(op, format!("got shape {}, expected {axes}", self.shape())))
    }

    /// The values in place, row-major.
    ///
    /// # Errors
    /// Where `T` is not the tensor's element type, or the values are not in the host's memory.
    pub fn data<T: Element>(&self) -> Result<&[T]> {
        self.expect_dtype("Tensor::data", T::DTYPE)?;
        Ok(self.0.storage.host("Tensor::data")?.as_slice())
    }

    /// A copy of the values as `f64`, whatever the element type.
    ///
    /// # Errors
    /// Where the values are on a device that refuses the copy.
    pub fn to_f64_vec(&self) -> Result<Vec<f64>> {
        let host = self.to_device(Device::Cpu)?;
        let bytes = host.0.storage.host("to_f64_vec")?;
        Ok(crate::dispatch_dtype!(self.dtype(), T => bytes.as_slice::<T>().iter().map(|v| v.to_f64()).collect()))
    }

    /// The only element, as `f64`.
    ///
    /// # Errors
    /// Where there is not exactly one, or it is on a device that refuses the copy.
    pub fn item(&self) -> Result<f64> {
        if self.elements() != 1 {
            return Err(Error::shape("item", format!("shape {} has not exactly one element", self.shape())));
        }
        Ok(self.to_f64_vec()?[0])
    }

    /// The memory as bytes, little-endian on every supported machine.
    ///
    /// # Errors
    /// Where the values are not in the host's memory.
    pub fn raw_bytes(&self) -> Result<&[u8]> {
        Ok(self.0.storage.host("Tensor::raw_bytes")?.raw())
    }

    /// A tensor from raw bytes in row-major order, as [`Tensor::raw_bytes`] gives them.
    ///
    /// # Errors
    /// Where the number of bytes is not the shape's.
    pub fn from_raw_bytes(bytes: &[u8], shape: impl Into<Shape>, dtype: DType) -> Result<Self> {
        let shape = shape.into();
        let wanted = shape.checked_elements("Tensor::from_raw_bytes", dtype.size())? * dtype.size();
        if bytes.len() != wanted {
            let message = format!("{} bytes for {dtype} of shape {shape}, which takes {wanted}", bytes.len());
            return Err(Error::shape("Tensor::from_raw_bytes", message));
        }
        Ok(Self::from_bytes(Buffer::copy_of(bytes).into_bytes(), shape, dtype))
    }

    /// The values as compute type `T`: in place where that is the element type, converted where it is a half type.
    ///
    /// This is how CPU ops read their inputs, so that one body serves `f32`, `f64`, `bf16` and `f16`.
    ///
    /// # Errors
    /// Where the element type's compute type is not `T`, or the values are not in the host's memory.
    pub fn floats<T: Float>(&self, op: &'static str) -> Result<Floats<'_, T>> {
        self.stored(op)
    }

    /// The values as `S`, which is the element type or, for `f32`, that of a half type: how ops read their inputs whose
    /// loops convert `bf16` themselves, with [`dispatch_stored`].
    pub(crate) fn stored<S: Element>(&self, op: &'static str) -> Result<Floats<'_, S>> {
        if self.dtype() == S::DTYPE {
            return Ok(Floats::Borrowed(self.0.storage.host(op)?.as_slice()));
        }
        match (self.dtype(), S::DTYPE) {
            (DType::Bf16 | DType::F16, DType::F32) => {
                let bytes = self.converted(self.0.storage.host(op)?, S::DTYPE);
                Ok(Floats::Converted(Widened(bytes), PhantomData))
            }
            (got, wanted) => Err(Error::DType { op, got, expected: format!("{wanted}, as the op's other tensors") }),
        }
    }

    pub(crate) fn expect_dtype(&self, op: &'static str, wanted: DType) -> Result<()> {
        if self.dtype() == wanted {
            Ok(())
        } else {
            Err(Error::DType { op, got: self.dtype(), expected: wanted.to_string() })
        }
    }

    pub(crate) fn expect_float(&self, op: &'static str) -> Result<()> {
        if self.dtype().is_float() {
            Ok(())
        } else {
            Err(Error::DType { op, got: self.dtype(), expected: "a floating-point type".into() })
        }
    }

    /// Values converted to `dtype`, off the tape. [`Tensor::cast`] is the differentiable form.
    pub(crate) fn cast_values(&self, dtype: DType) -> Result<Self> {
        if dtype == self.dtype() {
            return Ok(self.clone());
        }
        match &*self.0.storage {
            Storage::Host(bytes, _) => Ok(Self::from_bytes(self.converted(bytes, dtype), self.shape().clone(), dtype)),
            Storage::Gpu(memory) => crate::ops::gpu::cast(memory.gpu(), self, dtype),
        }
    }

    fn converted(&self, bytes: &Bytes, dtype: DType) -> Bytes {
        use crate::cpu::bf16::{bf16, narrow, widen};
        fn mapped<S: Element, D: Element>(source: &[S], f: impl Fn(S) -> D + Copy + Sync + Send) -> Bytes {
            let mut converted = Buffer::<D>::recycled(source.len());
            crate::cpu::parallel::map(source, &mut converted, f);
            converted.into_bytes()
        }
        fn convert<S: Element, D: Element>(source: &[S]) -> Bytes {
            mapped(source, |v| D::from_f64(v.to_f64()))
        }
        match (self.dtype(), dtype) {
            (DType::F32, DType::Bf16) => return mapped::<f32, bf16>(bytes.as_slice(), narrow),
            (DType::Bf16, DType::F32) => return mapped::<bf16, f32>(bytes.as_slice(), widen),
            _ => {}
        }
        crate::dispatch_dtype!(self.dtype(), S => {
            let source = bytes.as_slice::<S>();
            crate::dispatch_dtype!(dtype, D => convert::<S, D>(source))
        })
    }

    /// Whether gradients flow to or through this tensor.
    pub fn requires_grad(&self) -> bool {
        self.0.is_variable || self.0.node.is_some()
    }

    /// A leaf of the tape with these values: gradients are collected for it.
    ///
    /// # Errors
    /// Where the element type is not floating point.
    pub fn variable(&self) -> Result<Self> {
        self.expect_float("variable")?;
        let inner = Inner { id: TensorId::next(), node: None, is_variable: true, ..(*self.0).clone() };
        Ok(Tensor(Arc::new(inner)))
    }

    /// The same memory, cut off from the tape.
    pub fn detach(&self) -> Self {
        if !self.requires_grad() {
            return self.clone();
        }
        Tensor(Arc::new(Inner { id: TensorId::next(), node: None, is_variable: false, ..(*self.0).clone() }))
    }

    pub(crate) fn node(&self) -> Option<&Arc<Node>> {
        self.0.node.as_ref()
    }

    pub(crate) fn is_variable(&self) -> bool {
        self.0.is_variable
    }

    /// This tensor's memory under another shape and identity, off the tape. The caller has compared the elements.
    pub(crate) fn share(&self, shape: Shape) -> Self {
        debug_assert_eq!(shape.elements(), self.elements());
        Tensor(Arc::new(Inner { id: TensorId::next(), shape, node: None, is_variable: false, ..(*self.0).clone() }))
    }

    /// This tensor as the result that `node` stands for.
    pub(crate) fn attach(&self, id: TensorId, node: Arc<Node>) -> Self {
        Tensor(Arc::new(Inner { id, node: Some(node), is_variable: false, ..(*self.0).clone() }))
    }

    /// The values for writing: in place if nobody else holds them, else in a copy that replaces them. The identity
    /// stays, so this is for leaves alone.
    pub(crate) fn data_mut<T: Element>(&mut self) -> Result<&mut [T]> {
        self.expect_dtype("Tensor::data_mut", T::DTYPE)?;
        Ok(self.unique_storage()?.host_mut("Tensor::data_mut")?.as_mut_slice())
    }

    /// Whether nobody else can see this tensor's memory.
    pub(crate) fn is_unique(&self) -> bool {
        Arc::strong_count(&self.0) == 1 && Arc::strong_count(&self.0.storage) == 1
    }
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const SHOWN: usize = 8;
        let Ok(values) = self.to_f64_vec() else {
            return write!(f, "Tensor({} {} on {})", self.dtype(), self.shape(), self.device());
        };
        let shown: Vec<String> = values.iter().take(SHOWN).map(|v| format!("{v:.6}")).collect();
        let more = if values.len() > SHOWN { ", …" } else { "" };
        write!(f, "Tensor({} {} [{}{more}])", self.dtype(), self.shape(), shown.join(", "))
    }
}

/// Half-precision values as `f32`.
pub struct Widened(Bytes);

/// Values of a tensor in their compute type. See [`Tensor::floats`].
pub enum Floats<'a, T> {
    /// The tensor's own memory.
    Borrowed(&'a [T]),
    /// Half precision, widened.
    Converted(Widened, PhantomData<T>),
}

impl<T: Element> std::ops::Deref for Floats<'_, T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        match self {
            Floats::Borrowed(values) => values,
            Floats::Converted(widened, _) => widened.0.as_slice(),
        }
    }
}

/// Runs an expression with `T` bound to the element type of `dtype`.
#[macro_export]
#[doc(hidden)]
macro_rules! dispatch_dtype {
    ($dtype:expr, $type:ident => $body:expr) => {
        match $dtype {
            $crate::DType::F32 => {
                type $type = f32;
                $body
            }
            $crate::DType::F64 => {
                type $type = f64;
                $body
            }
            $crate::DType::Bf16 => {
                type $type = half::bf16;
                $body
            }
            $crate::DType::F16 => {
                type $type = half::f16;
                $body
            }
            $crate::DType::I64 => {
                type $type = i64;
                $body
            }
            $crate::DType::U8 => {
                type $type = u8;
                $body
            }
        }
    };
}

/// Runs an expression that returns a `Result` with `T` bound to the compute type of floating-point `dtype`: `f64` for
/// `F64`, `f32` for `F32`, `Bf16` and `F16`. Other dtypes are an error of `op`.
#[macro_export]
macro_rules! dispatch_float {
    ($op:expr, $dtype:expr, $type:ident => $body:expr) => {
        match $dtype {
            $crate::DType::F64 => {
                type $type = f64;
                $body
            }
            $crate::DType::F32 | $crate::DType::Bf16 | $crate::DType::F16 => {
                type $type = f32;
                $body
            }
            got => Err($crate::Error::DType { op: $op, got, expected: "a floating-point type".into() }),
        }
    };
}

/// Runs an expression that returns a `Result` with `S` bound to the type in which a loop reads and writes elements of
/// floating-point `dtype`, and `T` to its compute type. Other dtypes are an error of `op`.
macro_rules! dispatch_stored {
    ($op:expr, $dtype:expr, ($stored:ident, $compute:ident) => $body:expr) => {
        match $dtype {
            $crate::DType::Bf16 => {
                type $stored = half::bf16;
                type $compute = f32;
                $body
            }
            dtype => $crate::dispatch_float!($op, dtype, $compute => {
                type $stored = $compute;
                $body
            }),
        }
    };
}
pub(crate) use dispatch_stored;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writing_to_a_shared_tensor_leaves_the_other_alone() {
        let mut x = Tensor::new(&[1.0f32, 2.0], [2]).unwrap();
        let shared = x.share(Shape::from([1, 2]));
        x.data_mut::<f32>().unwrap()[0] = 5.0;
        assert_eq!(x.to_vec::<f32>().unwrap(), [5.0, 2.0]);
        assert_eq!(shared.to_vec::<f32>().unwrap(), [1.0, 2.0]);
    }

    #[test]
    fn constructors_refuse_what_does_not_fit() {
        assert!(Tensor::new(&[1.0f32], [2]).unwrap_err().to_string().contains("1 values for shape (2)"));
        assert!(Tensor::zeros([usize::MAX, 4], DType::F32).is_err());
        assert!(Tensor::new(&[1i64], [1]).unwrap().variable().is_err());
        assert!(Tensor::scalar(1.0f32).data::<f64>().is_err());
        assert!(Tensor::from_raw_bytes(&[0; 7], [2], DType::F32).is_err());
    }

    #[test]
    fn half_precision_reads_as_f32() {
        let x = Tensor::full([3], 1.0 + 1.0 / 512.0, DType::Bf16).unwrap();
        assert_eq!(&*x.floats::<f32>("test").unwrap(), &[1.0; 3]);
        assert!(x.floats::<f64>("test").is_err());
    }
}
