//! The networks that can be timed.

use clap::{Args, value_parser};
use gridgrad::models::crossformer;
use gridgrad::models::{CrossFormer, CrossFormerConfig, NetworkInNetwork, ResNet, ResNetConfig, resnet};
use gridgrad::random::Philox;
use gridgrad::train::{Classifier, OptimizerConfig, Precision};
use gridgrad::{DType, Device, Error, Result, Tensor};

use super::block::{self, Block};
use crate::device::DeviceFlag;

const NETWORK_IN_NETWORK: &str = "network-in-network";
const BLOCK: &str = "block";

/// What is timed, and how.
#[derive(Args)]
pub struct Subject {
    /// Name of the network: a CrossFormer's size or another of those that an unknown name lists.
    #[arg(long, default_value = "small")]
    pub model: String,
    /// Height and width of the images; the network's own size where absent.
    #[arg(long, value_parser = value_parser!(u16).range(1..))]
    pub image: Option<u16>,
    #[command(flatten)]
    pub device: DeviceFlag,
    /// f32, bf16 or f16: in what the network computes
    #[arg(long, default_value = "f32")]
    pub precision: Precision,
    /// Prints one line of JSON.
    #[arg(long)]
    pub json: bool,
}

/// A network of this name, and what it is trained with.
pub struct Network {
    pub model: Box<dyn Classifier>,
    /// Height and width of its images.
    pub image: [usize; 2],
    pub channels: usize,
    pub classes: usize,
    /// Multiply-adds for an image.
    pub products: u64,
    pub optimizer: OptimizerConfig,
}

/// All names, for `--help` and errors.
pub fn names() -> Vec<&'static str> {
    crossformer::NAMES.into_iter().chain(resnet::NAMES).chain([NETWORK_IN_NETWORK, BLOCK]).collect()
}

impl Network {
    /// A network with random weights, for square images of `side` or of its own size.
    pub fn new(name: &str, side: Option<u16>) -> Result<Self> {
        let side = side.map(usize::from);
        let name = match name {
            "nin" => NETWORK_IN_NETWORK,
            name => name.strip_prefix("crossformer-").unwrap_or(name),
        };
        if crossformer::NAMES.contains(&name) {
            Self::crossformer(name, side)
        } else if name == NETWORK_IN_NETWORK {
            Self::network_in_network(side)
        } else if name == BLOCK {
            Self::block(side)
        } else if resnet::NAMES.contains(&name) {
            Self::resnet(name, side.unwrap_or(32))
        } else {
            Err(Error::Config(format!("model '{name}' is not one of {}", names().join(", "))))
        }
    }

    fn crossformer(name: &str, side: Option<usize>) -> Result<Self> {
        let mut config = CrossFormerConfig::named(name, 1000)?;
        config.img_size = side.map_or(config.img_size, |side| [side; 2]);
        let (image, channels, classes) = (config.img_size, config.in_chans, config.num_classes);
        let model = CrossFormer::new(config, 0, DType::F32)?;
        let products = model.cost()?.total().products;
        let optimizer = OptimizerConfig::default();
        Ok(Network { model: Box::new(model), image, channels, classes, products, optimizer })
    }

    /// With CIFAR-10's stem and classes for images below 64 × 64, with ImageNet's from there on.
    fn resnet(name: &str, side: usize) -> Result<Self> {
        let config = match side {
            ..64 => ResNetConfig::named(name, 10)?.with_cifar_stem(),
            _ => ResNetConfig::named(name, 1000)?,
        };
        let (image, channels, classes) = ([side; 2], config.in_channels, config.num_classes);
        let model = ResNet::new(config, 0, DType::F32)?;
        let (products, optimizer) = (model.products(image), OptimizerConfig::default());
        Ok(Network { model: Box::new(model), image, channels, classes, products, optimizer })
    }

    /// For grey images, as it is trained on MNIST.
    fn network_in_network(side: Option<usize>) -> Result<Self> {
        let (image, channels, classes) = ([side.unwrap_or(28); 2], 1, 10);
        let model = NetworkInNetwork::new(channels, classes, 0, DType::F32)?;
        let (products, optimizer) = (model.products(image), OptimizerConfig::default());
        Ok(Network { model: Box::new(model), image, channels, classes, products, optimizer })
    }

    /// A transformer block, for maps of the size that CrossFormer-S's first stage has.
    fn block(side: Option<usize>) -> Result<Self> {
        let image = [side.unwrap_or(56); 2];
        let (model, optimizer) = (Box::new(Block::new()?), OptimizerConfig::default());
        let (channels, classes, products) = (block::CHANNELS, block::CLASSES, Block::products(image));
        Ok(Network { model, image, channels, classes, products, optimizer })
    }

    /// Random images (batch, height, width, channels) in `dtype`.
    pub fn images(&self, batch: usize, dtype: DType, device: Device) -> Result<Tensor> {
        let shape = [batch, self.image[0], self.image[1], self.channels];
        Tensor::randn(shape, DType::F32, Philox::new(0).stream("images"))?.cast(dtype)?.to_device(device)
    }
}
