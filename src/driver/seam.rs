//! The seam under all GPU code: what it asks of a machine, and nothing more.
//!
//! Everything runs in order on one stream. A call that returns `Ok` has been accepted, not finished; an error of the
//! work itself comes with a later call, at the latest with [`Driver::synchronize`].

use std::ffi::c_void;
use std::time::Duration;

use crate::Result;
use crate::tensor::{DType, Device};

/// An address in the device's memory; 0 is nowhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address(pub u64);

impl Address {
    /// For optional arguments that are absent.
    pub const NULL: Address = Address(0);

    /// This address, `bytes` further on.
    pub fn offset(self, bytes: usize) -> Self {
        Address(self.0 + bytes as u64)
    }
}

/// What launch geometry depends on.
#[derive(Clone, Debug)]
pub struct Properties {
    /// The product's name.
    pub name: String,
    /// (major, minor)
    pub compute_capability: (u32, u32),
    /// Number of multiprocessors.
    pub multiprocessors: u32,
    /// The most shared memory that a block may ask for, in bytes.
    pub shared_memory_per_block: u32,
}

/// Blocks of a launch, threads of a block, and the dynamic shared memory of a block in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Blocks along x, y, z.
    pub grid: [u32; 3],
    /// Threads along x, y, z.
    pub block: [u32; 3],
    /// Dynamic shared memory, in bytes.
    pub shared: u32,
}

/// A kernel that a driver has loaded.
#[derive(Clone, Debug)]
pub struct Function {
    /// The driver's own handle.
    pub handle: u64,
    /// The kernel's name, with the suffix of its dtype.
    pub name: String,
    /// Bytes of each parameter, as the compiled kernel has them.
    pub parameters: Vec<usize>,
}

/// A value that kernels take as a parameter. Its layout is that of the C type of the same size.
pub trait Argument: Copy {
    /// Bytes of the parameter.
    const SIZE: usize;
    /// Writes the value's bytes.
    fn write(&self, bytes: &mut [u8]);
}

macro_rules! argument {
    ($($type:ty),*) => {$(
        impl Argument for $type {
            const SIZE: usize = size_of::<$type>();
            fn write(&self, bytes: &mut [u8]) {
                bytes.copy_from_slice(&self.to_ne_bytes());
            }
        }
    )*};
}
argument!(u32, i32, u64, f32, f64);

impl Argument for Address {
    const SIZE: usize = 8;
    fn write(&self, bytes: &mut [u8]) {
        self.0.write(bytes);
    }
}

/// A C struct with one array member: shapes and strides by value.
impl<A: Argument, const N: usize> Argument for [A; N] {
    const SIZE: usize = A::SIZE * N;
    fn write(&self, bytes: &mut [u8]) {
        for (value, bytes) in self.iter().zip(bytes.chunks_exact_mut(A::SIZE)) {
            value.write(bytes);
        }
    }
}

/// The arguments of one launch, by value, in memory of their own: each begins at a multiple of 8 bytes.
#[derive(Clone)]
pub struct Arguments {
    words: Vec<u64>,
    /// First word and bytes of each argument.
    spans: [(u16, u16); Arguments::MOST],
    count: usize,
}

impl Arguments {
    const MOST: usize = 32;
    /// Bytes of parameters that a kernel may take, from compute capability 7.0 on.
    pub const MOST_BYTES: usize = 32_764;

    /// None yet.
    pub fn new() -> Self {
        Arguments { words: Vec::new(), spans: [(0, 0); Self::MOST], count: 0 }
    }

    /// Appends an argument. The lists of arguments are fixed types, so a list that is too long fails the first test
    /// that launches it.
    pub fn push<A: Argument>(&mut self, argument: A) {
        let words = A::SIZE.div_ceil(8);
        let first = self.words.len();
        assert!(
            self.count < Self::MOST && (first + words) * 8 <= Self::MOST_BYTES,
            "a kernel with too many parameters"
        );
        self.words.resize(first + words, 0);
        argument.write(&mut bytemuck::cast_slice_mut(&mut self.words[first..])[..A::SIZE]);
        self.spans[self.count] = (first as u16, A::SIZE as u16);
        self.count += 1;
    }

    /// Bytes of each argument, in order.
    pub fn sizes(&self) -> impl Iterator<Item = usize> + '_ {
        self.spans[..self.count].iter().map(|&(_, size)| usize::from(size))
    }

    /// The memory of each argument, in order, as `cuLaunchKernel` wants it. Drivers read and never write there.
    pub fn pointers(&self) -> [*const u8; Arguments::MOST] {
        let mut pointers = [std::ptr::null(); Arguments::MOST];
        for (pointer, &(first, _)) in pointers.iter_mut().zip(&self.spans[..self.count]) {
            *pointer = bytemuck::cast_slice::<u64, u8>(&self.words[usize::from(first)..]).as_ptr();
        }
        pointers
    }
}

impl Default for Arguments {
    fn default() -> Self {
        Self::new()
    }
}

/// What happens to the sum of a matrix product before it is rounded and stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Epilogue {
    /// Nothing.
    None,
    /// Adds a vector of n values to every row.
    Bias,
    /// Adds the bias, then the exact GELU. Libraries have the approximation by tanh, so no driver takes it.
    BiasGelu,
}

/// C (m, n) = A (m, k) · B (k, n), row-major, for each of `batch` matrices.
///
/// A is stored as (k, m) where `transpose_a`, B as (n, k) where `transpose_b`; rows follow each other without gaps. All
/// of A, B, C and the bias are `dtype`; sums are `f32`.
#[derive(Clone, Copy, Debug)]
pub struct MatrixProduct {
    /// `F32`, `Bf16` or `F16`.
    pub dtype: DType,
    /// Rows of C.
    pub m: usize,
    /// Columns of C.
    pub n: usize,
    /// Terms of each sum.
    pub k: usize,
    /// Number of products.
    pub batch: usize,
    /// Elements from one A to the next; 0 where all products share it.
    pub stride_a: usize,
    /// Elements from one B to the next; 0 where all products share it.
    pub stride_b: usize,
    /// See above.
    pub transpose_a: bool,
    /// See above.
    pub transpose_b: bool,
    /// A.
    pub a: Address,
    /// B.
    pub b: Address,
    /// C; C matrices follow each other without gaps.
    pub c: Address,
    /// The bias (n), or null.
    pub bias: Address,
    /// What to do with the sums.
    pub epilogue: Epilogue,
}

/// Launches that were recorded once and run again together.
pub trait Graph: Send {
    /// Runs all of them, in order.
    ///
    /// # Errors
    /// Where the device refuses.
    fn launch(&self) -> Result<()>;
}

/// A stretch of a device's work that is being timed.
pub trait Timer: Send {
    /// Waits for the work up to here and tells how long it took since the timer was started.
    ///
    /// # Errors
    /// Where any of it failed.
    fn stop(self: Box<Self>) -> Result<Duration>;
}

/// A machine that runs kernels. One stream, in order.
pub trait Driver: Send + Sync {
    /// The device it drives.
    fn device(&self) -> Device;

    /// What launch geometry depends on.
    fn properties(&self) -> &Properties;

    /// `bytes` (at least 1) of memory with unspecified content, aligned to 256 bytes on a GPU and to at least 16 on the
    /// emulator, which places the end of the memory at a guard page.
    ///
    /// # Errors
    /// `OutOfDeviceMemory`.
    fn allocate(&self, bytes: usize) -> Result<Address>;

    /// Gives memory back, once all work in the stream so far is done with it.
    fn free(&self, address: Address, bytes: usize);

    /// Called when freed memory is handed out again without going through [`Driver::free`] and
    /// [`Driver::allocate`]. The emulator poisons it.
    fn recycle(&self, _address: Address, _bytes: usize) {}

    /// Copies from host memory, which may be reused when this returns.
    ///
    /// # Errors
    /// Where the device refuses, or an earlier launch failed.
    fn upload(&self, from: &[u8], to: Address) -> Result<()>;

    /// Waits for all work and copies to host memory.
    ///
    /// # Errors
    /// As [`Driver::upload`].
    fn download(&self, from: Address, to: &mut [u8]) -> Result<()>;

    /// Copies within the device.
    ///
    /// # Errors
    /// As [`Driver::upload`].
    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<()>;

    /// Sets every byte.
    ///
    /// # Errors
    /// As [`Driver::upload`].
    fn fill(&self, to: Address, byte: u8, bytes: usize) -> Result<()>;

    /// Finds a kernel: `module` is the stem of its file in `kernels/`.
    ///
    /// # Errors
    /// Where the module has no code for this device, or no such kernel.
    fn load(&self, module: &'static str, kernel: &str) -> Result<Function>;

    /// Runs a kernel.
    ///
    /// # Errors
    /// Where the device refuses, or an earlier launch failed. The emulator runs the kernel to its end and reports what
    /// it did wrong.
    ///
    /// # Safety
    /// The arguments are those of the kernel in number, order and type, every address among them is of live memory of
    /// this device, as large as the kernel expects.
    unsafe fn launch(&self, function: &Function, geometry: Geometry, arguments: &Arguments) -> Result<()>;

    /// A matrix product by the vendor's library. False where there is none, or it does not take this product: then
    /// nothing has happened.
    ///
    /// # Errors
    /// Where the library fails.
    ///
    /// # Safety
    /// All addresses are of live memory of this device, as large as the description says.
    unsafe fn matrix_product(&self, product: &MatrixProduct) -> Result<bool>;

    /// Waits for all work.
    ///
    /// # Errors
    /// Where any of it failed.
    fn synchronize(&self) -> Result<()>;

    /// Starts a timer behind all work so far; `None` where the device has no clock of its own, and the host's serves.
    ///
    /// # Errors
    /// Where the device refuses.
    fn start_timer(&self) -> Result<Option<Box<dyn Timer>>> {
        Ok(None)
    }

    /// Lends the stream to another library of the vendor's: `body` gets its handle, with the device's context current.
    ///
    /// # Errors
    /// Those of `body`; `DeviceUnavailable` where the device has no stream that libraries know.
    #[cfg_attr(not(feature = "cudnn"), expect(dead_code, reason = "cuDNN is that library"))]
    fn lend_stream(&self, _body: &mut dyn FnMut(*mut c_void) -> Result<()>) -> Result<()> {
        let reason = "no library of NVIDIA's works on it".into();
        Err(crate::Error::DeviceUnavailable { device: self.device(), reason })
    }

    /// From here on, launches, products, copies within the device and fills are recorded and not run.
    ///
    /// # Errors
    /// Where a recording is under way, or the device refuses.
    fn begin_capture(&self) -> Result<()>;

    /// Ends the recording.
    ///
    /// # Errors
    /// Where none is under way, or something happened in it that cannot be recorded: an allocation, an upload, a wait.
    fn end_capture(&self) -> Result<Box<dyn Graph>>;
}
