//! The networks and ops in burn, on its `flex` backend.

use std::time::Instant;

use burn::module::Module;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::loss::{CrossEntropyLoss, CrossEntropyLossConfig};
use burn::nn::pool::{AvgPool2dConfig, MaxPool2dConfig};
use burn::nn::{BatchNorm, BatchNormConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig, PaddingConfig2d};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::activation::{gelu, relu, softmax};
use burn::tensor::module::{conv2d, layer_norm, linear};
use burn::tensor::ops::ConvOptions;
use burn::tensor::{Device, Distribution, Int, Tensor, TensorData};

use crate::shapes::{self, Block as Shape, MERGE_STRIDE, PATCH_STRIDE};
use crate::{Call, Op, Result, Step};

const NORMAL: Distribution = Distribution::Normal(0.0, 1.0);

trait Classifier: Module {
    fn logits(&self, images: Tensor<4>) -> Tensor<2>;
}

pub fn training(model: &str, batch: usize, image: usize) -> Result<Step> {
    let device = Device::flex().autodiff();
    Ok(match model {
        "nin" => train(NetworkInNetwork::new(&device), [batch, 1, image, image], 10, device),
        "resnet18" => train(ResNet18::new(&device), [batch, 3, image, image], 10, device),
        "block" => train(Alone::new(Shape::alone(image)?, &device), [batch, image, image, 96], 10, device),
        name => train(CrossFormer::new(name, image, &device)?, [batch, 3, image, image], 1000, device),
    })
}

fn train<M: Classifier + 'static>(model: M, images: [usize; 4], classes: usize, device: Device) -> Step {
    let labels: Vec<i64> = (0..images[0]).map(|image| (image % classes) as i64).collect();
    let labels = Tensor::<1, Int>::from_data(TensorData::from(labels.as_slice()), &device);
    let images = Tensor::<4>::random(images, NORMAL, &device);
    let loss: CrossEntropyLoss = CrossEntropyLossConfig::new().init(&device);
    let mut optimizer = AdamWConfig::new().with_epsilon(1e-8).with_weight_decay(0.05).init();
    let mut model = Some(model);
    Box::new(move || {
        // The optimizer takes the network and gives it back.
        let network = model.take().ok_or("an earlier step has failed")?;
        let start = Instant::now();
        let value = loss.forward(network.logits(images.clone()), labels.clone());
        device.sync()?;
        let forward = start.elapsed();
        let gradients = GradientsParams::from_grads(value.backward(), &network);
        drop(value);
        device.sync()?;
        let backward = start.elapsed() - forward;
        model = Some(optimizer.step(1e-4, network, gradients));
        device.sync()?;
        Ok([forward, backward, start.elapsed() - forward - backward])
    })
}

#[derive(Module, Debug)]
struct ConvNorm {
    conv: Conv2d,
    norm: BatchNorm,
}

impl ConvNorm {
    fn new(channels: [usize; 2], kernel: usize, stride: usize, device: &Device) -> Self {
        let config = Conv2dConfig::new(channels, [kernel; 2]).with_stride([stride; 2]).with_bias(false);
        let conv = config.with_padding(padding(kernel / 2)).init(device);
        ConvNorm { conv, norm: BatchNormConfig::new(channels[1]).init(device) }
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        self.norm.forward(self.conv.forward(x))
    }
}

fn padding(width: usize) -> PaddingConfig2d {
    PaddingConfig2d::Explicit(width, width, width, width)
}

/// (batch, channels, height, width) to (batch, channels).
fn mean_of_maps(x: Tensor<4>) -> Tensor<2> {
    let [batch, channels, _, _] = x.dims();
    x.mean_dims(&[2, 3]).reshape([batch, channels])
}

#[derive(Module, Debug)]
struct NetworkInNetwork {
    blocks: Vec<Vec<ConvNorm>>,
    fc: Linear,
}

impl NetworkInNetwork {
    fn new(device: &Device) -> Self {
        let (mut blocks, mut inputs) = (Vec::new(), 1);
        for layers in shapes::NETWORK_IN_NETWORK {
            let layer = |(kernel, outputs)| {
                ConvNorm::new([std::mem::replace(&mut inputs, outputs), outputs], kernel, 1, device)
            };
            blocks.push(layers.map(layer).into());
        }
        NetworkInNetwork { blocks, fc: LinearConfig::new(inputs, 10).init(device) }
    }
}

impl Classifier for NetworkInNetwork {
    fn logits(&self, images: Tensor<4>) -> Tensor<2> {
        let mut x = images;
        for (number, block) in self.blocks.iter().enumerate() {
            x = block.iter().fold(x, |x, layer| relu(layer.forward(x)));
            x = match number {
                0 => MaxPool2dConfig::new([3; 2]).with_strides([2; 2]).with_padding(padding(1)).init().forward(x),
                1 => AvgPool2dConfig::new([3; 2]).with_strides([2; 2]).with_padding(padding(1)).init().forward(x),
                _ => x,
            };
        }
        self.fc.forward(mean_of_maps(x))
    }
}

#[derive(Module, Debug)]
struct BasicBlock {
    first: ConvNorm,
    second: ConvNorm,
    shortcut: Option<ConvNorm>,
}

#[derive(Module, Debug)]
struct ResNet18 {
    stem: ConvNorm,
    blocks: Vec<BasicBlock>,
    fc: Linear,
}

impl ResNet18 {
    fn new(device: &Device) -> Self {
        let block = |(inputs, outputs, stride)| BasicBlock {
            first: ConvNorm::new([inputs, outputs], 3, stride, device),
            second: ConvNorm::new([outputs; 2], 3, 1, device),
            shortcut: (stride != 1).then(|| ConvNorm::new([inputs, outputs], 1, stride, device)),
        };
        let blocks = shapes::RESNET18.map(block).into();
        ResNet18 { stem: ConvNorm::new([3, 64], 3, 1, device), blocks, fc: LinearConfig::new(512, 10).init(device) }
    }
}

impl Classifier for ResNet18 {
    fn logits(&self, images: Tensor<4>) -> Tensor<2> {
        let mut x = relu(self.stem.forward(images));
        for BasicBlock { first, second, shortcut } in &self.blocks {
            let y = second.forward(relu(first.forward(x.clone())));
            x = relu(y + shortcut.as_ref().map_or_else(|| x.clone(), |conv| conv.forward(x.clone())));
        }
        self.fc.forward(mean_of_maps(x))
    }
}

/// The network that makes the table of position biases.
#[derive(Module, Debug)]
struct PositionBias {
    projection: Linear,
    norms: Vec<LayerNorm>,
    layers: Vec<Linear>,
}

impl PositionBias {
    fn new(shape: Shape, device: &Device) -> Self {
        let width = shape.bias_width();
        PositionBias {
            projection: LinearConfig::new(2, width).init(device),
            norms: [(); 3].map(|()| LayerNormConfig::new(width).init(device)).into(),
            layers: [width, width, shape.heads].map(|outputs| LinearConfig::new(width, outputs).init(device)).into(),
        }
    }

    fn forward(&self, offsets: Tensor<2>) -> Tensor<2> {
        let layers = self.norms.iter().zip(&self.layers);
        layers.fold(self.projection.forward(offsets), |x, (norm, linear)| linear.forward(relu(norm.forward(x))))
    }
}

#[derive(Module, Debug)]
struct Block {
    #[module(skip)]
    shape: Shape,
    norm1: LayerNorm,
    qkv: Linear,
    proj: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    bias: PositionBias,
    offsets: Tensor<2>,
    /// For each pair of tokens, its row of the table of biases.
    rows: Tensor<1, Int>,
}

impl Block {
    fn new(shape: Shape, device: &Device) -> Self {
        let (channels, (offsets, rows)) = (shape.channels, shape.offsets());
        let rows: Vec<i64> = rows.into_iter().map(i64::from).collect();
        let linear = |inputs, outputs| LinearConfig::new(inputs, outputs).init(device);
        let norm = || LayerNormConfig::new(channels).init(device);
        Block {
            shape,
            norm1: norm(),
            qkv: linear(channels, 3 * channels),
            proj: linear(channels, channels),
            norm2: norm(),
            fc1: linear(channels, 4 * channels),
            fc2: linear(4 * channels, channels),
            bias: PositionBias::new(shape, device),
            offsets: Tensor::<1>::from_data(TensorData::from(offsets.as_slice()), device).reshape([-1, 2]),
            rows: Tensor::from_data(TensorData::from(rows.as_slice()), device),
        }
    }

    /// Attention within groups (groups, tokens, channels).
    fn attend(&self, x: Tensor<3>) -> Tensor<3> {
        let [groups, tokens, channels] = x.dims();
        let (heads, width) = (self.shape.heads, channels / self.shape.heads);
        let qkv = self.qkv.forward(x).reshape([groups, tokens, 3, heads, width]).permute([2, 0, 3, 1, 4]);
        let part = |part: usize| qkv.clone().slice([part..part + 1]).squeeze_dim::<4>(0);
        let scores = (part(0) * (width as f64).powf(-0.5)).matmul(part(1).swap_dims(2, 3));
        let table = self.bias.forward(self.offsets.clone()).select(0, self.rows.clone());
        let bias = table.reshape([1, tokens, tokens, heads]).permute([0, 3, 1, 2]);
        let mixed = softmax(scores + bias, 3).matmul(part(2));
        self.proj.forward(mixed.swap_dims(1, 2).reshape([groups, tokens, channels]))
    }

    fn drop_path(&self, branch: Tensor<4>) -> Tensor<4> {
        let keep = 1.0 - self.shape.drop_path;
        if keep == 1.0 {
            return branch;
        }
        let draws = Tensor::<4>::random([branch.dims()[0], 1, 1, 1], Distribution::Bernoulli(keep), &branch.device());
        branch * (draws / keep)
    }

    /// Maps (batch, height, width, channels).
    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let map @ [batch, height, width, channels] = x.dims();
        let ((cut, order), (joined, back)) = (self.shape.cut(batch), self.shape.joined(batch));
        let tokens = self.shape.tokens();
        let groups = self.norm1.forward(x.clone()).reshape(cut).permute(order);
        let mixed = self.attend(groups.reshape([batch * height * width / tokens, tokens, channels]));
        let x = x + self.drop_path(mixed.reshape(joined).permute(back).reshape(map));
        let hidden = gelu(self.fc1.forward(self.norm2.forward(x.clone())));
        x + self.drop_path(self.fc2.forward(hidden))
    }
}

/// (batch, height, width, channels) to (batch, channels).
fn mean_of_tokens(x: Tensor<4>) -> Tensor<2> {
    let [batch, _, _, channels] = x.dims();
    x.mean_dims(&[1, 2]).reshape([batch, channels])
}

/// A block with a classifier on the mean of its tokens.
#[derive(Module, Debug)]
struct Alone {
    block: Block,
    head: Linear,
}

impl Alone {
    fn new(shape: Shape, device: &Device) -> Self {
        Alone { block: Block::new(shape, device), head: LinearConfig::new(shape.channels, 10).init(device) }
    }
}

impl Classifier for Alone {
    fn logits(&self, images: Tensor<4>) -> Tensor<2> {
        self.head.forward(mean_of_tokens(self.block.forward(images)))
    }
}

#[derive(Module, Debug)]
struct Stage {
    convolutions: Vec<Conv2d>,
    norm: LayerNorm,
    blocks: Vec<Block>,
}

#[derive(Module, Debug)]
struct CrossFormer {
    stages: Vec<Stage>,
    norm: LayerNorm,
    head: Linear,
}

impl CrossFormer {
    fn new(name: &str, image: usize, device: &Device) -> Result<Self> {
        let (mut stages, mut inputs) = (Vec::new(), 3);
        for (number, (kernels, blocks)) in shapes::crossformer(name, image)?.into_iter().enumerate() {
            let stride = if number == 0 { PATCH_STRIDE } else { MERGE_STRIDE };
            let convolution = |&(kernel, outputs): &(usize, usize)| {
                let config = Conv2dConfig::new([inputs, outputs], [kernel; 2]).with_stride([stride; 2]);
                config.with_padding(padding((kernel - stride) / 2)).init(device)
            };
            let outputs = kernels.iter().map(|(_, outputs)| outputs).sum();
            stages.push(Stage {
                convolutions: kernels.iter().map(convolution).collect(),
                // The first norm follows the embedding, the others come before it.
                norm: LayerNormConfig::new(if number == 0 { outputs } else { inputs }).init(device),
                blocks: blocks.into_iter().map(|shape| Block::new(shape, device)).collect(),
            });
            inputs = outputs;
        }
        let head = LinearConfig::new(inputs, 1000).init(device);
        Ok(CrossFormer { stages, norm: LayerNormConfig::new(inputs).init(device), head })
    }
}

impl Classifier for CrossFormer {
    fn logits(&self, images: Tensor<4>) -> Tensor<2> {
        let mut x = images;
        for (number, stage) in self.stages.iter().enumerate() {
            if number > 0 {
                x = stage.norm.forward(x).permute([0, 3, 1, 2]);
            }
            let maps = stage.convolutions.iter().map(|conv| conv.forward(x.clone())).collect();
            x = Tensor::cat(maps, 1).permute([0, 2, 3, 1]);
            if number == 0 {
                x = stage.norm.forward(x);
            }
            x = stage.blocks.iter().fold(x, |x, block| block.forward(x));
        }
        self.head.forward(mean_of_tokens(self.norm.forward(x)))
    }
}

/// Tensors of the ranks that ops have.
enum Value {
    Vector(Tensor<1>),
    Matrix(Tensor<2>),
    Map(Tensor<4>),
}

impl Value {
    fn new(shape: &[usize], device: &Device, wants_gradient: bool) -> Result<Self> {
        fn draw<const D: usize>(shape: [usize; D], device: &Device, wants_gradient: bool) -> Tensor<D> {
            let tensor = Tensor::random(shape, NORMAL, device);
            if wants_gradient { tensor.require_grad() } else { tensor }
        }
        Ok(match *shape {
            [a] => Value::Vector(draw([a], device, wants_gradient)),
            [a, b] => Value::Matrix(draw([a, b], device, wants_gradient)),
            [a, b, c, d] => Value::Map(draw([a, b, c, d], device, wants_gradient)),
            _ => return Err(format!("no op has a tensor of shape {shape:?}").into()),
        })
    }

    fn backward(&self) {
        match self {
            Value::Vector(x) => drop(x.backward()),
            Value::Matrix(x) => drop(x.backward()),
            Value::Map(x) => drop(x.backward()),
        }
    }
}

/// Forward alone, and forward with backward.
pub fn op(op: &Op) -> Result<(Call, Call)> {
    let (plain, recording) = (Device::flex(), Device::flex().autodiff());
    let mut shapes = op.shapes()?;
    if let Op::Linear { inputs, outputs, .. } = *op {
        // As burn's layers have their weights.
        shapes[1] = vec![inputs, outputs];
    }
    let inputs: Vec<Value> = shapes.iter().map(|shape| Value::new(shape, &plain, false)).collect::<Result<_>>()?;
    let variable =
        |(number, shape): (usize, &Vec<usize>)| Value::new(shape, &recording, !(op.of_images() && number == 0));
    let variables: Vec<Value> = shapes.iter().enumerate().map(variable).collect::<Result<_>>()?;
    let (forward, both) = (op.clone(), op.clone());
    Ok((
        Box::new(move || Ok(drop(run(&forward, &inputs)?))),
        Box::new(move || {
            run(&both, &variables)?.backward();
            Ok(())
        }),
    ))
}

fn run(op: &Op, inputs: &[Value]) -> Result<Value> {
    Ok(match (op, inputs) {
        (Op::Linear { gelu: with_gelu, .. }, [Value::Matrix(x), Value::Matrix(weight), Value::Vector(bias)]) => {
            let y = linear(x.clone(), weight.clone(), Some(bias.clone()));
            Value::Matrix(if *with_gelu { gelu(y) } else { y })
        }
        (Op::LayerNorm { .. }, [Value::Matrix(x), Value::Vector(weight), Value::Vector(bias)]) => {
            Value::Matrix(layer_norm(x.clone(), weight.clone(), Some(bias.clone()), 1e-5))
        }
        (Op::Softmax { .. }, [Value::Matrix(x)]) => Value::Matrix(softmax(x.clone(), 1)),
        (Op::Gelu { .. }, [Value::Vector(x)]) => Value::Vector(gelu(x.clone())),
        (Op::Relu { .. }, [Value::Vector(x)]) => Value::Vector(relu(x.clone())),
        (Op::Add { .. }, [Value::Vector(x), Value::Vector(y)]) => Value::Vector(x.clone() + y.clone()),
        (&Op::Conv2d { kernel, stride, .. }, [Value::Map(x), Value::Map(weight)]) => {
            let options = ConvOptions::new([stride; 2], [kernel / 2; 2], [1; 2], 1);
            Value::Map(conv2d(x.clone(), weight.clone(), None, options))
        }
        _ => return Err("not an op of this program".into()),
    })
}
