//! The Network-in-Network: its size, its pooling, and training it.

use gridgrad::models::NetworkInNetwork;
use gridgrad::nn::Context;
use gridgrad::ops::{CrossEntropyOptions, Pool2dOptions, Targets, avg_pool2d, cross_entropy};
use gridgrad::random::Philox;
use gridgrad::{DType, Tensor};

#[test]
fn it_has_the_published_number_of_parameters() {
    for (channels, classes, expected) in [(1, 10, 996_042), (3, 10, 1_005_642), (3, 43, 1_012_011)] {
        let model = NetworkInNetwork::new(channels, classes, 0, DType::F32).unwrap();
        assert_eq!(model.parameters().count(), expected, "{channels} channels, {classes} classes");
    }
}

#[test]
fn averages_at_the_border_divide_by_nine() {
    let pool =
        Pool2dOptions { kernel: [3; 2], stride: [2; 2], padding: [1; 2], ceil_mode: false, count_include_pad: true };
    let averages = avg_pool2d(&Tensor::ones([1, 5, 5, 1], DType::F64).unwrap(), pool).unwrap();
    let expected = [4.0, 6.0, 4.0, 6.0, 9.0, 6.0, 4.0, 6.0, 4.0].map(|count: f64| count / 9.0);
    for (got, expected) in averages.to_vec::<f64>().unwrap().into_iter().zip(expected) {
        assert!((got - expected).abs() < 1e-15, "{got} for {expected}");
    }
}

#[test]
fn images_that_do_not_fit_are_refused() {
    let model = NetworkInNetwork::new(3, 10, 0, DType::F32).unwrap();
    for shape in [[1, 4, 8, 3], [1, 8, 8, 1]] {
        let error = model.logits(&Tensor::zeros(shape, DType::F32).unwrap(), &Context::eval()).unwrap_err();
        assert!(error.to_string().contains("expected 3 channels and at least 5×5"), "{error}");
    }
    assert!(NetworkInNetwork::new(3, 0, 0, DType::F32).is_err());
}

#[test]
fn gradients_agree_with_differences_along_a_direction() {
    let model = NetworkInNetwork::new(1, 3, 5, DType::F64).unwrap();
    let images = Tensor::randn([4, 5, 6, 1], DType::F64, Philox::new(1)).unwrap();
    let labels = Tensor::new(&[0i64, 2, 1, 1], [4]).unwrap();
    let loss = || {
        let logits = model.logits(&images, &Context::train(Philox::new(0))).unwrap();
        cross_entropy(&logits, Targets::Labels(&labels), CrossEntropyOptions::default()).unwrap()
    };
    let gradients = loss().backward().unwrap();
    for name in
        ["block1.0.conv.weight", "block1.1.norm.weight", "block2.0.norm.bias", "block3.2.conv.weight", "fc.bias"]
    {
        let parameter = model.parameters().get(name).unwrap();
        let value = parameter.tensor().detach();
        let direction = Tensor::randn(value.shape(), DType::F64, Philox::new(7)).unwrap();
        let along = gradients.get(&parameter.tensor()).unwrap().mul(&direction).unwrap().sum_all().unwrap();
        // Small: ReLU and maxima have kinks, which a large step would cross.
        let step = 1e-9;
        let at = |step: f64| {
            parameter.set(&value.add(&direction.scale(step).unwrap()).unwrap()).unwrap();
            loss().item().unwrap()
        };
        let difference = (at(step) - at(-step)) / (2.0 * step);
        parameter.set(&value).unwrap();
        let along = along.item().unwrap();
        assert!((along - difference).abs() < 1e-5 * (1.0 + along.abs()), "{name}: {along} and {difference}");
    }
}

#[test]
fn every_model_of_several_has_the_bits_of_its_seed() {
    let seeds = [4, 9, 2];
    let several = NetworkInNetwork::each(1, 3, &seeds, DType::F32).unwrap();
    assert_eq!(several.parameters().get("fc.weight").unwrap().shape().to_vec(), [3, 3, 192]);
    for (model, seed) in seeds.into_iter().enumerate() {
        let alone = NetworkInNetwork::new(1, 3, seed, DType::F32).unwrap().parameters().state_dict();
        let state = several.state_of(model).unwrap();
        assert_eq!(state.len(), alone.len());
        for (name, value) in alone {
            assert_eq!(state[&name].shape(), value.shape(), "{name}");
            assert!(state[&name].raw_bytes().unwrap() == value.raw_bytes().unwrap(), "{name} of model {model}");
        }
    }
    assert!(several.state_of(3).is_err() && NetworkInNetwork::each(1, 3, &[], DType::F32).is_err());
}
