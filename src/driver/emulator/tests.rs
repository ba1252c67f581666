//! The emulator catches what it says it catches: the kernels of kernels/emulator/faults.cu, one by one.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{Emulator, set_schedule};
use crate::driver::seam::{Address, Arguments, Driver, Geometry};
use crate::{Error, Result};

/// The schedule is one for the process: tests that set it must not overlap.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn emulator() -> Emulator {
    Emulator::new().unwrap()
}

fn upload<T: bytemuck::NoUninit>(emulator: &Emulator, values: &[T]) -> Address {
    let bytes: &[u8] = bytemuck::cast_slice(values);
    let address = emulator.allocate(bytes.len()).unwrap();
    emulator.upload(bytes, address).unwrap();
    address
}

fn download<T: bytemuck::Pod>(emulator: &Emulator, from: Address, count: usize) -> Vec<T> {
    let mut values = vec![T::zeroed(); count];
    emulator.download(from, bytemuck::cast_slice_mut(&mut values)).unwrap();
    values
}

macro_rules! arguments {
    ($($argument:expr),* $(,)?) => {{
        #[allow(unused_mut)]
        let mut arguments = Arguments::new();
        $(arguments.push($argument);)*
        arguments
    }};
}

fn run_shaped(emulator: &Emulator, kernel: &str, geometry: Geometry, arguments: &Arguments) -> Result<()> {
    let function = emulator.load("faults", kernel)?;
    // SAFETY: each test passes what its kernel takes, or what the emulator is to refuse.
    unsafe { emulator.launch(&function, geometry, arguments) }
}

fn run(emulator: &Emulator, kernel: &str, blocks: u32, threads: u32, arguments: Arguments) -> Result<()> {
    let geometry = Geometry { grid: [blocks, 1, 1], block: [threads, 1, 1], shared: 0 };
    run_shaped(emulator, kernel, geometry, &arguments)
}

/// A healthy kernel gives the right sum: run after every fault.
fn is_healthy(emulator: &Emulator) {
    let (blocks, count) = (13, 1037);
    let input: Vec<f32> = (0..blocks * count).map(|i| (i % 19) as f32 - 7.0).collect();
    let from = upload(emulator, &input);
    let to = emulator.allocate(4 * blocks).unwrap();
    run(emulator, "healthy_sum", blocks as u32, 96, arguments![to, from, count as u32]).unwrap();
    let expected: Vec<f32> = input.chunks(count).map(|row| row.iter().sum()).collect();
    assert_eq!(download::<f32>(emulator, to, blocks), expected);
    emulator.free(from, 4 * input.len());
    emulator.free(to, 4 * blocks);
    emulator.synchronize().unwrap();
}

/// Checks that the launch failed in words that hold all of `parts`, and that the emulator goes on.
#[track_caller]
fn assert_fault(emulator: &Emulator, result: Result<()>, kernel: &str, parts: &[&str]) {
    match result {
        Err(Error::Kernel { kernel: named, reason, .. }) => {
            assert_eq!(named, kernel);
            for part in parts {
                assert!(reason.contains(part), "'{part}' is not in '{reason}'");
            }
        }
        other => panic!("{kernel}: {other:?}"),
    }
    is_healthy(emulator);
}

#[test]
fn sums_of_odd_sizes_are_right_under_every_schedule() {
    let _alone = alone();
    let emulator = emulator();
    for (blocks, threads, count) in [(1, 32, 1), (5, 64, 31), (7, 96, 997), (3, 256, 255), (70, 1024, 1025)] {
        let input: Vec<f32> = (0..blocks * count).map(|i| ((i * 37) % 101) as f32 / 8.0).collect();
        let from = upload(&emulator, &input);
        let to = emulator.allocate(4 * blocks).unwrap();
        let mut first: Option<Vec<f32>> = None;
        for seed in 0..6 {
            set_schedule(seed);
            run(&emulator, "healthy_sum", blocks as u32, threads, arguments![to, from, count as u32]).unwrap();
            let sums: Vec<f32> = download(&emulator, to, blocks);
            for (sum, row) in sums.iter().zip(input.chunks(count)) {
                let expected: f64 = row.iter().map(|&x| f64::from(x)).sum();
                assert!((f64::from(*sum) - expected).abs() <= 1e-6 * expected, "{sum}, expected {expected}");
            }
            assert_eq!(first.get_or_insert(sums.clone()), &sums);
            emulator.recycle(to, 4 * blocks);
        }
        set_schedule(0);
    }
}

#[test]
fn collectives_give_what_cuda_says() {
    let _alone = alone();
    let emulator = emulator();
    let (grid, block) = ([2, 3, 2], [16, 2, 3]);
    let (blocks, threads) = (12u32, 96u32);
    let to = emulator.allocate((blocks * threads * 8 * 4) as usize).unwrap();
    for seed in [0, 1, 2, 3, 99] {
        set_schedule(seed);
        run_shaped(&emulator, "healthy_collectives", Geometry { grid, block, shared: 0 }, &arguments![to]).unwrap();
        let all: Vec<u32> = download(&emulator, to, (blocks * threads * 8) as usize);
        for (i, values) in all.chunks(8).enumerate() {
            let (thread, lane) = (i as u32 % threads, i as u32 % 32);
            let thirds = (0..32).filter(|lane| lane % 3 == 0).fold(0, |bits, lane| bits | 1u32 << lane);
            let halves = if lane < 16 { 8 * (lane / 2 * 2) + 4 } else { 1 };
            let expected = [
                lane / 8 * 8 + 3,
                if lane % 16 >= 2 { lane - 2 } else { lane },
                thirds,
                15,
                halves,
                2,
                (31 - lane).pow(2),
            ];
            assert_eq!(values[..7], expected, "thread {thread}, seed {seed}");
            assert_eq!(values[7], i as u32 / threads);
        }
    }
    set_schedule(0);
}

#[test]
fn parameters_arrive_as_passed_and_others_are_refused() {
    let emulator = emulator();
    let to = emulator.allocate(24).unwrap();
    run(&emulator, "parameters", 1, 1, arguments![to, 7u32, [1u32, 2, 3], 9.0f64, -1i32]).unwrap();
    assert_eq!(download::<u32>(&emulator, to, 6), [7, 1, 2, 3, 9, u32::MAX]);
    let result = run(&emulator, "parameters", 1, 1, arguments![to, 7u32, [1u32, 2], 9.0f64, -1i32]);
    assert_fault(&emulator, result, "parameters", &["[8, 4, 8, 8, 4]", "[8, 4, 12, 8, 4]"]);
    assert!(matches!(emulator.load("faults", "nothing"), Err(Error::Kernel { .. })));
    assert!(matches!(emulator.load("nothing", "faults"), Err(Error::Kernel { .. })));
    for (grid, block, shared) in
        [([0, 1, 1], [1; 3], 0), ([1; 3], [33, 32, 1], 0), ([1; 3], [32, 1, 1], 227 * 1024 + 1)]
    {
        let result = run_shaped(&emulator, "empty_kernel", Geometry { grid, block, shared }, &arguments![]);
        assert_fault(&emulator, result, "empty_kernel", &[]);
    }
}

#[test]
fn sixteen_bit_floats_round_as_ieee_says() {
    let emulator = emulator();
    let mut bits: Vec<u32> = (0..=u16::MAX).step_by(7).map(|i| u32::from(i) << 16 | 0x8000).collect();
    bits.extend((0u32..1 << 16).map(|i| i.wrapping_mul(0x9E37_79B9)));
    bits.extend([0, 0x8000_0000, 0x477F_EFFF, 0x477F_F000, 0x3300_0000, 0x3300_0001, 0x387F_E000, 0x7F7F_FFFF]);
    let input: Vec<f32> = bits.iter().map(|&bits| f32::from_bits(bits)).collect();
    let from = upload(&emulator, &input);
    let (to, back) = (emulator.allocate(4 * input.len()).unwrap(), emulator.allocate(8 * input.len()).unwrap());
    let blocks = (input.len() as u32).div_ceil(256);
    run(&emulator, "conversions", blocks, 256, arguments![to, back, from, input.len() as u32]).unwrap();
    let (bits, back): (Vec<u32>, Vec<f32>) =
        (download(&emulator, to, input.len()), download(&emulator, back, 2 * input.len()));
    for (i, &value) in input.iter().enumerate() {
        let (b, h) = (half::bf16::from_f32(value), half::f16::from_f32(value));
        if value.is_nan() {
            assert_eq!(bits[i], 0x7FFF_7FFF);
            assert!(back[2 * i].is_nan() && back[2 * i + 1].is_nan());
        } else {
            assert_eq!(bits[i], u32::from(b.to_bits()) << 16 | u32::from(h.to_bits()), "{value:e}");
            assert_eq!((back[2 * i], back[2 * i + 1]), (b.to_f32(), h.to_f32()));
        }
    }
}

#[test]
fn a_missing_barrier_changes_bits_between_schedules() {
    let _alone = alone();
    let emulator = emulator();
    let to = emulator.allocate(256).unwrap();
    let outputs: Vec<Vec<u32>> = (0..4)
        .map(|seed| {
            set_schedule(seed);
            run(&emulator, "missing_barrier", 1, 64, arguments![to]).unwrap();
            download(&emulator, to, 64)
        })
        .collect();
    set_schedule(0);
    assert!(outputs.iter().any(|output| *output != outputs[0]));
}

#[test]
fn threads_that_wait_in_vain_are_named() {
    let emulator = emulator();
    let result = run(&emulator, "divergent_barrier", 1, 64, arguments![]);
    let who = "24 threads from (40, 0, 0) on waiting for lanes 0xffffffff, kernels/emulator/faults.cu:";
    let parts = ["block (0, 0, 0), thread (40, 0, 0)", who, "40 threads from (0, 0, 0) on at the block's barrier"];
    assert_fault(&emulator, result, "divergent_barrier", &parts);
    let result = run(&emulator, "early_exit", 3, 64, arguments![]);
    assert_fault(&emulator, result, "early_exit", &["block (1, 0, 0), thread (5, 0, 0)", "thread (5, 0, 0) exited"]);
    let to = emulator.allocate(4 * 32).unwrap();
    let result = run(&emulator, "missing_lane", 1, 32, arguments![to]);
    assert_fault(&emulator, result, "missing_lane", &["thread (9, 0, 0) exited", "31 threads"]);
    let result = run(&emulator, "not_in_mask", 1, 32, arguments![]);
    assert_fault(&emulator, result, "not_in_mask", &["thread (3, 0, 0)", "0x00000001", "faults.cu:"]);
}

#[test]
fn misuse_of_shared_memory_is_caught() {
    let emulator = emulator();
    let to = emulator.allocate(4 * 32).unwrap();
    run(&emulator, "shared_index", 1, 32, arguments![to, 64u32]).unwrap();
    let result = run(&emulator, "shared_index", 1, 32, arguments![to, 65u32]);
    assert_fault(&emulator, result, "shared_index", &["thread (17, 0, 0)", "index 65 out of range", "faults.cu:"]);
    let result = run(&emulator, "static_limit", 1, 1, arguments![]);
    assert_fault(&emulator, result, "static_limit", &["320000 bytes of shared memory"]);
    for shared in [4096, 100] {
        let geometry = Geometry { grid: [1; 3], block: [32, 1, 1], shared };
        run_shaped(&emulator, "dynamic_overrun", geometry, &arguments![shared - 1]).unwrap();
        let result = run_shaped(&emulator, "dynamic_overrun", geometry, &arguments![shared]);
        let who = if shared % 128 == 0 { "thread (1, 0, 0)" } else { "block (0, 0, 0)" };
        assert_fault(&emulator, result, "dynamic_overrun", &[who, "behind the end of the dynamic shared memory"]);
    }
    let geometry = Geometry { grid: [1; 3], block: [1; 3], shared: 64 };
    let result = run_shaped(&emulator, "dynamic_underrun", geometry, &arguments![]);
    assert_fault(&emulator, result, "dynamic_underrun", &["before the start of the dynamic shared memory"]);
    run(&emulator, "unwritten_shared", 1, 32, arguments![to]).unwrap();
    let values: Vec<f32> = download(&emulator, to, 32);
    assert!(values.iter().enumerate().all(|(i, value)| value.is_nan() == (i == 4)));
}

#[test]
fn accesses_outside_buffers_are_caught() {
    let emulator = emulator();
    let (buffer, bytes) = (emulator.allocate(4096).unwrap(), 4096i64);
    let write = |index: i64| run(&emulator, "global_write", 5, 64, arguments![buffer, index as u64]);
    write(bytes / 4 - 1).unwrap();
    write(0).unwrap();
    let thread = "block (2, 0, 0), thread (33, 0, 0): ";
    let last = ", after its wait at kernels/emulator/faults.cu:";
    let end = "0 bytes behind the end of a buffer of 4096 bytes";
    assert_fault(&emulator, write(bytes / 4), "global_write", &[thread, last, end]);
    assert_fault(&emulator, write(-1), "global_write", &[thread, "4 bytes before the start of a buffer of 4096"]);
    let result = run(&emulator, "global_read", 1, 64, arguments![buffer, buffer, 1024u64]);
    assert_fault(&emulator, result, "global_read", &["thread (33, 0, 0): ", end]);
    let result = run(&emulator, "global_read", 1, 64, arguments![buffer, Address::NULL, 0u64]);
    assert_fault(&emulator, result, "global_read", &["thread (33, 0, 0): ", "0 bytes from a null pointer"]);
    // Freed memory is gone.
    emulator.free(buffer, 4096);
    assert_fault(&emulator, write(0), "global_write", &[thread]);
}

#[test]
fn writes_into_the_margins_are_caught() {
    let emulator = emulator();
    let buffer = emulator.allocate(20).unwrap();
    let write = |index: i64| run(&emulator, "global_write", 3, 64, arguments![buffer, index as u64]);
    assert_fault(&emulator, write(5), "global_write", &["behind the end of a buffer of 20 bytes"]);
    assert_fault(&emulator, write(-1), "global_write", &["before the start of a buffer of 20 bytes"]);
    // Too far for the look after each launch; found when the memory is checked whole.
    write(-100).unwrap();
    assert!(matches!(emulator.synchronize(), Err(Error::Gpu { call: "synchronize", .. })));
    emulator.synchronize().unwrap();
    write(-100).unwrap();
    emulator.free(buffer, 20);
    assert!(matches!(emulator.synchronize(), Err(Error::Gpu { .. })));
    emulator.free(buffer, 20);
    assert!(emulator.allocate(16).is_ok());
    assert!(emulator.synchronize().is_err(), "freed twice");
    is_healthy(&emulator);
}

#[test]
fn misaligned_vectors_overflows_and_full_stacks_are_caught() {
    let emulator = emulator();
    let (to, from) = (emulator.allocate(64).unwrap(), emulator.allocate(64).unwrap());
    let result = run(&emulator, "misaligned", 1, 32, arguments![to, from]);
    assert_fault(&emulator, result, "misaligned", &["thread (2, 0, 0)", "misaligned", "multiple of 16", "faults.cu:"]);
    let result = run(&emulator, "divide", 1, 1, arguments![to, 0i32]);
    assert_fault(&emulator, result, "divide", &["division by zero", "faults.cu:"]);
    run(&emulator, "stack_overflow", 1, 1, arguments![to, 20u32]).unwrap();
    let result = run(&emulator, "stack_overflow", 1, 1, arguments![to, 200u32]);
    assert_fault(&emulator, result, "stack_overflow", &["stack overflow"]);
}

#[test]
fn ranges_of_transfers_are_checked() {
    let emulator = emulator();
    let buffer = emulator.allocate(100).unwrap();
    assert_eq!(download::<u8>(&emulator, buffer, 100), [0xFF; 100]);
    emulator.upload(&[1; 40], buffer.offset(60)).unwrap();
    assert!(emulator.upload(&[1; 41], buffer.offset(60)).is_err());
    assert!(emulator.download(Address(buffer.0 - 1), &mut [0; 2]).is_err());
    assert!(emulator.copy(buffer, buffer.offset(1), 100).is_err());
    assert!(emulator.fill(Address::NULL, 0, 1).is_err());
    emulator.copy(buffer.offset(60), buffer, 40).unwrap();
    emulator.fill(buffer.offset(40), 2, 20).unwrap();
    assert_eq!(download::<u8>(&emulator, buffer, 100), [[1; 20], [1; 20], [2; 20], [1; 20], [1; 20]].concat());
    emulator.recycle(buffer, 100);
    assert_eq!(download::<u8>(&emulator, buffer, 100), [0xFF; 100]);
}

#[test]
fn memory_has_an_end() {
    let emulator = emulator();
    emulator.set_memory_limit(1000);
    let buffer = emulator.allocate(600).unwrap();
    match emulator.allocate(401) {
        Err(Error::OutOfDeviceMemory { requested: 401, free: 400, total: 1000, .. }) => {}
        other => panic!("{other:?}"),
    }
    emulator.free(buffer, 600);
    emulator.allocate(1000).unwrap();
    let counters = emulator.counters();
    assert_eq!((counters.live, counters.bytes, counters.allocations), (1, 1000, 2));
}

#[test]
fn recordings_run_again_and_refuse_what_cannot_be_recorded() {
    let emulator = emulator();
    let input = upload(&emulator, &[1.0f32; 64]);
    let (sum, copy) = (emulator.allocate(4).unwrap(), emulator.allocate(4).unwrap());
    emulator.begin_capture().unwrap();
    assert!(emulator.begin_capture().is_err());
    run(&emulator, "healthy_sum", 1, 32, arguments![sum, input, 64u32]).unwrap();
    emulator.copy(sum, copy, 4).unwrap();
    emulator.fill(sum, 0, 4).unwrap();
    let graph = emulator.end_capture().unwrap();
    assert!(download::<f32>(&emulator, copy, 1)[0].is_nan(), "a recording runs nothing");
    for value in [1.0f32, 3.0] {
        emulator.upload(bytemuck::cast_slice(&[value; 64]), input).unwrap();
        graph.launch().unwrap();
        assert_eq!(download::<f32>(&emulator, copy, 1), [64.0 * value]);
        assert_eq!(download::<f32>(&emulator, sum, 1), [0.0]);
    }
    emulator.begin_capture().unwrap();
    assert!(emulator.allocate(4).is_err());
    assert!(emulator.synchronize().is_err());
    match emulator.end_capture().map(|_| ()) {
        Err(Error::Gpu { call: "end_capture", reason, .. }) => assert!(reason.contains("allocate"), "{reason}"),
        other => panic!("{other:?}"),
    }
    assert!(emulator.end_capture().is_err());
    emulator.synchronize().unwrap();
}

#[test]
fn launches_from_inside_rayon_tasks_do_not_disturb_each_other() {
    use rayon::prelude::*;
    let emulator = emulator();
    (0..16).into_par_iter().for_each(|_| is_healthy(&emulator));
}
