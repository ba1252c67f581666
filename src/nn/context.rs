//! What a forward pass is for, and its random numbers.

use std::cell::Cell;

use crate::random::Philox;

/// Training or evaluation, passed to every layer that behaves differently in the two.
///
/// In training each layer that asks gets a random stream of its own, numbered by the order of asking. Two forward
/// passes with the same stream drop the same units.
///
/// ```
/// use gridgrad::nn::Context;
/// use gridgrad::random::Philox;
/// let step = Context::train(Philox::new(0).stream("dropout").fork(17));
/// assert!(step.is_training() && !Context::eval().is_training());
/// ```
#[derive(Debug)]
pub struct Context {
    stream: Option<Philox>,
    asked: Cell<u64>,
}

impl Context {
    /// Evaluation: nothing is dropped, running statistics are used and not updated.
    pub fn eval() -> Self {
        Context { stream: None, asked: Cell::new(0) }
    }

    /// Training, with the random numbers of `stream`: a fresh one each step.
    pub fn train(stream: Philox) -> Self {
        Context { stream: Some(stream), asked: Cell::new(0) }
    }

    /// Whether this is training.
    pub fn is_training(&self) -> bool {
        self.stream.is_some()
    }

    /// The next layer's random stream, in training.
    pub fn next_stream(&self) -> Option<Philox> {
        self.asked.set(self.asked.get() + 1);
        self.stream.map(|stream| stream.fork(self.asked.get()))
    }
}
