//! Dynamic position bias: a small network from the offset of two tokens to one bias per head (CrossFormer, section
//! 3.3), evaluated once on the grid of all offsets. The networks of several blocks are evaluated together: one of them
//! is far too little work for a GPU.

pub(crate) mod cost;
mod cpu;
pub(crate) mod gpu;

use rayon::prelude::*;

use crate::autograd::{Backward, Function, record_all, records};
use crate::tensor::{Place, place};
use crate::{DType, Error, Result, Tensor, dispatch_float};

const OP: &str = "dynamic_position_bias";
/// Parameters of a network.
const TENSORS: usize = 14;

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
    pub(crate) fn tensors(&self) -> Vec<&Tensor> {
        let layers = self.layers.iter().flat_map(|layer| [&layer.norm, &layer.linear]);
        std::iter::once(&self.projection).chain(layers).flat_map(|affine| [&affine.weight, &affine.bias]).collect()
    }

    /// Width and heads, after comparing every shape and dtype.
    fn check(&self) -> Result<(usize, usize)> {
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
    let dtype = network.projection.weight.dtype();
    let mut tables = dynamic_position_biases(&[(network, group)], dtype)?;
    tables.pop().ok_or_else(|| Error::argument(OP, "no table of one network"))
}

/// [`dynamic_position_bias`] of several networks at once, each for groups of its own: on a GPU one launch in each
/// direction for up to 32 of them, such as the blocks of a stage have.
///
/// The tables come in `dtype`, rounded from the parameters' own, which are all alike. Every number is computed as for one
/// network alone.
///
/// # Errors
/// As [`dynamic_position_bias`], and where the networks differ in p, heads, `residual`, `eps` or dtype.
///
/// ```
/// use gridgrad::ops::position_bias::{Affine, BiasLayer, PositionBiasNetwork, dynamic_position_biases};
/// use gridgrad::{DType, Tensor, random::Philox};
/// let (width, heads) = (4, 2);
/// let affine = |out: usize, shape: &[usize]| -> gridgrad::Result<Affine> {
///     let weight = Tensor::randn(shape, DType::F32, Philox::new(0))?;
///     Ok(Affine { weight, bias: Tensor::zeros([out], DType::F32)? })
/// };
/// let layer = |out: usize| -> gridgrad::Result<BiasLayer> {
///     Ok(BiasLayer { norm: affine(width, &[width])?, linear: affine(out, &[out, width])? })
/// };
/// let network = PositionBiasNetwork {
///     projection: affine(width, &[width, 2])?,
///     layers: [layer(width)?, layer(width)?, layer(heads)?],
///     residual: false,
///     eps: 1e-5,
/// };
/// let tables = dynamic_position_biases(&[(&network, [7, 7]), (&network, [4, 8])], DType::Bf16)?;
/// assert_eq!((tables[0].shape().to_vec(), tables[1].shape().to_vec()), (vec![169, 2], vec![105, 2]));
/// # Ok::<(), gridgrad::Error>(())
/// ```
pub fn dynamic_position_biases(networks: &[(&PositionBiasNetwork, [usize; 2])], dtype: DType) -> Result<Vec<Tensor>> {
    let Some((first, _)) = networks.first() else { return Ok(Vec::new()) };
    let problems = problems(networks)?;
    let parameters_dtype = first.projection.weight.dtype();
    // Rounding to half precision is part of the kernel.
    let rounds = parameters_dtype == DType::F32 && matches!(dtype, DType::Bf16 | DType::F16);
    let computed = if rounds { dtype } else { parameters_dtype };
    let tensors: Vec<&Tensor> = networks.iter().flat_map(|(network, _)| network.tensors()).collect();
    let mut arrivals = None;
    let tables = match place(OP, &tensors)? {
        Place::Gpu(gpu) => {
            arrivals = records(&tensors).then(|| gpu::arrivals(gpu, problems.len())).transpose()?;
            gpu::forward(gpu, &problems, &tensors, computed, arrivals.as_ref())?
        }
        Place::Host => dispatch_float!(OP, parameters_dtype, T => {
            let values = tensors.iter().map(|t| t.floats::<T>(OP)).collect::<Result<Vec<_>>>()?;
            let work = problems.par_iter().zip(values.par_chunks(TENSORS)).map(|(problem, values)| {
                let values: Vec<&[T]> = values.iter().map(|values| &**values).collect();
                Tensor::from_floats(cpu::forward(problem, &values), [problem.rows(), problem.heads], computed)
            });
            work.collect::<Result<Vec<_>>>()
        })?,
    };
    let rule = || PositionBiasRule {
        networks: networks.iter().map(|(network, _)| (*network).clone()).collect(),
        problems,
        arrivals,
    };
    record_all(tables, &tensors, rule).into_iter().map(|table| table.cast(dtype)).collect()
}

/// What to compute for each network, after comparing them with each other.
fn problems(networks: &[(&PositionBiasNetwork, [usize; 2])]) -> Result<Vec<cpu::Problem>> {
    let problem = |&(network, group): &(&PositionBiasNetwork, [usize; 2])| {
        let (width, heads) = network.check()?;
        if group.contains(&0) || group.iter().any(|&extent| extent > 1 << 15) {
            return Err(Error::argument(OP, format!("group {group:?}; expected 1 to 32768 tokens a side")));
        }
        Ok(cpu::Problem { width, heads, group, residual: network.residual, eps: network.eps })
    };
    let problems = networks.iter().map(problem).collect::<Result<Vec<_>>>()?;
    let kind = |number: usize| {
        let cpu::Problem { width, heads, residual, eps, .. } = problems[number];
        (width, heads, residual, eps, networks[number].0.projection.weight.dtype())
    };
    match (1..problems.len()).find(|&number| kind(number) != kind(0)) {
        None => Ok(problems),
        Some(number) => {
            let message = format!(
                "network {number} has (width, heads, residual, eps, dtype) {:?}, the first {:?}; expected the same",
                kind(number),
                kind(0)
            );
            Err(Error::argument(OP, message))
        }
    }
}

struct PositionBiasRule {
    networks: Vec<PositionBiasNetwork>,
    problems: Vec<cpu::Problem>,
    /// On a GPU, counts of blocks.
    arrivals: Option<Tensor>,
}

impl Function for PositionBiasRule {
    fn name(&self) -> &'static str {
        OP
    }

    fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        backward.first_order_only(OP)?;
        let tensors: Vec<&Tensor> = self.networks.iter().flat_map(PositionBiasNetwork::tensors).collect();
        let (grads, dtype) = (backward.grads(), tensors[0].dtype());
        if let (Place::Gpu(gpu), Some(arrivals)) = (place(OP, &[tensors[0], backward.grad()])?, &self.arrivals) {
            return gpu::backward(gpu, &self.problems, &tensors, grads, arrivals);
        }
        dispatch_float!(OP, dtype, T => {
            let work = self.problems.par_iter().zip(tensors.par_chunks(TENSORS)).zip(grads);
            let gradients = |((problem, tensors), grad): ((&cpu::Problem, &[&Tensor]), &Option<Tensor>)| {
                let Some(grad) = grad else { return Ok(vec![None; TENSORS]) };
                let values = tensors.iter().map(|t| t.floats::<T>(OP)).collect::<Result<Vec<_>>>()?;
                let values: Vec<&[T]> = values.iter().map(|values| &**values).collect();
                let gradients = cpu::backward(problem, &values, &grad.floats::<T>(OP)?);
                let gradient = |(gradient, tensor): (_, &&Tensor)| {
                    Tensor::from_floats(gradient, tensor.shape(), dtype).map(Some)
                };
                gradients.into_iter().zip(tensors).map(gradient).collect::<Result<Vec<_>>>()
            };
            Ok(work.map(gradients).collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
        })
    }
}
