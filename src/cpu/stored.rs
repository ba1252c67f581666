//! Loops over numbers as tensors hold them.

use half::bf16;

use super::Float;
use super::bf16::{narrow, widen};
use crate::tensor::Element;

/// An element type that loops convert to its compute type `T` in registers, and back with one rounding: the compute types
/// themselves, and `bf16`, whose conversions are a shift and a few additions.
pub(crate) trait Stored<T: Float>: Element {
    /// Exact.
    fn load(self) -> T;
    /// Of a whole vector: where nothing is converted, a copy of it.
    #[inline(always)]
    fn load_all<const N: usize>(stored: &[Self; N]) -> [T; N] {
        let mut values = [T::ZERO; N];
        for (value, stored) in values.iter_mut().zip(stored) {
            *value = stored.load();
        }
        values
    }
    /// Rounded to the nearest.
    fn store(value: T) -> Self;
}

impl<T: Float> Stored<T> for T {
    #[inline(always)]
    fn load(self) -> T {
        self
    }

    #[inline(always)]
    fn load_all<const N: usize>(stored: &[T; N]) -> [T; N] {
        *stored
    }

    #[inline(always)]
    fn store(value: T) -> Self {
        value
    }
}

impl Stored<f32> for bf16 {
    #[inline(always)]
    fn load(self) -> f32 {
        widen(self)
    }

    #[inline(always)]
    fn store(value: f32) -> Self {
        narrow(value)
    }
}
