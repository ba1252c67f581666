//! The crate as a library: `cargo run --example library_use -- [CHECKPOINT.safetensors]`.
//!
//! With a path, loads CrossFormer-S from an official checkpoint that was saved as safetensors, and classifies a grey
//! image with it. Without one, trains a small CrossFormer for a few steps on the digits that come with the crate.

use std::sync::Arc;

use gridgrad::data::{self, AugmentConfig, Loader, LoaderConfig, Split};
use gridgrad::models::{CrossFormer, CrossFormerConfig};
use gridgrad::nn::{Context, state_dict};
use gridgrad::ops::{CrossEntropyOptions, Targets, cross_entropy, softmax};
use gridgrad::random::Philox;
use gridgrad::train::{Optimizer, OptimizerConfig};
use gridgrad::{DType, Result, Tensor, autograd};

fn main() -> Result<()> {
    match std::env::args().nth(1) {
        Some(checkpoint) => classify(&checkpoint),
        None => train(),
    }
}

fn classify(checkpoint: &str) -> Result<()> {
    let model = CrossFormer::new(CrossFormerConfig::named("small", 1000)?, 0, DType::F32)?;
    model.load_official(&state_dict::read(checkpoint)?.0)?;
    let images = Tensor::zeros([1, 224, 224, 3], DType::F32)?; // (batch, height, width, channels), normalised
    let logits = autograd::no_grad(|| model.logits(&images, &Context::eval()))?;
    let probabilities = softmax(&logits, -1)?.to_vec::<f32>()?;
    let best = (0..probabilities.len()).max_by(|&a, &b| probabilities[a].total_cmp(&probabilities[b])).unwrap_or(0);
    println!("class {best}, probability {:.3}", probabilities[best]);
    Ok(())
}

fn train() -> Result<()> {
    let digits: Arc<dyn data::Dataset> = Arc::from(data::open("builtin", Split::Train, None)?);
    let loader = Loader::new(
        digits,
        LoaderConfig { batch_size: 64, augment: AugmentConfig::digits(), ..LoaderConfig::default() },
    )?;
    let model =
        CrossFormer::new(CrossFormerConfig { in_chans: 1, ..CrossFormerConfig::named("micro", 10)? }, 0, DType::F32)?;
    let mut optimizer = Optimizer::new(model.parameters(), OptimizerConfig::default())?;
    println!("{} parameters", model.parameters().count());
    for (step, batch) in loader.epoch(0, 0).enumerate() {
        let batch = batch?;
        let images = Tensor::new(&batch.floats(), [batch.len(), batch.height, batch.width, batch.channels])?;
        let targets = Tensor::new(&batch.targets, [batch.len(), 10])?;
        let context = Context::train(Philox::new(0).fork(step as u64));
        let logits = model.logits(&images, &context)?;
        let loss = cross_entropy(&logits, Targets::Soft(&targets), CrossEntropyOptions::default())?;
        optimizer.step(&loss.backward()?, 1e-3)?;
        println!("step {:2}  loss {:.3}", step + 1, loss.item()?);
    }
    Ok(())
}
