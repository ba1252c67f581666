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
//! Model i has samples i·n to (i + 1)·n and seed i.

use std::time::Instant;

use gridgrad::data::InMemory;
use gridgrad::train::Sgd;
use gridgrad::train::many::{Recipe, Task, Trainer};
use gridgrad::{Error, Result};

const CLASSES: usize = 10;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [pixels, labels, side, models, samples, epochs] = &arguments[..] else {
        return Err(Error::Config("expected: pixels labels side models samples epochs".into()));
    };
    let number = |text: &String| {
        text.parse::<usize>().map_err(|error| Error::Config(format!("{text}: {error}; expected a whole number")))
    };
    let [side, models, samples, epochs] = [number(side)?, number(models)?, number(samples)?, number(epochs)?];
    let read = |path: &String| std::fs::read(path).map_err(|error| Error::io(path, error));
    let names: Vec<String> = (0..CLASSES).map(|class| class.to_string()).collect();
    let labels: Vec<usize> = read(labels)?.into_iter().map(usize::from).collect();
    let train = InMemory::new("train", names.clone(), [side, side, 1], read(pixels)?, labels)?;
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
