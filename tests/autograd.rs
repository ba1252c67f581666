//! Behaviour of the tape, apart from the rules of single ops.

use gridgrad::autograd::{Backward, Function, GradOptions, Gradients, grad, no_grad, record};
use gridgrad::{DType, Error, Result, Tensor};

fn variable(value: f64) -> Tensor {
    Tensor::scalar(value).variable().unwrap()
}

fn of(gradients: &Gradients, variable: &Tensor) -> f64 {
    gradients.get(variable).unwrap().item().unwrap()
}

const GRAPH: fn() -> GradOptions = || GradOptions { create_graph: true, ..GradOptions::default() };

#[test]
fn a_variable_used_several_times_sums_its_gradients() -> Result<()> {
    let x = variable(3.0);
    let y = x.mul(&x)?.add(&x)?.add(&x)?; // x² + 2x
    assert_eq!(of(&y.backward()?, &x), 8.0);
    // An op whose operands are the same tensor.
    assert_eq!(of(&x.add(&x)?.backward()?, &x), 2.0);
    assert_eq!(of(&x.sub(&x)?.backward()?, &x), 0.0);
    Ok(())
}

#[test]
fn branches_of_different_length_meet_before_the_walk_goes_on() -> Result<()> {
    let x = variable(2.0);
    let root = x.square()?;
    let short = root.scale(5.0)?;
    let long = root.scale(2.0)?.square()?.scale(0.5)?; // 2 root²
    let joined = short.mul(&long)?; // 10 root³ = 10 x⁶
    assert_eq!(of(&joined.backward()?, &x), 60.0 * 2f64.powi(5));
    Ok(())
}

/// 2⁶⁰ paths, so a walk that visited paths and not nodes would never end.
#[test]
fn stacked_diamonds_take_one_visit_per_node() -> Result<()> {
    let x = variable(1.0);
    let mut y = x.clone();
    for _ in 0..60 {
        y = y.add(&y)?;
    }
    assert_eq!(of(&y.backward()?, &x), 2f64.powi(60));
    Ok(())
}

#[test]
fn only_variables_behind_the_result_get_gradients() -> Result<()> {
    let (x, y, constant) = (variable(2.0), variable(3.0), Tensor::scalar(4.0f64));
    let gradients = x.mul(&constant)?.backward()?;
    assert_eq!((gradients.len(), of(&gradients, &x)), (1, 4.0));
    assert!(gradients.get(&y).is_none() && gradients.get(&constant).is_none());
    let asked = grad(&x.square()?, &[&y, &x], GradOptions::default())?;
    assert!(asked[0].is_none());
    assert_eq!(asked[1].as_ref().unwrap().item()?, 4.0);
    Ok(())
}

#[test]
fn no_grad_and_detach_cut_the_tape() -> Result<()> {
    let x = variable(2.0);
    let frozen = no_grad(|| x.square())?;
    assert!(!frozen.requires_grad());
    assert!(x.square()?.requires_grad(), "recording goes on afterwards");
    let y = x.square()?;
    assert!(!y.detach().requires_grad());
    assert_eq!(of(&y.mul(&y.detach())?.backward()?, &x), 16.0); // 2x · 4
    assert!(!x.detach().requires_grad() && x.requires_grad());
    // A variable made of a result is a leaf of its own.
    let leaf = x.square()?.variable()?;
    let gradients = leaf.square()?.backward()?;
    assert_eq!(of(&gradients, &leaf), 8.0);
    assert!(gradients.get(&x).is_none());
    Ok(())
}

#[test]
fn no_grad_is_restored_after_a_panic_and_nests() -> Result<()> {
    let x = variable(1.0);
    let panicked = std::panic::catch_unwind(|| no_grad(|| std::panic::resume_unwind(Box::new("stop"))));
    assert!(panicked.is_err());
    assert!(x.square()?.requires_grad());
    let inner = no_grad(|| {
        no_grad(|| ());
        x.square()
    })?;
    assert!(!inner.requires_grad());
    Ok(())
}

#[test]
fn a_graph_is_freed_unless_retained() -> Result<()> {
    let x = variable(3.0);
    let y = x.square()?;
    let retain = || GradOptions { retain_graph: true, ..GradOptions::default() };
    for _ in 0..2 {
        assert_eq!(grad(&y, &[&x], retain())?[0].as_ref().unwrap().item()?, 6.0);
    }
    assert_eq!(of(&y.backward()?, &x), 6.0);
    let error = y.backward().unwrap_err();
    assert!(matches!(error, Error::Autograd(_)));
    assert!(error.to_string().contains("already walked and freed; ask for `retain_graph`"), "{error}");
    // Also where another result shares the freed part.
    let shared = x.square()?;
    let (first, second) = (shared.exp()?, shared.neg()?);
    first.backward()?;
    assert!(second.backward().unwrap_err().to_string().contains("freed"));
    Ok(())
}

#[test]
fn derivatives_of_any_order() -> Result<()> {
    let x = variable(1.5);
    let mut derivative = x.powf(4.0)?;
    for expected in [4.0 * 1.5f64.powi(3), 12.0 * 1.5f64.powi(2), 24.0 * 1.5, 24.0] {
        derivative = grad(&derivative, &[&x], GRAPH())?.remove(0).unwrap();
        assert!((derivative.item()? - expected).abs() < 1e-12, "{derivative:?}, not {expected}");
    }
    // By products, the third derivative is 24x and its graph ends there.
    let mut derivative = x.square()?.square()?;
    for _ in 0..3 {
        derivative = grad(&derivative, &[&x], GRAPH())?.remove(0).unwrap();
    }
    assert_eq!(derivative.item()?, 36.0);
    Ok(())
}

/// As in a gradient penalty: the gradient's norm is part of the loss.
#[test]
fn a_gradient_is_part_of_a_loss() -> Result<()> {
    let (x, w) = (variable(2.0), variable(3.0));
    let slope = grad(&w.mul(&x.square()?)?, &[&x], GRAPH())?.remove(0).unwrap(); // 2wx
    let penalty = slope.shift(-1.0)?.square()?; // (2wx − 1)²
    let gradients = penalty.backward()?;
    assert_eq!(of(&gradients, &w), 2.0 * 11.0 * 4.0); // 2 (2wx − 1) · 2x
    assert_eq!(of(&gradients, &x), 2.0 * 11.0 * 6.0);
    Ok(())
}

#[test]
fn gradients_of_intermediate_results() -> Result<()> {
    let x = variable(2.0);
    let y = x.square()?;
    let z = y.mul(&y)?.mul(&x)?; // y² x
    let gradients = grad(&z, &[&y, &x, &z], GradOptions { retain_graph: true, ..GradOptions::default() })?;
    let values: Vec<f64> = gradients.iter().map(|g| g.as_ref().unwrap().item().unwrap()).collect();
    assert_eq!(values, [2.0 * 4.0 * 2.0, 5.0 * 16.0, 1.0]);
    // And second derivatives with respect to them.
    let z = y.mul(&y)?.mul(&y)?;
    let first = grad(&z, &[&y], GRAPH())?.remove(0).unwrap();
    let second = grad(&first, &[&y], GradOptions::default())?.remove(0).unwrap();
    assert_eq!(second.item()?, 24.0);
    Ok(())
}

#[test]
fn a_walk_starts_from_the_given_gradient() -> Result<()> {
    let x = Tensor::new(&[1.0, 2.0, 3.0], [3])?.variable()?;
    let y = x.square()?;
    let start = |grad_output: Tensor| GradOptions { grad_output: Some(grad_output), ..GradOptions::default() };
    let gradients = grad(&y, &[&x], start(Tensor::new(&[1.0, 10.0, 100.0], [3])?))?;
    assert_eq!(gradients[0].as_ref().unwrap().to_f64_vec().unwrap(), [2.0, 40.0, 600.0]);
    let y = x.square()?;
    let message = |options| grad(&y, &[&x], options).unwrap_err().to_string();
    assert!(message(GradOptions::default()).contains("needs a scalar or a grad_output, got shape (3)"));
    assert!(message(start(Tensor::scalar(1.0))).contains("grad_output is f64 (), the output f64 (3)"));
    assert!(message(start(Tensor::new(&[1.0f32; 3], [3])?)).contains("grad_output is f32 (3)"));
    assert!(Tensor::scalar(1.0).backward().unwrap_err().to_string().contains("does not depend on any variable"));
    Ok(())
}

#[test]
fn accumulated_gradients_are_sums_over_walks() -> Result<()> {
    let (x, y) = (variable(2.0), variable(5.0));
    let mut total = x.square()?.backward()?;
    let kept = total.get(&x).unwrap().clone();
    total.accumulate(x.mul(&y)?.backward()?)?;
    assert_eq!((total.len(), of(&total, &x), of(&total, &y)), (2, 9.0, 2.0));
    assert_eq!(kept.item()?, 4.0, "a gradient that somebody else holds is not written to");
    total.insert(&y, Tensor::scalar(7.0));
    assert_eq!(total.take(&y).unwrap().item()?, 7.0);
    assert!(total.get(&y).is_none() && !total.is_empty());
    Ok(())
}

/// The gradient of both branches is the same tensor, which the sum in place must not spoil.
#[test]
fn a_shared_gradient_is_not_overwritten() -> Result<()> {
    let (x, y) = (variable(1.0), variable(1.0));
    let sum = x.add(&y)?; // hands its own gradient to both
    let total = sum.add(&x.scale(3.0)?)?;
    let gradients = grad(&total, &[&x, &y, &sum], GradOptions::default())?;
    let values: Vec<f64> = gradients.iter().map(|g| g.as_ref().unwrap().item().unwrap()).collect();
    assert_eq!(values, [4.0, 1.0, 1.0]);
    Ok(())
}

#[test]
fn a_long_chain_is_walked_and_freed_in_a_small_stack() {
    const OPS: usize = 100_000;
    let body = || -> Result<()> {
        let chain = |x: &Tensor| (0..OPS).try_fold(x.clone(), |y, _| y.shift(1.0));
        let x = variable(0.0);
        let walked = chain(&x)?;
        assert_eq!(walked.item()?, OPS as f64);
        assert_eq!(of(&walked.backward()?, &x), 1.0);
        drop(walked);
        // Never walked, so all of it is freed at once; the rules of products hold tensors of the chain, too.
        drop(chain(&x)?);
        let mut product = x.clone();
        for _ in 0..OPS {
            product = product.mul(&x)?;
        }
        drop(product);
        Ok(())
    };
    std::thread::Builder::new().stack_size(256 << 10).spawn(body).unwrap().join().unwrap().unwrap();
}

#[test]
fn tensors_and_gradients_cross_threads() -> Result<()> {
    fn shared<T: Send + Sync>() {}
    shared::<Tensor>();
    shared::<Gradients>();
    let x = variable(3.0);
    let y = x.square()?;
    // Recording is a state of the thread: switched off in one, it stays on in the others.
    let recorded = no_grad(|| std::thread::scope(|scope| scope.spawn(|| y.scale(2.0).unwrap()).join().unwrap()));
    let gradients = std::thread::spawn(move || recorded.backward()).join().unwrap()?;
    assert_eq!(of(&gradients, &x), 12.0);
    Ok(())
}

/// Several threads that walk one retained graph at the same time.
#[test]
fn threads_share_a_graph() -> Result<()> {
    let x = variable(3.0);
    let y = (0..50).try_fold(x.clone(), |y, _| y.scale(1.01))?.square()?;
    let walk = || {
        let options = GradOptions { retain_graph: true, ..GradOptions::default() };
        grad(&y, &[&x], options).unwrap()[0].as_ref().unwrap().item().unwrap()
    };
    let expected = walk();
    std::thread::scope(|scope| {
        let walks: Vec<_> = (0..4).map(|_| scope.spawn(walk)).collect();
        walks.into_iter().for_each(|result| assert_eq!(result.join().unwrap(), expected));
    });
    Ok(())
}

struct Doubled;

impl Function for Doubled {
    fn name(&self) -> &'static str {
        "doubled"
    }

    fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        backward.first_order_only(self.name())?;
        assert!(backward.needs(0) && !backward.needs(1) && !backward.needs(2));
        Ok(vec![Some(backward.grad().scale(2.0)?), None])
    }
}

#[test]
fn a_custom_function_of_first_order_says_so() -> Result<()> {
    let (x, constant) = (variable(3.0), Tensor::scalar(1.0f64));
    let doubled = || record(Tensor::scalar(6.0f64), &[&x, &constant], |_| Doubled);
    assert_eq!(of(&doubled().backward()?, &x), 2.0);
    let error = grad(&doubled(), &[&x], GRAPH()).unwrap_err();
    assert!(matches!(error, Error::NoSecondDerivative { op: "doubled" }));
    assert!(error.to_string().contains("doubled: has no second derivative"));
    let off_tape = record(Tensor::scalar(6.0f64), &[&constant], |_| -> Doubled { unreachable!("nothing to record") });
    assert!(!off_tape.requires_grad());
    Ok(())
}

#[test]
fn integers_carry_no_gradients() -> Result<()> {
    let labels = Tensor::new(&[1i64, 2], [2])?;
    assert!(labels.variable().unwrap_err().to_string().contains("variable: got dtype i64"));
    let x = variable(2.7);
    assert!(!x.cast(DType::I64)?.requires_grad());
    assert_eq!(of(&x.cast(DType::F32)?.square()?.backward()?, &x), f64::from(2.7f32) * 2.0);
    Ok(())
}

#[test]
fn a_walk_stops_at_the_tensors_that_it_was_asked_for() {
    let x = Tensor::scalar(2.0f64).variable().unwrap();
    let middle = x.square().unwrap();
    // Frees what is behind `middle`.
    middle.backward().unwrap();
    let result = middle.exp().unwrap();
    let gradient = gridgrad::autograd::grad(&result, &[&middle], GradOptions::default()).unwrap();
    assert!((gradient[0].as_ref().unwrap().item().unwrap() - 4.0f64.exp()).abs() < 1e-12);
}
