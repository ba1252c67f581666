//! Layers with parameters.

use super::{Initializer, Parameter, Scope};
use crate::tensor::Shape;
use crate::{Result, Tensor, ops};

/// y = x Wᵀ + b on the last axis.
#[derive(Clone, Debug)]
pub struct Linear {
    /// (out, in)
    pub weight: Parameter,
    /// (out)
    pub bias: Option<Parameter>,
}

impl Linear {
    /// A linear layer with PyTorch's default initialisation.
    ///
    /// # Errors
    /// Where a name is taken.
    pub fn new(scope: &Scope, in_features: usize, out_features: usize, bias: bool) -> Result<Self> {
        let default = Initializer::default_bias(&Shape::from([out_features, in_features]));
        Self::with_init(scope, [in_features, out_features], Initializer::DEFAULT, bias.then_some(default))
    }

    /// A linear layer with `weight` and, where given, `bias` drawn from these.
    ///
    /// # Errors
    /// Where a name is taken.
    pub fn with_init(
        scope: &Scope,
        [in_features, out_features]: [usize; 2],
        weight: Initializer,
        bias: Option<Initializer>,
    ) -> Result<Self> {
        Ok(Linear {
            weight: scope.parameter("weight", [out_features, in_features], weight)?,
            bias: bias.map(|bias| scope.parameter("bias", [out_features], bias)).transpose()?,
        })
    }

    /// (…, in) to (…, out).
    ///
    /// # Errors
    /// Where the last axis is not `in`.
    pub fn forward(&self, input: &Tensor) -> Result<Tensor> {
        let bias = self.bias.as_ref().map(Parameter::tensor);
        ops::linear(input, &self.weight.tensor(), bias.as_ref())
    }
}
