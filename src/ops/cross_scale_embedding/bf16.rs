//! Patch matrices, as in [`patches`](super::patches), in `bf16`, where the processor multiplies it.

use std::sync::Arc;

use super::cpu::{Gradients, Kernel, Problem};
use super::patches::{gather, images_per_run, pack, scatter, taps, unpack};
use crate::cpu::bf16::{PANEL, Panels, To, bf16, block_rows, narrow, narrowed, serves};
use crate::cpu::parallel;
use crate::tensor::{Buffer, DType, Weight};

/// Whether this embedding is computed here.
pub(super) fn takes(problem: &Problem, dtype: DType) -> bool {
    serves(dtype) && !problem.prefers_rows()
}

/// Columns of a patch row that a kernel sees.
fn window(problem: &Problem, kernel: Kernel) -> usize {
    kernel.side * kernel.side * problem.extents[3]
}

/// The beginnings of rows `first` and following.
fn starts(first: usize, count: usize, stride: usize, column: usize) -> Vec<usize> {
    (first..first + count).map(|row| row * stride + column).collect()
}

/// A weight as [`forward`] reads it, by its own extents: taps in their order, the kernel's side, and its window and channels.
#[derive(Clone, PartialEq)]
struct ByTaps(Vec<[usize; 2]>, usize, [usize; 2]);

pub(super) fn forward(
    problem: &Problem,
    input: &[bf16],
    weights: &[Weight<'_, bf16>],
    biases: &[&[bf16]],
) -> Buffer<bf16> {
    let [_, height, width, channels] = problem.extents;
    let [rows, columns] = problem.output_map();
    let (taps, out_channels) = (taps(problem), problem.out_channels());
    let depth = taps.len() * channels;
    let panels = |(&kernel, weight): (&Kernel, &Weight<'_, bf16>)| {
        let extents = [window(problem, kernel), kernel.out];
        let packed = || Panels::of_columns(&pack(problem, kernel, &taps, weight.values), extents[0], extents[1]);
        weight.form(ByTaps(taps.clone(), kernel.side, extents), packed)
    };
    let panels: Vec<Arc<Panels>> = problem.kernels.iter().zip(weights).map(panels).collect();
    let mut output = Buffer::recycled(problem.output_shape().elements());
    let run = images_per_run::<bf16>(problem);
    let inputs = input.chunks((run * height * width * channels).max(1));
    for (input, output) in inputs.zip(output.chunks_mut((run * rows * columns * out_channels).max(1))) {
        let mut patches = Buffer::recycled(output.len() / out_channels * depth);
        gather(problem, &taps, input, &mut patches);
        let block = block_rows(depth, out_channels);
        parallel::pieces_mut(output, block * out_channels, |index, output| {
            let starts = starts(index * block, output.len() / out_channels, depth, 0);
            for ((panels, bias), first) in panels.iter().zip(biases).zip(problem.first_channels()) {
                let to = To::Narrow(&mut output[first..]);
                panels.rows_at((&patches, &starts), Some(bias), to, out_channels, false);
            }
        });
    }
    output
}

pub(super) fn backward(
    problem: &Problem,
    input: &[bf16],
    weights: &[&[bf16]],
    grad: &[bf16],
    needs_input: bool,
) -> Gradients<bf16> {
    let [_, height, width, channels] = problem.extents;
    let [rows, columns] = problem.output_map();
    let (taps, out_channels) = (taps(problem), problem.out_channels());
    let depth = taps.len() * channels;
    let run = images_per_run::<bf16>(problem);
    let mut sums: Vec<Buffer<f32>> = problem
        .kernels
        .iter()
        .map(|&kernel| {
            let [rows, columns] = [window(problem, kernel), kernel.out].map(|extent| extent.next_multiple_of(PANEL));
            Buffer::zeroed(rows * columns)
        })
        .collect();
    let into_patches = needs_input.then(|| IntoPatches::new(problem, &taps, weights));
    let mut input_grad = Buffer::<f32>::recycled(if needs_input { input.len() } else { 0 });
    let image = height * width * channels;
    for (number, input) in input.chunks((run * image).max(1)).enumerate() {
        let count = input.len() / image * rows * columns;
        let grad = &grad[number * run * rows * columns * out_channels..][..count * out_channels];
        let mut patches = Buffer::recycled(count * depth);
        gather(problem, &taps, input, &mut patches);
        for ((&kernel, first), sums) in problem.kernels.iter().zip(problem.first_channels()).zip(&mut sums) {
            let left = Panels::of_strided((&patches, depth), count, window(problem, kernel));
            let right = Panels::of_strided((&grad[first..], out_channels), count, kernel.out);
            parallel::pieces_mut(sums, PANEL * right.view().sums_stride(), |panel, sums| {
                left.view().add_transposed(panel, right.view(), sums);
            });
        }
        drop(patches);
        if let Some(into_patches) = &into_patches {
            let patches = into_patches.multiply(grad, count, depth);
            scatter(problem, &taps, &patches, &mut input_grad[number * run * image..][..input.len()]);
        }
    }
    let weight = |(sums, &kernel): (&Buffer<f32>, &Kernel)| {
        let (window, stride) = (window(problem, kernel), kernel.out.next_multiple_of(PANEL));
        let mut packed = Buffer::recycled(kernel.out * window);
        parallel::pieces_mut(&mut packed, window, |out, row| {
            row.iter_mut().zip(sums[out..].iter().step_by(stride)).for_each(|(value, &sum)| *value = narrow(sum));
        });
        unpack(problem, kernel, &taps, &packed)
    };
    Gradients {
        input: needs_input.then(|| narrowed(&input_grad)),
        weights: sums.iter().zip(&problem.kernels).map(weight).collect(),
    }
}

/// What turns gradients of the result into those of patches.
struct IntoPatches<'a> {
    problem: &'a Problem,
    /// By falling size of the kernels: their first channel in the result, and their weights. The window of the largest is
    /// a whole row: it overwrites, the others are added.
    kernels: Vec<(usize, Kernel, Panels)>,
}

impl<'a> IntoPatches<'a> {
    fn new(problem: &'a Problem, taps: &[[usize; 2]], weights: &[&[bf16]]) -> Self {
        let parts = problem.kernels.iter().zip(problem.first_channels()).zip(weights);
        let panels = |((&kernel, first), weight): ((&Kernel, usize), &&[bf16])| {
            let packed = pack(problem, kernel, taps, weight);
            (first, kernel, Panels::of_rows(&packed, kernel.out, window(problem, kernel)))
        };
        let mut kernels: Vec<_> = parts.map(panels).collect();
        kernels.sort_by_key(|(_, kernel, _)| std::cmp::Reverse(kernel.side));
        IntoPatches { problem, kernels }
    }

    fn multiply(&self, grad: &[bf16], count: usize, depth: usize) -> Buffer<f32> {
        let out_channels = self.problem.out_channels();
        let block = block_rows(2 * depth, out_channels);
        let mut patches = Buffer::recycled(count * depth);
        parallel::pieces_mut(&mut patches, block * depth, |index, patches| {
            for (number, (first, _, panels)) in self.kernels.iter().enumerate() {
                let starts = starts(index * block, patches.len() / depth, out_channels, *first);
                let to = if number == 0 { To::Wide(patches) } else { To::Added(patches) };
                panels.rows_at((grad, &starts), None, to, depth, false);
            }
        });
        patches
    }
}
