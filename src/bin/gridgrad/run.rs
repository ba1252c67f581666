//! `gridgrad run`: a network with given weights on given tensors, for comparing with other frameworks.

use std::path::PathBuf;

use clap::Args;
use gridgrad::models::crossformer::{CrossFormer, Kind};
use gridgrad::nn::state_dict::{self, Metadata};
use gridgrad::nn::{Context, StateDict};
use gridgrad::ops::{CrossEntropyOptions, Targets, cross_entropy};
use gridgrad::{DType, Device, Error, Result, Tensor, autograd};

use crate::device::DeviceFlag;
use crate::info::read_config;

/// Runs a network with given weights on given tensors: the bridge to other frameworks.
///
/// Reads the tensor `input` (B, 3, H, W) and writes `logits`, or `feature.0`, `feature.1`, … (B, C, H, W) for a backbone.
/// With --grads also `loss`, `grad_input` and `grad.NAME` of every parameter: the loss is the mean cross-entropy with the
/// integer tensor `target`, for a backbone the sum of the dot products with `cotangent.0`, `cotangent.1`, ….
#[derive(Args)]
pub struct Run {
    /// JSON file that describes the network
    #[arg(long, value_name = "FILE.json")]
    config: String,
    /// State dict under the official names
    #[arg(long, value_name = "W.safetensors")]
    weights: PathBuf,
    /// Tensors to run on
    #[arg(long, value_name = "IN.safetensors")]
    input: PathBuf,
    /// Where the results go
    #[arg(long, value_name = "OUT.safetensors")]
    output: PathBuf,
    /// Also computes the loss and all gradients
    #[arg(long)]
    grads: bool,
    /// f32 or f64
    #[arg(long, default_value = "f32")]
    dtype: DType,
    #[command(flatten)]
    device: DeviceFlag,
}

pub fn run(run: &Run) -> Result<()> {
    let device = run.device.get()?;
    if !matches!(run.dtype, DType::F32 | DType::F64) {
        return Err(Error::Config(format!("--dtype {} is not f32 or f64", run.dtype)));
    }
    let model = CrossFormer::new(read_config(&run.config)?, 0, run.dtype)?;
    let (weights, _) = state_dict::read(&run.weights)?;
    model.parameters().to_device(device)?;
    model.load_official(&weights).map_err(|error| Error::format(&run.weights, error.to_string()))?;
    let (tensors, _) = state_dict::read(&run.input)?;
    let inputs = Inputs { run, device, tensors };
    let images = inputs.floats("input")?;
    if images.rank() != 4 {
        let reason = format!("tensor input is {}, expected (batch, channels, height, width)", images.shape());
        return Err(Error::format(&run.input, reason));
    }
    let images = images.permute(&[0, 2, 3, 1])?;
    let results = if run.grads {
        with_gradients(&model, images.variable()?, &inputs)?
    } else {
        autograd::no_grad(|| outputs(&model, &images))?.iter().map(as_result).collect::<Result<_>>()?
    };
    state_dict::write(&run.output, &results, Metadata::new())
}

struct Inputs<'a> {
    run: &'a Run,
    device: Device,
    tensors: StateDict,
}

impl Inputs<'_> {
    fn get(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).ok_or_else(|| Error::format(&self.run.input, format!("has no tensor {name}")))
    }

    fn floats(&self, name: &str) -> Result<Tensor> {
        self.get(name)?.cast(self.run.dtype)?.to_device(self.device)
    }
}

/// Named outputs, maps channels-last.
fn outputs(model: &CrossFormer, images: &Tensor) -> Result<Vec<(String, Tensor)>> {
    let context = Context::eval();
    if model.config().kind == Kind::Classifier {
        return Ok(vec![("logits".into(), model.logits(images, &context)?)]);
    }
    let features = model.features(images, &context)?.into_iter().enumerate();
    Ok(features.map(|(stage, feature)| (format!("feature.{stage}"), feature)).collect())
}

/// Maps in the order of the file: channels before height and width.
fn as_result((name, value): &(String, Tensor)) -> Result<(String, Tensor)> {
    let value = if value.rank() == 4 { value.detach().permute(&[0, 3, 1, 2])? } else { value.detach() };
    Ok((name.clone(), value))
}

fn with_gradients(model: &CrossFormer, images: Tensor, inputs: &Inputs<'_>) -> Result<StateDict> {
    let outputs = outputs(model, &images)?;
    let mut loss: Option<Tensor> = None;
    for (number, (name, output)) in outputs.iter().enumerate() {
        let term = if name == "logits" {
            let target = inputs.get("target")?.to_device(inputs.device)?;
            let loss = cross_entropy(output, Targets::Labels(&target), CrossEntropyOptions::default());
            loss.map_err(|error| Error::format(&inputs.run.input, format!("tensor target: {error}")))?
        } else {
            let name = format!("cotangent.{number}");
            let cotangent = inputs.floats(&name)?;
            let (_, expected) = as_result(&(String::new(), output.clone()))?;
            if cotangent.shape() != expected.shape() {
                let reason = format!("tensor {name} is {}, expected {}", cotangent.shape(), expected.shape());
                return Err(Error::format(&inputs.run.input, reason));
            }
            output.mul(&cotangent.permute(&[0, 2, 3, 1])?)?.sum_all()?
        };
        loss = Some(match loss {
            None => term,
            Some(sum) => sum.add(&term)?,
        });
    }
    let loss = loss.ok_or_else(|| Error::Config("the network has no output".into()))?;
    let mut gradients = loss.backward()?;
    let mut results: StateDict = outputs.iter().map(as_result).collect::<Result<_>>()?;
    results.insert("loss".into(), loss.detach());
    let mut gradient = |of: &Tensor| match gradients.take(of) {
        Some(gradient) => Ok(gradient),
        None => Tensor::zeros(of.shape(), of.dtype()),
    };
    results.insert("grad_input".into(), gradient(&images)?.permute(&[0, 3, 1, 2])?);
    for parameter in model.parameters().weights() {
        results.insert(format!("grad.{}", parameter.name()), gradient(&parameter.tensor())?);
    }
    Ok(results)
}
