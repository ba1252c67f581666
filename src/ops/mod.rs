//! The differentiable functions, one room each: the public function with its backward rule in `mod.rs`, the CPU
//! implementation in `cpu.rs`, the launches of its GPU kernels in `gpu.rs`. An op computes where its tensors are; they
//! must all be on one device.
//!
//! ```
//! use gridgrad::{DType, Tensor, ops, random::Philox};
//! let x = Tensor::randn([2, 5, 8], DType::F32, Philox::new(0))?; // (batch, tokens, channels)
//! let (weight, bias) = (Tensor::ones([8], DType::F32)?, Tensor::zeros([8], DType::F32)?);
//! let x = ops::layer_norm(&x, &weight, &bias, 1e-5)?;
//! let scores = x.matmul(&x.transpose(1, 2)?)?.scale(8f64.powf(-0.5))?;
//! let mixed = ops::softmax(&scores, -1)?.matmul(&x)?;
//! assert_eq!(mixed.shape().to_vec(), [2, 5, 8]);
//! # Ok::<(), gridgrad::Error>(())
//! ```

mod batch_norm;
pub mod class_moments;
mod conv2d;
mod crops;
pub mod cross_scale_embedding;
pub mod denfi;
mod dropout;
mod elementwise;
mod gather;
mod interpolate;
mod layer_norm;
mod layout;
mod linear;
mod linear_probe;
mod look_up_bytes;
mod loss;
pub mod lsda;
mod matmul;
mod models;
mod pool;
mod pooled_features;
pub mod position_bias;
mod reduce;
mod resample;
mod softmax;
mod strided;

pub use batch_norm::{BatchNorm, BatchNormMode, BatchStatistics, batch_norm, batch_norm_relu, batch_norm_relu_each};
pub use class_moments::class_moments;
pub use conv2d::{Conv2dOptions, conv_transpose2d, conv2d, conv2d_each, linear_each};
pub use crops::crops_each;
pub use cross_scale_embedding::{
    EmbeddingNorm, EmbeddingOptions, ImageLayout, PixelNormalisation, cross_scale_embedding, cross_scale_embedding_with,
};
pub use denfi::{boundary_density, denfi_conv};
pub use dropout::{drop_path, dropout};
pub use elementwise::{Binary, Unary, select};
pub use gather::embedding;
pub use interpolate::{Interpolation, interpolate};
pub use layer_norm::layer_norm;
pub use layout::concat;
pub use linear::{linear, linear_gelu};
pub use linear_probe::{ProbeLoss, linear_probe};
pub use look_up_bytes::look_up_bytes;
pub use loss::{CrossEntropyOptions, Reduction, Targets, binary_cross_entropy_with_logits, cross_entropy, mse_loss};
pub use lsda::{lsda, lsda_dropout};
pub use matmul::Transposed;
pub use models::Counts;
pub use pool::{Pool2dOptions, adaptive_avg_pool2d, avg_pool2d, global_avg_pool2d, max_pool2d};
pub use pooled_features::{add_relu_gap, pooled_features};
pub use position_bias::{dynamic_position_bias, dynamic_position_biases};
pub use softmax::{log_softmax, softmax};

pub(crate) use elementwise::add_in_place;
pub(crate) use look_up_bytes::look_up;

/// What the rest of the crate needs of the GPU's kernels.
pub(crate) mod gpu {
    use crate::gpu::Signature;
    use crate::kernels::Costs;

    pub(crate) use super::elementwise::gpu::{cast, full};

    /// All kernels, room by room.
    pub(crate) fn kernels() -> impl Iterator<Item = Signature> {
        use super::*;
        let rooms: [&[Signature]; 25] = [
            batch_norm::gpu::KERNELS,
            class_moments::gpu::KERNELS,
            conv2d::depthwise_gpu::KERNELS,
            conv2d::gpu::KERNELS,
            crops::gpu::KERNELS,
            cross_scale_embedding::gpu::KERNELS,
            denfi::density_gpu::KERNELS,
            denfi::gpu::KERNELS,
            dropout::gpu::KERNELS,
            elementwise::gpu::KERNELS,
            gather::gpu::KERNELS,
            layer_norm::gpu::KERNELS,
            layout::gpu::KERNELS,
            linear::gpu::KERNELS,
            linear_probe::gpu::KERNELS,
            look_up_bytes::gpu::KERNELS,
            loss::gpu::KERNELS,
            lsda::gpu::KERNELS,
            matmul::gpu::KERNELS,
            pool::gpu::KERNELS,
            pooled_features::gpu::KERNELS,
            position_bias::gpu::KERNELS,
            reduce::gpu::KERNELS,
            resample::gpu::KERNELS,
            softmax::gpu::KERNELS,
        ];
        rooms.into_iter().flatten().copied()
    }

    /// What they move and compute, room by room.
    pub(crate) fn costs() -> impl Iterator<Item = &'static Costs> {
        use super::*;
        let rooms: [&Costs; 23] = [
            &batch_norm::cost::COSTS,
            &class_moments::cost::COSTS,
            &conv2d::cost::COSTS,
            &crops::cost::COSTS,
            &cross_scale_embedding::cost::COSTS,
            &denfi::cost::COSTS,
            &dropout::cost::COSTS,
            &elementwise::cost::COSTS,
            &gather::cost::COSTS,
            &layer_norm::cost::COSTS,
            &layout::cost::COSTS,
            &linear::cost::COSTS,
            &linear_probe::cost::COSTS,
            &look_up_bytes::cost::COSTS,
            &loss::cost::COSTS,
            &lsda::cost::COSTS,
            &matmul::cost::COSTS,
            &pool::cost::COSTS,
            &pooled_features::cost::COSTS,
            &position_bias::cost::COSTS,
            &reduce::cost::COSTS,
            &resample::cost::COSTS,
            &softmax::cost::COSTS,
        ];
        rooms.into_iter()
    }
}
