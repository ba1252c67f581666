//! First values of parameters, as PyTorch's `nn.init` defines them.

use crate::random::Philox;
use crate::tensor::Shape;
use crate::{DType, Result, Tensor};

/// The side of a layer that an initialiser keeps the variance of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fan {
    /// Inputs of one output unit.
    In,
    /// Outputs that one input unit reaches.
    Out,
}

/// A distribution of first values. Weights are (out, in, …kernel): fans count the kernel's positions.
///
/// ```
/// use gridgrad::DType;
/// use gridgrad::nn::{Fan, Initializer, Scope};
/// let he = Initializer::KaimingNormal { a: 0.0, fan: Fan::Out };
/// let weight = Scope::new(0, DType::F32).parameter("weight", [16, 3, 3, 3], he)?;
/// assert_eq!(weight.shape().elements(), 432);
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Initializer {
    /// One value everywhere.
    Constant(f64),
    /// Uniform in [low, high).
    Uniform(f64, f64),
    /// Normal with mean 0.
    Normal {
        /// Standard deviation.
        std: f64,
    },
    /// Normal with mean 0, drawn again until within ±`limit` (an absolute bound, as timm's `trunc_normal_`).
    TruncatedNormal {
        /// Standard deviation before truncation.
        std: f64,
        /// Largest magnitude.
        limit: f64,
    },
    /// Uniform in ±√(6 / ((1 + a²) fan)) (He et al. 2015). PyTorch's default for weights is a = √5, fan in, which is
    /// ±1/√fan.
    KaimingUniform {
        /// Negative slope of the activation that follows.
        a: f64,
        /// Which fan.
        fan: Fan,
    },
    /// Normal with deviation √(2 / ((1 + a²) fan)) (He et al. 2015).
    KaimingNormal {
        /// Negative slope of the activation that follows.
        a: f64,
        /// Which fan.
        fan: Fan,
    },
    /// Uniform in ±√(6 / (fan in + fan out)) (Glorot and Bengio 2010).
    XavierUniform,
    /// Normal with deviation √(2 / (fan in + fan out)) (Glorot and Bengio 2010).
    XavierNormal,
}

impl Initializer {
    /// PyTorch's default for the weights of linear and convolution layers.
    pub const DEFAULT: Initializer = Initializer::KaimingUniform { a: 2.236_067_977_499_79, fan: Fan::In };

    /// PyTorch's default for the bias of a layer with this weight: uniform in ±1/√(fan in).
    pub fn default_bias(weight: &Shape) -> Initializer {
        let bound = 1.0 / fan(weight, Fan::In).max(1.0).sqrt();
        Initializer::Uniform(-bound, bound)
    }

    /// Draws a tensor of `shape`: element i from number i of `stream`.
    ///
    /// # Errors
    /// Where the shape is too large for the address range.
    pub fn draw(self, shape: &Shape, dtype: DType, stream: Philox) -> Result<Tensor> {
        let gain = |a: f64| 2.0 / (1.0 + a * a);
        let both = fan(shape, Fan::In) + fan(shape, Fan::Out);
        let (normal, scale) = match self {
            Initializer::Constant(value) => return Tensor::full(shape, value, dtype),
            Initializer::Uniform(low, high) => return Tensor::uniform(shape, low, high, dtype, stream),
            Initializer::TruncatedNormal { std, limit } => {
                return Tensor::from_index(shape, dtype, |i| truncated(stream, i as u64, std, limit));
            }
            Initializer::Normal { std } => (true, std),
            Initializer::KaimingUniform { a, fan: side } => (false, (3.0 * gain(a) / fan(shape, side).max(1.0)).sqrt()),
            Initializer::KaimingNormal { a, fan: side } => (true, (gain(a) / fan(shape, side).max(1.0)).sqrt()),
            Initializer::XavierUniform => (false, (6.0 / both.max(1.0)).sqrt()),
            Initializer::XavierNormal => (true, (2.0 / both.max(1.0)).sqrt()),
        };
        if normal {
            Tensor::from_index(shape, dtype, |i| scale * stream.normal(i as u64))
        } else {
            Tensor::uniform(shape, -scale, scale, dtype, stream)
        }
    }
}

fn truncated(stream: Philox, index: u64, std: f64, limit: f64) -> f64 {
    // Numbers of the same index in streams of their own: a retry does not shift the elements that follow.
    const TRIES: u64 = 64;
    let draw =
        |attempt: u64| std * if attempt == 0 { stream.normal(index) } else { stream.fork(attempt).normal(index) };
    (0..TRIES).map(draw).find(|value| value.abs() <= limit).unwrap_or(0.0)
}

fn fan(shape: &Shape, side: Fan) -> f64 {
    let positions: usize = shape.iter().skip(2).product();
    let units = match side {
        Fan::In => shape.get(1).or(shape.first()),
        Fan::Out => shape.first(),
    };
    (units.copied().unwrap_or(1) * positions) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moments(initializer: Initializer, shape: [usize; 4]) -> (f64, f64) {
        let values = initializer.draw(&Shape::from(shape), DType::F64, Philox::new(1)).unwrap().to_f64_vec().unwrap();
        let deviation = (values.iter().map(|v| v * v).sum::<f64>() / values.len() as f64).sqrt();
        (deviation, values.iter().fold(0.0, |largest, v| v.abs().max(largest)))
    }

    #[test]
    fn distributions_have_their_published_spread() {
        let shape = [40, 30, 3, 3];
        let (fan_in, fan_out) = (270.0f64, 360.0f64);
        let (deviation, largest) = moments(Initializer::DEFAULT, shape);
        assert!(largest <= 1.0 / fan_in.sqrt() && (deviation - 1.0 / (3.0 * fan_in).sqrt()).abs() < 1e-3);
        let (deviation, _) = moments(Initializer::KaimingNormal { a: 0.0, fan: Fan::Out }, shape);
        assert!((deviation / (2.0 / fan_out).sqrt() - 1.0).abs() < 0.03);
        let (deviation, _) = moments(Initializer::XavierNormal, shape);
        assert!((deviation / (2.0 / (fan_in + fan_out)).sqrt() - 1.0).abs() < 0.03);
        let (deviation, largest) = moments(Initializer::TruncatedNormal { std: 1.0, limit: 1.0 }, shape);
        assert!(largest <= 1.0 && (deviation - 0.54).abs() < 0.02);
    }
}
