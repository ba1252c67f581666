//! Matrix products by cuBLASLt, where it is found.
//!
//! The library stores matrices by columns and ours are stored by rows, so it sees each of them transposed. It is asked
//! for Cᵀ = Bᵀ · Aᵀ: the factors trade places, and each is transposed where ours is. Rows of its result are columns of
//! ours, which is what makes its bias, one value per row, ours, one value per column.
//!
//! Products are the same bits in every run: the library promises that for one version, one kind of GPU and one stream,
//! and an algorithm is picked by shape and alignment only. Sums over k are either not split, or their parts are kept in
//! `f32` and added in a separate step; parts that were rounded to the result's type are refused.
//!
//! [`Epilogue::BiasGelu`] is not taken: the library's GELU is the approximation by tanh, and ours is exact.

use std::collections::HashMap;
use std::ffi::c_void;
use std::fmt::Write;
use std::sync::{Arc, Mutex};

use cudarc::cublaslt::sys::{self, cublasStatus_t as Status};
use cudarc::driver::sys::CUmemoryPool;

use super::stream::{Stream, Turn, lock};
use super::{libraries, memory};
use crate::driver::seam::{Address, Epilogue, MatrixProduct};
use crate::tensor::DType;
use crate::{Error, Result};

/// Plans kept at most. A model has some dozens; one whose shapes never repeat must not fill the memory.
const MOST_PLANS: usize = 1024;

/// What this module calls.
const CALLS: &[&str] = &[
    "cublasLtCreate",
    "cublasLtDestroy",
    "cublasLtMatmul",
    "cublasLtMatmulAlgoGetHeuristic",
    "cublasLtMatmulDescCreate",
    "cublasLtMatmulDescDestroy",
    "cublasLtMatmulDescSetAttribute",
    "cublasLtMatmulPreferenceCreate",
    "cublasLtMatmulPreferenceDestroy",
    "cublasLtMatmulPreferenceSetAttribute",
    "cublasLtMatrixLayoutCreate",
    "cublasLtMatrixLayoutDestroy",
    "cublasLtMatrixLayoutSetAttribute",
];

/// The library's handle, its workspace, and how each product was done before.
pub(super) struct Products {
    stream: Arc<Stream>,
    handle: sys::cublasLtHandle_t,
    workspace: Address,
    workspace_bytes: usize,
    tf32: bool,
    /// `None` for products that the library does not take.
    plans: HashMap<Key, Option<Plan>>,
}

// SAFETY: the handle and the descriptors belong to no thread; they are used only under the stream's turn.
unsafe impl Send for Products {}

/// All that an algorithm depends on.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    dtype: DType,
    shape: [usize; 4],
    strides: [usize; 2],
    transposed: [bool; 2],
    epilogue: Epilogue,
    /// Of A, B, C and the bias, in bytes.
    alignments: [u32; 4],
}

impl Key {
    fn new(product: &MatrixProduct) -> Self {
        let &MatrixProduct { dtype, m, n, k, batch, stride_a, stride_b, epilogue, .. } = product;
        Key {
            dtype,
            shape: [m, n, k, batch],
            strides: if batch == 1 { [0; 2] } else { [stride_a, stride_b] },
            transposed: [product.transpose_a, product.transpose_b],
            epilogue,
            alignments: [product.a, product.b, product.c, product.bias].map(alignment),
        }
    }
}

/// The largest power of two that divides an address, up to that of a whole allocation.
fn alignment(address: Address) -> u32 {
    1 << address.0.trailing_zeros().min(8)
}

impl Products {
    /// `None` where the library is not found.
    pub(super) fn new(stream: Arc<Stream>, pool: CUmemoryPool, capability: (u32, u32)) -> Result<Option<Self>> {
        if !libraries::load_cublaslt() || !has_all_calls() {
            return Ok(None);
        }
        let mut turn = stream.turn()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: writes one pointer to a place that outlives the call; the context is current.
        match unsafe { sys::cublasLtCreate(&mut handle) } {
            Status::CUBLAS_STATUS_SUCCESS => {}
            // A library that is too old for the GPU, or too new for the driver: as good as none.
            _ => return Ok(None),
        }
        let workspace_bytes = if capability.0 >= 9 { 32 << 20 } else { 4 << 20 };
        let workspace = Address::NULL;
        let plans = HashMap::new();
        let tf32 = super::is_set("GRIDGRAD_TF32");
        let mut products = Products { stream: stream.clone(), handle, workspace, workspace_bytes, tf32, plans };
        let workspace = memory::allocate(&mut turn, pool, workspace_bytes);
        // `products` takes a turn of its own when dropped.
        drop(turn);
        products.workspace = workspace?;
        Ok(Some(products))
    }

    /// # Safety
    /// As [`crate::driver::seam::Driver::matrix_product`].
    pub(super) unsafe fn run(products: &Mutex<Self>, stream: &Stream, product: &MatrixProduct) -> Result<bool> {
        let &MatrixProduct { dtype, m, n, k, batch, .. } = product;
        if m == 0 || n == 0 || batch == 0 {
            return Ok(true);
        }
        if k == 0 || data_type(dtype).is_none() || product.epilogue == Epilogue::BiasGelu {
            return Ok(false);
        }
        let mut turn = stream.turn()?;
        let products = &mut *lock(products);
        let key = Key::new(product);
        if !products.plans.contains_key(&key) {
            let plan = products.plan(product, &key)?;
            if products.plans.len() >= MOST_PLANS {
                products.plans.clear();
            }
            products.plans.insert(key, plan);
        }
        let Some(Some(plan)) = products.plans.get(&key) else { return Ok(false) };
        // SAFETY: the plan was made for this product, whose addresses the caller vouches for.
        let status = unsafe { products.multiply(&turn, plan, product) }?;
        match status {
            Status::CUBLAS_STATUS_SUCCESS => {}
            Status::CUBLAS_STATUS_NOT_SUPPORTED => return Ok(false),
            status => {
                // Where the work and not the call has failed, the driver knows.
                if turn.capture().is_none() {
                    turn.synchronize()?;
                }
                return Err(failure(stream, "cublasLtMatmul", status));
            }
        }
        turn.launched(|name| {
            // Writing to a `String` cannot fail.
            let _ = write!(name, "of cublasLtMatmul ({m}, {n}, {k}) × {batch}");
        })?;
        Ok(true)
    }

    /// # Safety
    /// `plan` is that of `product`, whose addresses are of live memory as large as it says.
    unsafe fn multiply(&self, turn: &Turn<'_>, plan: &Plan, product: &MatrixProduct) -> Result<Status> {
        plan.set_bias(&self.stream, product)?;
        let (one, zero) = (1f32, 0f32);
        let [a, b, c] = [product.a, product.b, product.c].map(|address| address.0 as *mut c_void);
        // SAFETY: handle, descriptors and workspace live as long as `self`; the factors are read from the host before
        // the call returns. Later work in the stream, the next product included, comes after this one, so that one
        // workspace serves all.
        Ok(unsafe {
            sys::cublasLtMatmul(
                self.handle,
                plan.operation.0,
                (&raw const one).cast(),
                b,
                plan.b.0,
                a,
                plan.a.0,
                (&raw const zero).cast(),
                c,
                plan.c.0,
                c,
                plan.c.0,
                &plan.algorithm,
                self.workspace.0 as *mut c_void,
                self.workspace_bytes,
                turn.raw().cast(),
            )
        })
    }

    /// Descriptors and the algorithm for a product; `None` where the library has none.
    fn plan(&self, product: &MatrixProduct, key: &Key) -> Result<Option<Plan>> {
        let stream = &*self.stream;
        let &MatrixProduct { dtype, m, n, k, batch, transpose_a, transpose_b, .. } = product;
        let Some(data_type) = data_type(dtype) else { return Ok(None) };
        let layout = |rows, columns, stride| Layout::new(stream, data_type, [rows, columns], batch, stride);
        let (a_columns, a_rows) = if transpose_a { (k, m) } else { (m, k) };
        let (b_columns, b_rows) = if transpose_b { (n, k) } else { (k, n) };
        let a = layout(a_rows, a_columns, product.stride_a)?;
        let b = layout(b_rows, b_columns, product.stride_b)?;
        let c = layout(n, m, m * n)?;
        let operation = Operation::new(stream, self.compute_type(dtype))?;
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let set = |attribute, value: u32| operation.set(stream, attribute, &value);
        set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, u32::from(transpose_b))?;
        set(Attribute::CUBLASLT_MATMUL_DESC_TRANSB, u32::from(transpose_a))?;
        let epilogue = match product.epilogue {
            Epilogue::Bias => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS,
            _ => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_DEFAULT,
        };
        set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue as u32)?;
        let mut plan = Plan { operation, a, b, c, algorithm: sys::cublasLtMatmulAlgo_t { data: [0; 8] } };
        // The heuristic reads the alignment of the bias from its address.
        plan.set_bias(stream, product)?;
        Ok(self.choose(&plan, key)?.map(|algorithm| {
            plan.algorithm = algorithm;
            plan
        }))
    }

    fn compute_type(&self, dtype: DType) -> sys::cublasComputeType_t {
        match (dtype, self.tf32) {
            (DType::F32, true) => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
            _ => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
        }
    }

    /// The library's best guess among the algorithms whose sums are repeatable.
    fn choose(&self, plan: &Plan, key: &Key) -> Result<Option<sys::cublasLtMatmulAlgo_t>> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let stream = &*self.stream;
        let preference = Preference::new(stream)?;
        let most = self.workspace_bytes as u64;
        preference.set(stream, Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &most)?;
        let scheme = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        preference.set(stream, Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &scheme)?;
        let [a, b, c, _] = key.alignments;
        preference.set(stream, Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &b)?;
        preference.set(stream, Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &a)?;
        preference.set(stream, Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &c)?;
        preference.set(stream, Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &c)?;
        let mut found = std::mem::MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::zeroed();
        let mut count = 0;
        // SAFETY: all descriptors are alive; at most one result is written, to a place that outlives the call.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                plan.operation.0,
                plan.b.0,
                plan.a.0,
                plan.c.0,
                plan.c.0,
                preference.0,
                1,
                found.as_mut_ptr(),
                &mut count,
            )
        };
        match status {
            Status::CUBLAS_STATUS_SUCCESS if count > 0 => {}
            Status::CUBLAS_STATUS_SUCCESS | Status::CUBLAS_STATUS_NOT_SUPPORTED => return Ok(None),
            status => return Err(failure(stream, "cublasLtMatmulAlgoGetHeuristic", status)),
        }
        // SAFETY: the library wrote one result; zeros, for what it left out, are valid in every field.
        let found = unsafe { found.assume_init() };
        Ok((found.state == Status::CUBLAS_STATUS_SUCCESS).then_some(found.algo))
    }
}

impl Drop for Products {
    fn drop(&mut self) {
        self.stream.quiet_turn(|turn| {
            // SAFETY: the handle is ours and not used any more; what the library still runs is in the stream.
            let status = unsafe { sys::cublasLtDestroy(self.handle) };
            accept(&self.stream, "cublasLtDestroy", status)?;
            if self.workspace == Address::NULL { Ok(()) } else { memory::free(turn, self.workspace.0) }
        });
    }
}

/// How a product is done.
struct Plan {
    operation: Operation,
    a: Layout,
    b: Layout,
    c: Layout,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Plan {
    fn set_bias(&self, stream: &Stream, product: &MatrixProduct) -> Result<()> {
        match product.epilogue {
            Epilogue::Bias => {
                let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
                self.operation.set(stream, attribute, &product.bias.0)
            }
            _ => Ok(()),
        }
    }
}

/// Declares an owned descriptor of the library, how its attributes are set, and that it is destroyed when dropped.
macro_rules! descriptor {
    ($(#[$doc:meta])* $name:ident($raw:ty), $attribute:ty, $set:ident, $destroy:ident) => {
        $(#[$doc])*
        struct $name($raw);

        impl $name {
            /// Sets an attribute, whose type in the library's documentation is as wide as `T`.
            fn set<T: bytemuck::Pod>(&self, stream: &Stream, attribute: $attribute, value: &T) -> Result<()> {
                // SAFETY: the descriptor is alive, and the library copies the value.
                let status = unsafe { sys::$set(self.0, attribute, (&raw const *value).cast(), size_of::<T>()) };
                accept(stream, stringify!($set), status)
            }
        }

        impl Drop for $name {
            fn drop(&mut self) {
                // SAFETY: the descriptor is ours and not used any more; launched work has no need of it. That fails
                // only for what is not a descriptor.
                let _ = unsafe { sys::$destroy(self.0) };
            }
        }
    };
}

descriptor! {
    /// What is computed.
    Operation(sys::cublasLtMatmulDesc_t),
    sys::cublasLtMatmulDescAttributes_t, cublasLtMatmulDescSetAttribute, cublasLtMatmulDescDestroy
}

descriptor! {
    /// A matrix stored by columns.
    Layout(sys::cublasLtMatrixLayout_t),
    sys::cublasLtMatrixLayoutAttribute_t, cublasLtMatrixLayoutSetAttribute, cublasLtMatrixLayoutDestroy
}

descriptor! {
    /// Which algorithms are wanted.
    Preference(sys::cublasLtMatmulPreference_t),
    sys::cublasLtMatmulPreferenceAttributes_t, cublasLtMatmulPreferenceSetAttribute, cublasLtMatmulPreferenceDestroy
}

impl Operation {
    /// Factors alpha and beta are `f32`.
    fn new(stream: &Stream, compute: sys::cublasComputeType_t) -> Result<Self> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: writes one pointer to a place that outlives the call.
        let status = unsafe { sys::cublasLtMatmulDescCreate(&mut raw, compute, sys::cudaDataType_t::CUDA_R_32F) };
        accept(stream, "cublasLtMatmulDescCreate", status)?;
        Ok(Operation(raw))
    }
}

impl Layout {
    /// Columns follow each other without gaps, and matrices of a batch after `stride` elements.
    fn new(
        stream: &Stream,
        dtype: sys::cudaDataType_t,
        [rows, columns]: [usize; 2],
        batch: usize,
        stride: usize,
    ) -> Result<Self> {
        use sys::cublasLtMatrixLayoutAttribute_t as Attribute;
        let mut raw = std::ptr::null_mut();
        // SAFETY: writes one pointer to a place that outlives the call.
        let status =
            unsafe { sys::cublasLtMatrixLayoutCreate(&mut raw, dtype, rows as u64, columns as u64, rows as i64) };
        accept(stream, "cublasLtMatrixLayoutCreate", status)?;
        let layout = Layout(raw);
        if batch > 1 {
            layout.set(stream, Attribute::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &(batch as i32))?;
            layout.set(stream, Attribute::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &(stride as i64))?;
        }
        Ok(layout)
    }
}

impl Preference {
    fn new(stream: &Stream) -> Result<Self> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: writes one pointer to a place that outlives the call.
        accept(stream, "cublasLtMatmulPreferenceCreate", unsafe { sys::cublasLtMatmulPreferenceCreate(&mut raw) })?;
        Ok(Preference(raw))
    }
}

fn data_type(dtype: DType) -> Option<sys::cudaDataType_t> {
    match dtype {
        DType::F32 => Some(sys::cudaDataType_t::CUDA_R_32F),
        DType::Bf16 => Some(sys::cudaDataType_t::CUDA_R_16BF),
        DType::F16 => Some(sys::cudaDataType_t::CUDA_R_16F),
        _ => None,
    }
}

/// A library that lacks a call would make `cudarc` panic when it is made.
fn has_all_calls() -> bool {
    // SAFETY: the library was just found; the symbols are looked up and neither called nor read.
    CALLS.iter().all(|call| unsafe { sys::culib().get::<*const c_void>(*call) }.is_ok())
}

fn accept(stream: &Stream, call: &'static str, status: Status) -> Result<()> {
    match status {
        Status::CUBLAS_STATUS_SUCCESS => Ok(()),
        status => Err(failure(stream, call, status)),
    }
}

fn failure(stream: &Stream, call: &'static str, status: Status) -> Error {
    Error::Gpu { device: stream.device(), call, reason: format!("{status:?}") }
}

#[cfg(test)]
mod unit_tests {
    use super::*;

    #[test]
    fn alignment_is_that_of_the_address_up_to_an_allocations() {
        for (address, expected) in [(1, 1), (6, 2), (16, 16), (256 + 32, 32), (512, 256), (1 << 40, 256), (0, 256)] {
            assert_eq!(alignment(Address(address)), expected, "{address}");
        }
    }
}
