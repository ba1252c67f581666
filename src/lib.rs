//! Cross-scale vision transformers in Rust: fused kernels, a small safe autograd, and published systems trained end to
//! end. Tensors compute where they are: on the processor, on an NVIDIA GPU, or on an emulated one ([`Device`]).
//!
//! A tensor is made a variable; ops record themselves on a tape; [`Tensor::backward`] gives the gradients.
//!
//! ```
//! use gridgrad::models::{CrossFormer, CrossFormerConfig};
//! use gridgrad::nn::Context;
//! use gridgrad::ops::{CrossEntropyOptions, Targets, cross_entropy};
//! use gridgrad::random::Philox;
//! use gridgrad::train::{Optimizer, OptimizerConfig};
//! use gridgrad::{DType, Tensor};
//!
//! let model = CrossFormer::new(CrossFormerConfig::named("micro", 10)?, 0, DType::F32)?;
//! let mut optimizer = Optimizer::new(model.parameters(), OptimizerConfig::default())?;
//! let images = Tensor::randn([4, 32, 32, 3], DType::F32, Philox::new(1))?; // (batch, height, width, channels)
//! let labels = Tensor::new(&[3i64, 1, 4, 1], [4])?;
//!
//! let logits = model.logits(&images, &Context::train(Philox::new(2)))?;
//! let loss = cross_entropy(&logits, Targets::Labels(&labels), CrossEntropyOptions::default())?;
//! optimizer.step(&loss.backward()?, 1e-3)?;
//! # Ok::<(), gridgrad::Error>(())
//! ```
//!
//! # Modules, from the top down
//!
//! | module | what is in it |
//! |---|---|
//! | [`methods`] | the papers' methods: certified defence against poisoned training sets |
//! | [`train`] | the training loop, optimizers, schedules, checkpoints, metrics |
//! | [`data`] | readers of image sets, augmentation, the loader of batches |
//! | [`models`] | published networks: CrossFormer and CrossFormer++, ResNets, Network-in-Network |
//! | [`report`] | pictures of a run, as SVG |
//! | [`nn`] | layers, named parameters, initialisers, state dicts |
//! | [`ops`] | the differentiable functions, one room each |
//! | [`autograd`] | the tape, gradients of gradients, the gradient check |
//! | [`tensor`] | tensors, shapes, element types, devices, memory |
//! | [`cpu`] | what CPU implementations share: vectors, threads, matrix products |
//! | [`random`] | counter-based random numbers |
//! | [`driver`] | what GPUs this machine has, and the emulator |
//! | [`kernels`] | the GPU kernels: what they take of a multiprocessor, move and compute |
//! | [`file`](mod@file) | files written whole or not at all |
//!
//! # What holds everywhere
//!
//! - Maps and images are channels-last, (batch, height, width, channels); weights have PyTorch's layouts and names.
//! - Whatever a caller can get wrong is an [`Error`] that says which op or file, what arrived and what was expected.
//! - The same seed gives the same bits, for any number of threads; between kinds of devices last digits differ.

#![warn(missing_docs)]

pub mod autograd;
pub mod cpu;
pub mod data;
pub mod driver;

mod error;
pub mod file;
mod gpu;
pub mod kernels;
pub mod methods;
pub mod models;
pub mod nn;
pub mod ops;
pub mod random;
pub mod report;
mod sha256;
pub mod tensor;
pub mod train;

pub use error::{Error, Result};
pub use kernels::check_kernels;
pub use tensor::{DType, Device, Shape, Tensor};

/// Compiles and runs the examples of the README as documentation tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
