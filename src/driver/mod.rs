//! GPUs: whether there is one, and the seam through which all GPU code reaches it.
//!
//! Two drivers stand behind the seam: NVIDIA's, loaded when first asked for and never linked, so that the same binary
//! starts on machines with and without one; and the emulator, which runs the same kernels on the processor.

// Drivers are C libraries, and kernels are C++. This module is the only one of the crate that calls foreign code.
#![allow(unsafe_code)]
#![allow(dead_code, reason = "the seam is under construction")]

#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(feature = "emulator")]
pub(crate) mod emulator;
mod image;
mod probe;
pub(crate) mod seam;

pub use image::kernels_built;
pub use probe::*;
