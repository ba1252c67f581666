//! A trained network from its checkpoint: architecture, classes and preprocessing travel with the weights.

use std::path::{Path, PathBuf};

use gridgrad::data::AugmentConfig;
use gridgrad::data::Image;
use gridgrad::data::augment::Augment;
use gridgrad::models::{CrossFormer, CrossFormerConfig};
use gridgrad::nn::Context;
use gridgrad::train::{BEST_CHECKPOINT, Checkpoint, LAST_CHECKPOINT};
use gridgrad::{DType, Device, Error, Result, Tensor, autograd, ops};
use serde::{Deserialize, Serialize};

/// What a checkpoint says of its run beside the training configuration.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Description {
    /// The set that it learns from.
    pub data: String,
    pub classes: Vec<String>,
    pub batch_size: usize,
    pub model: CrossFormerConfig,
    pub augment: AugmentConfig,
}

/// A network ready to classify images.
pub struct Trained {
    pub model: CrossFormer,
    pub description: Description,
    augment: Augment,
    device: Device,
}

impl Trained {
    /// Reads a checkpoint file, or the best one of a run's folder, onto `device`. Averaged weights are taken where it has
    /// them.
    pub fn read(path: &Path, device: Device) -> Result<Self> {
        let path = if path.is_dir() { in_folder(path)? } else { path.to_path_buf() };
        let Checkpoint { progress, model: weights, ema: averages, .. } = Checkpoint::read(&path)?;
        let description = progress.config.get("run").cloned().unwrap_or_default();
        let description: Description = serde_json::from_value(description).map_err(|error| {
            Error::format(&path, format!("is not a checkpoint of a CrossFormer classifier: {error}"))
        })?;
        let model = CrossFormer::new(description.model.clone(), 0, DType::F32)?;
        let loaded = model.parameters().load_state_dict(&averages.unwrap_or(weights));
        loaded.map_err(|error| Error::format(&path, error.to_string()))?;
        model.parameters().to_device(device)?;
        Ok(Trained {
            augment: Augment::new(description.augment.clone(), description.model.in_chans)?,
            model,
            description,
            device,
        })
    }

    /// The image as the network sees it, (1, height, width, channels).
    pub fn prepare(&self, image: Image) -> Result<Tensor> {
        let channels = self.description.model.in_chans;
        let image = if channels == 1 { image.into_grey() } else { image.into_rgb() };
        let mut sample = vec![0.0; self.augment.sample_len()];
        self.augment.test_sample(&image, &mut sample)?;
        let side = self.description.augment.image_size;
        Tensor::new(&sample, [1, side, side, channels])?.to_device(self.device)
    }

    /// Class probabilities, the likeliest first.
    pub fn classify(&self, image: Image) -> Result<Vec<(usize, f32)>> {
        let images = self.prepare(image)?;
        let logits = autograd::no_grad(|| self.model.logits(&images, &Context::eval()))?;
        let probabilities = ops::softmax(&logits, -1)?.to_vec::<f32>()?;
        let mut ranked: Vec<(usize, f32)> = probabilities.into_iter().enumerate().collect();
        ranked.sort_by(|a, b| b.1.total_cmp(&a.1));
        Ok(ranked)
    }

    /// The name of a class.
    pub fn class(&self, number: usize) -> &str {
        self.description.classes.get(number).map_or("?", String::as_str)
    }
}

/// The best checkpoint of a run's folder, or the last one of a run that was stopped in its first epoch.
fn in_folder(folder: &Path) -> Result<PathBuf> {
    let found = [BEST_CHECKPOINT, LAST_CHECKPOINT].map(|name| folder.join(name)).into_iter().find(|path| path.exists());
    found.ok_or_else(|| Error::format(folder, format!("the folder has no {BEST_CHECKPOINT} and no {LAST_CHECKPOINT}")))
}
