//! Training many models at once: the bits of a model are its own.

use gridgrad::data::{self, Image, InMemory, Split};
use gridgrad::methods::finite_aggregation::learner::{BaseLearner, Member, NetworkInNetwork, vote};
use gridgrad::random::Philox;
use gridgrad::train::many::{Outcome, Recipe, Task, Trainer};
use gridgrad::{Device, Result};

/// Images of a bright and a dark half, whose class is which half is bright.
fn halves(samples: usize, seed: u64) -> InMemory {
    let (side, stream) = (5, Philox::new(seed));
    let labels: Vec<usize> = (0..samples).map(|i| i % 2).collect();
    let pixel = |i: usize| {
        let (sample, row) = (i / (side * side), i / side % side);
        let bright = (row < side / 2) == (labels[sample] == 0);
        (60 * usize::from(bright) + stream.below(i as u64, 190)) as u8
    };
    let pixels = (0..samples * side * side).map(pixel).collect();
    InMemory::new("halves", vec!["top".into(), "bottom".into()], [side, side, 1], pixels, labels).unwrap()
}

fn recipe(batch_size: usize) -> Recipe {
    Recipe { epochs: 2, batch_size, crop_padding: 1, flip: true, ..Recipe::default() }
}

fn bits(outcome: &Outcome) -> Vec<u8> {
    let weights = outcome.weights.iter().flatten().flat_map(|(_, value)| value.raw_bytes().unwrap().to_vec());
    let numbers = outcome.scores.iter().chain(&outcome.mean).chain(&outcome.deviation).chain([&outcome.loss]);
    numbers.flat_map(|value| value.to_bits().to_le_bytes()).chain(weights).collect()
}

/// Subsets of different sizes, among them one with more steps and one without samples.
fn subsets() -> Vec<Vec<usize>> {
    let ranges = [0..5, 3..7, 5..15, 9..9, 10..14, 2..6];
    ranges.into_iter().map(Vec::from_iter).collect()
}

fn trained(trainer: &Trainer, subsets: &[Vec<usize>], order: &[usize]) -> Vec<Vec<u8>> {
    let (train, test) = (halves(24, 1), halves(3, 2));
    let task = |&model: &usize| Task { seed: 10 + model as u64, samples: &subsets[model] };
    let tasks: Vec<Task<'_>> = order.iter().map(task).collect();
    let outcomes = trainer.train(&tasks, &train, &test).unwrap();
    assert!(outcomes.iter().all(|outcome| outcome.loss.is_finite() && outcome.scores.len() == 6));
    outcomes.iter().map(bits).collect()
}

#[test]
fn bits_do_not_depend_on_the_group_the_order_or_the_threads() {
    let (subsets, order) = (subsets(), [0, 1, 2, 3, 4, 5]);
    let trainer = Trainer::new(recipe(8)).keep_weights(true);
    let alone: Vec<Vec<u8>> = order.iter().flat_map(|&model| trained(&trainer, &subsets, &[model])).collect();
    for group in [3, 5] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(group).build().unwrap();
        let together = pool.install(|| trained(&trainer.clone().group(group), &subsets, &order));
        assert!(together == alone, "groups of {group}");
    }
    let mixed = [5, 2, 0, 4];
    let other = trained(&trainer.group(4), &subsets, &mixed);
    assert!(mixed.iter().zip(other).all(|(&model, bits)| alone[model] == bits), "another order");
}

#[test]
fn a_model_that_diverges_says_so() {
    let (train, test) = (halves(24, 1), halves(3, 2));
    let samples: Vec<usize> = (0..6).collect();
    let wild = Recipe { learning_rate: 1e30, ..recipe(8) };
    let tasks = [Task { seed: 1, samples: &samples }];
    let outcome = &Trainer::new(wild).train(&tasks, &train, &test).unwrap()[0];
    assert!(outcome.loss.is_nan() || !outcome.loss.is_finite(), "{}", outcome.loss);
    assert_eq!(outcome.scores.len(), 6);
}

/// The built-in zeros and ones, `samples` of them.
fn digits(split: Split, samples: usize) -> InMemory {
    let all = data::open("builtin", split, None).unwrap();
    let two = (0..all.len()).map(|index| all.sample(index).unwrap()).filter(|(_, label)| *label < 2).take(samples);
    let (images, labels): (Vec<Image>, Vec<usize>) = two.unzip();
    let pixels = images.iter().flat_map(|image| image.pixels().to_vec()).collect();
    InMemory::new("digits", vec!["0".into(), "1".into()], [8, 8, 1], pixels, labels).unwrap()
}

#[test]
fn it_learns_and_the_empty_subset_answers_class_0() {
    let (train, test) = (digits(Split::Train, 24), digits(Split::Test, 40));
    let samples: Vec<usize> = (0..24).collect();
    // Enough steps for the running statistics to follow.
    let recipe = Recipe { epochs: 12, batch_size: 8, crop_padding: 1, ..Recipe::default() };
    let learner = NetworkInNetwork::new(Trainer::new(recipe));
    let members =
        [Member { classifier: 0, seed: 3, samples: &samples }, Member { classifier: 1, seed: 4, samples: &[] }];
    let trained = learner.train(&members, &train, &test).unwrap();
    let right = |(scores, &label): (&[f32], &usize)| vote(scores) == label;
    let hits = trained[0].scores.chunks(2).zip(test.labels()).filter(|&pair| right(pair)).count();
    // By chance so many are right about once in a thousand times.
    assert!(hits >= 30, "{hits} of 40, loss {}", trained[0].loss);
    assert!(trained[1].scores.chunks(2).all(|scores| scores == [1.0, 0.0]) && trained[1].weights.is_none());
    assert_eq!(learner.recipe()["training"]["epochs"], 12);
}

#[test]
fn bad_input_is_refused() -> Result<()> {
    let (train, test) = (halves(8, 1), halves(3, 2));
    let message = |recipe: Recipe, samples: &[usize]| {
        Trainer::new(recipe).train(&[Task { seed: 0, samples }], &train, &test).unwrap_err().to_string()
    };
    assert!(message(recipe(8), &[8]).contains("sample 8 of 8"));
    assert!(message(Recipe { epochs: 0, ..recipe(8) }, &[0]).contains("0 epochs"));
    assert!(message(Recipe { learning_rate: f64::NAN, ..recipe(8) }, &[0]).contains("learning rate NaN"));
    let small = InMemory::new("small", vec!["a".into(), "b".into()], [4, 4, 1], vec![0; 16], vec![0])?;
    let refused = Trainer::new(recipe(8)).train(&[Task { seed: 0, samples: &[0] }], &small, &small).unwrap_err();
    assert!(refused.to_string().contains("at least 5×5"), "{refused}");
    Ok(())
}

/// On the device under test, in a small form: the emulator takes seconds for a step.
#[test]
fn bits_on_a_device_do_not_depend_on_the_group() {
    let device = match std::env::var("GRIDGRAD_TEST_DEVICE") {
        Ok(name) => name.parse().unwrap(),
        Err(_) if cfg!(feature = "emulator") => Device::Emulated,
        Err(_) => return,
    };
    let recipe = Recipe { epochs: 1, ..recipe(8) };
    let subsets = [vec![0, 1], vec![2, 3, 4]];
    let trainer = Trainer::new(recipe).on(device).keep_weights(true);
    let together = trained(&trainer, &subsets, &[0, 1]);
    let alone = [0, 1].map(|model| trained(&trainer, &subsets, &[model]).remove(0));
    assert!(alone[..] == together[..]);
}
