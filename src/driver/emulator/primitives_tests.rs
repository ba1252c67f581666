//! The device code that kernels share (kernels/common/), against plain arithmetic, under several orders of the threads.

use bytemuck::Pod;
use half::{bf16, f16};

use super::{Emulator, set_schedule};
use crate::Result;
use crate::driver::seam::{Address, Arguments, Driver, Geometry};
use crate::random::Philox;

/// An emulated device, and what a kernel needs to run on it.
struct Machine(Emulator);

impl Machine {
    fn new(schedule: u64) -> Self {
        set_schedule(schedule);
        Machine(Emulator::new().unwrap())
    }

    fn upload<T: Pod>(&self, values: &[T]) -> Address {
        let bytes = bytemuck::cast_slice(values);
        let address = self.0.allocate(bytes.len()).unwrap();
        self.0.upload(bytes, address).unwrap();
        address
    }

    fn output<T>(&self, len: usize) -> Address {
        self.0.allocate(len * size_of::<T>()).unwrap()
    }

    fn download<T: Pod>(&self, address: Address, len: usize) -> Vec<T> {
        let mut values = vec![T::zeroed(); len];
        self.0.download(address, bytemuck::cast_slice_mut(&mut values)).unwrap();
        values
    }

    fn launch(&self, kernel: &str, geometry: Geometry, push: impl FnOnce(&mut Arguments)) -> Result<()> {
        let mut arguments = Arguments::new();
        push(&mut arguments);
        let function = self.0.load("primitives", kernel)?;
        assert_eq!(arguments.sizes().collect::<Vec<_>>(), function.parameters, "{kernel}");
        #[allow(unsafe_code, reason = "launches are")]
        // SAFETY: the arguments' number and sizes are the kernel's, and each test passes what its kernel documents.
        unsafe {
            self.0.launch(&function, geometry, &arguments)
        }
    }
}

fn line(blocks: u32, threads: u32) -> Geometry {
    Geometry { grid: [blocks, 1, 1], block: [threads, 1, 1], shared: 0 }
}

/// What `run` gives under every order, which must not depend on it.
fn under_every_schedule<T: Pod>(run: impl Fn(&Machine) -> Vec<T>) -> Vec<T> {
    let [first, second, third] = [0, 1, 2].map(|schedule| run(&Machine::new(schedule)));
    let bytes = |values: &[T]| bytemuck::cast_slice::<T, u8>(values).to_vec();
    assert!(bytes(&first) == bytes(&second) && bytes(&first) == bytes(&third), "bits depend on the schedule");
    first
}

fn numbers(name: &str, len: usize) -> Vec<f32> {
    let stream = Philox::new(11).stream(name);
    (0..len as u64).map(|i| stream.normal(i) as f32).collect()
}

fn to_bf16(x: f32) -> f32 {
    bf16::from_f32(x).to_f32()
}

fn to_f16(x: f32) -> f32 {
    f16::from_f32(x).to_f32()
}

/// Ten bits of mantissa, ties away from zero.
fn to_tf32(x: f32) -> f32 {
    f32::from_bits((x.to_bits() + 0x1000) & !0x1FFF)
}

/// `c + Σ a b`, in the order of k, each step rounded once.
fn dot(c: f32, terms: impl Iterator<Item = (f32, f32)>) -> f32 {
    terms.fold(c, |sum, (a, b)| a.mul_add(b, sum))
}

#[test]
fn tensor_core_products_are_those_of_their_tiles() {
    let cases: [(&str, usize, fn(f32) -> f32); 3] =
        [("mma_bf16", 16, to_bf16), ("mma_f16", 16, to_f16), ("mma_tf32", 8, to_tf32)];
    for (kernel, depth, round) in cases {
        let (a, b, c) = (numbers("a", 16 * depth), numbers("b", depth * 8), numbers("c", 128));
        let d = under_every_schedule(|machine| {
            let output = machine.output::<f32>(128);
            let addresses = [output, machine.upload(&a), machine.upload(&b), machine.upload(&c)];
            machine
                .launch(kernel, line(1, 32), |arguments| {
                    addresses.into_iter().for_each(|address| arguments.push(address));
                })
                .unwrap();
            machine.download::<f32>(output, 128)
        });
        for (i, &d) in d.iter().enumerate() {
            let (row, column) = (i / 8, i % 8);
            let terms = (0..depth).map(|k| (round(a[row * depth + k]), round(b[k * 8 + column])));
            assert_eq!(d, dot(c[i], terms), "{kernel} ({row}, {column})");
        }
    }
}

#[test]
fn matrices_load_as_the_instruction_set_says() {
    let stream = Philox::new(5);
    let matrices: Vec<u16> = (0..256).map(|i| stream.bits(i) as u16).collect();
    let registers = under_every_schedule(|machine| {
        let (output, input) = (machine.output::<u32>(13 * 32), machine.upload(&matrices));
        machine
            .launch("matrix_loads", line(1, 32), |arguments| {
                arguments.push(output);
                arguments.push(input);
            })
            .unwrap();
        machine.download::<u32>(output, 13 * 32)
    });
    let element = |matrix: usize, row: usize, column: usize| u32::from(matrices[matrix * 64 + row * 8 + column]);
    for lane in 0..32 {
        let (group, pair) = (lane / 4, lane % 4 * 2);
        let plain = |matrix| element(matrix, group, pair) | element(matrix, group, pair + 1) << 16;
        let transposed = |matrix| element(matrix, pair, group) | element(matrix, pair + 1, group) << 16;
        let expected = [
            [0, 1, 2, 3].map(plain).as_slice(),
            &[0, 1, 2, 3].map(transposed),
            &[0, 1].map(plain),
            &[0, 1].map(transposed),
            &[transposed(0)],
        ]
        .concat();
        for (register, expected) in expected.into_iter().enumerate() {
            assert_eq!(registers[register * 32 + lane], expected, "register {register} of lane {lane}");
        }
    }
}

fn reduce(input: &[f32]) -> Vec<f32> {
    let threads = input.len();
    under_every_schedule(|machine| {
        let (output, input) = (machine.output::<f32>(threads * 11), machine.upload(input));
        machine
            .launch("reductions", line(1, threads as u32), |arguments| {
                arguments.push(output);
                arguments.push(input);
            })
            .unwrap();
        machine.download(output, threads * 11)
    })
}

/// The sum by halves that lanes compute.
fn tree(values: &[f32]) -> f32 {
    if let [value] = values { *value } else { tree(&interleave(values, 0)) + tree(&interleave(values, 1)) }
}

/// Every second value, from `first` on.
fn interleave(values: &[f32], first: usize) -> Vec<f32> {
    values.iter().skip(first).step_by(2).copied().collect()
}

fn largest(values: &[f32]) -> f32 {
    values.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}

#[test]
fn reductions_are_those_of_warps_and_blocks() {
    for threads in [32, 96, 256, 1024] {
        let mut input = numbers("reductions", threads);
        input[7] = 9.5; // twice the largest of its warp: the first counts
        input[21] = 9.5;
        let wide = || input.iter().map(|&x| f64::from(x));
        let sum: f64 = wide().sum();
        let rounding = wide().map(f64::abs).sum::<f64>() * f64::from(f32::EPSILON);
        let sample: Vec<f64> = wide().enumerate().flat_map(|(i, x)| (0..i % 3).map(move |j| x + j as f64)).collect();
        let mean = sample.iter().sum::<f64>() / sample.len() as f64;
        let variance = sample.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / sample.len() as f64;
        let all = reduce(&input);
        for (thread, output) in all.chunks_exact(11).enumerate() {
            let group = |width: usize| &input[thread / width * width..][..width];
            assert_eq!(output[0], tree(group(32)));
            assert_eq!(output[1], tree(group(4)));
            assert_eq!(output[2], largest(group(16)));
            assert_eq!(output[3], largest(group(32)));
            let index = group(32).iter().position(|&x| x == output[3]).unwrap() + thread / 32 * 32;
            assert_eq!(output[4], index as f32);
            assert!((f64::from(output[5]) - sum).abs() <= 10.0 * rounding);
            assert_eq!(output[6], largest(&input));
            assert!((f64::from(output[7]) - sum).abs() <= sum.abs() * f64::from(f32::EPSILON));
            assert!((f64::from(output[8]) - mean).abs() <= 1e-5, "{} {mean}", output[8]);
            assert!((f64::from(output[9]) - variance).abs() <= 1e-5 * variance, "{} {variance}", output[9]);
            // Terms of 1e8 that cancel: a plain f32 sum keeps multiples of 8.
            assert!((f64::from(output[10]) - sum).abs() <= 1e-3, "{} {sum}", output[10]);
            assert_eq!(output[5..], all[5..11], "every thread has the block's results");
        }
    }
}

#[test]
fn reductions_show_what_is_not_a_number() {
    let mut input = numbers("reductions", 64);
    input[4] = f32::NAN;
    input[10] = f32::NAN;
    for (thread, output) in reduce(&input).chunks_exact(11).enumerate() {
        assert_eq!(output[3].is_nan(), thread < 32);
        assert!(thread >= 32 || output[4] == 4.0);
        assert_eq!(output[2].is_nan(), thread < 16);
        assert!(output[5].is_nan() && output[6].is_nan() && output[8].is_nan());
    }
}

#[test]
fn random_numbers_are_those_of_the_host() {
    let stream = Philox::new(0x0123_4567_89AB_CDEF).stream("kernels");
    let (key, number) = stream.state();
    let (count, forks) = (300, [5, u64::MAX, 1 << 40]);
    for (depth, in_memory, first) in [(0, false, 0), (1, true, 3), (2, false, (1 << 34) - 7), (3, true, u64::MAX - 400)]
    {
        let expected = forks[..depth].iter().fold(stream, |stream, &index| stream.fork(index));
        let words = under_every_schedule(|machine| {
            let (bits, uniform) = (machine.output::<u32>(count), machine.output::<f32>(count));
            // Where the number is in memory, the one in the arguments does not count.
            let (cell, number) = if in_memory { (machine.upload(&[number]), 99) } else { (Address::NULL, number) };
            machine
                .launch("random_numbers", line(2, 64), |arguments| {
                    arguments.push(bits);
                    arguments.push(uniform);
                    arguments.push([key, number, cell.0, depth as u64, forks[0], forks[1], forks[2]]);
                    arguments.push(first);
                    arguments.push(count as u32);
                })
                .unwrap();
            [machine.download::<u32>(bits, count), machine.download(uniform, count)].concat()
        });
        for i in 0..count {
            let index = first + i as u64;
            assert_eq!(words[i], expected.bits(index), "depth {depth}, number {index}");
            assert_eq!(f32::from_bits(words[count + i]), expected.uniform(index));
        }
    }
}

/// Values of a type that kernels store.
trait Storage: Pod + PartialEq + std::fmt::Debug {
    const SUFFIX: &str;
    fn round(x: f32) -> Self;
    fn widen(self) -> f32;
}

macro_rules! storage {
    ($type:ty, $suffix:literal, $round:expr, $widen:expr) => {
        impl Storage for $type {
            const SUFFIX: &str = $suffix;
            fn round(x: f32) -> Self {
                $round(x)
            }
            fn widen(self) -> f32 {
                $widen(self)
            }
        }
    };
}
storage!(f32, "f32", |x| x, |x| x);
storage!(bf16, "bf16", bf16::from_f32, bf16::to_f32);
storage!(f16, "f16", f16::from_f32, f16::to_f32);

fn check_vectors<T: Storage>() {
    for count in [1, 7, 8, 61, 250] {
        let input: Vec<T> = numbers("vectors", count).into_iter().map(T::round).collect();
        let output = under_every_schedule(|machine| {
            let (doubled, copied) = (machine.output::<T>(count), machine.output::<T>(count));
            let input = machine.upload(&input);
            machine
                .launch(&format!("vectors_{}", T::SUFFIX), line(1, 32), |arguments| {
                    [doubled, copied, input].into_iter().for_each(|address| arguments.push(address));
                    arguments.push(count as u64);
                })
                .unwrap();
            [machine.download::<T>(doubled, count), machine.download(copied, count)].concat()
        });
        for (i, &x) in input.iter().enumerate() {
            assert_eq!(output[i], T::round(x.widen() * 2.0 + 1.0), "{} {i} of {count}", T::SUFFIX);
            assert_eq!(output[count + i], x);
        }
    }
}

#[test]
fn vectors_move_all_elements_and_no_more() {
    check_vectors::<f32>();
    check_vectors::<bf16>();
    check_vectors::<f16>();
}

#[test]
fn asynchronous_copies_arrive_with_zeros_behind_them() {
    let stream = Philox::new(6);
    let input: Vec<u32> = (0..128).map(|i| stream.bits(i)).collect();
    for valid in [0, 3, 5, 8, 15, 16] {
        let output = under_every_schedule(|machine| {
            let (output, input) = (machine.output::<u32>(384), machine.upload(&input));
            machine
                .launch("async_copies", line(1, 32), |arguments| {
                    arguments.push(output);
                    arguments.push(input);
                    arguments.push(valid as u32);
                })
                .unwrap();
            machine.download::<u32>(output, 384)
        });
        for lane in 0..32 {
            let mut bytes: [u8; 16] = bytemuck::cast_slice(&input[(lane + 1) % 32 * 4..][..4]).try_into().unwrap();
            bytes[valid..].fill(0);
            let words: [u32; 4] = bytemuck::cast(bytes);
            assert_eq!(output[lane * 4..][..4], words, "16 bytes, {valid} valid");
            assert_eq!(output[128 + lane * 4..][..4], [words[0], words[1], 7, 7], "8 bytes, {valid} valid");
            assert_eq!(output[256 + lane * 4..][..4], [7, input[(lane + 1) % 32 * 4 + 1], 7, 7]);
        }
    }
}

#[test]
fn an_asynchronous_copy_that_nobody_waits_for_shows() {
    let input: Vec<u32> = (0..32).collect();
    // Twice on one machine: what the first run leaves under way must not reach the second.
    let machine = Machine::new(0);
    for _ in 0..2 {
        let (output, from) = (machine.output::<u32>(64), machine.upload(&input));
        machine
            .launch("async_copy_unwaited", line(1, 32), |arguments| {
                arguments.push(output);
                arguments.push(from);
            })
            .unwrap();
        assert_eq!(machine.download::<u32>(output, 64), [input.clone(), vec![u32::MAX; 32]].concat());
    }
}

#[test]
fn a_misaligned_asynchronous_copy_is_reported() {
    let machine = Machine::new(0);
    let input = machine.upload(&[0u32; 132]);
    let error = machine.launch("async_copy_misaligned", line(1, 32), |arguments| arguments.push(input)).unwrap_err();
    let report = error.to_string();
    assert!(report.contains("misaligned") && report.contains("async_copy"), "{report}");
}

/// A kernel of a main loop: its tile, and what it takes.
struct Product {
    kernel: &'static str,
    /// Rows, columns and depth of the tile.
    tile: [usize; 3],
    threads: u32,
    shared: u32,
    /// Elements to whose multiples the strides are rounded.
    run: usize,
}

fn tensor(kernel: &'static str, tile: [usize; 3], threads: u32, stages: usize, run: usize) -> Product {
    let shared = stages * (tile[0] + tile[1]) * tile[2] * 2;
    Product { kernel, tile, threads, shared: shared as u32, run }
}

fn simt(kernel: &'static str, tile: [usize; 3], threads: u32, stages: usize, run: usize) -> Product {
    let shared = stages * (tile[0] + tile[1] + 8) * tile[2] * 4;
    Product { kernel, tile, threads, shared: shared as u32, run }
}

/// A matrix (lines, depth) as it lies in memory, with NaNs where rows are padded; and the stride.
fn lay_out<T: Storage>(matrix: &[T], depth: usize, along_k: bool, run: usize) -> (Vec<T>, usize) {
    let lines = matrix.len() / depth;
    let (outer, inner) = if along_k { (lines, depth) } else { (depth, lines) };
    let stride = inner.next_multiple_of(run);
    let mut memory = vec![T::round(f32::NAN); outer * stride];
    for (i, &x) in matrix.iter().enumerate() {
        let (line, k) = (i / depth, i % depth);
        memory[if along_k { line * stride + k } else { k * stride + line }] = x;
    }
    (memory, stride)
}

/// Compares every element with its sum in the order of k, bit for bit.
fn check_product<T: Storage>(product: &Product, layouts: &[&str], [m, n, k]: [usize; 3]) {
    let a: Vec<T> = numbers("a", m * k).into_iter().map(T::round).collect();
    let b: Vec<T> = numbers("b", n * k).into_iter().map(T::round).collect();
    let split = k / 2 / product.tile[2] * product.tile[2];
    for layout in layouts {
        let (a_memory, stride_a) = lay_out(&a, k, layout.starts_with('k'), product.run);
        let (b_memory, stride_b) = lay_out(&b, k, layout.ends_with('k'), product.run);
        let kernel = format!("{}_{layout}", product.kernel);
        let c = under_every_schedule(|machine| {
            let addresses = [machine.output::<f32>(m * n), machine.upload(&a_memory), machine.upload(&b_memory)];
            let grid = [n.div_ceil(product.tile[1]) as u32, m.div_ceil(product.tile[0]) as u32, 1];
            let geometry = Geometry { grid, block: [product.threads, 1, 1], shared: product.shared };
            machine
                .launch(&kernel, geometry, |arguments| {
                    addresses.into_iter().for_each(|address| arguments.push(address));
                    arguments.push([m as u32, n as u32, k as u32]);
                    [split, stride_a, stride_b].into_iter().for_each(|number| arguments.push(number as u32));
                })
                .unwrap();
            machine.download::<f32>(addresses[0], m * n)
        });
        for (i, &c) in c.iter().enumerate() {
            let (row, column) = (i / n * k, i % n * k);
            let expected = dot(0.0, (0..k).map(|x| (a[row + x].widen(), b[column + x].widen())));
            assert_eq!(c, expected, "{kernel} of {m}, {n}, {k}: ({}, {})", i / n, i % n);
        }
    }
}

const LAYOUTS: [&str; 4] = ["kk", "kn", "mk", "mn"];

#[test]
fn tensor_core_main_loops_multiply_odd_matrices_in_all_layouts() {
    for shape in [[1, 1, 1], [45, 37, 101]] {
        check_product::<bf16>(&tensor("tensor_small_run8", [32, 32, 32], 128, 3, 8), &LAYOUTS, shape);
        check_product::<bf16>(&tensor("tensor_small_run1", [32, 32, 32], 128, 3, 1), &LAYOUTS, shape);
    }
    check_product::<f16>(&tensor("tensor_middle_run2", [64, 64, 32], 128, 2, 2), &LAYOUTS, [67, 61, 53]);
    check_product::<bf16>(&tensor("tensor_deep_run4", [64, 32, 64], 128, 4, 4), &LAYOUTS, [67, 29, 199]);
    check_product::<bf16>(&tensor("tensor_large_run8", [128, 128, 32], 256, 3, 8), &["kn"], [131, 137, 71]);
}

#[test]
fn f32_main_loops_multiply_odd_matrices_in_all_layouts() {
    for shape in [[1, 1, 1], [45, 37, 101]] {
        check_product::<f32>(&simt("simt_small_run1", [32, 32, 16], 64, 3, 1), &LAYOUTS, shape);
    }
    check_product::<f32>(&simt("simt_middle_run4", [64, 64, 16], 128, 2, 4), &LAYOUTS, [67, 61, 53]);
    check_product::<f32>(&simt("simt_large_run4", [128, 128, 8], 256, 3, 4), &["kn"], [131, 137, 29]);
}
