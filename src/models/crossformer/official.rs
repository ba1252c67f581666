//! Checkpoints of the authors' code.

use super::CrossFormer;
use super::config::Kind;
use crate::Result;
use crate::nn::StateDict;

impl CrossFormer {
    /// Loads a state dict of the authors' code, saved as safetensors, unchanged.
    ///
    /// Prefixes `model.`, `module.` and `backbone.` are taken off where every name has them. Buffers that the code keeps
    /// beside its parameters (`attn.biases`, `attn.relative_position_index`, `attn_mask`) are skipped, and for a backbone the
    /// classifier's `norm` and `head` as well. Returns the names that were skipped.
    ///
    /// # Errors
    /// [`Error::StateDict`](crate::Error::StateDict), listing every missing, surplus or misshapen tensor; then nothing is
    /// changed.
    pub fn load_official(&self, state: &StateDict) -> Result<Vec<String>> {
        let mut state = state.clone();
        for prefix in ["model.", "module.", "backbone."] {
            if !state.is_empty() && state.keys().all(|name| name.starts_with(prefix)) {
                state = state.into_iter().map(|(name, value)| (name[prefix.len()..].to_owned(), value)).collect();
            }
        }
        let is_classifier = self.config().kind == Kind::Classifier;
        let is_skipped = |name: &str| {
            let buffer = [".attn.biases", ".attn.relative_position_index", "attn_mask"];
            let head = !is_classifier && (name.starts_with("norm.") || name.starts_with("head."));
            head || buffer.iter().any(|suffix| name.ends_with(suffix))
        };
        let skipped: Vec<String> = state.keys().filter(|name| is_skipped(name)).cloned().collect();
        state.retain(|name, _| !is_skipped(name));
        self.parameters().load_state_dict(&state)?;
        Ok(skipped)
    }
}
