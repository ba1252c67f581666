//! Memory, kernels and recordings on an emulator of their own.

use super::*;
use crate::driver::emulator::Emulator;
use crate::tensor::{DType, Tensor};

/// A device with so many bytes, which no other test uses.
fn device(bytes: usize) -> &'static Gpu {
    let emulator = Emulator::new().unwrap();
    emulator.set_memory_limit(bytes);
    Box::leak(Box::new(Gpu::new(Box::new(emulator))))
}

#[test]
fn freed_memory_is_handed_out_again() {
    let gpu = device(1 << 20);
    let first = gpu.allocate(1000).unwrap();
    let address = first.address();
    drop(first);
    assert_eq!(gpu.memory_stats(), MemoryStats { live: 0, peak: 1000, cached: 1000, allocations: 1 });
    let second = gpu.allocate(1000).unwrap();
    assert_eq!(second.address(), address);
    let third = gpu.allocate(24).unwrap();
    assert_eq!(gpu.memory_stats(), MemoryStats { live: 1024, peak: 1024, cached: 0, allocations: 2 });
    drop((second, third));
    gpu.release_cached();
    gpu.reset_peak();
    assert_eq!(gpu.memory_stats(), MemoryStats { live: 0, peak: 0, cached: 0, allocations: 2 });
}

#[test]
fn a_full_device_gives_back_what_is_cached_and_then_says_so() {
    let gpu = device(4096);
    drop(gpu.allocate(3000).unwrap());
    // Fits only once the cached block is given back.
    let large = gpu.allocate(2000).unwrap();
    let error = gpu.allocate(2500).unwrap_err();
    assert!(matches!(error, Error::OutOfDeviceMemory { requested: 2500, total: 4096, .. }), "{error}");
    assert!(error.to_string().contains("use a smaller batch"), "{error}");
    drop(large);
    gpu.allocate(2500).unwrap();
}

#[test]
fn a_kernel_that_is_not_as_it_is_called_is_refused() {
    let gpu = device(1 << 20);
    let geometry = Geometry::blocks(1, 32);
    let wrong: Kernel<(u32, u32)> = Kernel::new("softmax", "softmax_forward", FLOATS);
    let message = wrong.launch(gpu, "f32", geometry, (0, 0)).unwrap_err().to_string();
    assert!(message.contains("softmax_forward_f32") && message.contains("[4, 4]"), "{message}");
    let message = wrong.launch(gpu, "f64", geometry, (0, 0)).unwrap_err().to_string();
    assert!(message.contains("is not made for f64; there is f32, bf16, f16"), "{message}");
    let missing: Kernel<(u32,)> = Kernel::new("softmax", "no_such_kernel", &[]);
    assert!(missing.launch(gpu, "", geometry, (0,)).unwrap_err().to_string().contains("no_such_kernel"));
    let missing: Kernel<(u32,)> = Kernel::new("no_such_module", "kernel", &[]);
    assert!(missing.launch(gpu, "", geometry, (0,)).unwrap_err().to_string().contains("no_such_module"));
}

/// `y + y` into fresh memory.
fn doubled(y: &Tensor) -> Tensor {
    y.add(y).unwrap()
}

#[test]
fn a_recording_keeps_its_memory_and_reads_what_is_there_when_it_is_repeated() {
    let gpu = device(1 << 20);
    let on_device = |values: &[f32]| {
        let memory = gpu.upload(bytemuck::cast_slice(values)).unwrap();
        let tensor = Tensor::empty_on(gpu, [values.len()], DType::F32).unwrap();
        tensor.memory().unwrap().copy_from(&memory).unwrap();
        tensor
    };
    let input = on_device(&[1.0, 2.0, 3.0]);
    // The pool must hold what the recording needs.
    drop(doubled(&doubled(&input)));
    let (captured, output) = gpu.capture(|| Ok(doubled(&doubled(&input)))).unwrap().unwrap();
    captured.launch().unwrap();
    assert_eq!(output.to_vec::<f32>().unwrap(), [4.0, 8.0, 12.0]);
    // Other work of the same size must not be given the recording's memory.
    let others: Vec<Tensor> = (0..4).map(|_| on_device(&[7.0, 7.0, 7.0])).collect();
    input.memory().unwrap().write(bytemuck::cast_slice(&[10.0f32, 20.0, 30.0])).unwrap();
    captured.launch().unwrap();
    assert_eq!(output.to_vec::<f32>().unwrap(), [40.0, 80.0, 120.0]);
    assert!(others.iter().all(|other| other.to_vec::<f32>().unwrap() == [7.0; 3]));
    let before = gpu.memory_stats().cached;
    drop(captured);
    assert!(gpu.memory_stats().cached > before);
}

#[test]
fn what_cannot_be_recorded_is_refused_and_the_device_goes_on() {
    let gpu = device(1 << 20);
    let input = gpu.allocate(12).unwrap();
    input.fill(0).unwrap();
    let error = gpu.capture(|| input.read(&mut [0; 12])).map(drop).unwrap_err().to_string();
    assert!(error.contains("record"), "{error}");
    let mut error = None;
    let captured =
        gpu.capture(|| gpu.allocate(100_000).map(drop).inspect_err(|refusal| error = Some(refusal.to_string())));
    assert!(captured.unwrap().is_none());
    assert!(error.unwrap().contains("no block of 100000 bytes"));
    let nested = gpu.capture(|| gpu.capture(|| Ok(())).map(drop)).map(drop).unwrap_err().to_string();
    assert!(nested.contains("under way"), "{nested}");
    let mut bytes = [1; 12];
    input.read(&mut bytes).unwrap();
    assert_eq!(bytes, [0; 12]);
}

#[test]
fn what_other_threads_do_waits_for_the_end_of_a_recording_and_is_not_in_it() {
    let gpu = device(1 << 20);
    let (recorded, other) = (gpu.upload(&[0; 8]).unwrap(), gpu.upload(&[0; 8]).unwrap());
    let value = |memory: &Memory| {
        let mut bytes = [0; 8];
        memory.read(&mut bytes).unwrap();
        bytes[0]
    };
    let captured = std::thread::scope(|scope| {
        let captured = gpu.capture(|| {
            let (started, starts) = std::sync::mpsc::channel();
            let other = &other;
            scope.spawn(move || {
                started.send(()).unwrap();
                other.fill(2).unwrap();
                drop(gpu.allocate(50_000).unwrap());
                assert_eq!(value(other), 2);
            });
            starts.recv().unwrap();
            std::thread::sleep(std::time::Duration::from_millis(20));
            recorded.fill(1)
        });
        captured.unwrap().unwrap().0
    });
    assert_eq!((value(&recorded), value(&other)), (0, 2));
    other.fill(3).unwrap();
    captured.launch().unwrap();
    assert_eq!((value(&recorded), value(&other)), (1, 3));
}
