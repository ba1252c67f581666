//! Damaged and hostile files: whatever arrives, a parser returns a value or an error that names the file.

use std::path::Path;
use std::sync::OnceLock;

use gridgrad::models::CrossFormerConfig;
use gridgrad::nn::StateDict;
use gridgrad::nn::state_dict::{self, Metadata};
use gridgrad::train::{Checkpoint, Progress};
use gridgrad::{DType, Tensor};
use proptest::prelude::*;
use serde_json::{Value, json};

const FILE: &str = "hostile.safetensors";

fn sound_tensors() -> StateDict {
    let dtypes = [DType::F32, DType::F64, DType::Bf16, DType::F16, DType::I64, DType::U8];
    let tensor = |(n, dtype): (usize, DType)| {
        (format!("tensor.{n}"), Tensor::from_index([n + 1, 3], dtype, |i| i as f64).unwrap())
    };
    dtypes.into_iter().enumerate().map(tensor).collect()
}

/// A state dict's file and a checkpoint's.
fn sound_files() -> &'static (Vec<u8>, Vec<u8>) {
    static FILES: OnceLock<(Vec<u8>, Vec<u8>)> = OnceLock::new();
    FILES.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let (weights, checkpoint) = (folder.path().join("weights"), folder.path().join("checkpoint"));
        let state = sound_tensors();
        state_dict::write(&weights, &state, Metadata::new()).unwrap();
        let progress = Progress { step: 3, config: json!({ "lr": 0.1 }), ..Progress::default() };
        Checkpoint { progress, model: state.clone(), optimizer: state, ema: None }.write(&checkpoint).unwrap();
        (std::fs::read(weights).unwrap(), std::fs::read(checkpoint).unwrap())
    })
}

/// What a writer with bad intent or a bad disk does to a file.
#[derive(Clone, Debug)]
enum Damage {
    Flip(Vec<prop::sample::Index>),
    Overwrite(prop::sample::Index, Vec<u8>),
    Insert(prop::sample::Index, Vec<u8>),
    Remove(prop::sample::Index, usize),
    Repeat(prop::sample::Index, usize),
}

impl Damage {
    fn apply(&self, mut bytes: Vec<u8>) -> Vec<u8> {
        match self {
            Damage::Flip(bits) => bits.iter().for_each(|bit| {
                let bit = bit.index(8 * bytes.len());
                bytes[bit / 8] ^= 1 << (bit % 8);
            }),
            Damage::Overwrite(at, by) => {
                let at = at.index(bytes.len());
                bytes[at..].iter_mut().zip(by).for_each(|(byte, by)| *byte = *by);
            }
            Damage::Insert(at, more) => {
                let at = at.index(bytes.len());
                bytes.splice(at..at, more.iter().copied());
            }
            Damage::Remove(at, len) => {
                let at = at.index(bytes.len());
                bytes.drain(at..(at + len).min(bytes.len()));
            }
            Damage::Repeat(at, len) => {
                let at = at.index(bytes.len());
                let piece = bytes[at..(at + len).min(bytes.len())].to_vec();
                bytes.splice(at..at, piece);
            }
        }
        bytes
    }
}

fn damage() -> impl Strategy<Value = Damage> {
    let at = any::<prop::sample::Index>;
    let some = || prop::collection::vec(any::<u8>(), 1..64);
    prop_oneof![
        prop::collection::vec(at(), 1..4).prop_map(Damage::Flip),
        (at(), some()).prop_map(|(at, by)| Damage::Overwrite(at, by)),
        (at(), some()).prop_map(|(at, more)| Damage::Insert(at, more)),
        (at(), 1usize..300).prop_map(|(at, len)| Damage::Remove(at, len)),
        (at(), 1usize..300).prop_map(|(at, len)| Damage::Repeat(at, len)),
    ]
}

/// Parses; an error names the file, and no more is held than the file has.
fn survives(bytes: &[u8]) -> Result<(), TestCaseError> {
    match state_dict::parse(bytes, Path::new(FILE)) {
        Ok((tensors, _)) => {
            let held: usize = tensors.values().map(|tensor| tensor.raw_bytes().unwrap().len()).sum();
            prop_assert!(held <= 2 * bytes.len(), "{} bytes from {}", held, bytes.len());
        }
        Err(error) => prop_assert!(error.to_string().contains(FILE), "{}", error),
    }
    Ok(())
}

/// A file with this header and these many bytes behind it.
fn with_header(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 1);
    bytes
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (0u8..40).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "\\PC{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 12, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::btree_map("[a-z]{1,4}", inner, 0..3)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

/// Numbers and lists near those that make sense, where the comparisons between parameters are.
fn near_json() -> impl Strategy<Value = Value> {
    let number = || prop_oneof![0u64..20, Just(1 << 16), Just(1 << 24), Just(1 << 40), Just(u64::MAX)];
    prop_oneof![
        number().prop_map(Value::from),
        prop::collection::vec(number(), 0..6).prop_map(Value::from),
        prop::collection::vec(prop::collection::vec(number(), 0..4), 0..4).prop_map(Value::from),
        prop::collection::vec(-9.0f64..9.0, 0..6).prop_map(Value::from),
        any_json(),
    ]
}

const KEYS: [&str; 27] = [
    "model",
    "kind",
    "in_chans",
    "img_size",
    "num_classes",
    "embed_dim",
    "depths",
    "num_heads",
    "group_size",
    "interval",
    "mlp_ratio",
    "patch_kernels",
    "patch_stride",
    "merge_kernels",
    "merge_stride",
    "qkv_bias",
    "layer_norm_eps",
    "use_acl",
    "adaptive_interval",
    "pad_type",
    "no_mask",
    "drop_path_rate",
    "attn_drop_rate",
    "group_type",
    "attention",
    "position_bias",
    "surprise",
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn random_bytes_are_no_safetensors(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
        survives(&bytes)?;
    }

    #[test]
    fn damaged_safetensors_are_read_or_refused(damage in damage()) {
        survives(&damage.apply(sound_files().0.clone()))?;
    }

    #[test]
    fn headers_that_claim_anything_are_read_or_refused(
        dtype in prop::sample::select(vec!["F32", "F64", "I32", "I64", "U8", "BOOL", "BF16", "F4", "none"]),
        shape in prop::collection::vec(prop_oneof![0u64..4, Just(1 << 32), Just(u64::MAX)], 0..12),
        begin in prop_oneof![0u64..40, any::<u64>()],
        len in prop_oneof![0u64..40, any::<u64>()],
    ) {
        let entry = json!({ "dtype": dtype, "shape": shape, "data_offsets": [begin, begin.wrapping_add(len)] });
        survives(&with_header(&json!({ "a": entry }).to_string(), 36))?;
    }

    #[test]
    fn any_json_is_a_configuration_or_an_error(key in prop::sample::select(&KEYS[..]), value in any_json()) {
        let _ = serde_json::from_value::<CrossFormerConfig>(json!({ key: value }));
    }

    #[test]
    fn likely_json_is_a_configuration_that_validates_or_an_error(
        entries in prop::collection::vec((prop::sample::select(&KEYS[..]), near_json()), 1..4),
    ) {
        let object: serde_json::Map<String, Value> =
            entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        if let Ok(config) = serde_json::from_value::<CrossFormerConfig>(Value::Object(object)) {
            prop_assert!(config.validate().is_ok());
            let [height, width] = config.img_size;
            for (stage, map) in config.stage_maps(height, width).unwrap().into_iter().enumerate() {
                config.block_grouping(stage, 0, map);
            }
            let again: CrossFormerConfig = serde_json::from_value(serde_json::to_value(&config).unwrap()).unwrap();
            prop_assert_eq!(again, config);
        }
    }

    #[test]
    fn damaged_checkpoints_are_refused(damage in damage()) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE);
        let sound = &sound_files().1;
        let damaged = damage.apply(sound.clone());
        std::fs::write(&path, &damaged).unwrap();
        match Checkpoint::read(&path) {
            Ok(_) => prop_assert!(damaged == *sound, "damage went unnoticed"),
            Err(error) => prop_assert!(error.to_string().contains(FILE), "{}", error),
        }
    }
}
