//! Element types.

use half::{bf16, f16};

/// The type of a tensor's elements.
///
/// ```
/// use gridgrad::DType;
/// assert_eq!("bf16".parse::<DType>()?, DType::Bf16);
/// assert_eq!((DType::Bf16.size(), DType::I64.is_float()), (2, false));
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// 32-bit floating point, the default.
    F32,
    /// 64-bit floating point, for references and gradient checks; on the processor only.
    F64,
    /// bfloat16, with the range of `f32`. Ops sum in `f32` and round their results once.
    Bf16,
    /// IEEE half precision. Ops sum in `f32` and round their results once.
    F16,
    /// Indices and class labels.
    I64,
    /// Pixels and masks.
    U8,
}

impl DType {
    /// Bytes per element.
    pub fn size(self) -> usize {
        match self {
            DType::F64 | DType::I64 => 8,
            DType::F32 => 4,
            DType::Bf16 | DType::F16 => 2,
            DType::U8 => 1,
        }
    }

    /// The name, as in `f32`.
    pub fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F64 => "f64",
            DType::Bf16 => "bf16",
            DType::F16 => "f16",
            DType::I64 => "i64",
            DType::U8 => "u8",
        }
    }

    /// Whether values are floating point, and so can carry gradients.
    pub fn is_float(self) -> bool {
        !matches!(self, DType::I64 | DType::U8)
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for DType {
    type Err = crate::Error;

    fn from_str(name: &str) -> crate::Result<Self> {
        [DType::F32, DType::F64, DType::Bf16, DType::F16, DType::I64, DType::U8]
            .into_iter()
            .find(|dtype| dtype.to_string() == name)
            .ok_or_else(|| crate::Error::Config(format!("dtype '{name}' is not one of f32, f64, bf16, f16, i64, u8")))
    }
}

/// A Rust type that tensors can hold.
pub trait Element: bytemuck::Pod + Send + Sync + PartialEq + std::fmt::Debug + 'static {
    /// The matching [`DType`].
    const DTYPE: DType;
    /// The value as `f64`, exact where `f64` can hold it.
    fn to_f64(self) -> f64;
    /// The nearest value to `value`; integers truncate and saturate.
    fn from_f64(value: f64) -> Self;
}

macro_rules! element {
    ($type:ty, $dtype:ident, $value:ident => $to:expr, $from:expr) => {
        impl Element for $type {
            const DTYPE: DType = DType::$dtype;
            #[inline(always)]
            fn to_f64(self) -> f64 {
                let $value = self;
                $to
            }
            #[inline(always)]
            fn from_f64($value: f64) -> Self {
                $from
            }
        }
    };
}

element!(f32, F32, v => f64::from(v), v as f32);
element!(f64, F64, v => v, v);
element!(bf16, Bf16, v => f64::from(v), bf16::from_f64(v));
element!(f16, F16, v => f64::from(v), f16::from_f64(v));
element!(i64, I64, v => v as f64, v as i64);
element!(u8, U8, v => f64::from(v), v as u8);
