//! The updates themselves: each value is read and written once, with all that belongs to it.

use rayon::prelude::*;

use super::{AdamW, Sgd};
use crate::cpu::parallel::{PIECE, update};
use crate::cpu::{Float, simd};

/// The numbers of one AdamW step, the same for all elements of a parameter.
#[derive(Clone, Copy)]
pub(super) struct AdamWFactors<T> {
    gradient_scale: T,
    /// 1 − lr · decay.
    keep: T,
    beta1: T,
    beta1_rest: T,
    beta2: T,
    beta2_rest: T,
    /// lr / (1 − β₁ᵗ).
    step_size: T,
    /// 1 / √(1 − β₂ᵗ).
    root_scale: T,
    eps: T,
}

impl<T: Float> AdamWFactors<T> {
    pub fn new(config: &AdamW, step: i64, lr: f64, decay: f64, gradient_scale: f64) -> Self {
        let (beta1, beta2) = config.betas;
        let correction = |beta: f64| 1.0 - beta.powf(step as f64);
        AdamWFactors {
            gradient_scale: T::from_f64(gradient_scale),
            keep: T::from_f64(1.0 - lr * decay),
            beta1: T::from_f64(beta1),
            beta1_rest: T::from_f64(1.0 - beta1),
            beta2: T::from_f64(beta2),
            beta2_rest: T::from_f64(1.0 - beta2),
            step_size: T::from_f64(lr / correction(beta1)),
            root_scale: T::from_f64(1.0 / correction(beta2).sqrt()),
            eps: T::from_f64(config.eps),
        }
    }
}

/// m ← β₁ m + (1 − β₁) g, v ← β₂ v + (1 − β₂) g², p ← keep · p − step_size · m / (√v · root_scale + ε).
pub(super) fn adamw<T: Float>(value: &mut [T], mean: &mut [T], square: &mut [T], gradient: &[T], f: AdamWFactors<T>) {
    let written = value.par_chunks_mut(PIECE).zip(mean.par_chunks_mut(PIECE)).zip(square.par_chunks_mut(PIECE));
    written.zip(gradient.par_chunks(PIECE)).for_each(|(((value, mean), square), gradient)| {
        simd::dispatch(
            #[inline(always)]
            || adamw_piece(value, mean, square, gradient, f),
        );
    });
}

/// Takes the factors by value: behind a reference, they might change with every write, for all the compiler knows.
#[inline(always)]
fn adamw_piece<T: Float>(value: &mut [T], mean: &mut [T], square: &mut [T], gradient: &[T], f: AdamWFactors<T>) {
    for (((p, m), v), &g) in value.iter_mut().zip(mean).zip(square).zip(gradient) {
        let g = g * f.gradient_scale;
        *m = f.beta1 * *m + f.beta1_rest * g;
        *v = f.beta2 * *v + f.beta2_rest * (g * g);
        *p = f.keep * *p - f.step_size * *m / (v.sqrt() * f.root_scale + f.eps);
    }
}

/// The numbers of one SGD step.
#[derive(Clone, Copy)]
pub(super) struct SgdFactors<T> {
    gradient_scale: T,
    decay: T,
    lr: T,
    momentum: T,
    nesterov: bool,
}

impl<T: Float> SgdFactors<T> {
    pub fn new(config: &Sgd, lr: f64, decay: f64, gradient_scale: f64) -> Self {
        SgdFactors {
            gradient_scale: T::from_f64(gradient_scale),
            decay: T::from_f64(decay),
            lr: T::from_f64(lr),
            momentum: T::from_f64(config.momentum),
            nesterov: config.nesterov,
        }
    }
}

/// p ← p − lr (g + decay · p).
pub(super) fn sgd<T: Float>(value: &mut [T], gradient: &[T], f: SgdFactors<T>) {
    update(value, gradient, move |p, g| *p -= f.lr * (g * f.gradient_scale + f.decay * *p));
}

/// d = g + decay · p, b ← momentum · b + d, p ← p − lr · b; with Nesterov p ← p − lr (d + momentum · b).
pub(super) fn sgd_momentum<T: Float>(value: &mut [T], buffer: &mut [T], gradient: &[T], f: SgdFactors<T>) {
    let written = value.par_chunks_mut(PIECE).zip(buffer.par_chunks_mut(PIECE));
    written.zip(gradient.par_chunks(PIECE)).for_each(|((value, buffer), gradient)| {
        simd::dispatch(
            #[inline(always)]
            || sgd_piece(value, buffer, gradient, f),
        );
    });
}

#[inline(always)]
fn sgd_piece<T: Float>(value: &mut [T], buffer: &mut [T], gradient: &[T], f: SgdFactors<T>) {
    for ((p, b), &g) in value.iter_mut().zip(buffer).zip(gradient) {
        let d = g * f.gradient_scale + f.decay * *p;
        *b = f.momentum * *b + d;
        *p -= f.lr * if f.nesterov { d + f.momentum * *b } else { *b };
    }
}
