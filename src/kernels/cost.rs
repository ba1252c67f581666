//! What the launches of kernels move and compute, by formulas that each room declares beside its kernels.

use super::Formula;
use crate::Result;

/// What one launch of a kernel moves to and from device memory, and computes.
///
/// Bytes count what must pass once; what caches serve again is not counted. A multiply-add is two FLOPs, and work on
/// padding of tiles is none.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// The kernel's name without its instance.
    pub kernel: &'static str,
    /// Read from and written to device memory.
    pub bytes: Formula,
    /// Floating-point operations.
    pub flops: Formula,
    /// Dynamic shared memory of a block in bytes, where a launch asks for any.
    pub shared: Option<Formula>,
    /// Whether the FLOPs are those of matrix products, which tensor cores do in `bf16` and `f16`.
    pub products: bool,
}

impl Cost {
    /// Bytes and FLOPs of a kernel.
    pub const fn new(kernel: &'static str, bytes: &'static str, flops: &'static str) -> Self {
        let (bytes, flops) = (Formula::new(bytes), Formula::new(flops));
        Cost { kernel, bytes, flops, shared: None, products: false }
    }

    /// The same, of matrix products.
    pub const fn of_products(kernel: &'static str, bytes: &'static str, flops: &'static str) -> Self {
        Cost { products: true, ..Self::new(kernel, bytes, flops) }
    }

    /// With dynamic shared memory.
    pub const fn with_shared(self, bytes: &'static str) -> Self {
        Cost { shared: Some(Formula::new(bytes)), ..self }
    }

    /// Bytes and FLOPs of a launch with these extents.
    ///
    /// # Errors
    /// Where a formula names an extent that is not given.
    pub fn work(&self, extents: &[(&str, f64)]) -> Result<Work> {
        Ok(Work { bytes: self.bytes.evaluate(extents)?, flops: self.flops.evaluate(extents)? })
    }
}

/// Bytes moved and floating-point operations.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// To and from device memory.
    pub bytes: f64,
    /// A multiply-add is two.
    pub flops: f64,
}

impl std::ops::Add for Work {
    type Output = Work;
    fn add(self, other: Work) -> Work {
        Work { bytes: self.bytes + other.bytes, flops: self.flops + other.flops }
    }
}

/// The costs of a room's kernels, and what the names in their formulas stand for.
#[derive(Clone, Copy, Debug)]
pub struct Costs {
    /// Names and meanings. In all formulas `s` is the bytes of an element.
    pub names: &'static [(&'static str, &'static str)],
    /// One for each kernel.
    pub kernels: &'static [Cost],
}
