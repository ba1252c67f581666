//! The published base classifier, trained by the published recipe.

use serde_json::{Value, json};

use super::{BaseLearner, Member, Trained, Training};
use crate::Result;
use crate::data::InMemory;
use crate::train::many::{Outcome, Recipe, Session, Task, Trainer};

/// Trains [`NetworkInNetwork`](crate::models::NetworkInNetwork)s by a [`Trainer`]; without samples the answer is class
/// 0. Where training diverges the loss and the scores are no numbers, which [`vote`](super::vote) counts as class 0.
#[derive(Clone, Debug)]
pub struct NetworkInNetwork {
    trainer: Trainer,
}

impl NetworkInNetwork {
    /// A learner that trains by `trainer`.
    pub fn new(trainer: Trainer) -> Self {
        NetworkInNetwork { trainer }
    }
}

impl Default for NetworkInNetwork {
    fn default() -> Self {
        Self::new(Trainer::new(Recipe::default()))
    }
}

impl BaseLearner for NetworkInNetwork {
    /// The device belongs to it: classifiers of the processor and of a GPU are rounded differently.
    fn recipe(&self) -> Value {
        let kind = match self.trainer.device() {
            crate::Device::Cpu => "cpu",
            _ => "gpu",
        };
        json!({ "learner": "network-in-network", "device": kind, "training": self.trainer.recipe() })
    }

    fn backend(&self) -> String {
        super::backend_of(self.trainer.device())
    }

    fn group_size(&self) -> usize {
        self.trainer.models_at_once()
    }

    fn open<'a>(&'a self, train: &'a InMemory, test: &'a InMemory) -> Result<Box<dyn Training + 'a>> {
        Ok(Box::new(self.trainer.open(train, test)?))
    }
}

impl Training for Session<'_> {
    fn train_each(&self, members: &[Member<'_>], done: &mut dyn FnMut(usize, Trained) -> Result<()>) -> Result<()> {
        let tasks: Vec<Task<'_>> =
            members.iter().map(|member| Task { seed: member.seed, samples: member.samples }).collect();
        self.train(&tasks, |member, outcome| done(member, outcome.into()))
    }
}

impl From<Outcome> for Trained {
    fn from(outcome: Outcome) -> Self {
        let Outcome { scores, weights, mean, deviation, loss } = outcome;
        Trained { scores, weights, mean, deviation, loss }
    }
}
