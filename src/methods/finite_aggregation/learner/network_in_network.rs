//! The published base classifier, trained by the published recipe.

use serde_json::{Value, json};

use super::{BaseLearner, Member, Trained};
use crate::Result;
use crate::data::InMemory;
use crate::train::many::{Recipe, Task, Trainer};

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

    fn train(&self, members: &[Member<'_>], train: &InMemory, test: &InMemory) -> Result<Vec<Trained>> {
        let tasks: Vec<Task<'_>> =
            members.iter().map(|member| Task { seed: member.seed, samples: member.samples }).collect();
        let trained = self.trainer.train(&tasks, train, test)?.into_iter();
        Ok(trained
            .map(|outcome| Trained {
                scores: outcome.scores,
                weights: outcome.weights,
                mean: outcome.mean,
                deviation: outcome.deviation,
                loss: outcome.loss,
            })
            .collect())
    }
}
