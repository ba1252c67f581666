//! Named tensors in safetensors files.
//!
//! ```
//! use gridgrad::nn::state_dict::{self, Metadata, StateDict};
//! use gridgrad::{DType, Tensor};
//! let folder = tempfile::tempdir().unwrap();
//! let path = folder.path().join("weights.safetensors");
//! let state = StateDict::from([("fc.weight".to_owned(), Tensor::ones([2, 3], DType::F32)?)]);
//! state_dict::write(&path, &state, Metadata::new())?;
//! let (state, _) = state_dict::read(&path)?;
//! assert_eq!(state["fc.weight"].shape().to_vec(), [2, 3]);
//! # Ok::<(), gridgrad::Error>(())
//! ```

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use crate::file::write_atomically;
use crate::{DType, Device, Error, Result, Tensor};

/// Tensors by name, sorted.
pub type StateDict = BTreeMap<String, Tensor>;

/// Strings that a safetensors file carries beside its tensors.
pub type Metadata = HashMap<String, String>;

/// Reads a safetensors file: its tensors and its metadata.
///
/// # Errors
/// Where the file cannot be read, is damaged, or holds a dtype that has no counterpart here.
pub fn read(path: impl AsRef<Path>) -> Result<(StateDict, Metadata)> {
    let path = path.as_ref();
    let bytes = std::fs::read(path).map_err(|error| Error::io(path, error))?;
    parse(&bytes, path)
}

/// Reads the content of a safetensors file; `path` is for errors.
///
/// # Errors
/// As [`read`].
pub fn parse(bytes: &[u8], path: &Path) -> Result<(StateDict, Metadata)> {
    let damaged = |error: safetensors::SafeTensorError| Error::format(path, format!("not a safetensors file: {error}"));
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(damaged)?;
    let file = SafeTensors::deserialize(bytes).map_err(damaged)?;
    let mut state = StateDict::new();
    for (name, view) in file.tensors() {
        let dtype = match view.dtype() {
            Dtype::F32 => DType::F32,
            Dtype::F64 => DType::F64,
            Dtype::BF16 => DType::Bf16,
            Dtype::F16 => DType::F16,
            Dtype::I64 => DType::I64,
            Dtype::U8 => DType::U8,
            Dtype::I32 => {
                let values: Vec<i64> =
                    view.data().as_chunks().0.iter().map(|b| i32::from_le_bytes(*b).into()).collect();
                state.insert(name, Tensor::new(&values, view.shape())?);
                continue;
            }
            other => return Err(Error::format(path, format!("tensor {name} has dtype {other:?}, which is not known"))),
        };
        state.insert(name, Tensor::from_raw_bytes(view.data(), view.shape(), dtype)?);
    }
    Ok((state, header.metadata().clone().unwrap_or_default()))
}

/// Writes a safetensors file, whole or not at all: to a temporary file in the same folder, which then takes the name.
///
/// # Errors
/// Where the system refuses, a full disk included; an existing file is then untouched.
pub fn write(path: impl AsRef<Path>, state: &StateDict, metadata: Metadata) -> Result<()> {
    let path = path.as_ref();
    write_atomically(path, &to_bytes(path, state, metadata)?)
}

/// The content of a safetensors file; `path` is for errors. With at most one key of metadata, equal tensors give equal
/// bytes.
///
/// # Errors
/// Where a tensor cannot be copied to the host.
pub fn to_bytes(path: &Path, state: &StateDict, metadata: Metadata) -> Result<Vec<u8>> {
    let on_host = state.iter().map(|(name, tensor)| Ok((name, tensor.to_device(Device::Cpu)?)));
    let on_host = on_host.collect::<Result<Vec<_>>>()?;
    let views = on_host.iter().map(|(name, tensor)| Ok((name, view(tensor, path)?))).collect::<Result<Vec<_>>>()?;
    safetensors::serialize(views, Some(metadata))
        .map_err(|error| Error::format(path, format!("cannot be written as safetensors: {error}")))
}

fn view<'a>(tensor: &'a Tensor, path: &Path) -> Result<TensorView<'a>> {
    let dtype = match tensor.dtype() {
        DType::F32 => Dtype::F32,
        DType::F64 => Dtype::F64,
        DType::Bf16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        DType::I64 => Dtype::I64,
        DType::U8 => Dtype::U8,
    };
    TensorView::new(dtype, tensor.shape().to_vec(), tensor.raw_bytes()?)
        .map_err(|error| Error::format(path, format!("cannot be written as safetensors: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_round_trip_and_damage_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.safetensors");
        let mut state = StateDict::new();
        for (name, dtype) in [("a", DType::F32), ("b", DType::Bf16), ("c", DType::I64), ("d", DType::F64)] {
            state.insert(name.into(), Tensor::from_index([2, 3], dtype, |i| i as f64).unwrap());
        }
        write(&path, &state, Metadata::from([("step".into(), "3".into())])).unwrap();
        let (read_back, metadata) = read(&path).unwrap();
        assert_eq!(metadata["step"], "3");
        for (name, tensor) in &state {
            assert_eq!(tensor.raw_bytes().unwrap(), read_back[name].raw_bytes().unwrap());
            assert_eq!((tensor.dtype(), tensor.shape()), (read_back[name].dtype(), read_back[name].shape()));
        }
        let bytes = std::fs::read(&path).unwrap();
        for len in 0..bytes.len() {
            let error = parse(&bytes[..len], &path).unwrap_err().to_string();
            assert!(error.contains("state.safetensors"), "{error}");
        }
        assert!(read(folder.path().join("absent")).unwrap_err().to_string().contains("absent"));
    }
}
