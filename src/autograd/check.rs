//! Gradients held against finite differences.

use super::{GradOptions, grad};
use crate::random::Philox;
use crate::{DType, Error, Result, Tensor};

/// How finite differences are taken and compared.
///
/// ```
/// use gridgrad::autograd::{GradientCheck, check_gradients};
/// use gridgrad::{DType, Tensor, random::Philox};
/// let x = Tensor::randn([2, 3], DType::F64, Philox::new(1))?;
/// let check = GradientCheck { second_order: true, ..GradientCheck::default() };
/// check_gradients(|inputs| inputs[0].tanh()?.mul(&inputs[0]), &[x], check)?;
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct GradientCheck {
    /// Step of the central difference.
    pub step: f64,
    /// Largest allowed difference, relative to the largest gradient element of the input (at least 1).
    pub tolerance: f64,
    /// Elements of each input to check; spread evenly where there are more.
    pub samples: usize,
    /// Also checks the gradients of the gradients.
    pub second_order: bool,
}

impl Default for GradientCheck {
    fn default() -> Self {
        GradientCheck { step: 1e-5, tolerance: 1e-6, samples: 60, second_order: false }
    }
}

/// Compares the gradients of `function` at `inputs` with central differences, in `f64`.
///
/// The output is weighted with fixed random numbers, so every element of it counts. Inputs that are not `f64` are
/// constants.
///
/// # Errors
/// Names the input and the element where the two disagree.
pub fn check_gradients(
    function: impl Fn(&[Tensor]) -> Result<Tensor>,
    inputs: &[Tensor],
    check: GradientCheck,
) -> Result<()> {
    let first_order = |inputs: &[Tensor]| weighted(&function(inputs)?, "first");
    compare(&first_order, inputs, check, "gradient")?;
    if check.second_order {
        let second_order = |inputs: &[Tensor]| -> Result<Tensor> {
            // Also differentiable by inputs that the caller's perturbation left as constants.
            let inputs: Vec<Tensor> = variables(inputs)?;
            let wanted: Vec<&Tensor> = inputs.iter().filter(|input| input.dtype() == DType::F64).collect();
            let options = GradOptions { create_graph: true, ..GradOptions::default() };
            let mut total = Tensor::scalar(0.0f64);
            for gradient in grad(&first_order(&inputs)?, &wanted, options)?.into_iter().flatten() {
                total = total.add(&weighted(&gradient, "second")?)?;
            }
            Ok(total)
        };
        compare(&second_order, inputs, check, "second derivative")?;
    }
    Ok(())
}

/// Inputs on the tape as they are, others of type `f64` as new variables.
fn variables(inputs: &[Tensor]) -> Result<Vec<Tensor>> {
    let variable = |input: &Tensor| {
        if input.dtype() == DType::F64 && !input.requires_grad() { input.variable() } else { Ok(input.clone()) }
    };
    inputs.iter().map(variable).collect()
}

fn weighted(output: &Tensor, stream: &str) -> Result<Tensor> {
    let weights = Tensor::randn(output.shape(), DType::F64, Philox::new(17).stream(stream))?;
    output.mul(&weights)?.sum_all()
}

fn compare(
    function: &dyn Fn(&[Tensor]) -> Result<Tensor>,
    inputs: &[Tensor],
    check: GradientCheck,
    what: &str,
) -> Result<()> {
    let tracked = variables(inputs)?;
    let result = function(&tracked)?;
    for (number, input) in inputs.iter().enumerate().filter(|(_, input)| input.dtype() == DType::F64) {
        let analytic = if result.requires_grad() {
            let options = GradOptions { retain_graph: true, ..GradOptions::default() };
            grad(&result, &[&tracked[number]], options)?.remove(0)
        } else {
            None
        };
        let analytic = analytic.map_or_else(|| Ok(vec![0.0; input.elements()]), |gradient| gradient.to_f64_vec())?;
        let scale = analytic.iter().fold(1.0f64, |scale, g| scale.max(g.abs()));
        let stride = input.elements().div_ceil(check.samples.max(1)).max(1);
        for element in (0..input.elements()).step_by(stride) {
            let at = |delta: f64| -> Result<f64> {
                let mut moved = inputs.to_vec();
                let mut values = input.to_f64_vec()?;
                values[element] += delta;
                moved[number] = Tensor::new(&values, input.shape())?;
                function(&moved)?.item()
            };
            let numeric = (at(check.step)? - at(-check.step)?) / (2.0 * check.step);
            let difference = (numeric - analytic[element]).abs();
            if difference.is_nan() || difference > check.tolerance * scale {
                return Err(Error::Autograd(format!(
                    "{what} of input {number} {}, element {element}: the rule gives {:e}, finite differences {numeric:e}",
                    input.shape(),
                    analytic[element],
                )));
            }
        }
    }
    Ok(())
}
