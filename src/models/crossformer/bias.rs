//! Where attention gets its position bias from.

use std::sync::{Mutex, PoisonError};

use super::config::{CrossFormerConfig, PositionBias};
use super::layers::{LINEAR, linear};
use crate::autograd::records;
use crate::gpu::Gpu;
use crate::nn::{LayerNorm, Linear, Parameter, Scope};
use crate::ops::position_bias::{Affine, BiasLayer, PositionBiasNetwork, dynamic_position_biases};
use crate::{DType, Error, Result, Tensor};

/// Where the bias of attention scores comes from.
pub(super) enum BiasSource {
    None,
    /// A table for groups of one size.
    Table {
        table: Parameter,
        group: usize,
    },
    Network(Box<BiasNetwork>),
}

pub(super) struct BiasNetwork {
    projection: Linear,
    layers: [(LayerNorm, Linear); 3],
    residual: bool,
    eps: f64,
}

fn affine(weight: &Parameter, bias: Option<&Parameter>) -> Result<Affine> {
    let missing = || Error::Config(format!("{} has no bias", weight.name()));
    Ok(Affine { weight: weight.tensor(), bias: bias.ok_or_else(missing)?.tensor() })
}

impl BiasNetwork {
    fn new(scope: &Scope, channels: usize, heads: usize, residual: bool, eps: f64) -> Result<Self> {
        // A sixteenth: the official module is made with a quarter of the channels and takes a quarter of that.
        let width = channels / 4 / 4;
        let layer = |name: &str, out: usize| -> Result<(LayerNorm, Linear)> {
            let scope = scope.child(name);
            Ok((LayerNorm::new(&scope.child(0), width, eps)?, linear(&scope.child(2), width, out, true)?))
        };
        Ok(BiasNetwork {
            projection: linear(&scope.child("pos_proj"), 2, width, true)?,
            layers: [layer("pos1", width)?, layer("pos2", width)?, layer("pos3", heads)?],
            residual,
            eps,
        })
    }

    /// Of every parameter, a number that changes with it.
    fn versions(&self) -> impl Iterator<Item = u64> {
        let norms = self.layers.iter().flat_map(|(norm, _)| [&norm.weight, &norm.bias]);
        let linears = self.layers.iter().map(|(_, linear)| linear).chain([&self.projection]);
        let linears = linears.flat_map(|linear| std::iter::once(&linear.weight).chain(&linear.bias));
        norms.chain(linears).map(Parameter::version)
    }

    /// The network as the op takes it.
    fn present(&self) -> Result<PositionBiasNetwork> {
        let layer = |(norm, linear): &(LayerNorm, Linear)| -> Result<BiasLayer> {
            Ok(BiasLayer {
                norm: affine(&norm.weight, Some(&norm.bias))?,
                linear: affine(&linear.weight, linear.bias.as_ref())?,
            })
        };
        let [first, second, third] = &self.layers;
        Ok(PositionBiasNetwork {
            projection: affine(&self.projection.weight, self.projection.bias.as_ref())?,
            layers: [layer(first)?, layer(second)?, layer(third)?],
            residual: self.residual,
            eps: self.eps,
        })
    }
}

impl BiasSource {
    pub fn new(scope: &Scope, config: &CrossFormerConfig, stage: usize, block: usize) -> Result<Self> {
        let (channels, heads) = (config.channels(stage), config.num_heads[stage]);
        let network = |residual| -> Result<Self> {
            let network = BiasNetwork::new(&scope.child("pos"), channels, heads, residual, config.layer_norm_eps)?;
            Ok(BiasSource::Network(Box::new(network)))
        };
        match config.position_bias {
            PositionBias::Dynamic => network(false),
            PositionBias::DynamicResidual => network(true),
            PositionBias::Absolute | PositionBias::None => Ok(BiasSource::None),
            PositionBias::Relative => {
                let group = config.block_group_size(stage, block);
                let shape = [(2 * group - 1) * (2 * group - 1), heads];
                let table = scope.parameter("relative_position_bias_table", shape, LINEAR)?;
                Ok(BiasSource::Table { table, group })
            }
        }
    }

    fn network(&self) -> Option<&BiasNetwork> {
        match self {
            BiasSource::Network(network) => Some(network),
            BiasSource::None | BiasSource::Table { .. } => None,
        }
    }

    /// The learned table for groups of `group` tokens; none of a network.
    fn learned(&self, [gh, gw]: [usize; 2], dtype: DType) -> Result<Option<Tensor>> {
        let BiasSource::Table { table, group } = self else { return Ok(None) };
        let side = 2 * group - 1;
        if gh > *group || gw > *group {
            let message = format!("a group of {gh}×{gw} with a relative position bias learned for {group}×{group}");
            return Err(Error::Config(message));
        }
        // The table of a smaller group is the centre of that of a larger one.
        let table = table.tensor();
        let heads = table.shape()[1];
        let centre = table.reshape([side, side, heads])?.narrow(0, group - gh, 2 * gh - 1)?;
        let centre = centre.narrow(1, group - gw, 2 * gw - 1)?;
        centre.reshape([(2 * gh - 1) * (2 * gw - 1), heads])?.cast(dtype).map(Some)
    }
}

/// The bias tables of a stage's blocks, made together. Where no gradients are recorded, those of networks are kept until
/// a parameter changes or others are asked for.
#[derive(Default)]
pub(super) struct StageBias(Mutex<Option<Kept>>);

struct Kept {
    key: Key,
    tables: Vec<Tensor>,
}

/// Whatever tables depend on.
#[derive(PartialEq)]
struct Key {
    groups: Vec<[usize; 2]>,
    dtype: DType,
    versions: Vec<u64>,
    /// Repeated recordings change parameters without asking them.
    replays: u64,
}

impl StageBias {
    /// The tables of blocks with these sources for groups of these sizes, in `dtype`. They are small, so they are
    /// computed in the parameters' own.
    pub fn tables(&self, sources: &[&BiasSource], groups: &[[usize; 2]], dtype: DType) -> Result<Vec<Option<Tensor>>> {
        // A stage's blocks are of one kind.
        match sources.iter().map(|source| source.network()).collect::<Option<Vec<_>>>() {
            None => sources.iter().zip(groups).map(|(source, &group)| source.learned(group, dtype)).collect(),
            Some(networks) => Ok(self.of_networks(&networks, groups, dtype)?.into_iter().map(Some).collect()),
        }
    }

    fn of_networks(&self, networks: &[&BiasNetwork], groups: &[[usize; 2]], dtype: DType) -> Result<Vec<Tensor>> {
        // Versions before values: a change in between makes the tables newer than their key, never older.
        let versions = networks.iter().flat_map(|network| network.versions()).collect();
        let key = Key { groups: groups.to_vec(), dtype, versions, replays: crate::gpu::replays() };
        let present = networks.iter().map(|network| network.present()).collect::<Result<Vec<_>>>()?;
        let recorded = present.iter().any(|network| records(&network.tensors()));
        let gpu = present.first().and_then(|network| network.projection.weight.gpu());
        // What a recording reads must be computed in it: parameters may be others when it is repeated.
        let may_keep = !recorded && !gpu.is_some_and(Gpu::is_recording);
        let compute = || {
            let pairs: Vec<_> = present.iter().zip(groups.iter().copied()).collect();
            dynamic_position_biases(&pairs, dtype)
        };
        if !may_keep {
            return compute();
        }
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kept) = kept.as_ref().filter(|kept| kept.key == key) {
            return Ok(kept.tables.clone());
        }
        let tables = compute()?;
        *kept = Some(Kept { key, tables: tables.clone() });
        Ok(tables)
    }
}
