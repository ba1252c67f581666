use super::*;
use crate::nn::{Initializer, Scope};
use crate::random::Philox;

const STEPS: usize = 6;
/// Longer than one piece of a parallel loop.
const LEN: usize = 20_011;

/// `gradient` of element `i` at `step`.
fn gradient(step: usize, i: usize) -> f64 {
    Philox::new(5).fork(step as u64).normal(i as u64)
}

fn matrix(dtype: DType) -> (Scope, Parameter) {
    let scope = Scope::new(3, dtype);
    let weight = scope.parameter("layer.weight", [1, LEN], Initializer::DEFAULT).unwrap();
    (scope, weight)
}

fn gradients(parameter: &Parameter, step: usize) -> Gradients {
    let value = parameter.tensor();
    let mut gradients = Gradients::default();
    gradients.insert(&value, Tensor::from_index(value.shape(), value.dtype(), |i| gradient(step, i)).unwrap());
    gradients
}

/// Steps a parameter and, next to it, `reference(value, memory, gradient, step)` in `f64`; compares after every step.
fn compare(
    config: OptimizerConfig,
    dtype: DType,
    [lr, scale]: [f64; 2],
    reference: impl Fn(f64, &mut [f64; 2], f64, usize) -> f64,
) {
    let (scope, weight) = matrix(dtype);
    let mut optimizer = Optimizer::new(scope.parameters(), config).unwrap();
    let mut values = weight.tensor().to_f64_vec().unwrap();
    let mut memory = vec![[0.0; 2]; LEN];
    let tolerance = if dtype == DType::F64 { 1e-13 } else { 2e-6 };
    for step in 1..=STEPS {
        optimizer.step_scaled(&gradients(&weight, step), lr, scale).unwrap();
        for (i, (value, memory)) in values.iter_mut().zip(&mut memory).enumerate() {
            *value = reference(*value, memory, gradient(step, i) * scale, step);
        }
        for (i, (got, expected)) in weight.tensor().to_f64_vec().unwrap().iter().zip(&values).enumerate() {
            let difference = (got - expected).abs();
            assert!(difference <= tolerance, "step {step}, element {i}: {got}, expected {expected}");
        }
    }
}

#[test]
fn adamw_is_the_published_formula() {
    let config = AdamW { betas: (0.8, 0.95), eps: 1e-3, weight_decay: 0.3 };
    for dtype in [DType::F32, DType::F64] {
        compare(OptimizerConfig::AdamW(config), dtype, [0.02, 0.5], |p, [m, v], g, step| {
            let p = p - 0.02 * 0.3 * p;
            *m = 0.8 * *m + 0.2 * g;
            *v = 0.95 * *v + 0.05 * g * g;
            let mean = *m / (1.0 - 0.8f64.powi(step as i32));
            let square = *v / (1.0 - 0.95f64.powi(step as i32));
            p - 0.02 * mean / (square.sqrt() + 1e-3)
        });
    }
}

#[test]
fn sgd_is_the_published_formula_with_and_without_momentum_and_nesterov() {
    for (momentum, nesterov) in [(0.0, false), (0.9, false), (0.9, true)] {
        let config = Sgd { momentum, nesterov, weight_decay: 0.1 };
        for dtype in [DType::F32, DType::F64] {
            compare(OptimizerConfig::Sgd(config), dtype, [0.05, 1.0], |p, [buffer, _], g, step| {
                let d = g + 0.1 * p;
                *buffer = if step == 1 { d } else { momentum * *buffer + d };
                p - 0.05 * if nesterov { d + momentum * *buffer } else { *buffer }
            });
        }
    }
}

#[test]
fn only_matrices_that_are_not_biases_decay_and_a_group_can_freeze() {
    let scope = Scope::new(1, DType::F64);
    let one = Initializer::Constant(1.0);
    let make = |name: &str, shape: &[usize]| scope.parameter(name, shape, one).unwrap();
    let all = [make("fc.weight", &[2, 2]), make("norm.weight", &[4]), make("fc.bias", &[2, 2]), make("free", &[1, 1])];
    let mut zero = Gradients::default();
    for parameter in &all[..3] {
        zero.insert(&parameter.tensor(), Tensor::zeros(parameter.shape(), DType::F64).unwrap());
    }
    let config = OptimizerConfig::AdamW(AdamW { weight_decay: 0.5, ..AdamW::default() });
    Optimizer::new(scope.parameters(), config).unwrap().step(&zero, 0.1).unwrap();
    let first = || all.iter().map(|p| p.tensor().to_f64_vec().unwrap()[0]).collect::<Vec<_>>();
    // The last one decays, but has no gradient.
    assert_eq!(first(), [0.95, 1.0, 1.0, 1.0]);
    let frozen = |p: &Parameter| Group { weight_decay: 0.5, lr_scale: f64::from(u8::from(p.name() == "norm.weight")) };
    Optimizer::with_groups(scope.parameters(), config, frozen).unwrap().step(&zero, 0.1).unwrap();
    assert_eq!(first(), [0.95, 0.95, 1.0, 1.0]);
}

#[test]
fn a_state_dict_continues_to_the_bit_and_one_that_does_not_fit_changes_nothing() {
    for config in [OptimizerConfig::default(), OptimizerConfig::Sgd(Sgd::default())] {
        let (scope, weight) = matrix(DType::F32);
        let mut optimizer = Optimizer::new(scope.parameters(), config).unwrap();
        optimizer.step(&gradients(&weight, 1), 0.1).unwrap();
        let (state, value) = (optimizer.state_dict().unwrap(), weight.tensor().detach());
        optimizer.step(&gradients(&weight, 2), 0.1).unwrap();
        let expected = weight.tensor().to_vec::<f32>().unwrap();

        weight.set(&value).unwrap();
        let mut resumed = Optimizer::new(scope.parameters(), config).unwrap();
        resumed.load_state_dict(&state).unwrap();
        resumed.step(&gradients(&weight, 2), 0.1).unwrap();
        assert_eq!(weight.tensor().to_vec::<f32>().unwrap(), expected);

        let names: Vec<&String> = state.keys().collect();
        let mut unfit = StateDict::from([(names[0].clone(), Tensor::zeros([3], DType::F32).unwrap())]);
        unfit.insert("other.exp_avg".into(), Tensor::scalar(0.0f32));
        let message = resumed.load_state_dict(&unfit).unwrap_err().to_string();
        assert!(message.contains("misshapen: layer.weight.") && message.contains("surplus: other"), "{message}");
        let same = resumed
            .state_dict()
            .unwrap()
            .iter()
            .zip(optimizer.state_dict().unwrap())
            .all(|((_, a), (_, b))| a.raw_bytes().unwrap() == b.raw_bytes().unwrap());
        assert!(same);
    }
}

#[test]
fn settings_and_tensors_that_cannot_be_are_refused() {
    let (scope, weight) = matrix(DType::F32);
    for config in [
        OptimizerConfig::AdamW(AdamW { betas: (1.0, 0.9), ..AdamW::default() }),
        OptimizerConfig::AdamW(AdamW { eps: f64::NAN, ..AdamW::default() }),
        OptimizerConfig::AdamW(AdamW { weight_decay: -1.0, ..AdamW::default() }),
        OptimizerConfig::Sgd(Sgd { momentum: 0.0, nesterov: true, weight_decay: 0.0 }),
    ] {
        assert!(matches!(Optimizer::new(scope.parameters(), config), Err(Error::Config(_))), "{config:?}");
    }
    let half = Scope::new(0, DType::Bf16);
    half.parameter("weight", [2], Initializer::DEFAULT).unwrap();
    assert!(matches!(Optimizer::new(half.parameters(), OptimizerConfig::default()), Err(Error::DType { .. })));

    let mut optimizer = Optimizer::new(scope.parameters(), OptimizerConfig::default()).unwrap();
    let mut wrong = Gradients::default();
    wrong.insert(&weight.tensor(), Tensor::zeros([2], DType::F32).unwrap());
    assert!(optimizer.step(&wrong, 0.1).unwrap_err().to_string().contains("layer.weight"));
}

#[test]
fn configurations_are_read_by_name_and_unknown_fields_are_refused() {
    let read = |text: &str| toml::from_str::<OptimizerConfig>(text);
    let sgd = read("kind = 'sgd'\nnesterov = true").unwrap();
    assert_eq!(sgd, OptimizerConfig::Sgd(Sgd { nesterov: true, ..Sgd::default() }));
    assert_eq!(read("kind = 'adamw'").unwrap(), OptimizerConfig::default());
    assert!(read("kind = 'adamw'\nmomentum = 0.9").unwrap_err().to_string().contains("momentum"));
}
