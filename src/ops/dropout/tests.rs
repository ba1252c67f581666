//! What only the crate can see: streams whose number a kernel reads from device memory.

use super::{drop_path, dropout};
use crate::gpu::Gpu;
use crate::random::Philox;
use crate::{DType, Device, Result, Tensor};

const SHAPE: [usize; 3] = [7, 5, 11];

fn bits(tensor: &Tensor) -> Vec<u8> {
    tensor.to_device(Device::Cpu).unwrap().raw_bytes().unwrap().to_vec()
}

/// Compares the results of `host` on the processor with those of `device` on the emulator.
fn compare(host: Philox, device: Philox) {
    for dtype in [DType::F32, DType::Bf16, DType::F16] {
        let input = Tensor::randn(SHAPE, dtype, Philox::new(3)).unwrap();
        let moved = input.to_device(Device::Emulated).unwrap();
        for p in [0.1, 0.5] {
            for op in [dropout as fn(&Tensor, f64, Philox) -> Result<Tensor>, drop_path] {
                assert!(bits(&op(&input, p, host).unwrap()) == bits(&op(&moved, p, device).unwrap()), "{dtype} {p}");
            }
        }
    }
}

#[test]
fn the_processor_and_the_emulator_make_the_same_masks() {
    let stream = Philox::new(0x1234_5678_9abc_def0).stream("dropout").fork(u64::MAX);
    compare(stream, stream);
}

#[test]
fn a_stream_in_a_cell_is_the_one_that_the_cell_names() {
    let gpu = Gpu::open(Device::Emulated).unwrap();
    let root = Philox::new(5).stream("training");
    let cell = gpu.upload(&root.fork(0).state().1.to_ne_bytes()).unwrap();
    let recorded = root.fork(0).in_cell(cell.address());
    for step in [0, 1, 1 << 40] {
        let current = root.fork(step);
        cell.write(&current.state().1.to_ne_bytes()).unwrap();
        compare(current, recorded);
        compare(current.fork(7), recorded.fork(7));
        compare(current.stream("layer").fork(2).fork(9), recorded.stream("layer").fork(2).fork(9));
    }
    // Deeper than an argument holds: by value.
    let deep = |stream: Philox| stream.fork(1).fork(2).fork(3).fork(4);
    compare(deep(root.fork(0)), deep(recorded));
}
