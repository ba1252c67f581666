//! The walk from results to inputs.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use super::node::{Backward, Edge, Node, recording};
use crate::tensor::{TensorId, place};
use crate::{Error, Result, Tensor};

/// How [`grad`] walks.
#[derive(Clone, Debug, Default)]
pub struct GradOptions {
    /// Record the gradients' own computation, so that they can be differentiated again. Implies `retain_graph`.
    pub create_graph: bool,
    /// Keep what the rules saved, so that the graph can be walked again.
    pub retain_graph: bool,
    /// The gradient to start from, of the output's shape; ones where absent.
    pub grad_output: Option<Tensor>,
}

/// Gradients of variables, by tensor.
///
/// ```
/// use gridgrad::Tensor;
/// let (x, y) = (Tensor::scalar(2.0f32).variable()?, Tensor::scalar(5.0f32).variable()?);
/// let gradients = x.mul(&y)?.backward()?;
/// assert_eq!((gradients.len(), gradients.get(&x).unwrap().item()?), (2, 5.0));
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Gradients(HashMap<TensorId, Tensor>);

impl Gradients {
    /// The gradient of `variable`, or `None` where the result does not depend on it.
    pub fn get(&self, variable: &Tensor) -> Option<&Tensor> {
        self.0.get(&variable.id())
    }

    /// Takes the gradient of `variable` out.
    pub fn take(&mut self, variable: &Tensor) -> Option<Tensor> {
        self.0.remove(&variable.id())
    }

    /// Replaces the gradient of `variable`.
    pub fn insert(&mut self, variable: &Tensor, gradient: Tensor) {
        self.0.insert(variable.id(), gradient);
    }

    /// Adds the gradients of another walk, for accumulation over several batches.
    ///
    /// # Errors
    /// Where shapes differ, which happens only if the two come from different variables.
    pub fn accumulate(&mut self, other: Gradients) -> Result<()> {
        other.0.into_iter().try_for_each(|(id, gradient)| add(&mut self.0, id, gradient, false))
    }

    /// Number of variables with a gradient.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether no variable has a gradient.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Tensor {
    /// Gradients of this one-element tensor with respect to every variable behind it. Frees the graph.
    ///
    /// # Errors
    /// Where this tensor has more than one element or does not depend on a variable, or the graph was freed before.
    pub fn backward(&self) -> Result<Gradients> {
        let start = start(self, &GradOptions::default())?;
        walk(self, start, &GradOptions::default(), None)
    }

    /// [`Tensor::backward`] from `grad_output`, of this tensor's shape, dtype and device, in place of ones.
    ///
    /// # Errors
    /// As [`Tensor::backward`], and where `grad_output` does not fit.
    pub fn backward_from(&self, grad_output: &Tensor) -> Result<Gradients> {
        let options = GradOptions { grad_output: Some(grad_output.clone()), ..GradOptions::default() };
        walk(self, start(self, &options)?, &options, None)
    }
}

/// Gradients of `output` with respect to `inputs`, which may be variables or results of ops. `None` where the output
/// does not depend on an input.
///
/// # Errors
/// Where `output` has more than one element and no `grad_output` is given, does not depend on any variable, or its
/// graph was freed before; and where `create_graph` meets an op without second derivatives.
pub fn grad(output: &Tensor, inputs: &[&Tensor], options: GradOptions) -> Result<Vec<Option<Tensor>>> {
    let start = start(output, &options)?;
    let wanted: HashSet<TensorId> = inputs.iter().map(|input| input.id()).collect();
    let gradients = walk(output, start, &options, Some(&wanted))?;
    Ok(inputs.iter().map(|input| gradients.get(input).cloned()).collect())
}

fn start(output: &Tensor, options: &GradOptions) -> Result<Tensor> {
    if !output.requires_grad() {
        return Err(Error::Autograd("the result does not depend on any variable".into()));
    }
    match &options.grad_output {
        Some(grad) if grad.shape() != output.shape() || grad.dtype() != output.dtype() => Err(Error::shape(
            "backward",
            format!(
                "grad_output is {} {}, the output {} {}",
                grad.dtype(),
                grad.shape(),
                output.dtype(),
                output.shape()
            ),
        )),
        Some(grad) => place("backward", &[output, grad]).map(|_| grad.clone()),
        None if output.elements() == 1 => output.full_like(1.0),
        None => Err(Error::shape("backward", format!("needs a scalar or a grad_output, got shape {}", output.shape()))),
    }
}

/// The nodes from which a wanted tensor is reached: the others need not be walked.
fn leading_to(wanted: &HashSet<TensorId>, output: &Tensor) -> HashSet<TensorId> {
    let mut reached: BTreeMap<TensorId, Arc<Node>> = BTreeMap::new();
    let mut pending: Vec<Arc<Node>> = output.node().into_iter().map(Arc::clone).collect();
    while let Some(node) = pending.pop() {
        if reached.insert(node.id(), Arc::clone(&node)).is_none() {
            let inputs =
                node.edges.iter().filter_map(|edge| if let Edge::Node(_, node) = edge { Some(node) } else { None });
            pending.extend(inputs.cloned());
        }
    }
    // Oldest first: the inputs of a node are decided before it.
    let mut leading = HashSet::new();
    for node in reached.values() {
        let leads = |target: TensorId| wanted.contains(&target) || leading.contains(&target);
        if node.edges.iter().filter_map(Edge::target).any(leads) {
            leading.extend(&node.outputs);
        }
    }
    leading
}

/// Gradients of the `wanted` tensors, or of all variables where none are named.
fn walk(
    output: &Tensor,
    start: Tensor,
    options: &GradOptions,
    wanted: Option<&HashSet<TensorId>>,
) -> Result<Gradients> {
    let leading = wanted.map(|wanted| leading_to(wanted, output));
    let mut gradients = HashMap::from([(output.id(), start)]);
    let mut kept = HashMap::new();
    // Newest first: every consumer of a tensor is younger than it, so its gradient is complete when it is reached.
    let mut pending: BTreeMap<TensorId, Arc<Node>> = BTreeMap::new();
    if let Some(node) = output.node() {
        pending.insert(node.id(), Arc::clone(node));
    }
    while let Some((id, node)) = pending.pop_last() {
        let grads: Vec<Option<Tensor>> = node.outputs.iter().map(|output| gradients.remove(output)).collect();
        let Some(grad) = grads.iter().flatten().next() else { continue };
        for (output, grad) in node.outputs.iter().zip(&grads) {
            if let Some(grad) = grad
                && wanted.is_some_and(|wanted| wanted.contains(output))
            {
                kept.insert(*output, grad.clone());
            }
        }
        if leading.as_ref().is_some_and(|leading| !leading.contains(&id)) {
            continue;
        }
        let function = node.function(!options.retain_graph && !options.create_graph)?;
        let backward = Backward { grad, grads: &grads, node: &node, create_graph: options.create_graph };
        let inputs = recording(options.create_graph, || function.backward(&backward))?;
        drop(function);
        for (edge, gradient) in node.edges.iter().zip(inputs) {
            let (Some(target), Some(gradient)) = (edge.target(), gradient) else { continue };
            recording(options.create_graph, || add(&mut gradients, target, gradient, options.create_graph))?;
            if let Edge::Node(_, node) = edge {
                pending.entry(node.id()).or_insert_with(|| Arc::clone(node));
            }
        }
    }
    gradients.extend(kept);
    Ok(Gradients(gradients))
}

fn add(gradients: &mut HashMap<TensorId, Tensor>, id: TensorId, gradient: Tensor, recorded: bool) -> Result<()> {
    let sum = match gradients.remove(&id) {
        None => gradient,
        Some(sum) if recorded => sum.add(&gradient)?,
        Some(sum) => crate::ops::add_in_place(sum, &gradient)?,
    };
    gradients.insert(id, sum);
    Ok(())
}
