//! Patch matrices, for products in `bf16`.
//!
//! One row per output holds the largest window, its taps ordered from the centre outwards: the window of every smaller
//! kernel is then a prefix of the row, and one matrix serves all kernels. Images are taken in runs whose matrix is about
//! 16 MiB.

use super::cpu::{Kernel, Problem};
use crate::cpu::{Float, parallel};
use crate::tensor::{Buffer, Element};

const PATCH_BYTES: usize = 16 << 20;

/// Positions (row, column) in the largest window, those of smaller kernels first.
pub(super) fn taps(problem: &Problem) -> Vec<[usize; 2]> {
    let largest = problem.largest();
    let mut sides: Vec<usize> = problem.kernels.iter().map(|kernel| kernel.side).collect();
    sides.sort_unstable();
    let inside = |side: usize, at: usize| (at + side / 2 >= largest / 2) && at + side / 2 - largest / 2 < side;
    let smallest = |[row, column]: [usize; 2]| {
        sides.iter().position(|&side| inside(side, row) && inside(side, column)).unwrap_or(sides.len())
    };
    let mut taps: Vec<[usize; 2]> = (0..largest * largest).map(|i| [i / largest, i % largest]).collect();
    taps.sort_by_key(|&tap| smallest(tap));
    taps
}

/// Weights as (out, tap, channel).
pub(super) fn pack<T: Element>(problem: &Problem, kernel: Kernel, taps: &[[usize; 2]], weight: &[T]) -> Buffer<T> {
    let (channels, positions) = (problem.extents[3], kernel.side * kernel.side);
    let mut packed = Buffer::recycled(kernel.out * positions * channels);
    parallel::pieces_mut(&mut packed, positions * channels, |out, packed| {
        let weight = &weight[out * channels * positions..][..channels * positions];
        for (&tap, packed) in taps.iter().zip(packed.chunks_exact_mut(channels)) {
            let weight = weight[position(problem, kernel, tap)..].iter().step_by(positions);
            packed.iter_mut().zip(weight).for_each(|(packed, &weight)| *packed = weight);
        }
    });
    packed
}

/// The inverse of [`pack`].
pub(super) fn unpack<T: Element>(problem: &Problem, kernel: Kernel, taps: &[[usize; 2]], packed: &[T]) -> Buffer<T> {
    let (channels, positions) = (problem.extents[3], kernel.side * kernel.side);
    let mut weight = Buffer::recycled(packed.len());
    parallel::pieces_mut(&mut weight, positions * channels, |out, weight| {
        let packed = packed[out * channels * positions..].chunks_exact(channels);
        for (&tap, packed) in taps[..positions].iter().zip(packed) {
            let weight = weight[position(problem, kernel, tap)..].iter_mut().step_by(positions);
            weight.zip(packed).for_each(|(weight, &packed)| *weight = packed);
        }
    });
    weight
}

/// Where a tap of the largest window lies in a kernel's own.
fn position(problem: &Problem, kernel: Kernel, [row, column]: [usize; 2]) -> usize {
    let inset = (problem.largest() - kernel.side) / 2;
    (row - inset) * kernel.side + column - inset
}

pub(super) fn images_per_run<T>(problem: &Problem) -> usize {
    let [rows, columns] = problem.output_map();
    let image = rows * columns * problem.largest().pow(2) * problem.extents[3] * size_of::<T>();
    (PATCH_BYTES / image.max(1)).max(1)
}

/// Calls `visit(column, row)` for every tap that lies inside the map: the tap's place in a patch row, and the input's.
#[inline(always)]
fn for_each_tap(problem: &Problem, taps: &[[usize; 2]], [y, x]: [usize; 2], mut visit: impl FnMut(usize, usize)) {
    let [_, height, width, channels] = problem.extents;
    let border = problem.padding();
    for (number, &[row, column]) in taps.iter().enumerate() {
        let (row, column) = (y * problem.stride + row, x * problem.stride + column);
        if (border..border + height).contains(&row) && (border..border + width).contains(&column) {
            visit(number * channels, ((row - border) * width + column - border) * channels);
        }
    }
}

pub(super) fn gather<T: Element>(problem: &Problem, taps: &[[usize; 2]], input: &[T], patches: &mut [T]) {
    let [_, height, width, channels] = problem.extents;
    let [rows, columns] = problem.output_map();
    let depth = taps.len() * channels;
    parallel::pieces_mut(patches, columns * depth, |number, patches| {
        let input = &input[number / rows * height * width * channels..];
        patches.fill(T::zeroed());
        for (x, patch) in patches.chunks_exact_mut(depth).enumerate() {
            for_each_tap(problem, taps, [number % rows, x], |to, from| {
                patch[to..][..channels].copy_from_slice(&input[from..][..channels]);
            });
        }
    });
}

/// Adds every patch to the input positions that it was gathered from. One task per image: windows overlap.
pub(super) fn scatter<T: Float>(problem: &Problem, taps: &[[usize; 2]], patches: &[T], input_grad: &mut [T]) {
    let [_, height, width, channels] = problem.extents;
    let [rows, columns] = problem.output_map();
    let depth = taps.len() * channels;
    parallel::pieces_mut(input_grad, height * width * channels, |image, input_grad| {
        input_grad.fill(T::ZERO);
        let patches = &patches[image * rows * columns * depth..][..rows * columns * depth];
        for (at, patch) in patches.chunks_exact(depth).enumerate() {
            for_each_tap(problem, taps, [at / columns, at % columns], |from, to| {
                let sums = input_grad[to..][..channels].iter_mut();
                sums.zip(&patch[from..][..channels]).for_each(|(sum, &value)| *sum += value);
            });
        }
    });
}
