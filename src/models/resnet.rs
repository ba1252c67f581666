//! Residual networks (He et al., CVPR 2016) with torchvision's parameter names and first values.
//!
//! Images are (batch, height, width, channels), of any size.
//!
//! ```
//! use gridgrad::models::{ResNet, ResNetConfig};
//! use gridgrad::nn::Context;
//! use gridgrad::{DType, Tensor};
//! let config = ResNetConfig { widths: vec![8, 16], depths: vec![1, 1], ..ResNetConfig::named("resnet18", 10)? };
//! let model = ResNet::new(config.with_cifar_stem(), 0, DType::F32)?;
//! let logits = model.logits(&Tensor::zeros([2, 32, 32, 3], DType::F32)?, &Context::eval())?;
//! assert_eq!(logits.shape().to_vec(), [2, 10]);
//! # Ok::<(), gridgrad::Error>(())
//! ```

use crate::nn::{BatchNorm, Context, Conv2d, Fan, Initializer, Linear, Parameters, Scope};
use crate::ops::{Conv2dOptions, Pool2dOptions, global_avg_pool2d, max_pool2d};
use crate::{DType, Error, Result, Tensor};

/// Names that [`ResNetConfig::named`] knows.
pub const NAMES: [&str; 5] = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"];

/// What stands before the first block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stem {
    /// A 7×7 convolution and a pooling, stride 2 each: for images of 224 × 224.
    ImageNet,
    /// A 3×3 convolution of stride 1: for images of 32 × 32.
    Cifar,
}

/// The branch of a block that is added to its input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Branch {
    /// Two 3×3 convolutions.
    Basic,
    /// 1×1, 3×3 and 1×1 convolutions; the last one's channels are four times the stage's width. The 3×3 one has the
    /// stride ("v1.5").
    Bottleneck,
}

impl Branch {
    /// Channels of a block's output for each channel of its stage's width.
    fn expansion(self) -> usize {
        match self {
            Branch::Basic => 1,
            Branch::Bottleneck => 4,
        }
    }
}

/// The architecture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResNetConfig {
    /// What stands before the first block.
    pub stem: Stem,
    /// What the blocks are made of.
    pub branch: Branch,
    /// Blocks of each stage. Every stage but the first halves the map.
    pub depths: Vec<usize>,
    /// Width of each stage; the stem has the first one's.
    pub widths: Vec<usize>,
    /// Channels of the images.
    pub in_channels: usize,
    /// Number of classes.
    pub num_classes: usize,
}

impl ResNetConfig {
    /// A published depth, for RGB images of ImageNet's size.
    ///
    /// # Errors
    /// Where the name is not one of [`NAMES`].
    pub fn named(name: &str, num_classes: usize) -> Result<Self> {
        let (branch, depths) = match name {
            "resnet18" => (Branch::Basic, [2, 2, 2, 2]),
            "resnet34" => (Branch::Basic, [3, 4, 6, 3]),
            "resnet50" => (Branch::Bottleneck, [3, 4, 6, 3]),
            "resnet101" => (Branch::Bottleneck, [3, 4, 23, 3]),
            "resnet152" => (Branch::Bottleneck, [3, 8, 36, 3]),
            _ => return Err(Error::Config(format!("model '{name}' is not one of {}", NAMES.join(", ")))),
        };
        let widths = vec![64, 128, 256, 512];
        Ok(ResNetConfig { stem: Stem::ImageNet, branch, depths: depths.into(), widths, in_channels: 3, num_classes })
    }

    /// The same with the stem for small images.
    #[must_use]
    pub fn with_cifar_stem(self) -> Self {
        ResNetConfig { stem: Stem::Cifar, ..self }
    }

    fn validate(&self) -> Result<()> {
        let sizes = [&self.depths[..], &self.widths, &[self.in_channels, self.num_classes]].concat();
        if self.depths.is_empty() || self.depths.len() != self.widths.len() || sizes.contains(&0) {
            let message = "a ResNet needs as many widths as depths, at least one, and nothing that is 0";
            return Err(Error::Config(format!("{message}: {self:?}")));
        }
        Ok(())
    }
}

/// A convolution without bias and its batch normalisation.
struct ConvNorm {
    conv: Conv2d,
    norm: BatchNorm,
}

impl ConvNorm {
    /// `names` are those of the convolution and of the normalisation.
    fn new(scope: &Scope, names: [&str; 2], channels: [usize; 2], kernel: usize, stride: usize) -> Result<Self> {
        let options = Conv2dOptions { stride: [stride; 2], padding: [kernel / 2; 2], ..Conv2dOptions::default() };
        let weight = Initializer::KaimingNormal { a: 0.0, fan: Fan::Out };
        Ok(ConvNorm {
            conv: Conv2d::with_init(&scope.child(names[0]), channels, kernel, weight, None, options)?,
            norm: BatchNorm::new(&scope.child(names[1]), channels[1])?,
        })
    }

    fn forward(&self, input: &Tensor, context: &Context) -> Result<Tensor> {
        self.norm.forward(&self.conv.forward(input)?, context)
    }

    fn forward_relu(&self, input: &Tensor, context: &Context) -> Result<Tensor> {
        self.norm.forward_relu(&self.conv.forward(input)?, context)
    }

    /// Multiply-adds for one image, and the extents of the output.
    fn products(&self, input: [usize; 2]) -> (u64, [usize; 2]) {
        let [stride, padding] = [self.conv.options().stride[0], self.conv.options().padding[0]];
        let weight = self.conv.weight.shape();
        let output = input.map(|extent| (extent + 2 * padding).saturating_sub(weight[2]) / stride + 1);
        ((output[0] * output[1] * weight.elements()) as u64, output)
    }
}

struct Block {
    branch: Vec<ConvNorm>,
    downsample: Option<ConvNorm>,
}

impl Block {
    fn new(scope: &Scope, kind: Branch, input: usize, width: usize, stride: usize) -> Result<Self> {
        let output = width * kind.expansion();
        // (channels, kernel, stride) of the convolutions.
        let layers = match kind {
            Branch::Basic => vec![([input, width], 3, stride), ([width, output], 3, 1)],
            Branch::Bottleneck => {
                vec![([input, width], 1, 1), ([width, width], 3, stride), ([width, output], 1, 1)]
            }
        };
        let layer = |(number, (channels, kernel, stride)): (usize, ([usize; 2], usize, usize))| {
            let names = [format!("conv{}", number + 1), format!("bn{}", number + 1)];
            ConvNorm::new(scope, [&names[0], &names[1]], channels, kernel, stride)
        };
        let branch = layers.into_iter().enumerate().map(layer).collect::<Result<_>>()?;
        let reshapes = stride != 1 || input != output;
        let shortcut = || ConvNorm::new(&scope.child("downsample"), ["0", "1"], [input, output], 1, stride);
        Ok(Block { branch, downsample: reshapes.then(shortcut).transpose()? })
    }

    fn forward(&self, input: &Tensor, context: &Context) -> Result<Tensor> {
        let mut output = input.clone();
        for (number, layer) in self.branch.iter().enumerate() {
            let last = number + 1 == self.branch.len();
            output = if last { layer.forward(&output, context)? } else { layer.forward_relu(&output, context)? };
        }
        let shortcut = match &self.downsample {
            Some(layer) => layer.forward(input, context)?,
            None => input.clone(),
        };
        output.add(&shortcut)?.relu()
    }

    fn products(&self, input: [usize; 2]) -> (u64, [usize; 2]) {
        let mut sum = self.downsample.as_ref().map_or(0, |layer| layer.products(input).0);
        let mut extents = input;
        for layer in &self.branch {
            let (products, output) = layer.products(extents);
            sum += products;
            extents = output;
        }
        (sum, extents)
    }
}

/// The network. See the [module documentation](self).
pub struct ResNet {
    config: ResNetConfig,
    stem: ConvNorm,
    blocks: Vec<Block>,
    head: Linear,
    parameters: Parameters,
}

impl ResNet {
    /// A network with torchvision's initialisation from `seed`.
    ///
    /// # Errors
    /// Where the configuration cannot be built.
    pub fn new(config: ResNetConfig, seed: u64, dtype: DType) -> Result<Self> {
        config.validate()?;
        let scope = Scope::new(seed, dtype);
        let (kernel, stride) = match config.stem {
            Stem::ImageNet => (7, 2),
            Stem::Cifar => (3, 1),
        };
        let mut channels = config.widths[0];
        let stem = ConvNorm::new(&scope, ["conv1", "bn1"], [config.in_channels, channels], kernel, stride)?;
        let mut blocks = Vec::new();
        for (stage, (&depth, &width)) in config.depths.iter().zip(&config.widths).enumerate() {
            let stage_scope = scope.child(format!("layer{}", stage + 1));
            for number in 0..depth {
                let stride = if stage > 0 && number == 0 { 2 } else { 1 };
                blocks.push(Block::new(&stage_scope.child(number), config.branch, channels, width, stride)?);
                channels = width * config.branch.expansion();
            }
        }
        let head = Linear::new(&scope.child("fc"), channels, config.num_classes, true)?;
        Ok(ResNet { stem, blocks, head, parameters: scope.parameters().clone(), config })
    }

    /// The architecture.
    pub fn config(&self) -> &ResNetConfig {
        &self.config
    }

    /// All parameters, under torchvision's names.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// Logits (batch, classes) of `images` (batch, height, width, channels).
    ///
    /// # Errors
    /// Where the images do not fit the network.
    pub fn logits(&self, images: &Tensor, context: &Context) -> Result<Tensor> {
        let mut map = self.stem.forward_relu(images, context)?;
        if self.config.stem == Stem::ImageNet {
            let pool = Pool2dOptions { stride: [2; 2], padding: [1; 2], ..Pool2dOptions::tiling([3; 2]) };
            map = max_pool2d(&map, pool)?;
        }
        for block in &self.blocks {
            map = block.forward(&map, context)?;
        }
        self.head.forward(&global_avg_pool2d(&map)?)
    }

    /// Multiply-adds of convolutions and matrix products for an image of these extents (height, width).
    pub fn products(&self, image: [usize; 2]) -> u64 {
        let (mut sum, mut extents) = self.stem.products(image);
        if self.config.stem == Stem::ImageNet {
            extents = extents.map(|extent| extent.div_ceil(2));
        }
        for block in &self.blocks {
            let (products, output) = block.products(extents);
            sum += products;
            extents = output;
        }
        sum + self.head.weight.shape().elements() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Philox;

    fn published(name: &str) -> ResNet {
        ResNet::new(ResNetConfig::named(name, 1000).unwrap(), 0, DType::F32).unwrap()
    }

    #[test]
    fn published_sizes_have_the_published_parameters_and_products() {
        // torchvision's parameter counts; multiply-adds of convolutions and the classifier at 224 × 224.
        for (name, parameters, products) in
            [("resnet18", 11_689_512, 1_814_073_344), ("resnet50", 25_557_032, 4_089_184_256)]
        {
            let model = published(name);
            let weights: usize = model.parameters().weights().map(|parameter| parameter.shape().elements()).sum();
            assert_eq!((weights, model.products([224; 2])), (parameters, products), "{name}");
        }
        let config = ResNetConfig::named("resnet18", 10).unwrap().with_cifar_stem();
        let model = ResNet::new(config, 0, DType::F32).unwrap();
        let weights: usize = model.parameters().weights().map(|parameter| parameter.shape().elements()).sum();
        assert_eq!((weights, model.products([32; 2])), (11_173_962, 555_422_720));
    }

    #[test]
    fn parameters_have_torchvisions_names() {
        let model = published("resnet50");
        let names: Vec<String> = model.parameters().iter().map(|parameter| parameter.name().to_owned()).collect();
        assert_eq!(names.len(), 161 + 2 * 53, "weights and running statistics");
        for name in
            ["conv1.weight", "bn1.running_var", "layer1.0.downsample.1.bias", "layer4.2.conv3.weight", "fc.bias"]
        {
            assert!(names.iter().any(|other| other == name), "{name}");
        }
        assert_eq!(model.parameters().get("layer2.0.conv2.weight").unwrap().shape().to_vec(), [128, 128, 3, 3]);
    }

    #[test]
    fn gradients_reach_every_weight_and_agree_with_differences() {
        let config = ResNetConfig {
            depths: vec![1, 1],
            widths: vec![2, 3],
            branch: Branch::Bottleneck,
            ..ResNetConfig::named("resnet50", 4).unwrap()
        };
        let model = ResNet::new(config, 3, DType::F64).unwrap();
        let images = Tensor::randn([2, 19, 17, 3], DType::F64, Philox::new(1)).unwrap();
        let loss =
            || model.logits(&images, &Context::train(Philox::new(0))).unwrap().square().unwrap().sum_all().unwrap();
        let gradients = loss().backward().unwrap();
        for parameter in model.parameters().weights() {
            let gradient = gradients.get(&parameter.tensor()).unwrap_or_else(|| panic!("{}", parameter.name()));
            let analytic = gradient.to_f64_vec().unwrap()[0];
            const STEP: f64 = 1e-5;
            let shifted = |by: f64| {
                parameter.update::<f64>(|values| values[0] += by).unwrap();
                loss().item().unwrap()
            };
            let (above, below) = (shifted(STEP), shifted(-2.0 * STEP));
            shifted(STEP);
            let numeric = (above - below) / (2.0 * STEP);
            let scale = analytic.abs().max(numeric.abs()).max(1.0);
            assert!((analytic - numeric).abs() < 1e-5 * scale, "{}: {analytic} {numeric}", parameter.name());
        }
    }

    #[test]
    fn impossible_configurations_are_refused() {
        let config = ResNetConfig::named("resnet18", 10).unwrap();
        assert!(ResNetConfig::named("resnet19", 10).is_err());
        for config in [
            ResNetConfig { depths: vec![], widths: vec![], ..config.clone() },
            ResNetConfig { depths: vec![1], ..config.clone() },
            ResNetConfig { widths: vec![64, 0, 256, 512], ..config.clone() },
            ResNetConfig { num_classes: 0, ..config },
        ] {
            assert!(ResNet::new(config, 0, DType::F32).is_err());
        }
    }
}
