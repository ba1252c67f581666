//! Bytes through a table for each channel: the kernel `look_up_bytes`.

use std::fmt;

use gridgrad::ops::look_up_bytes;
use gridgrad::random::Philox;
use gridgrad::{DType, Error, Result, Tensor};

use crate::harness::{Derivatives, OpCase, Work, check, check_on_device, randn, test_device};

/// Bytes of this shape, channels last.
#[derive(Debug)]
struct LookUp(Vec<usize>);

impl LookUp {
    fn channels(&self) -> usize {
        *self.0.last().unwrap()
    }
}

impl fmt::Display for LookUp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

fn random_bytes(shape: &[usize]) -> Tensor {
    Tensor::from_index(shape, DType::U8, |i| f64::from(Philox::new(3).bits(i as u64) % 256)).unwrap()
}

impl OpCase for LookUp {
    fn inputs(&self) -> Vec<Tensor> {
        vec![random_bytes(&self.0), randn(&[self.channels(), 256], 0)]
    }

    fn run(&self, inputs: &[Tensor]) -> Result<Tensor> {
        look_up_bytes(&inputs[0], &inputs[1])
    }

    fn reference(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        let value = |(i, &byte): (usize, &f64)| inputs[1][i % self.channels() * 256 + byte as usize];
        inputs[0].iter().enumerate().map(value).collect()
    }

    fn work(&self) -> Work {
        Work { bytes: 5 * self.0.iter().product::<usize>() as u64, flops: 0 }
    }

    fn derivatives(&self) -> Derivatives {
        Derivatives::None
    }
}

fn case(shape: &[usize]) -> Box<dyn OpCase> {
    Box::new(LookUp(shape.to_vec()))
}

pub fn benchmarks() -> Vec<Box<dyn OpCase>> {
    vec![case(&[32, 224, 224, 3]), case(&[256, 28, 28, 1])]
}

#[test]
fn values_are_those_of_the_table() {
    check(&[
        case(&[1]),
        case(&[3]),
        case(&[32]),
        case(&[5, 1]),
        case(&[2, 3, 5, 3]),
        case(&[1, 7, 11, 4]),
        case(&[4, 32, 32, 1]),
        case(&[0, 4, 4, 3]),
    ]);
}

/// A block's tile is 4096 bytes, of which a thread takes 16 in parts of 4 or 8; at most 24 blocks stride over the tiles.
#[test]
fn kernels_reach_the_ends_of_their_tiles() {
    for shape in [[4096, 1], [4097, 1], [1365, 3], [1366, 3], [98_311, 1], [40_961, 3], [20_483, 5], [7001, 31]] {
        check_on_device(&*case(&shape));
    }
}

#[test]
fn halves_have_the_bits_of_a_cast() {
    // All bytes in all channels, and values that half precision rounds, overflows on and cannot hold normally.
    let bytes = Tensor::from_index([256, 3], DType::U8, |i| (i / 3) as f64).unwrap();
    let extremes = [f32::NAN, f32::INFINITY, -0.0, 1e-7, -3e-8, 65519.9, 65520.0, 3.4e38, 1.003_906_4];
    let value = |i: usize| if i < 9 { extremes[i] } else { Philox::new(4).normal(i as u64) as f32 };
    let table = Tensor::new(&Vec::from_iter((0..768).map(value)), [3, 256]).unwrap();
    for device in [Some(gridgrad::Device::Cpu), test_device()].into_iter().flatten() {
        let (bytes, table) = (bytes.to_device(device).unwrap(), table.to_device(device).unwrap());
        let floats = look_up_bytes(&bytes, &table).unwrap();
        for dtype in [DType::F32, DType::Bf16, DType::F16] {
            let bits = |tensor: Tensor| tensor.to_device(gridgrad::Device::Cpu).unwrap().raw_bytes().unwrap().to_vec();
            let direct = look_up_bytes(&bytes, &table.cast(dtype).unwrap()).unwrap();
            assert_eq!(direct.dtype(), dtype);
            assert!(bits(direct) == bits(floats.cast(dtype).unwrap()), "{dtype} on {device}");
        }
    }
}

#[test]
fn bad_arguments_are_errors() {
    let (bytes, table) = (random_bytes(&[2, 3, 3]), randn(&[3, 256], 0));
    let refused = |bytes: &Tensor, table: &Tensor| look_up_bytes(bytes, table).unwrap_err();
    assert!(matches!(refused(&table, &table), Error::DType { .. }));
    assert!(matches!(refused(&bytes, &bytes), Error::DType { .. }));
    assert!(matches!(refused(&bytes, &table.cast(DType::I64).unwrap()), Error::DType { .. }));
    for shape in [&[1, 256][..], &[256, 3], &[3, 255], &[3, 257], &[768], &[3, 256, 1], &[0, 256], &[]] {
        let message = refused(&bytes, &Tensor::zeros(shape, DType::F32).unwrap()).to_string();
        assert!(message.contains("expected (3, 256)"), "{message}");
    }
    for shape in [&[][..], &[2, 0], &[2, 33]] {
        let table = Tensor::zeros([shape.last().copied().unwrap_or(1), 256], DType::F32).unwrap();
        let message = refused(&Tensor::zeros(shape, DType::U8).unwrap(), &table).to_string();
        assert!(message.contains("1 to 32 channels"), "{message}");
    }
    let Some(device) = test_device() else { return };
    let table = table.cast(DType::F32).unwrap();
    assert!(matches!(refused(&bytes.to_device(device).unwrap(), &table), Error::DeviceMismatch { .. }));
}
