//! CrossFormer against values of the authors' code, and the properties that its specification lists.

use std::path::Path;

use gridgrad::autograd::no_grad;
use gridgrad::models::crossformer::{AttentionPattern, CrossFormerConfig, GroupSchedule, Kind, PositionBias};
use gridgrad::models::{CrossFormer, crossformer};
use gridgrad::nn::{Context, StateDict, state_dict};
use gridgrad::ops::{CrossEntropyOptions, Targets, cross_entropy};
use gridgrad::random::Philox;
use gridgrad::{DType, Result, Tensor};

fn fixture(name: &str) -> (CrossFormer, StateDict, StateDict) {
    fixture_as(name, DType::F64)
}

fn fixture_as(name: &str, dtype: DType) -> (CrossFormer, StateDict, StateDict) {
    // Read when the test runs: packed for another machine, it finds its files elsewhere.
    let root = std::env::var("CARGO_MANIFEST_DIR").unwrap_or(env!("CARGO_MANIFEST_DIR").into());
    let file = |suffix: &str| Path::new(&root).join(format!("tests/fixtures/crossformer/{name}.{suffix}"));
    let config = serde_json::from_slice(&std::fs::read(file("json")).unwrap()).unwrap();
    let model = CrossFormer::new(config, 0, dtype).unwrap();
    let (weights, _) = state_dict::read(file("weights.safetensors")).unwrap();
    assert!(model.load_official(&weights).unwrap().is_empty());
    let (io, _) = state_dict::read(file("io.safetensors")).unwrap();
    let io = io.into_iter().map(|(name, value)| {
        let value = if value.dtype().is_float() { value.cast(dtype).unwrap() } else { value };
        (name, value)
    });
    (model, weights, io.collect())
}

fn largest(tensor: &Tensor) -> f64 {
    tensor.to_f64_vec().unwrap().iter().fold(0.0, |largest, value| largest.max(value.abs()))
}

fn assert_close(name: &str, got: &Tensor, want: &Tensor, tolerance: f64) {
    assert_eq!(got.shape(), want.shape(), "{name}");
    let difference = largest(&got.sub(want).unwrap());
    assert!(difference <= tolerance, "{name}: differs by {difference:e}, allowed {tolerance:e}");
}

/// NCHW to NHWC.
fn channels_last(tensor: &Tensor) -> Tensor {
    tensor.permute(&[0, 2, 3, 1]).unwrap()
}

fn check_gradients(model: &CrossFormer, loss: &Tensor, images: &Tensor, io: &StateDict, relative: f64, absolute: f64) {
    let mut gradients = loss.backward().unwrap();
    let expected = |name: &str| &io[name];
    let all = model.parameters().iter().map(|parameter| largest(expected(&format!("grad.{}", parameter.name()))));
    let scale = all.fold(0.0, f64::max);
    let tolerance = |want: &Tensor| relative * largest(want) + absolute * scale;
    let input = expected("grad_input");
    assert_close(
        "grad_input",
        &gradients.take(images).unwrap().permute(&[0, 3, 1, 2]).unwrap(),
        input,
        tolerance(input),
    );
    for parameter in model.parameters().iter() {
        let want = expected(&format!("grad.{}", parameter.name()));
        assert_close(parameter.name(), gradients.get(&parameter.tensor()).unwrap(), want, tolerance(want));
    }
}

fn classifier_agrees(dtype: DType, output: f64, relative: f64, absolute: f64) {
    let (model, _, io) = fixture_as("classifier", dtype);
    let images = channels_last(&io["input"]).variable().unwrap();
    let logits = model.logits(&images, &Context::eval()).unwrap();
    assert_close("logits", &logits, &io["logits"], output * largest(&io["logits"]));
    let loss = cross_entropy(&logits, Targets::Labels(&io["target"]), CrossEntropyOptions::default()).unwrap();
    assert!((loss.item().unwrap() - io["loss"].item().unwrap()).abs() < output * 10.0);
    check_gradients(&model, &loss, &images, &io, relative, absolute);
}

fn backbone_agrees(dtype: DType, output: f64, relative: f64, absolute: f64) {
    let (model, _, io) = fixture_as("backbone", dtype);
    let images = channels_last(&io["input"]).variable().unwrap();
    let features = model.features(&images, &Context::eval()).unwrap();
    let mut loss = Tensor::scalar(0.0f64).cast(dtype).unwrap();
    for (number, feature) in features.iter().enumerate() {
        let want = &io[&format!("feature.{number}")];
        assert_close("feature", &feature.permute(&[0, 3, 1, 2]).unwrap(), want, output * largest(want));
        let cotangent = channels_last(&io[&format!("cotangent.{number}")]);
        loss = loss.add(&feature.mul(&cotangent).unwrap().sum_all().unwrap()).unwrap();
    }
    check_gradients(&model, &loss, &images, &io, relative, absolute);
}

// The reference was computed in f64 and stored in f32: 1e-7 of each value is its own rounding.

#[test]
fn the_classifier_agrees_with_the_official_code_in_f64() {
    classifier_agrees(DType::F64, 1e-6, 1e-6, 1e-7);
}

#[test]
fn the_classifier_agrees_with_the_official_code_in_f32() {
    classifier_agrees(DType::F32, 1e-4, 1e-3, 2e-5);
}

#[test]
fn the_backbone_agrees_with_the_official_code_in_f64() {
    backbone_agrees(DType::F64, 1e-6, 1e-6, 1e-7);
}

#[test]
fn the_backbone_agrees_with_the_official_code_in_f32() {
    backbone_agrees(DType::F32, 1e-4, 1e-3, 2e-5);
}

#[test]
fn tiny_has_the_official_names_and_shapes() {
    let model = CrossFormer::new(CrossFormerConfig::named("tiny", 1000).unwrap(), 0, DType::Bf16).unwrap();
    let state = model.parameters().state_dict();
    assert_eq!(state.len(), 448);
    for (name, shape) in [
        ("patch_embed.projs.3.weight", vec![8, 3, 32, 32]),
        ("patch_embed.norm.bias", vec![64]),
        ("layers.1.blocks.0.attn.pos.pos_proj.weight", vec![8, 2]),
        ("layers.2.blocks.7.attn.pos.pos1.0.weight", vec![16]),
        ("layers.2.blocks.7.attn.pos.pos2.2.weight", vec![16, 16]),
        ("layers.3.blocks.5.attn.pos.pos3.2.bias", vec![16]),
        ("layers.3.blocks.5.attn.qkv.weight", vec![1536, 512]),
        ("layers.0.blocks.0.mlp.fc2.weight", vec![64, 256]),
        ("layers.2.downsample.reductions.1.weight", vec![256, 256, 4, 4]),
        ("layers.2.downsample.norm.weight", vec![256]),
        ("head.weight", vec![1000, 512]),
    ] {
        assert_eq!(state[name].shape().to_vec(), shape, "{name}");
    }
    for (name, count) in [("small", 344), ("base", 656), ("large", 656), ("++small", 676), ("++huge", 892)] {
        let model = CrossFormer::new(CrossFormerConfig::named(name, 1000).unwrap(), 0, DType::Bf16).unwrap();
        assert_eq!(model.parameters().iter().count(), count, "{name}");
    }
}

#[test]
fn checkpoints_load_with_prefixes_and_buffers_and_refuse_the_rest() {
    let (model, weights, _) = fixture("classifier");
    let mut wrapped: StateDict =
        weights.iter().map(|(name, value)| (format!("module.{name}"), value.clone())).collect();
    wrapped.insert("module.layers.0.blocks.0.attn.biases".into(), Tensor::zeros([49, 2], DType::F32).unwrap());
    wrapped.insert(
        "module.layers.0.blocks.0.attn.relative_position_index".into(),
        Tensor::zeros([16, 16], DType::I64).unwrap(),
    );
    assert_eq!(model.load_official(&wrapped).unwrap().len(), 2);
    wrapped.remove("module.head.weight");
    wrapped.insert("module.head.scale".into(), Tensor::zeros([1], DType::F32).unwrap());
    wrapped.insert("module.norm.weight".into(), Tensor::zeros([5], DType::F32).unwrap());
    let message = model.load_official(&wrapped).unwrap_err().to_string();
    for part in ["missing: head.weight (7, 96)", "surplus: head.scale", "misshapen: norm.weight is (5)"] {
        assert!(message.contains(part), "{message}");
    }
}

/// A small network with two stages; `change` edits its configuration.
fn small(change: impl FnOnce(&mut CrossFormerConfig)) -> CrossFormer {
    let json = r#"{"embed_dim": 64, "depths": [4, 2], "num_heads": [4, 8], "group_size": [3, 3], "interval": [2, 2],
        "mlp_ratio": [1, 1], "img_size": [40, 40], "num_classes": 5}"#;
    let mut config: CrossFormerConfig = serde_json::from_str(json).unwrap();
    change(&mut config);
    CrossFormer::new(config, 3, DType::F64).unwrap()
}

fn images(height: usize, width: usize) -> Tensor {
    Tensor::randn([2, height, width, 3], DType::F64, Philox::new(9)).unwrap()
}

#[test]
fn any_size_works_in_any_order_without_memory_of_the_last() {
    for kind in [Kind::Classifier, Kind::Backbone, Kind::LegacyBackbone] {
        let model = small(|config| config.kind = kind);
        let run = |model: &CrossFormer, size: [usize; 2]| {
            model.features(&images(size[0], size[1]), &Context::eval()).unwrap()
        };
        let sizes = [[40, 40], [8, 9], [33, 61], [8, 160], [40, 40]];
        for size in sizes {
            let (again, fresh) = (run(&model, size), run(&small(|config| config.kind = kind), size));
            assert_eq!(again.len(), 2);
            for (a, b) in again.iter().zip(fresh) {
                assert_eq!(a.raw_bytes().unwrap(), b.raw_bytes().unwrap(), "{kind:?} {size:?}");
            }
        }
        let message = model.features(&images(7, 40), &Context::eval()).unwrap_err().to_string();
        assert!(message.contains("the smallest is 8×8"), "{message}");
    }
}

#[test]
fn logits_are_the_head_of_the_backbones_last_map() {
    let (classifier, backbone) = (small(|_| ()), small(|config| config.kind = Kind::Backbone));
    let mut state = classifier.parameters().state_dict();
    backbone.load_official(&state).unwrap();
    let feature = backbone.features(&images(40, 40), &Context::eval()).unwrap().pop().unwrap();
    let mut take = |name: &str| state.remove(name).unwrap();
    let normed = gridgrad::ops::layer_norm(&feature, &take("norm.weight"), &take("norm.bias"), 1e-5).unwrap();
    let pooled = normed.mean(&[1, 2], false).unwrap();
    let logits = gridgrad::ops::linear(&pooled, &take("head.weight"), Some(&take("head.bias"))).unwrap();
    assert_close("logits", &classifier.logits(&images(40, 40), &Context::eval()).unwrap(), &logits, 1e-12);
    assert!(backbone.logits(&images(40, 40), &Context::eval()).unwrap_err().to_string().contains("backbone"));
}

#[test]
fn images_of_a_batch_do_not_see_each_other() {
    let model = small(|_| ());
    let both = model.logits(&images(40, 40), &Context::eval()).unwrap().to_vec::<f64>().unwrap();
    let second = model.logits(&images(40, 40).narrow(0, 1, 1).unwrap(), &Context::eval()).unwrap();
    assert_close("second", &second, &Tensor::new(&both[5..], [1, 5]).unwrap(), 1e-12);
}

/// Every switch builds, runs, changes the result, and has gradients that agree with finite differences.
#[test]
fn every_switch_trains() {
    type Change = fn(&mut CrossFormerConfig);
    let plain = small(|config| config.img_size = [28, 28])
        .logits(&images(28, 28), &Context::eval())
        .unwrap()
        .to_f64_vec()
        .unwrap();
    let switches: [(&str, Change); 14] = [
        ("one scale", |c| (c.patch_kernels, c.merge_kernels) = (vec![4], vec![vec![2]])),
        ("short", |c| c.attention = AttentionPattern::Short),
        ("long", |c| c.attention = AttentionPattern::Long),
        ("relative", |c| c.position_bias = PositionBias::Relative),
        ("residual", |c| c.position_bias = PositionBias::DynamicResidual),
        ("absolute", |c| c.position_bias = PositionBias::Absolute),
        ("no bias", |c| c.position_bias = PositionBias::None),
        ("cooling", |c| c.use_acl = true),
        ("adaptive", |c| (c.group_size, c.adaptive_interval) = (vec![4, 4], true)),
        ("pad both", |c| c.pad_type = 1),
        ("no mask", |c| c.no_mask = true),
        ("no mask, pad both", |c| (c.no_mask, c.pad_type) = (true, 1)),
        ("linear", |c| c.group_type = GroupSchedule::Linear),
        ("no qkv bias", |c| c.qkv_bias = false),
    ];
    for (number, (name, change)) in switches.into_iter().enumerate() {
        let small = |change: Change| {
            small(|config| {
                config.img_size = [28, 28];
                change(config);
            })
        };
        let model = small(change);
        // The published first values are so small that biases hardly matter.
        for (number, parameter) in model.parameters().weights().enumerate() {
            let noise = Philox::new(8).fork(number as u64);
            let spread = |(i, value): (usize, &mut f64)| *value = 3.0 * *value + 0.1 * noise.normal(i as u64);
            parameter.update::<f64>(|values| values.iter_mut().enumerate().for_each(spread)).unwrap();
        }
        let loss = |model: &CrossFormer| -> Result<Tensor> {
            let logits = model.logits(&images(28, 28), &Context::eval())?;
            cross_entropy(&logits, Targets::Labels(&Tensor::new(&[1i64, 4], [2])?), CrossEntropyOptions::default())
        };
        let changed = small(change).logits(&images(28, 28), &Context::eval()).unwrap().to_f64_vec().unwrap();
        assert!(changed != plain || !model.config().qkv_bias, "{name} changes nothing");
        let gradients = loss(&model).unwrap().backward().unwrap();
        // A sixth of the parameters, other ones for each switch.
        for parameter in model.parameters().weights().skip(number % 6).step_by(6) {
            let gradient = gradients.get(&parameter.tensor()).unwrap().to_f64_vec().unwrap();
            let element = gradient.len() / 2;
            let at = |delta: f64| {
                parameter.update::<f64>(|values| values[element] += delta).unwrap();
                let value = loss(&model).unwrap().item().unwrap();
                parameter.update::<f64>(|values| values[element] -= delta).unwrap();
                value
            };
            let numeric = (at(1e-5) - at(-1e-5)) / 2e-5;
            let difference = (numeric - gradient[element]).abs();
            assert!(
                difference < 1e-5 * (1.0 + numeric.abs()),
                "{name}: {} differs by {difference:e}",
                parameter.name()
            );
        }
    }
}

#[test]
fn group_schedules_follow_the_specification() {
    let sizes = |name: &str, schedule| -> Vec<Vec<usize>> {
        let config = CrossFormerConfig { group_type: schedule, ..CrossFormerConfig::named(name, 10).unwrap() };
        (0..4).map(|s| (0..config.depths[s]).map(|b| config.block_group_size(s, b)).collect()).collect()
    };
    assert_eq!(sizes("++small", GroupSchedule::Constant)[2], vec![14; 18]);
    let half = sizes("++small", GroupSchedule::SevenFourteen);
    assert_eq!((half[2][3], half[2][4], half[0][0]), (7, 14, 4));
    // f = 4/56 + n (1 − 4/56) / 24; g = r f: n = 4 on 14 tokens gives 3.17, n = 13 gives 8.04, n = 22 on 7 gives 6.46.
    let linear = sizes("++small", GroupSchedule::Linear);
    assert_eq!((linear[2][0], linear[2][9], linear[3][0]), (4, 9, 7));
    let divided = sizes("++small", GroupSchedule::LinearDiv);
    assert_eq!((divided[2][7], divided[2][9], divided[2][17]), (7, 7, 14));
    let alternating = sizes("++small", GroupSchedule::Alter);
    assert_eq!((alternating[2][9], alternating[2][10]), (14, 7));
}

#[test]
fn published_maps_group_as_published() {
    let config = CrossFormerConfig::named("small", 10).unwrap();
    let grouping = |stage, block, side| config.block_grouping(stage, block, [side, side]);
    assert!(!grouping(0, 0, 56).long_distance && grouping(0, 1, 56).long_distance);
    assert_eq!(grouping(0, 1, 56).grouping, gridgrad::ops::lsda::Grouping::long(7, 8));
    assert!(!grouping(3, 1, 7).long_distance, "the last stage is one group");
    assert!(crossformer::NAMES.contains(&"small"));
}

#[test]
fn dropped_branches_and_probabilities_are_for_training_alone() {
    dropped_in_training_alone(&small(|config| config.drop_path_rate = 0.5));
    dropped_in_training_alone(&small(|config| config.attn_drop_rate = 0.2));
    dropped_in_training_alone(&small(|config| {
        (config.attn_drop_rate, config.no_mask, config.group_size) = (0.2, true, vec![4, 3]);
    }));
}

fn dropped_in_training_alone(model: &CrossFormer) {
    let run = |context: &Context| model.logits(&images(24, 24), context).unwrap().to_f64_vec().unwrap();
    let stream = Philox::new(4);
    assert_eq!(run(&Context::eval()), run(&Context::eval()));
    assert_eq!(run(&Context::train(stream)), run(&Context::train(stream)));
    assert_ne!(run(&Context::train(stream)), run(&Context::train(stream.fork(1))));
    assert_ne!(run(&Context::train(stream)), run(&Context::eval()));
}

#[test]
fn tables_kept_without_gradients_follow_parameters_sizes_and_dtypes() {
    let model = small(|_| ());
    let other = small(|_| ());
    let kept = |images: &Tensor| no_grad(|| model.logits(images, &Context::eval())).unwrap().to_f64_vec().unwrap();
    let anew = |images: &Tensor| model.logits(images, &Context::eval()).unwrap().to_f64_vec().unwrap();
    // Groups of the smaller map are smaller.
    let sizes = [images(24, 24), images(8, 16)];
    let check = || sizes.iter().for_each(|images| assert_eq!(kept(images), anew(images)));
    check();
    let before = kept(&sizes[0]);
    for name in ["layers.0.blocks.1.attn.pos.pos_proj.weight", "layers.1.blocks.0.attn.pos.pos3.2.bias"] {
        let parameter = model.parameters().get(name).unwrap();
        parameter.update::<f64>(|values| values.iter_mut().zip(1..).for_each(|(v, i)| *v += f64::from(i))).unwrap();
        check();
    }
    assert_ne!(kept(&sizes[0]), before);
    model.parameters().load_state_dict(&other.parameters().state_dict()).unwrap();
    check();
    assert_eq!(kept(&sizes[0]), before);
    let rounded = sizes[0].cast(DType::F32).unwrap();
    assert_eq!(kept(&rounded), anew(&rounded));
}
