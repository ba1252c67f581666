//! The bucket of a sample, from its image alone.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// How an image's bytes become the number that, modulo `n`, is its bucket. The label plays no part, so that a flipped
/// label stays in its bucket. A certificate does not rest on collisions being hard to find: it lets the attacker choose
/// the bucket anyway.
///
/// ```
/// use gridgrad::methods::finite_aggregation::ContentHash;
/// assert_eq!(ContentHash::Fnv1a.of(b"a"), 0xaf63_dc4c_8601_ec8c);
/// assert_eq!("pixel-sum".parse::<ContentHash>()?.of(&[250, 10, 1]), 261);
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ContentHash {
    /// FNV-1a with 64 bits over the bytes, row by row, channels last (Fowler, Noll and Vo).
    #[default]
    Fnv1a,
    /// The sum of the bytes, as the published scripts have it. On small images it takes few values, and leaves many
    /// buckets empty.
    PixelSum,
}

impl ContentHash {
    /// The hash of an image's bytes, which are taken row by row, channels last.
    pub fn of(self, pixels: &[u8]) -> u64 {
        match self {
            ContentHash::Fnv1a => fnv1a(FNV_START, pixels),
            ContentHash::PixelSum => pixels.iter().map(|&pixel| u64::from(pixel)).sum(),
        }
    }
}

/// Where FNV-1a with 64 bits starts.
pub(super) const FNV_START: u64 = 0xcbf2_9ce4_8422_2325;

/// Goes on with FNV-1a from `state`.
pub(super) fn fnv1a(state: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(state, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

impl fmt::Display for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ContentHash::Fnv1a => "fnv1a",
            ContentHash::PixelSum => "pixel-sum",
        })
    }
}

impl FromStr for ContentHash {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let known = [ContentHash::Fnv1a, ContentHash::PixelSum];
        known
            .into_iter()
            .find(|hash| hash.to_string() == name)
            .ok_or_else(|| Error::Config(format!("hash {name:?} is not known; expected fnv1a or pixel-sum")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values_and_names() {
        assert_eq!(ContentHash::Fnv1a.of(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(ContentHash::Fnv1a.of(b"foobar"), 0x8594_4171_f739_67e8);
        assert_eq!(ContentHash::PixelSum.of(&[255; 1000]), 255_000);
        for hash in [ContentHash::Fnv1a, ContentHash::PixelSum] {
            assert_eq!(hash.to_string().parse::<ContentHash>().unwrap(), hash);
            assert_eq!(serde_json::to_value(hash).unwrap(), hash.to_string());
        }
        assert!("md5".parse::<ContentHash>().unwrap_err().to_string().contains("md5"));
    }
}
