//! The networks and ops in candle, composed of what its training supports: the fused layer norm and softmax have no gradients.

use std::time::Instant;

use candle_core::{D, DType, Device, Result as Candle, Tensor, Var};
use candle_nn::ops::{layer_norm_slow, softmax};
use candle_nn::{
    AdamW, BatchNorm, Conv2d, Conv2dConfig, Init, Linear, Module, ModuleT, Optimizer, ParamsAdamW, VarBuilder, VarMap,
    batch_norm, conv2d, conv2d_no_bias, linear, loss,
};

use crate::shapes::{self, Block as Shape, MERGE_STRIDE, PATCH_STRIDE};
use crate::{Call, Op, Result, Step};

pub fn training(model: &str, batch: usize, image: usize) -> Result<Step> {
    let variables = VarMap::new();
    let scope = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
    let (network, channels, classes): (Box<dyn Module>, _, _) = match model {
        "nin" => (Box::new(NetworkInNetwork::new(&scope)?), 1, 10),
        "resnet18" => (Box::new(ResNet18::new(&scope)?), 3, 10),
        "block" => (Box::new(Alone::new(Shape::alone(image)?, &scope)?), 96, 10),
        name => (Box::new(CrossFormer::new(name, image, &scope)?), 3, 1000),
    };
    let settings = ParamsAdamW { lr: 1e-4, weight_decay: 0.05, ..ParamsAdamW::default() };
    let mut optimizer = AdamW::new(variables.all_vars(), settings)?;
    let shape = if model == "block" { [batch, image, image, channels] } else { [batch, channels, image, image] };
    let images = Tensor::randn(0f32, 1.0, &shape, &Device::Cpu)?;
    let labels = Tensor::from_iter((0..batch as u32).map(|image| image % classes), &Device::Cpu)?;
    Ok(Box::new(move || {
        let start = Instant::now();
        let loss = loss::cross_entropy(&network.forward(&images)?, &labels)?;
        let forward = start.elapsed();
        let gradients = loss.backward()?;
        drop(loss);
        let backward = start.elapsed() - forward;
        optimizer.step(&gradients)?;
        drop(gradients);
        Ok([forward, backward, start.elapsed() - forward - backward])
    }))
}

struct ConvNorm {
    conv: Conv2d,
    norm: BatchNorm,
}

impl ConvNorm {
    fn new([inputs, outputs]: [usize; 2], kernel: usize, stride: usize, scope: VarBuilder) -> Candle<Self> {
        let config = Conv2dConfig { padding: kernel / 2, stride, ..Conv2dConfig::default() };
        let conv = conv2d_no_bias(inputs, outputs, kernel, config, scope.pp("conv"))?;
        Ok(ConvNorm { conv, norm: batch_norm(outputs, 1e-5, scope.pp("norm"))? })
    }
}

impl Module for ConvNorm {
    fn forward(&self, x: &Tensor) -> Candle<Tensor> {
        self.norm.forward_t(&self.conv.forward(x)?, true)
    }
}

struct NetworkInNetwork {
    blocks: Vec<Vec<ConvNorm>>,
    fc: Linear,
}

impl NetworkInNetwork {
    fn new(scope: &VarBuilder) -> Candle<Self> {
        let (mut blocks, mut inputs) = (Vec::new(), 1);
        for (number, layers) in shapes::NETWORK_IN_NETWORK.iter().enumerate() {
            let mut block = Vec::new();
            for (position, &(kernel, outputs)) in layers.iter().enumerate() {
                block.push(ConvNorm::new([inputs, outputs], kernel, 1, scope.pp(number).pp(position))?);
                inputs = outputs;
            }
            blocks.push(block);
        }
        Ok(NetworkInNetwork { blocks, fc: linear(inputs, 10, scope.pp("fc"))? })
    }
}

impl Module for NetworkInNetwork {
    fn forward(&self, images: &Tensor) -> Candle<Tensor> {
        let mut x = images.clone();
        for (number, block) in self.blocks.iter().enumerate() {
            for layer in block {
                x = layer.forward(&x)?.relu()?;
            }
            // Windows that overlap have no gradients in candle: 2 × 2 in place of 3 × 3, less work.
            x = match number {
                0 => x.max_pool2d(2)?,
                1 => x.avg_pool2d(2)?,
                _ => x.mean((2, 3))?,
            };
        }
        self.fc.forward(&x)
    }
}

struct ResNet18 {
    stem: ConvNorm,
    /// Two convolutions and, where the shape changes, the one of the shortcut.
    blocks: Vec<(ConvNorm, ConvNorm, Option<ConvNorm>)>,
    fc: Linear,
}

impl ResNet18 {
    fn new(scope: &VarBuilder) -> Candle<Self> {
        let block = |(number, &(inputs, outputs, stride)): (usize, &(usize, usize, usize))| {
            let scope = scope.pp(number);
            let shortcut = (stride != 1).then(|| ConvNorm::new([inputs, outputs], 1, stride, scope.pp("shortcut")));
            let first = ConvNorm::new([inputs, outputs], 3, stride, scope.pp("first"))?;
            Ok((first, ConvNorm::new([outputs; 2], 3, 1, scope.pp("second"))?, shortcut.transpose()?))
        };
        let blocks = shapes::RESNET18.iter().enumerate().map(block).collect::<Candle<_>>()?;
        Ok(ResNet18 {
            stem: ConvNorm::new([3, 64], 3, 1, scope.pp("stem"))?,
            blocks,
            fc: linear(512, 10, scope.pp("fc"))?,
        })
    }
}

impl Module for ResNet18 {
    fn forward(&self, images: &Tensor) -> Candle<Tensor> {
        let mut x = self.stem.forward(images)?.relu()?;
        for (first, second, shortcut) in &self.blocks {
            let y = second.forward(&first.forward(&x)?.relu()?)?;
            let shortcut = shortcut.as_ref().map_or_else(|| Ok(x.clone()), |conv| conv.forward(&x))?;
            x = (y + shortcut)?.relu()?;
        }
        self.fc.forward(&x.mean((2, 3))?)
    }
}

struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
}

impl LayerNorm {
    fn new(channels: usize, scope: VarBuilder) -> Candle<Self> {
        let value = |name, value| scope.get_with_hints(channels, name, Init::Const(value));
        Ok(LayerNorm { weight: value("weight", 1.0)?, bias: value("bias", 0.0)? })
    }
}

impl Module for LayerNorm {
    fn forward(&self, x: &Tensor) -> Candle<Tensor> {
        layer_norm_slow(x, &self.weight, &self.bias, 1e-5)
    }
}

/// The network that makes the table of position biases.
struct PositionBias {
    projection: Linear,
    layers: Vec<(LayerNorm, Linear)>,
}

impl PositionBias {
    fn new(shape: Shape, scope: VarBuilder) -> Candle<Self> {
        let width = shape.bias_width();
        let layer = |(number, outputs): (usize, usize)| {
            let scope = scope.pp(number);
            Ok((LayerNorm::new(width, scope.pp("norm"))?, linear(width, outputs, scope.pp("linear"))?))
        };
        let layers = [width, width, shape.heads].into_iter().enumerate().map(layer).collect::<Candle<_>>()?;
        Ok(PositionBias { projection: linear(2, width, scope.pp("projection"))?, layers })
    }
}

impl Module for PositionBias {
    fn forward(&self, offsets: &Tensor) -> Candle<Tensor> {
        let mut x = self.projection.forward(offsets)?;
        for (norm, linear) in &self.layers {
            x = linear.forward(&norm.forward(&x)?.relu()?)?;
        }
        Ok(x)
    }
}

struct Block {
    shape: Shape,
    norms: [LayerNorm; 2],
    qkv: Linear,
    proj: Linear,
    fc1: Linear,
    fc2: Linear,
    bias: PositionBias,
    offsets: Tensor,
    /// For each pair of tokens, its row of the table of biases.
    rows: Tensor,
}

impl Block {
    fn new(shape: Shape, scope: VarBuilder) -> Candle<Self> {
        let (channels, (offsets, rows)) = (shape.channels, shape.offsets());
        let linear = |name: &str, inputs, outputs| linear(inputs, outputs, scope.pp(name));
        Ok(Block {
            shape,
            norms: [LayerNorm::new(channels, scope.pp("norm1"))?, LayerNorm::new(channels, scope.pp("norm2"))?],
            qkv: linear("qkv", channels, 3 * channels)?,
            proj: linear("proj", channels, channels)?,
            fc1: linear("fc1", channels, 4 * channels)?,
            fc2: linear("fc2", 4 * channels, channels)?,
            bias: PositionBias::new(shape, scope.pp("bias"))?,
            offsets: Tensor::from_vec(offsets, ((), 2), &Device::Cpu)?,
            rows: Tensor::from_iter(rows, &Device::Cpu)?,
        })
    }

    /// Attention within groups (groups, tokens, channels).
    fn attend(&self, x: &Tensor) -> Candle<Tensor> {
        let (groups, tokens, channels) = x.dims3()?;
        let (heads, width) = (self.shape.heads, channels / self.shape.heads);
        let qkv = self.qkv.forward(x)?.reshape((groups, tokens, 3, heads, width))?.permute((2, 0, 3, 1, 4))?;
        let [q, k, v] = [0, 1, 2].map(|part| qkv.get(part).and_then(|part| part.contiguous()));
        let scores = (q? * (width as f64).powf(-0.5))?.matmul(&k?.t()?)?;
        let table = self.bias.forward(&self.offsets)?.index_select(&self.rows, 0)?;
        let bias = table.reshape((tokens, tokens, heads))?.permute((2, 0, 1))?;
        let mixed = softmax(&scores.broadcast_add(&bias)?, D::Minus1)?.matmul(&v?)?;
        self.proj.forward(&mixed.transpose(1, 2)?.reshape((groups, tokens, channels))?)
    }

    fn drop_path(&self, branch: Tensor) -> Candle<Tensor> {
        let keep = 1.0 - self.shape.drop_path;
        if keep == 1.0 {
            return Ok(branch);
        }
        let draws = Tensor::rand(0f32, 1.0, (branch.dim(0)?, 1, 1, 1), branch.device())?;
        branch.broadcast_mul(&((draws + keep)?.floor()? / keep)?)
    }
}

impl Module for Block {
    /// Maps (batch, height, width, channels).
    fn forward(&self, x: &Tensor) -> Candle<Tensor> {
        let (batch, _, _, channels) = x.dims4()?;
        let ((cut, order), (joined, back)) = (self.shape.cut(batch), self.shape.joined(batch));
        let groups = self.norms[0].forward(x)?.reshape(&cut)?.permute(order)?;
        let mixed = self.attend(&groups.reshape(((), self.shape.tokens(), channels))?)?;
        let mixed = mixed.reshape(&joined)?.permute(back)?.reshape(x.shape())?;
        let x = (x + self.drop_path(mixed)?)?;
        let hidden = self.fc1.forward(&self.norms[1].forward(&x)?)?.gelu_erf()?;
        &x + self.drop_path(self.fc2.forward(&hidden)?)?
    }
}

/// A block with a classifier on the mean of its tokens.
struct Alone {
    block: Block,
    head: Linear,
}

impl Alone {
    fn new(shape: Shape, scope: &VarBuilder) -> Candle<Self> {
        Ok(Alone { block: Block::new(shape, scope.pp("block"))?, head: linear(shape.channels, 10, scope.pp("head"))? })
    }
}

impl Module for Alone {
    fn forward(&self, x: &Tensor) -> Candle<Tensor> {
        self.head.forward(&self.block.forward(x)?.mean((1, 2))?)
    }
}

struct Stage {
    convolutions: Vec<Conv2d>,
    norm: LayerNorm,
    blocks: Vec<Block>,
}

struct CrossFormer {
    stages: Vec<Stage>,
    norm: LayerNorm,
    head: Linear,
}

impl CrossFormer {
    fn new(name: &str, image: usize, scope: &VarBuilder) -> Result<Self> {
        let (mut stages, mut inputs) = (Vec::new(), 3);
        for (number, (kernels, blocks)) in shapes::crossformer(name, image)?.into_iter().enumerate() {
            let (scope, stride) = (scope.pp(number), if number == 0 { PATCH_STRIDE } else { MERGE_STRIDE });
            let convolution = |(kernel, outputs): (usize, usize)| {
                let config = Conv2dConfig { padding: (kernel - stride) / 2, stride, ..Conv2dConfig::default() };
                conv2d(inputs, outputs, kernel, config, scope.pp(format!("kernel{kernel}")))
            };
            let outputs = kernels.iter().map(|(_, outputs)| outputs).sum();
            let convolutions = kernels.into_iter().map(convolution).collect::<Candle<_>>()?;
            // The first norm follows the embedding, the others come before it.
            let norm = LayerNorm::new(if number == 0 { outputs } else { inputs }, scope.pp("norm"))?;
            let block = |(number, shape)| Block::new(shape, scope.pp(format!("block{number}")));
            let blocks = blocks.into_iter().enumerate().map(block).collect::<Candle<_>>()?;
            stages.push(Stage { convolutions, norm, blocks });
            inputs = outputs;
        }
        let (norm, head) = (LayerNorm::new(inputs, scope.pp("norm"))?, linear(inputs, 1000, scope.pp("head"))?);
        Ok(CrossFormer { stages, norm, head })
    }
}

impl Module for CrossFormer {
    fn forward(&self, images: &Tensor) -> Candle<Tensor> {
        let mut x = images.clone();
        for (number, stage) in self.stages.iter().enumerate() {
            if number > 0 {
                x = stage.norm.forward(&x)?.permute((0, 3, 1, 2))?.contiguous()?;
            }
            let maps: Vec<Tensor> = stage.convolutions.iter().map(|conv| conv.forward(&x)).collect::<Candle<_>>()?;
            x = Tensor::cat(&maps, 1)?.permute((0, 2, 3, 1))?.contiguous()?;
            if number == 0 {
                x = stage.norm.forward(&x)?;
            }
            for block in &stage.blocks {
                x = block.forward(&x)?;
            }
        }
        self.head.forward(&self.norm.forward(&x)?.mean((1, 2))?)
    }
}

/// Forward alone, and forward with backward.
pub fn op(op: &Op) -> Result<(Call, Call)> {
    let draw = |shape: Vec<usize>| Tensor::randn(0f32, 1.0, shape, &Device::Cpu);
    let inputs: Vec<Tensor> = op.shapes()?.into_iter().map(draw).collect::<Candle<_>>()?;
    let variable = |(number, input): (usize, &Tensor)| match op.of_images() && number == 0 {
        true => Ok(input.clone()),
        false => Ok(Var::from_tensor(input)?.into_inner()),
    };
    let variables: Vec<Tensor> = inputs.iter().enumerate().map(variable).collect::<Candle<_>>()?;
    let (forward, both) = (op.clone(), op.clone());
    Ok((
        Box::new(move || Ok(drop(run(&forward, &inputs, false)?))),
        Box::new(move || Ok(drop(run(&both, &variables, true)?.backward()?))),
    ))
}

/// `training` leaves out what has no gradients.
fn run(op: &Op, inputs: &[Tensor], training: bool) -> Result<Tensor> {
    let x = &inputs[0];
    Ok(match *op {
        Op::Linear { gelu, .. } => {
            let y = x.matmul(&inputs[1].t()?)?.broadcast_add(&inputs[2])?;
            if gelu { y.gelu_erf()? } else { y }
        }
        Op::LayerNorm { .. } if training => layer_norm_slow(x, &inputs[1], &inputs[2], 1e-5)?,
        Op::LayerNorm { .. } => candle_nn::ops::layer_norm(x, &inputs[1], &inputs[2], 1e-5)?,
        Op::Softmax { .. } if training => softmax(x, D::Minus1)?,
        Op::Softmax { .. } => candle_nn::ops::softmax_last_dim(x)?,
        Op::Gelu { .. } => x.gelu_erf()?,
        Op::Relu { .. } => x.relu()?,
        Op::Add { .. } => (x + &inputs[1])?,
        Op::Conv2d { kernel, stride, .. } => x.conv2d(&inputs[1], kernel / 2, stride, 1, 1)?,
        Op::Unknown => return Err("not an op of this program".into()),
    })
}
