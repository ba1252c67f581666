//! Trains many small networks at once, each on its own subset of one set of images, and prints a line of JSON.
//!
//! `benches/finite_aggregation.py` compares it with a loop in PyTorch. The arguments are a file of pixels, a byte each, a
//! file of labels, a byte each, the side of the square images, and the numbers of models, of samples of each, and of
//! epochs:
//!
//! ```text
//! cargo run --release --example many_models -- pixels labels 28 4 50 5
//! ```
//!
//! Without arguments four networks read some of the digits that come with the crate, for two epochs. Model i has samples
//! i·n to (i + 1)·n and seed i.

use std::time::Instant;

use gridgrad::data::{self, Dataset, InMemory, Split};
use gridgrad::train::Sgd;
use gridgrad::train::many::{Recipe, Task, Trainer};
use gridgrad::{Error, Result};

const CLASSES: usize = 10;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (train, [models, samples, epochs]) = match &arguments[..] {
        [] => (digits()?, [4, 50, 2]),
        [pixels, labels, numbers @ ..] => from_files(pixels, labels, numbers)?,
        [_] => return Err(usage()),
    };
    let [side, ..] = train.shape();
    let names = train.class_names().to_vec();
    // One image to score: what is measured is training.
    let test = InMemory::new("test", names, [side, side, 1], train.pixels()[..side * side].to_vec(), vec![0])?;

    let subsets: Vec<Vec<usize>> =
        (0..models).map(|model| (model * samples..(model + 1) * samples).collect()).collect();
    let tasks: Vec<Task<'_>> =
        subsets.iter().enumerate().map(|(model, samples)| Task { seed: model as u64, samples }).collect();
    let sgd = Sgd { momentum: 0.9, nesterov: true, weight_decay: 5e-4 };
    let trainer = Trainer::new(Recipe { epochs, sgd, ..Recipe::default() });
    let start = Instant::now();
    let outcomes = trainer.train(&tasks, &train, &test)?;
    let seconds = start.elapsed().as_secs_f64();
    let losses: Vec<f32> = outcomes.iter().map(|outcome| outcome.loss).collect();
    println!("{}", serde_json::json!({ "wall_s": seconds, "losses": losses }));
    Ok(())
}

fn usage() -> Error {
    Error::Config("expected: pixels labels side models samples epochs".into())
}

fn names() -> Vec<String> {
    (0..CLASSES).map(|class| class.to_string()).collect()
}

fn digits() -> Result<InMemory> {
    let set = data::open("builtin", Split::Train, None)?;
    let samples = (0..set.len()).map(|index| set.sample(index)).collect::<Result<Vec<_>>>()?;
    let side = samples[0].0.height();
    let labels = samples.iter().map(|(_, label)| *label).collect();
    let pixels = samples.into_iter().flat_map(|(image, _)| image.into_grey().pixels().to_vec()).collect();
    InMemory::new("digits", names(), [side, side, 1], pixels, labels)
}

/// The set, and the numbers of models, samples and epochs.
fn from_files(pixels: &str, labels: &str, numbers: &[String]) -> Result<(InMemory, [usize; 3])> {
    let number = |text: &String| {
        text.parse::<usize>().map_err(|error| Error::Config(format!("{text}: {error}; expected a whole number")))
    };
    let [side, counts @ ..]: [usize; 4] =
        numbers.iter().map(number).collect::<Result<Vec<_>>>()?.try_into().map_err(|_| usage())?;
    let read = |path: &str| std::fs::read(path).map_err(|error| Error::io(path, error));
    let labels = read(labels)?.into_iter().map(usize::from).collect();
    Ok((InMemory::new("train", names(), [side, side, 1], read(pixels)?, labels)?, counts))
}
