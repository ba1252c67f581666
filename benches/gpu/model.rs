//! The static model: what the kernels of an op move and compute, by the formulas of their rooms, and how long a card takes
//! for that at least.

use gridgrad::kernels::{Cost, Work, cost};
use gridgrad::{DType, Error, Result};
use serde::Serialize;

use crate::shapes::{Case, Op};

/// Which pass over an op.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    Forward,
    Backward,
}

impl Direction {
    pub const BOTH: [Direction; 2] = [Direction::Forward, Direction::Backward];

    pub fn name(self) -> &'static str {
        match self {
            Direction::Forward => "forward",
            Direction::Backward => "backward",
        }
    }
}

/// What a card does at most in a second.
#[derive(Clone, Copy, Debug)]
pub struct Roofs {
    pub bytes: f64,
    /// Of matrix products in 2-byte types.
    pub products: f64,
    /// Of everything else, in `f32`.
    pub flops: f64,
}

/// An H200: a copy and a dense product in bf16 as measured beforehand, `f32` as published.
pub const H200: Roofs = Roofs { bytes: 4.3e12, products: 790e12, flops: 67e12 };

/// One launch with its work.
#[derive(Clone, Debug)]
pub struct Launch {
    #[allow(dead_code, reason = "the static model prints it")]
    pub kernel: &'static str,
    pub work: Work,
    pub products: bool,
}

impl Launch {
    /// Seconds that memory and arithmetic take, each alone.
    pub fn times(&self, roofs: Roofs, dtype: DType) -> [f64; 2] {
        let peak = if self.products && dtype != DType::F32 { roofs.products } else { roofs.flops };
        [self.work.bytes / roofs.bytes, self.work.flops / peak]
    }

    /// The longer of the two.
    pub fn time(&self, roofs: Roofs, dtype: DType) -> f64 {
        let [memory, arithmetic] = self.times(roofs, dtype);
        memory.max(arithmetic)
    }
}

/// Work of all launches, and the least time of one after the other.
pub fn total(launches: &[Launch], roofs: Roofs, dtype: DType) -> (Work, f64) {
    let work = launches.iter().fold(Work::default(), |sum, launch| sum + launch.work);
    (work, launches.iter().map(|launch| launch.time(roofs, dtype)).sum())
}

/// Blocks that split reductions aim at, as a round number for all rooms; what they add is small.
const SPLIT: f64 = 256.0;

/// The launches of an op, as the rooms make them for a GPU.
pub fn launches(case: &Case, direction: Direction, dtype: DType) -> Result<Vec<Launch>> {
    let batch = case.batch as f64;
    let mut extents: Vec<(&str, f64)> = vec![("s", dtype.size() as f64)];
    let forward = direction == Direction::Forward;
    let kernels: &[&str] = match &case.op {
        Op::CrossScaleEmbedding { map, channels, sides, out, stride, image } => {
            let channels = *channels as f64;
            let area = |map: [usize; 2]| (map[0] * map[1]) as f64 * batch;
            let positions = area([map[0] / stride, map[1] / stride]);
            let weights: usize = sides.iter().zip(out).map(|(side, out)| side * side * out).sum();
            extents.extend([("pixels", area(*map)), ("channels", channels), ("positions", positions)]);
            extents.extend([("out", out.iter().sum::<usize>() as f64), ("weights", weights as f64 * channels)]);
            extents.extend([("stored", dtype.size() as f64), ("maps", 1.0)]);
            // The weights' gradient: units of 64 terms by 32 columns, 16 in a block, and blocks for the bias.
            let terms = |side: usize| ((side * side) as f64 * channels / 64.0).ceil() as usize;
            let units = sides.iter().zip(out).map(|(&side, &out)| terms(side) * out.div_ceil(32));
            let out: usize = out.iter().sum();
            let blocks = units.map(|units| units.div_ceil(16)).sum::<usize>() + out.div_ceil(32);
            extents.push(("parts", (positions / 512.0).min(512.0 / blocks as f64).ceil().max(1.0)));
            extents.push(("sums", weights as f64 * channels + out as f64));
            match (forward, image) {
                (true, _) => &["cross_scale_embedding_pack", "cross_scale_embedding_forward"],
                (false, true) => &["cross_scale_embedding_weight_gradient", "cross_scale_embedding_add_parts"],
                (false, false) => &[
                    "cross_scale_embedding_turn_weights",
                    "cross_scale_embedding_input_gradient",
                    "cross_scale_embedding_weight_gradient",
                    "cross_scale_embedding_add_parts",
                ],
            }
        }
        Op::Lsda { map, heads, head_width, group, .. } => {
            let tokens = (map[0] * map[1]) as f64 * batch;
            let table = ((2 * group[0] - 1) * (2 * group[1] - 1)) as f64;
            extents.extend([("tokens", tokens), ("heads", *heads as f64), ("d", *head_width as f64)]);
            extents.extend([("group", (group[0] * group[1]) as f64), ("table", table)]);
            extents.push(("blocks", (tokens / (group[0] * group[1]) as f64).min(SPLIT)));
            if forward { &["lsda_forward"] } else { &["lsda_backward", "lsda_table_gradient"] }
        }
        Op::PositionBias { groups, width, heads } => {
            let kernel = if forward { "position_bias_forward" } else { "position_bias_backward" };
            let units = [*width as f64, *heads as f64];
            let mut work = Work::default();
            for &group in groups {
                work = work + bias_network(kernel, group, units, dtype)?;
            }
            return Ok(vec![Launch { kernel, work, products: false }]);
        }
        Op::LayerNorm { rows, width } => {
            extents.extend([("rows", *rows as f64 * batch), ("width", *width as f64), ("parts", SPLIT)]);
            if forward { &["layer_norm_forward"] } else { &["layer_norm_backward", "layer_norm_finish"] }
        }
        Op::LinearGelu { rows, input, output } => {
            return linear_gelu([batch * *rows as f64, *input as f64, *output as f64], forward, dtype);
        }
        Op::Softmax { rows, width } => {
            extents.extend([("rows", *rows as f64 * batch), ("width", *width as f64)]);
            if forward { &["softmax_forward"] } else { &["softmax_backward"] }
        }
        Op::MaxPool { map, channels } => {
            let elements = |map: [usize; 2]| (map[0] * map[1] * channels) as f64 * batch;
            extents.extend([("input", elements(*map)), ("output", elements(map.map(|extent| extent.div_ceil(2))))]);
            extents.push(("taps", 9.0));
            if forward { &["max_pool"] } else { &["max_pool_scatter"] }
        }
        Op::BatchNorm { map, channels } => {
            extents.extend([("rows", (map[0] * map[1]) as f64 * batch), ("channels", *channels as f64)]);
            extents.push(("parts", SPLIT));
            if forward {
                &["batch_norm_partial_statistics", "batch_norm_finish_statistics", "batch_norm_apply"]
            } else {
                &["batch_norm_partial_sums", "batch_norm_finish_sums", "batch_norm_input_gradient"]
            }
        }
    };
    kernels.iter().map(|kernel| launch(kernel, &extents)).collect()
}

/// One network's part of the launch for all of a stage. Its parameters are `f32` in any case.
fn bias_network(kernel: &'static str, group: [usize; 2], [p, heads]: [f64; 2], dtype: DType) -> Result<Work> {
    let rows = ((2 * group[0] - 1) * (2 * group[1] - 1)) as f64;
    let parameters = 3.0 * p + 6.0 * p + 2.0 * (p * p + p) + heads * p + heads;
    let sizes = [("s", dtype.size() as f64), ("stored", DType::F32.size() as f64), ("parameters", parameters)];
    let extents = [("networks", 1.0), ("rows", rows), ("p", p), ("heads", heads)];
    let blocks = ("blocks", (rows / 8.0).ceil().min(64.0));
    launch(kernel, &[&sizes[..], &extents, &[blocks]].concat()).map(|launch| launch.work)
}

/// The product with the GELU behind it, which keeps what went in; backward that of the GELU and two products.
fn linear_gelu([rows, input, output]: [f64; 3], forward: bool, dtype: DType) -> Result<Vec<Launch>> {
    let s = ("s", dtype.size() as f64);
    let product = |m: f64, n: f64, k: f64| launch("matmul_large", &[s, ("batch", 1.0), ("m", m), ("n", n), ("k", k)]);
    if forward {
        let mut product = product(rows, output, input)?;
        product.work.bytes += rows * output * s.1;
        return Ok(vec![product]);
    }
    let gelu = launch("linear_gelu_backward", &[s, ("rows", rows), ("columns", output), ("parts", SPLIT)])?;
    Ok(vec![gelu, product(rows, input, output)?, product(output, input, rows)?])
}

fn launch(kernel: &'static str, extents: &[(&str, f64)]) -> Result<Launch> {
    let cost: Cost = cost(kernel).ok_or_else(|| Error::Config(format!("no kernel {kernel}")))?;
    Ok(Launch { kernel, work: cost.work(extents)?, products: cost.products })
}
