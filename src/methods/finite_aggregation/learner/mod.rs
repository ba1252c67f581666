//! Base learners: what turns subsets of the training set into classifiers.
//!
//! The certificate holds because the vote of classifier i is a function of i, of the samples of its subset and of the
//! test image alone. So a learner may use nothing else: not the other members of its group, not the size of the group,
//! not the order of the training file, not the number of threads.

mod nearest;
mod network_in_network;

pub use nearest::NearestNeighbour;
pub use network_in_network::NetworkInNetwork;
use serde_json::Value;

use crate::cpu::simd;
use crate::data::InMemory;
use crate::nn::StateDict;
use crate::train::many::Trainer;
use crate::{Device, Error, Result, driver};

/// A classifier to be trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member<'a> {
    /// Its number, which is the column of its votes.
    pub classifier: usize,
    /// Decides first weights, order and augmentation.
    pub seed: u64,
    /// Indices of its subset in the training set, sorted by content: in place of indices, a learner's random numbers
    /// use positions in this list. May be empty. Bagging draws with replacement, so that an index can occur twice.
    pub samples: &'a [usize],
}

/// A trained classifier, as far as the certificate needs it.
#[derive(Clone, Debug)]
pub struct Trained {
    /// Scores of all test images, (samples, classes): the greatest is the vote, of equal ones the one of the smallest
    /// class.
    pub scores: Vec<f32>,
    /// The weights, where the learner has some and was asked to keep them.
    pub weights: Option<StateDict>,
    /// Mean of each channel over the subset, as the learner normalised with it; empty where it did not.
    pub mean: Vec<f32>,
    /// Standard deviation of each channel over the subset, likewise.
    pub deviation: Vec<f32>,
    /// The last epoch's mean loss; 0 where there is none, and not a number where training diverged.
    pub loss: f32,
}

/// Trains classifiers, several at once.
pub trait BaseLearner {
    /// All that the numbers of a classifier depend on beside its [`Member`] and the data: two learners with equal
    /// recipes train the same bits.
    fn recipe(&self) -> Value;

    /// What else they depend on: device, instruction set, and how the program was built.
    fn backend(&self) -> String {
        backend_of(Device::Cpu)
    }

    /// How many members [`train`](BaseLearner::train) is best given at once.
    fn group_size(&self) -> usize;

    /// Puts both sets where it computes, once for all groups of a run.
    ///
    /// # Errors
    /// `Argument` where `test` has images of another size or other classes; what the device has to say.
    fn open<'a>(&'a self, train: &'a InMemory, test: &'a InMemory) -> Result<Box<dyn Training + 'a>>;

    /// Trains `members` on their subsets of `train` and scores `test`. One result for each member, in their order.
    ///
    /// # Errors
    /// As [`open`](BaseLearner::open) and [`Training::train_each`]; `Shape` where a member has no result.
    fn train(&self, members: &[Member<'_>], train: &InMemory, test: &InMemory) -> Result<Vec<Trained>> {
        let mut results: Vec<Option<Trained>> = members.iter().map(|_| None).collect();
        self.open(train, test)?.train_each(members, &mut |member, trained| {
            results[member] = Some(trained);
            Ok(())
        })?;
        let (expected, trained) = (members.len(), results.into_iter().flatten().collect::<Vec<_>>());
        if trained.len() != expected {
            let message = format!("got {} results for {expected} classifiers", trained.len());
            return Err(Error::shape("BaseLearner::train", message));
        }
        Ok(trained)
    }
}

/// A learner with both sets at hand.
pub trait Training {
    /// Trains `members` on their subsets and scores the held-out images. Calls `done` with the place of each member in
    /// the list as soon as that one is trained, in any order, with the bits that it would have alone.
    ///
    /// # Errors
    /// `Argument` where an index is not one of the training set; what the device or `done` have to say. Members that are
    /// trained by then were given to `done`. A loss that is not finite is an outcome, and disturbs no other member.
    fn train_each(&self, members: &[Member<'_>], done: &mut dyn FnMut(usize, Trained) -> Result<()>) -> Result<()>;
}

/// The learner with a recipe, on `device`. Of networks, `group` are computed by one op, where it is not left to the
/// device; that changes no bit.
///
/// # Errors
/// `Config` where no learner of this crate has such a recipe.
pub fn from_recipe(
    recipe: &Value,
    device: Device,
    group: Option<usize>,
    keep_weights: bool,
) -> Result<Box<dyn BaseLearner>> {
    let unknown = |reason: String| Error::Config(format!("no learner of this program has the recipe {recipe}{reason}"));
    match recipe.get("learner").and_then(Value::as_str) {
        Some("nearest") => Ok(Box::new(NearestNeighbour)),
        Some("network-in-network") => {
            let training = recipe.get("training").cloned().unwrap_or_default();
            let training = serde_json::from_value(training).map_err(|error| unknown(format!(": {error}")))?;
            let trainer = Trainer::new(training).on(device).keep_weights(keep_weights);
            Ok(Box::new(NetworkInNetwork::new(match group {
                Some(group) => trainer.group(group),
                None => trainer,
            })))
        }
        _ => Err(unknown(String::new())),
    }
}

/// What the bits of a network that was trained on `device` depend on beside its recipe: processors differ by their vector
/// instructions, GPUs by their model, and builds with debug assertions are compiled in another way.
pub fn backend_of(device: Device) -> String {
    let build = if cfg!(debug_assertions) { ", debug build" } else { "" };
    match device {
        Device::Cpu => format!("cpu, {}{build}", simd::widest_instruction_set()),
        Device::Cuda(ordinal) => {
            let gpus = driver::probe().unwrap_or_default();
            let name = gpus.into_iter().find(|gpu| gpu.ordinal == ordinal).map_or("GPU".into(), |gpu| gpu.name);
            format!("{name}{build}")
        }
        Device::Emulated => format!("emulated GPU{build}"),
    }
}

/// The class of the greatest score, of equal ones the smallest class. A score that is no number is below all others;
/// where none is a number, it is class 0.
pub fn vote(scores: &[f32]) -> usize {
    let mut best = None;
    for (class, &score) in scores.iter().enumerate() {
        if !score.is_nan() && best.is_none_or(|(_, greatest)| score > greatest) {
            best = Some((class, score));
        }
    }
    best.map_or(0, |(class, _)| class)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_go_to_the_smaller_class_and_what_is_no_number_loses() {
        assert_eq!(vote(&[0.0, 2.0, 2.0]), 1);
        assert_eq!(vote(&[f32::NAN, f32::NEG_INFINITY, f32::NAN]), 1);
        assert_eq!(vote(&[0.0, -0.0]), 0);
        assert_eq!((vote(&[f32::NAN; 3]), vote(&[])), (0, 0));
    }
}
