//! Dynamic position bias: a small network from the offset of two tokens to one bias per head (CrossFormer, section
//! 3.3), evaluated once on the grid of all offsets.

pub(crate) mod cost;
mod cpu;
pub(crate) mod gpu;

use crate::autograd::{Backward, Function, record};
use crate::tensor::{Place, place};
use crate::{Error, Result, Tensor, dispatch_float};

/// Weight and bias of a linear layer, (out, in) and (out), or scale and shift of a layer norm, (width) each.
#[derive(Clone, Debug)]
pub struct Affine {
    /// Weight or scale.
    pub weight: Tensor,
    /// Bias or shift.
    pub bias: Tensor,
}

/// One layer: linear(ReLU(layer norm(x))).
#[derive(Clone, Debug)]
pub struct BiasLayer {
    /// Scale and shift, (p).
    pub norm: Affine,
    /// (p, p), and (heads, p) in the last layer.
    pub linear: Affine,
}

/// The network's parameters; p is its width.
#[derive(Clone, Debug)]
pub struct PositionBiasNetwork {
    /// (p, 2): from the offset (dy, dx), in tokens of the group.
    pub projection: Affine,
    /// The first two keep the width, the last one gives the heads.
    pub layers: [BiasLayer; 3],
    /// Adds the input of the first two layers to their output (the paper's DPB-residual).
    pub residual: bool,
    /// Added to the variance in the layer norms.
    pub eps: f64,
}

impl PositionBiasNetwork {
    /// Parameters in the order of gradients: projection, then norm and linear of each layer, weight before bias.
    fn tensors(&self) -> Vec<&Tensor> {
        let layers = self.layers.iter().flat_map(|layer| [&layer.norm, &layer.linear]);
        std::iter::once(&self.projection).chain(layers).flat_map(|affine| [&affine.weight, &affine.bias]).collect()
    }

    /// Width and heads, after comparing every shape and dtype.
    fn check(&self) -> Result<(usize, usize)> {
        const OP: &str = "dynamic_position_bias";
        let [width, _] = self.projection.weight.dims::<2>(OP, "projection weight (width, 2)")?;
        let [heads, _] = self.layers[2].linear.weight.dims::<2>(OP, "last weight (heads, width)")?;
        let mut expected = vec![vec![width, 2], vec![width]];
        for out in [width, width, heads] {
            expected.extend([vec![width], vec![width], vec![out, width], vec![out]]);
        }
        for (number, (tensor, expected)) in self.tensors().into_iter().zip(expected).enumerate() {
            tensor.expect_dtype(OP, self.projection.weight.dtype())?;
            if **tensor.shape() != expected {
                let message = format!("parameter {number} is {}, expected {expected:?}", tensor.shape());
                return Err(Error::shape(OP, message));
            }
        }
        Ok((width, heads))
    }
}

/// The bias table for groups of G_h × G_w tokens: ((2 G_h − 1)(2 G_w − 1), heads), for [`lsda`](super::lsda::lsda).
///
/// Row (dy + G_h − 1)(2 G_w − 1) + dx + G_w − 1 is the network's output for the raw offset (dy, dx), query minus key.
/// First derivatives only, with respect to all parameters. Cost: rows · (2 p² + 2 p + p · heads) multiply-adds.
///
/// # Errors
/// Where parameters do not fit together or the group has a zero; on a GPU also where the activations of one row, 13 p +
/// heads numbers, exceed a block's shared memory.
pub fn dynamic_position_bias(network: &PositionBiasNetwork, group: [usize; 2]) -> Result<Tensor> {
    const OP: &str = "dynamic_position_bias";
    let (width, heads) = network.check()?;
    if group.contains(&0) || group.iter().any(|&extent| extent > 1 << 15) {
        return Err(Error::argument(OP, format!("group {group:?}; expected 1 to 32768 tokens a side")));
    }
    let dtype = network.projection.weight.dtype();
    let problem = cpu::Problem { width, heads, group, residual: network.residual, eps: network.eps };
    let tensors = network.tensors();
    let output = match place(OP, &tensors)? {
        Place::Gpu(gpu) => gpu::forward(gpu, &problem, &tensors)?,
        Place::Host => dispatch_float!(OP, dtype, T => {
            let parameters = tensors.iter().map(|t| t.floats::<T>(OP)).collect::<Result<Vec<_>>>()?;
            let parameters: Vec<&[T]> = parameters.iter().map(|p| &**p).collect();
            Tensor::from_floats(cpu::forward(&problem, &parameters), [problem.rows(), heads], dtype)
        })?,
    };
    Ok(record(output, &tensors, |_| PositionBiasRule { network: network.clone(), problem }))
}

struct PositionBiasRule {
    network: PositionBiasNetwork,
    problem: cpu::Problem,
}

impl Function for PositionBiasRule {
    fn name(&self) -> &'static str {
        "dynamic_position_bias"
    }

    fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        const OP: &str = "dynamic_position_bias";
        backward.first_order_only(OP)?;
        let tensors = self.network.tensors();
        let (grad, dtype) = (backward.grad(), backward.grad().dtype());
        if let Place::Gpu(gpu) = place(OP, &[tensors[0], grad])? {
            let gradients = gpu::backward(gpu, &self.problem, &tensors, grad)?;
            return Ok(gradients.into_iter().map(Some).collect());
        }
        dispatch_float!(OP, dtype, T => {
            let parameters = tensors.iter().map(|t| t.floats::<T>(OP)).collect::<Result<Vec<_>>>()?;
            let parameters: Vec<&[T]> = parameters.iter().map(|p| &**p).collect();
            let gradients = cpu::backward(&self.problem, &parameters, &grad.floats::<T>(OP)?);
            let gradient = |(gradient, tensor): (_, &&Tensor)| Tensor::from_floats(gradient, tensor.shape(), dtype).map(Some);
            gradients.into_iter().zip(&tensors).map(gradient).collect()
        })
    }
}
