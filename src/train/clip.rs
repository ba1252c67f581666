//! The global norm of gradients, and clipping by it.

use rayon::prelude::*;

use crate::autograd::Gradients;
use crate::cpu::parallel::PIECE;
use crate::cpu::{Float, simd};
use crate::nn::{Parameter, Parameters};
use crate::{Result, Tensor, dispatch_float};

/// The Euclidean norm of all gradients of the weights in `parameters`, as of one vector.
///
/// Squares are summed in `f64` and in a fixed order. The norm is not finite if any element is not.
///
/// # Errors
/// Where a gradient is not floating point.
pub fn global_norm(parameters: &Parameters, gradients: &Gradients) -> Result<f64> {
    let weights: Vec<Parameter> = parameters.weights().collect();
    let square = |parameter: &Parameter| gradients.get(&parameter.tensor()).map_or(Ok(0.0), sum_of_squares);
    let squares = weights.par_iter().map(square).collect::<Result<Vec<f64>>>()?;
    Ok(squares.iter().sum::<f64>().sqrt())
}

/// What gradients of this norm are multiplied by so that it does not exceed `max_norm` (as PyTorch's
/// `clip_grad_norm_`).
pub fn clip_factor(norm: f64, max_norm: f64) -> f64 {
    (max_norm / (norm + 1e-6)).min(1.0)
}

/// Scales all gradients of the weights in `parameters` so that their global norm does not exceed `max_norm`, and
/// returns the norm they had. Gradients whose norm is not finite stay as they are.
///
/// # Errors
/// As [`global_norm`].
pub fn clip_global_norm(parameters: &Parameters, gradients: &mut Gradients, max_norm: f64) -> Result<f64> {
    let norm = global_norm(parameters, gradients)?;
    let factor = clip_factor(norm, max_norm);
    if norm.is_finite() && factor < 1.0 {
        for parameter in parameters.weights() {
            let value = parameter.tensor();
            if let Some(gradient) = gradients.take(&value) {
                gradients.insert(&value, crate::autograd::no_grad(|| gradient.scale(factor))?);
            }
        }
    }
    Ok(norm)
}

/// Names of the weights whose gradients hold a value that is not finite.
///
/// # Errors
/// As [`global_norm`].
pub fn not_finite(parameters: &Parameters, gradients: &Gradients) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for parameter in parameters.weights() {
        if let Some(gradient) = gradients.get(&parameter.tensor())
            && !sum_of_squares(gradient)?.is_finite()
        {
            names.push(parameter.name().to_owned());
        }
    }
    Ok(names)
}

fn sum_of_squares(gradient: &Tensor) -> Result<f64> {
    dispatch_float!("global_norm", gradient.dtype(), T => {
        let values = gradient.floats::<T>("global_norm")?;
        let pieces: Vec<f64> = values.par_chunks(PIECE).map(piece_sum).collect();
        Ok(pieces.iter().sum())
    })
}

/// Sixteen running sums, whatever the width of the registers, so that every machine adds in the same order.
fn piece_sum<T: Float>(values: &[T]) -> f64 {
    const LANES: usize = 16;
    simd::dispatch(
        #[inline(always)]
        || {
            let mut sums = [0.0f64; LANES];
            let (chunks, rest) = values.as_chunks::<LANES>();
            for chunk in chunks {
                for lane in 0..LANES {
                    let value = chunk[lane].to_f64();
                    sums[lane] += value * value;
                }
            }
            let mut total = 0.0;
            for sum in sums {
                total += sum;
            }
            for value in rest {
                total += value.to_f64() * value.to_f64();
            }
            total
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::nn::{Initializer, Scope};

    fn model(dtype: DType) -> (Scope, Gradients) {
        let scope = Scope::new(0, dtype);
        let mut gradients = Gradients::default();
        for (name, len) in [("a", 3), ("b", 20_005), ("without", 2)] {
            let parameter = scope.parameter(name, [len], Initializer::DEFAULT).unwrap();
            if name != "without" {
                let gradient = Tensor::from_index([len], dtype, |i| (i as f64 * 0.7).sin()).unwrap();
                gradients.insert(&parameter.tensor(), gradient);
            }
        }
        (scope, gradients)
    }

    #[test]
    fn the_norm_is_that_of_one_vector_for_any_number_of_threads() {
        for (dtype, tolerance) in [(DType::F32, 1e-7), (DType::F64, 1e-13)] {
            let (scope, gradients) = model(dtype);
            let square = |len: usize| (0..len).map(|i| (i as f64 * 0.7).sin().powi(2)).sum::<f64>();
            let expected = (square(3) + square(20_005)).sqrt();
            let norm = global_norm(scope.parameters(), &gradients).unwrap();
            assert!((norm / expected - 1.0).abs() < tolerance, "{norm}, expected {expected}");
            for threads in [1, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                assert_eq!(pool.install(|| global_norm(scope.parameters(), &gradients).unwrap()), norm);
            }
        }
    }

    #[test]
    fn clipping_shortens_long_gradients_alone() {
        let (scope, mut gradients) = model(DType::F64);
        let norm = clip_global_norm(scope.parameters(), &mut gradients, 5.0).unwrap();
        let clipped = global_norm(scope.parameters(), &gradients).unwrap();
        assert!(norm > 90.0 && (clipped - 5.0).abs() < 1e-6, "{norm} {clipped}");
        assert_eq!(clip_global_norm(scope.parameters(), &mut gradients, 6.0).unwrap(), clipped);
        assert_eq!(global_norm(scope.parameters(), &gradients).unwrap(), clipped);
    }

    #[test]
    fn a_value_that_is_not_finite_shows_and_is_named() {
        for bad in [f64::NAN, f64::INFINITY] {
            let (scope, mut gradients) = model(DType::F32);
            assert!(not_finite(scope.parameters(), &gradients).unwrap().is_empty());
            let b = scope.parameters().get("b").unwrap().tensor();
            let spoiled = Tensor::from_index([20_005], DType::F32, |i| if i == 20_001 { bad } else { 0.0 }).unwrap();
            gradients.insert(&b, spoiled);
            assert!(!clip_global_norm(scope.parameters(), &mut gradients, 1.0).unwrap().is_finite());
            assert_eq!(not_finite(scope.parameters(), &gradients).unwrap(), ["b"]);
        }
    }
}
