//! All offsets at once: an activation is (unit, row), each unit one contiguous vector over the rows of the table, so every
//! loop runs along rows and vectorises whatever the width. One thread for a network, a few hundred kFLOP.

use crate::cpu::block_gemm::Strided;
use crate::cpu::dots::add_dots;
use crate::cpu::small_gemm::{Ahead, LANES, Left, Onto, multiply};
use crate::cpu::{Float, simd};
use crate::tensor::{Buffer, DType};

#[derive(Clone, Copy)]
pub(super) struct Problem {
    pub width: usize,
    pub heads: usize,
    pub group: [usize; 2],
    pub residual: bool,
    pub eps: f64,
}

impl Problem {
    pub fn rows(&self) -> usize {
        (2 * self.group[0] - 1) * (2 * self.group[1] - 1)
    }

    fn padded_rows(&self) -> usize {
        self.rows().next_multiple_of(LANES)
    }
}

/// What the backward pass needs of one layer.
struct Layer<T> {
    /// Normalised input, (width, rows).
    normalised: Buffer<T>,
    /// 1 / deviation, (rows).
    inverse_deviation: Buffer<T>,
    /// After scale, shift and ReLU, (width, rows).
    rectified: Buffer<T>,
}

struct Activations<T> {
    offsets: Buffer<T>,
    layers: Vec<Layer<T>>,
    /// (heads, rows)
    output: Buffer<T>,
}

/// The six parameters of the network's part `number` start here: projection 0, then layers.
fn layer_parameters<'a, T>(parameters: &[&'a [T]], layer: usize) -> [&'a [T]; 4] {
    std::array::from_fn(|i| parameters[2 + 4 * layer + i])
}

pub(super) fn forward<T: Float>(problem: &Problem, parameters: &[&[T]]) -> Buffer<T> {
    let output = simd::dispatch(
        #[inline(always)]
        || activations(problem, parameters).output,
    );
    let padded = problem.padded_rows();
    Buffer::from_fn(problem.rows() * problem.heads, |i| output[i % problem.heads * padded + i / problem.heads])
}

#[inline(always)]
fn activations<T: Float>(problem: &Problem, parameters: &[&[T]]) -> Activations<T> {
    let (rows, padded, width) = (problem.rows(), problem.padded_rows(), problem.width);
    let [height, columns] = problem.group;
    let offset = |axis: usize, row: usize| {
        let (at, centre) = [(row / (2 * columns - 1), height - 1), (row % (2 * columns - 1), columns - 1)][axis];
        T::from_f64(at as f64 - centre as f64)
    };
    let offsets =
        Buffer::from_fn(2 * padded, |i| if i % padded < rows { offset(i / padded, i % padded) } else { T::ZERO });
    let mut input = affine(parameters[0], parameters[1], &offsets, padded);
    let mut layers = Vec::with_capacity(3);
    for number in 0..3 {
        let [scale, shift, weight, bias] = layer_parameters(parameters, number);
        let layer = normalise(&input, scale, shift, padded, T::from_f64(problem.eps));
        let mut output = affine(weight, bias, &layer.rectified, padded);
        if problem.residual && number < 2 {
            for (out, &value) in output.iter_mut().zip(&*input) {
                *out += value;
            }
        }
        layers.push(layer);
        input = output;
    }
    debug_assert!(layers.iter().all(|layer| layer.rectified.len() == width * padded));
    Activations { offsets, layers, output: input }
}

/// out[o] = bias[o] + Σ_i weight[o, i] · input[i], over vectors of rows.
#[inline(always)]
fn affine<T: Float>(weight: &[T], bias: &[T], input: &[T], padded: usize) -> Buffer<T> {
    let mut output = Buffer::recycled(bias.len() * padded);
    let fan_in = input.len() / padded;
    output.chunks_exact_mut(padded).zip(bias).for_each(|(out, &bias)| out.fill(bias));
    let left = Left::rows(weight, fan_in);
    multiply(left, [bias.len(), fan_in, padded], input, Onto::Itself, &mut output, Ahead::default());
    output
}

#[inline(always)]
fn normalise<T: Float>(input: &[T], scale: &[T], shift: &[T], padded: usize, eps: T) -> Layer<T> {
    let share = T::ONE / T::from_f64((input.len() / padded) as f64);
    let mut mean = Buffer::<T>::zeroed(padded);
    for unit in input.chunks_exact(padded) {
        for (mean, &value) in mean.iter_mut().zip(unit) {
            *mean += value * share;
        }
    }
    let mut inverse_deviation = Buffer::<T>::zeroed(padded);
    let mut normalised = Buffer::recycled(input.len());
    for (out, unit) in normalised.chunks_exact_mut(padded).zip(input.chunks_exact(padded)) {
        for ((out, &value), (&mean, variance)) in out.iter_mut().zip(unit).zip(mean.iter().zip(&mut *inverse_deviation))
        {
            *out = value - mean;
            *variance += *out * *out * share;
        }
    }
    for value in inverse_deviation.iter_mut() {
        *value = T::ONE / (*value + eps).sqrt();
    }
    let mut rectified = Buffer::recycled(input.len());
    for (unit, (out, normalised)) in
        rectified.chunks_exact_mut(padded).zip(normalised.chunks_exact_mut(padded)).enumerate()
    {
        for ((out, value), &inverse) in out.iter_mut().zip(normalised).zip(&*inverse_deviation) {
            *value *= inverse;
            *out = scale[unit].mul_add(*value, shift[unit]).nan_max(T::ZERO);
        }
    }
    Layer { normalised, inverse_deviation, rectified }
}

/// Gradients of all parameters, in their order. `grad` is that of the table, (rows, heads).
pub(super) fn backward<T: Float>(problem: &Problem, parameters: &[&[T]], grad: &[T]) -> Vec<Buffer<T>> {
    let (rows, padded, heads) = (problem.rows(), problem.padded_rows(), problem.heads);
    let transposed = |i: usize| if i % padded < rows { grad[i % padded * heads + i / padded] } else { T::ZERO };
    let mut grad = Buffer::from_fn(heads * padded, transposed);
    let mut gradients: Vec<Buffer<T>> = Vec::with_capacity(parameters.len());
    simd::dispatch(
        #[inline(always)]
        || {
            let activations = activations(problem, parameters);
            for number in (0..3).rev() {
                let [scale, shift, weight, _] = layer_parameters(parameters, number);
                let layer = &activations.layers[number];
                let (dweight, dbias, dinput) = affine_backward(weight, &layer.rectified, &grad, padded);
                let (dscale, dshift, mut dinput) = normalise_backward(layer, scale, shift, dinput, padded);
                if problem.residual && number < 2 {
                    for (sum, &grad) in dinput.iter_mut().zip(&*grad) {
                        *sum += grad;
                    }
                }
                gradients.extend([dbias, dweight, dshift, dscale]);
                grad = dinput;
            }
            let (dweight, dbias, _) = affine_backward(parameters[0], &activations.offsets, &grad, padded);
            gradients.extend([dbias, dweight]);
        },
    );
    gradients.reverse();
    gradients
}

#[inline(always)]
fn dot<T: Float>(left: &[T], right: &[T]) -> T {
    let mut lanes = [T::ZERO; LANES];
    for (left, right) in left.as_chunks::<LANES>().0.iter().zip(right.as_chunks::<LANES>().0) {
        for (lane, (&a, &b)) in lanes.iter_mut().zip(left.iter().zip(right)) {
            *lane = a.mul_add(b, *lane);
        }
    }
    lanes.into_iter().sum()
}

/// left · rightᵀ, of matrices whose rows have `padded` elements.
#[inline(always)]
fn products_of_rows<T: Float>(left: &[T], right: &[T], padded: usize) -> Buffer<T> {
    let rows = [left, right].map(|values| values.len() / padded);
    if T::DTYPE == DType::F32 {
        let mut products = Buffer::zeroed(rows[0] * rows[1]);
        let of_rows = |values| Strided { data: bytemuck::cast_slice(values), stride: padded, columns: padded };
        let sums = bytemuck::cast_slice_mut(&mut products);
        add_dots(of_rows(left), of_rows(right), rows, sums, rows[1], Strided { data: &[], ..of_rows(left) });
        return products;
    }
    Buffer::from_fn(rows[0] * rows[1], |i| {
        let [row, column] = [i / rows[1], i % rows[1]].map(|number| number * padded);
        dot(&left[row..row + padded], &right[column..column + padded])
    })
}

/// Gradients of weight, bias and input of [`affine`].
#[inline(always)]
fn affine_backward<T: Float>(
    weight: &[T],
    input: &[T],
    grad: &[T],
    padded: usize,
) -> (Buffer<T>, Buffer<T>, Buffer<T>) {
    let (fan_in, fan_out) = (input.len() / padded, grad.len() / padded);
    let dweight = products_of_rows(grad, input, padded);
    let dbias = Buffer::from_fn(fan_out, |out| grad[out * padded..][..padded].iter().copied().sum());
    let mut dinput = Buffer::recycled(input.len());
    let left = Left::transposed(weight, fan_in);
    multiply(left, [fan_in, fan_out, padded], grad, Onto::Nothing, &mut dinput, Ahead::default());
    (dweight, dbias, dinput)
}

/// Gradients of scale, shift and input of [`normalise`] from that of its rectified output.
#[inline(always)]
fn normalise_backward<T: Float>(
    layer: &Layer<T>,
    scale: &[T],
    shift: &[T],
    mut grad: Buffer<T>,
    padded: usize,
) -> (Buffer<T>, Buffer<T>, Buffer<T>) {
    let units = scale.len();
    let share = T::ONE / T::from_f64(units as f64);
    let (mut dscale, mut dshift) = (Buffer::recycled(units), Buffer::recycled(units));
    let (mut mean, mut correlation) = (Buffer::zeroed(padded), Buffer::zeroed(padded));
    for unit in 0..units {
        let at = unit * padded..(unit + 1) * padded;
        let (grad, normalised) = (&mut grad[at.clone()], &layer.normalised[at]);
        for (grad, &value) in grad.iter_mut().zip(normalised) {
            *grad = if scale[unit].mul_add(value, shift[unit]) > T::ZERO { *grad } else { T::ZERO };
        }
        dscale[unit] = dot(grad, normalised);
        dshift[unit] = grad.iter().copied().sum();
        for ((grad, &value), (mean, correlation)) in
            grad.iter_mut().zip(normalised).zip(mean.iter_mut().zip(&mut *correlation))
        {
            *grad *= scale[unit];
            *mean += *grad * share;
            *correlation += *grad * value * share;
        }
    }
    for (grad, normalised) in grad.chunks_exact_mut(padded).zip(layer.normalised.chunks_exact(padded)) {
        for (row, (grad, &value)) in grad.iter_mut().zip(normalised).enumerate() {
            *grad = (*grad - mean[row] - value * correlation[row]) * layer.inverse_deviation[row];
        }
    }
    (dscale, dshift, grad)
}
