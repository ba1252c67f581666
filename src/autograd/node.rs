//! Nodes of the tape and the rules they hold.

use std::cell::Cell;
use std::sync::{Arc, Mutex, PoisonError};

use crate::tensor::TensorId;
use crate::{Error, Result, Tensor};

/// The backward rule of one op: what it saved from the forward, and how to use it.
///
/// ```
/// use gridgrad::autograd::{Backward, Function, record};
/// use gridgrad::{Result, Tensor};
///
/// struct DoubleRule;
///
/// impl Function for DoubleRule {
///     fn name(&self) -> &'static str {
///         "double"
///     }
///     fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
///         Ok(vec![Some(backward.grad().scale(2.0)?)])
///     }
/// }
///
/// fn double(x: &Tensor) -> Result<Tensor> {
///     Ok(record(x.detach().scale(2.0)?, &[x], |_| DoubleRule))
/// }
///
/// let x = Tensor::scalar(1.5f32).variable()?;
/// assert_eq!(double(&x)?.backward()?.get(&x).unwrap().item()?, 2.0);
/// # Ok::<(), gridgrad::Error>(())
/// ```
pub trait Function: Send + Sync + 'static {
    /// The op's name, for errors.
    fn name(&self) -> &'static str;

    /// Gradients of the inputs, in the order in which they were recorded; `None` for those that need none.
    ///
    /// # Errors
    /// Whatever the ops that compute the gradients report.
    fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>>;
}

/// Where an input came from.
pub(super) enum Edge {
    /// Needs no gradient.
    Constant,
    /// A variable.
    Leaf(TensorId),
    /// A result of another op.
    Node(TensorId, Arc<Node>),
}

impl Edge {
    fn of(tensor: &Tensor) -> Self {
        match tensor.node() {
            Some(node) => Edge::Node(tensor.id(), Arc::clone(node)),
            None if tensor.is_variable() => Edge::Leaf(tensor.id()),
            None => Edge::Constant,
        }
    }

    /// The tensor that this edge stands for, if it needs a gradient.
    pub(super) fn target(&self) -> Option<TensorId> {
        match self {
            Edge::Constant => None,
            Edge::Leaf(id) | Edge::Node(id, _) => Some(*id),
        }
    }
}

/// One application of a function.
pub(crate) struct Node {
    /// At least one, oldest first; all of them newer than the inputs and older than whatever is computed from any.
    pub(super) outputs: Vec<TensorId>,
    pub(super) edges: Vec<Edge>,
    /// Taken by a backward walk that does not retain the graph, which frees what the rule saved.
    function: Mutex<Option<Arc<dyn Function>>>,
}

impl Node {
    fn new(outputs: Vec<TensorId>, inputs: &[&Tensor], function: impl Function) -> Self {
        let edges = inputs.iter().map(|input| Edge::of(input)).collect();
        Node { outputs, edges, function: Mutex::new(Some(Arc::new(function))) }
    }

    /// The number by which walks know the node.
    pub(super) fn id(&self) -> TensorId {
        self.outputs[0]
    }

    /// The rule; with `take`, the node's own hold on it ends.
    pub(super) fn function(&self, take: bool) -> Result<Arc<dyn Function>> {
        let mut slot = self.function.lock().unwrap_or_else(PoisonError::into_inner);
        let function = if take { slot.take() } else { slot.clone() };
        function.ok_or_else(|| {
            Error::Autograd("this graph was already walked and freed; ask for `retain_graph` the first time".into())
        })
    }
}

impl Drop for Node {
    /// Frees a long chain of nodes in a loop: dropped recursively, a few ten thousand ops would overflow the stack.
    fn drop(&mut self) {
        // Saved tensors go first, while the edges still hold the nodes behind them.
        *self.function.get_mut().unwrap_or_else(PoisonError::into_inner) = None;
        let mut pending = std::mem::take(&mut self.edges);
        while let Some(edge) = pending.pop() {
            if let Edge::Node(_, node) = edge
                && let Some(mut node) = Arc::into_inner(node)
            {
                *node.function.get_mut().unwrap_or_else(PoisonError::into_inner) = None;
                pending.append(&mut node.edges);
            }
        }
    }
}

/// What this thread's ops are for.
#[derive(Clone, Copy, PartialEq)]
enum Purpose {
    /// Results that may be asked for gradients.
    Record,
    /// Gradients of the first order.
    Differentiate,
    /// Results alone.
    Answer,
}

thread_local! {
    static PURPOSE: Cell<Purpose> = const { Cell::new(Purpose::Record) };
}

/// Runs `body` without recording: its results need no gradients. What ops prepare from a weight, such as its values in the
/// order of a product, is kept from the second time on, until the weight is written to, trained with or dropped.
pub fn no_grad<R>(body: impl FnOnce() -> R) -> R {
    with_purpose(Purpose::Answer, body)
}

/// Runs `body`, a backward rule, with recording on or off.
pub(super) fn recording<R>(on: bool, body: impl FnOnce() -> R) -> R {
    with_purpose(if on { Purpose::Record } else { Purpose::Differentiate }, body)
}

/// Runs `body`, and restores the state after it, also on a panic.
fn with_purpose<R>(purpose: Purpose, body: impl FnOnce() -> R) -> R {
    struct Restore(Purpose);
    impl Drop for Restore {
        fn drop(&mut self) {
            PURPOSE.set(self.0);
        }
    }
    let _restore = Restore(PURPOSE.replace(purpose));
    body()
}

/// The output of a function, saved for its backward rule.
pub struct SavedOutput(Tensor);

/// Puts `output` on the tape as the result of a function of `inputs`, if any of them needs a gradient.
///
/// `function` is called only then; it receives the output in a form that the rule may keep.
pub fn record<F: Function>(output: Tensor, inputs: &[&Tensor], function: impl FnOnce(SavedOutput) -> F) -> Tensor {
    if !records(inputs) {
        return output;
    }
    // A fresh identity, newer than every input: the walk goes by age.
    let saved = output.share(output.shape().clone());
    let id = saved.id();
    let function = function(SavedOutput(saved));
    output.attach(id, Arc::new(Node::new(vec![id], inputs, function)))
}

/// Puts `outputs` on the tape as the results of one function of `inputs`, if any of these needs a gradient. Its rule
/// runs once for all of them, with [`Backward::grads`].
///
/// ```
/// use gridgrad::autograd::{Backward, Function, record_all};
/// use gridgrad::{Result, Tensor};
///
/// struct SumAndDifferenceRule;
///
/// impl Function for SumAndDifferenceRule {
///     fn name(&self) -> &'static str {
///         "sum_and_difference"
///     }
///     fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
///         Ok(match backward.grads() {
///             [Some(sum), Some(difference)] => vec![Some(sum.add(difference)?), Some(sum.sub(difference)?)],
///             [Some(sum), _] => vec![Some(sum.clone()), Some(sum.clone())],
///             [_, Some(difference)] => vec![Some(difference.clone()), Some(difference.neg()?)],
///             _ => vec![None, None],
///         })
///     }
/// }
///
/// let (x, y) = (Tensor::scalar(5.0f32).variable()?, Tensor::scalar(3.0f32).variable()?);
/// let outputs = vec![x.detach().add(&y.detach())?, x.detach().sub(&y.detach())?];
/// let outputs = record_all(outputs, &[&x, &y], || SumAndDifferenceRule);
/// let product = outputs[0].mul(&outputs[1])?; // x² − y²
/// let gradients = product.backward()?;
/// assert_eq!(gradients.get(&x).unwrap().item()?, 10.0);
/// assert_eq!(gradients.get(&y).unwrap().item()?, -6.0);
/// # Ok::<(), gridgrad::Error>(())
/// ```
pub fn record_all<F: Function>(outputs: Vec<Tensor>, inputs: &[&Tensor], function: impl FnOnce() -> F) -> Vec<Tensor> {
    if outputs.is_empty() || !records(inputs) {
        return outputs;
    }
    let ids: Vec<TensorId> = outputs.iter().map(|output| output.share(output.shape().clone()).id()).collect();
    let node = Arc::new(Node::new(ids.clone(), inputs, function()));
    outputs.iter().zip(ids).map(|(output, id)| output.attach(id, Arc::clone(&node))).collect()
}

/// Whether [`record`] would put a function of `inputs` on the tape.
pub(crate) fn records(inputs: &[&Tensor]) -> bool {
    PURPOSE.get() == Purpose::Record && inputs.iter().any(|input| input.requires_grad())
}

/// Whether ops compute results alone: weights will serve the next ones as they are.
pub(crate) fn answers() -> bool {
    PURPOSE.get() == Purpose::Answer
}

/// What a backward rule is given.
pub struct Backward<'a> {
    pub(super) grad: &'a Tensor,
    pub(super) grads: &'a [Option<Tensor>],
    pub(super) node: &'a Arc<Node>,
    pub(super) create_graph: bool,
}

impl Backward<'_> {
    /// The gradient of the output: same shape and dtype as the output. Of several, of the first that has one.
    pub fn grad(&self) -> &Tensor {
        self.grad
    }

    /// The gradients of all outputs of a function recorded by [`record_all`]; `None` for those that nothing depends on.
    pub fn grads(&self) -> &[Option<Tensor>] {
        self.grads
    }

    /// Whether input `index` needs a gradient.
    pub fn needs(&self, index: usize) -> bool {
        self.node.edges.get(index).is_some_and(|edge| edge.target().is_some())
    }

    /// The saved output, on the tape.
    pub fn output(&self, saved: &SavedOutput) -> Tensor {
        if self.create_graph { saved.0.attach(self.node.id(), Arc::clone(self.node)) } else { saved.0.clone() }
    }

    /// Whether the gradients will be differentiated again: then they must be made of recorded ops.
    pub fn create_graph(&self) -> bool {
        self.create_graph
    }

    /// Refuses `create_graph` for a rule that computes its gradients outside the tape.
    ///
    /// # Errors
    /// [`Error::NoSecondDerivative`] where the gradients will be differentiated again.
    pub fn first_order_only(&self, op: &'static str) -> Result<()> {
        if self.create_graph { Err(Error::NoSecondDerivative { op }) } else { Ok(()) }
    }
}
