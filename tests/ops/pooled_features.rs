//! Features of many maps at once, and the fused end of a residual block.

use std::fmt;

use gridgrad::ops::{adaptive_avg_pool2d, add_relu_gap, concat, pooled_features};
use gridgrad::{DType, Result, Tensor, autograd};

use crate::harness::{Derivatives, OpCase, ROUNDING, Tolerance, Work, check, check_on_device, randn, test_device};

/// Which results are looked at.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Form {
    /// Features of all maps.
    Pooled,
    /// The fused form of two maps of one shape: output and features, one after the other.
    Fused,
}

#[derive(Debug)]
struct Features {
    batch: usize,
    /// Height, width, channels.
    maps: Vec<[usize; 3]>,
    cells: usize,
    form: Form,
}

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// One row of values.
fn flat(tensor: &Tensor, dtype: DType) -> Result<Tensor> {
    tensor.reshape([tensor.elements()])?.cast(dtype)
}

impl OpCase for Features {
    fn inputs(&self) -> Vec<Tensor> {
        let map = |(&[h, w, c], number): (&[usize; 3], u64)| randn(&[self.batch, h, w, c], number);
        self.maps.iter().zip(0..).map(map).collect()
    }

    fn run(&self, inputs: &[Tensor]) -> Result<Tensor> {
        let dtype = inputs[0].dtype();
        match self.form {
            Form::Pooled => flat(&pooled_features(&inputs.iter().collect::<Vec<_>>(), self.cells)?, dtype),
            Form::Fused => {
                let (output, features) = add_relu_gap(&inputs[0], &inputs[1], self.cells)?;
                concat(&[&flat(&output, dtype)?, &flat(&features, dtype)?], 0)
            }
        }
    }

    fn reference(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        let sum: Vec<f64>;
        let (mut result, maps): (Vec<f64>, Vec<&[f64]>) = match self.form {
            Form::Pooled => (Vec::new(), inputs.iter().map(|map| &map[..]).collect()),
            Form::Fused => {
                sum = inputs[0].iter().zip(&inputs[1]).map(|(a, b)| (a + b).max(0.0)).collect();
                (sum.clone(), vec![&sum])
            }
        };
        let p = self.cells;
        for image in 0..self.batch {
            for (map, &[h, w, c]) in maps.iter().zip(&self.maps) {
                for (cell, channel) in (0..p * p).flat_map(|cell| (0..c).map(move |channel| (cell, channel))) {
                    let (a, b) = (cell / p, cell % p);
                    let mut values = Vec::new();
                    for i in a * h / p..((a + 1) * h).div_ceil(p) {
                        for j in b * w / p..((b + 1) * w).div_ceil(p) {
                            values.push(map[((image * h + i) * w + j) * c + channel]);
                        }
                    }
                    result.push(values.iter().sum::<f64>() / values.len() as f64);
                }
            }
        }
        result
    }

    fn work(&self) -> Work {
        let elements: u64 = self.maps.iter().map(|map| (self.batch * map.iter().product::<usize>()) as u64).sum();
        match self.form {
            Form::Pooled => Work { bytes: 4 * elements, flops: elements },
            Form::Fused => Work { bytes: 6 * elements, flops: 3 * elements / 2 },
        }
    }

    fn tolerance(&self) -> Tolerance {
        ROUNDING
    }

    fn derivatives(&self) -> Derivatives {
        Derivatives::First
    }
}

fn case(batch: usize, maps: &[[usize; 3]], cells: usize, form: Form) -> Box<dyn OpCase> {
    Box::new(Features { batch, maps: maps.to_vec(), cells, form })
}

/// ResNet-20's blocks on CIFAR at batch 16, and the last end of a residual block of ResNet-50.
pub fn benchmarks() -> Vec<Box<dyn OpCase>> {
    let stages = [[32, 32, 16], [16, 16, 32], [8, 8, 64]];
    let blocks: Vec<[usize; 3]> = stages.iter().flat_map(|&stage| [stage; 3]).collect();
    vec![case(16, &blocks, 1, Form::Pooled), case(8, &[[7, 7, 2048]; 2], 1, Form::Fused)]
}

#[test]
fn pooled_features_agree_with_their_formula() {
    check(&[
        case(2, &[[6, 5, 3]], 1, Form::Pooled),
        case(3, &[[8, 8, 16], [4, 4, 8], [1, 1, 5], [7, 3, 1]], 2, Form::Pooled),
        case(1, &[[5, 7, 4], [3, 2, 2]], 4, Form::Pooled),
        case(0, &[[2, 2, 3]], 1, Form::Pooled),
        case(2, &[[2, 2, 0], [2, 2, 3]], 1, Form::Pooled),
    ]);
    // More channels than a block takes, in vectors and one by one.
    for case in [case(1, &[[3, 3, 264], [2, 2, 33]], 1, Form::Pooled), case(1, &[[9, 31, 24]], 1, Form::Pooled)] {
        check_on_device(case.as_ref());
    }
}

#[test]
fn the_fused_form_agrees_with_its_formula() {
    check(&[
        case(2, &[[5, 7, 3]; 2], 2, Form::Fused),
        case(2, &[[4, 4, 16]; 2], 1, Form::Fused),
        case(1, &[[1, 1, 8]; 2], 3, Form::Fused),
        case(1, &[[5, 3, 8]; 2], 4, Form::Fused),
    ]);
}

#[test]
fn features_are_those_of_adaptive_pooling() {
    let map = randn(&[2, 7, 5, 3], 0);
    let pooled = adaptive_avg_pool2d(&map, [2, 2]).unwrap().to_f64_vec().unwrap();
    let features = pooled_features(&[&map], 2).unwrap().to_f64_vec().unwrap();
    assert!(pooled.iter().zip(&features).all(|(a, b)| (a - b).abs() < 1e-14));
}

#[test]
fn gradients_of_both_results_add_up() {
    let (a, b) = (randn(&[2, 4, 4, 3], 0).variable().unwrap(), randn(&[2, 4, 4, 3], 1).variable().unwrap());
    let (output, features) = add_relu_gap(&a, &b, 1).unwrap();
    let loss = output.square().unwrap().sum_all().unwrap().add(&features.square().unwrap().sum_all().unwrap()).unwrap();
    let fused = autograd::grad(&loss, &[&a, &b], Default::default()).unwrap();
    let plain = a.add(&b).unwrap().relu().unwrap();
    let mean = plain.mean(&[1, 2], false).unwrap();
    let loss = plain.square().unwrap().sum_all().unwrap().add(&mean.square().unwrap().sum_all().unwrap()).unwrap();
    for (fused, plain) in fused.iter().zip(autograd::grad(&loss, &[&a, &b], Default::default()).unwrap()) {
        let (fused, plain) = (fused.as_ref().unwrap().to_f64_vec().unwrap(), plain.unwrap().to_f64_vec().unwrap());
        assert!(fused.iter().zip(&plain).all(|(a, b)| (a - b).abs() < 1e-13));
    }
}

#[test]
fn what_is_not_a_number_shows() {
    let map = Tensor::from_index([1, 2, 2, 2], DType::F32, |i| if i == 2 { f64::NAN } else { 1.0 }).unwrap();
    for map in [Some(map.clone()), test_device().map(|device| map.to_device(device).unwrap())].into_iter().flatten() {
        let features = pooled_features(&[&map], 1).unwrap().to_f64_vec().unwrap();
        assert!(features[0].is_nan() && features[1] == 1.0);
        let (output, features) = add_relu_gap(&map, &map, 1).unwrap();
        assert!(output.to_f64_vec().unwrap()[2].is_nan() && features.to_f64_vec().unwrap()[0].is_nan());
    }
}

#[test]
fn bad_arguments_are_errors() {
    let message = |result: Result<Tensor>| result.unwrap_err().to_string();
    let (map, other) = (randn(&[2, 3, 3, 4], 0), randn(&[1, 3, 3, 4], 1));
    assert!(message(pooled_features(&[], 1)).contains("0 maps, expected 1 to 512"));
    assert!(message(pooled_features(&[&map; 513], 1)).contains("513 maps"));
    assert!(message(pooled_features(&[&map], 0)).contains("0 cells a side"));
    assert!(message(pooled_features(&[&map, &other], 1)).contains("expected 2 images"));
    assert!(message(pooled_features(&[&randn(&[2, 0, 3, 4], 0)], 1)).contains("with positions"));
    assert!(message(pooled_features(&[&map, &map.cast(DType::F32).unwrap()], 1)).contains("got dtype f32"));
    assert!(message(add_relu_gap(&map, &other, 1).map(|both| both.0)).contains("expected (2, 3, 3, 4)"));
}
