//! Medians, and the limits of the machine.

use std::hint::black_box;
use std::time::{Duration, Instant};

use gridgrad::cpu::{parallel, peak_flops, simd};
use serde::Serialize;

pub fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// The middle value; of an even number, the mean of the two. `values` is not empty.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let half = values.len() / 2;
    if values.len() % 2 == 1 { values[half] } else { (values[half - 1] + values[half]) / 2.0 }
}

/// The most that the processor does with all its threads: the best of several rounds.
#[derive(Serialize)]
pub struct Peak {
    threads: usize,
    instruction_set: &'static str,
    /// Of `f32` fused multiply-adds in registers, two operations each.
    gflops: f64,
    /// Read and written by a copy between arrays that no cache holds.
    copy_gb_per_s: f64,
}

impl Peak {
    pub fn of_this_machine() -> Self {
        const ROUNDS: usize = 5;
        let source = vec![1.0f32; 1 << 25];
        let mut target = source.clone();
        let copy_gb_per_s = (0..ROUNDS).map(|_| copy(&source, &mut target)).fold(0.0, f64::max);
        Peak {
            threads: rayon::current_num_threads(),
            instruction_set: simd::instruction_set(),
            gflops: (0..ROUNDS).map(|_| peak_flops() / 1e9).fold(0.0, f64::max),
            copy_gb_per_s,
        }
    }
}

/// GB/s, reading and writing counted.
fn copy(source: &[f32], target: &mut [f32]) -> f64 {
    let start = Instant::now();
    parallel::map(source, target, |value: f32| value);
    let seconds = start.elapsed().as_secs_f64();
    black_box(&target[0]);
    (8 * source.len()) as f64 / seconds / 1e9
}

impl std::fmt::Display for Peak {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "threads: {}, vectors: {}", self.threads, self.instruction_set)?;
        writeln!(f, "multiply-adds  {:>8.1} GFLOP/s in f32", self.gflops)?;
        writeln!(f, "copy           {:>8.1} GB/s, reading and writing", self.copy_gb_per_s)
    }
}
