//! The boundary-tap convolution, and the density of points on the boundary of boxes.

use std::f64::consts::PI;
use std::fmt;

use gridgrad::ops::denfi::{DenfiOptions, MapRange, boundary_density, denfi_conv};
use gridgrad::ops::{Conv2dOptions, conv2d};
use gridgrad::{DType, Device, Result, Tensor, autograd};

use crate::harness::{Derivatives, OpCase, Tolerance, Work, check, check_on_device, inputs_as, randn, test_device};

#[derive(Debug)]
struct DenfiConv {
    /// Batch, height, width, channels.
    shape: [usize; 4],
    options: DenfiOptions,
    /// Added to the logarithms of the sides.
    reach: f64,
}

impl fmt::Display for DenfiConv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// The bilinear value of a channel of a map, 0 where the place is not in (−1, height) × (−1, width).
fn bilinear(value: impl Fn(usize, usize) -> f64, [height, width]: [usize; 2], row: f64, column: f64) -> f64 {
    if !(row > -1.0 && row < height as f64 && column > -1.0 && column < width as f64) {
        return 0.0;
    }
    let mut sum = 0.0;
    for i in [row.floor(), row.floor() + 1.0] {
        for j in [column.floor(), column.floor() + 1.0] {
            if i >= 0.0 && i < height as f64 && j >= 0.0 && j < width as f64 {
                let weight = (1.0 - (row - i).abs()) * (1.0 - (column - j).abs());
                sum += weight * value(i as usize, j as usize);
            }
        }
    }
    sum
}

impl OpCase for DenfiConv {
    fn inputs(&self) -> Vec<Tensor> {
        let [batch, height, width, channels] = self.shape;
        let outputs = 4 + 2 * self.options.bins;
        let shifted = randn(&[batch, height, width, outputs], 1).to_f64_vec().unwrap();
        let boundary = |i: usize| shifted[i] * 0.4 + if i % outputs < 4 { self.reach } else { 0.0 };
        vec![
            randn(&self.shape, 0),
            Tensor::from_index([batch, height, width, outputs], DType::F64, boundary).unwrap(),
            randn(&[channels, 1, 3, 3], 2),
        ]
    }

    fn run(&self, inputs: &[Tensor]) -> Result<Tensor> {
        denfi_conv(&inputs[0], &inputs[1], &inputs[2], self.options)
    }

    fn reference(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        let [batch, height, width, channels] = self.shape;
        let DenfiOptions { bins, cell, scale, clamp_residual, .. } = self.options;
        let mut output = Vec::new();
        for (image, i, j) in (0..batch).flat_map(|b| (0..height).flat_map(move |i| (0..width).map(move |j| (b, i, j))))
        {
            let raw = &inputs[1][((image * height + i) * width + j) * (4 + 2 * bins)..][..4 + 2 * bins];
            let [l, t, r, b] = [0, 1, 2, 3].map(|side| raw[side].clamp(-7.0, 7.0).exp());
            let largest = raw[4..4 + bins].iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let bin = raw[4..4 + bins].iter().position(|&score| score == largest).unwrap();
            let residual = raw[4 + bins + bin];
            let residual = if clamp_residual { residual.clamp(-1.0, 1.0) } else { residual };
            let omega = 2.0 * PI / bins as f64;
            let (sin, cos) = (bin as f64 * omega + residual * omega / 2.0).sin_cos();
            for c in 0..channels {
                let value = |y: usize, x: usize| inputs[0][((image * height + y) * width + x) * channels + c];
                let mut sum = 0.0;
                for (row, alpha) in [-1.0, 0.0, 1.0].into_iter().enumerate() {
                    for (column, beta) in [-1.0, 0.0, 1.0].into_iter().enumerate() {
                        // The box about its own centre.
                        let u = (t - b) / 2.0 + scale * beta * (t + b) / 2.0;
                        let v = (l - r) / 2.0 + scale * alpha * (l + r) / 2.0;
                        let (y, x) = (sin * u + cos * v, cos * u - sin * v);
                        let place = (i as f64 + y / cell[0], j as f64 + x / cell[1]);
                        let sample = bilinear(value, [height, width], place.0, place.1);
                        sum += inputs[2][c * 9 + row * 3 + column] * sample;
                    }
                }
                output.push(sum);
            }
        }
        output
    }

    fn work(&self) -> Work {
        let [batch, height, width, channels] = self.shape.map(|extent| extent as u64);
        let cells = batch * height * width;
        let outputs = 4 + 2 * self.options.bins as u64;
        Work { bytes: 4 * (cells * (2 * channels + outputs) + 9 * channels), flops: 90 * cells * channels }
    }

    fn tolerance(&self) -> Tolerance {
        // A place is off by a rounding of metres times the cells of a metre, and a value by as much times the
        // difference of its neighbours. The gradient by the boundary adds that over channels and taps.
        Tolerance { f64: 1e-12, f32: 2e-5, gradient: 1e-5 }
    }

    fn derivatives(&self) -> Derivatives {
        Derivatives::First
    }
}

fn options(bins: usize, cell: [f64; 2], boundary_grad: bool) -> DenfiOptions {
    DenfiOptions { boundary_grad, ..DenfiOptions::new(bins, cell) }
}

/// `boundary_grad` off makes the gradient check's numeric derivative by the boundary differ from the absent one, so
/// that all cases have it on; a test of its own turns it off.
fn case(shape: [usize; 4], options: DenfiOptions, reach: f64) -> Box<dyn OpCase> {
    Box::new(DenfiConv { shape, options, reach })
}

fn cases() -> Vec<Box<dyn OpCase>> {
    let plain = options(4, [0.8, 0.7], true);
    vec![
        case([1, 5, 7, 3], plain, 0.0),
        case([2, 6, 4, 8], options(12, [1.0, 1.3], true), 0.3),
        case([1, 1, 9, 1], options(1, [0.5, 0.5], true), -0.5),
        case([2, 7, 1, 5], options(3, [0.9, 1.1], true), 0.2),
        case([1, 1, 1, 2], plain, -1.0),
        case([1, 4, 5, 4], DenfiOptions { scale: 0.6, clamp_residual: true, ..plain }, 0.4),
        // Boxes that leave the map.
        case([1, 4, 5, 2], plain, 1.5),
        case([0, 4, 5, 2], plain, 0.0),
        case([1, 4, 5, 0], plain, 0.0),
    ]
}

/// One below, at and above the tile of 32 cells; more channels than a block takes, in vectors and one by one.
fn device_cases() -> Vec<Box<dyn OpCase>> {
    let plain = options(4, [0.8, 0.7], true);
    vec![
        case([1, 1, 31, 4], plain, 0.3),
        case([1, 4, 8, 16], plain, 0.3),
        case([1, 3, 11, 7], plain, 0.3),
        case([1, 1, 3, 264], plain, 0.0),
        case([1, 1, 2, 257], plain, 0.0),
    ]
}

/// A map of a bird's-eye detector at batch 1.
pub fn benchmarks() -> Vec<Box<dyn OpCase>> {
    vec![case([1, 100, 88, 128], options(12, [0.8, 0.8], false), 0.5)]
}

#[test]
fn denfi_conv_agrees_with_its_formula() {
    check(&cases());
    device_cases().iter().for_each(|case| check_on_device(case.as_ref()));
}

/// The same boundary (raw values) in every cell.
fn uniform(extents: [usize; 3], raw: &[f64], dtype: DType) -> Tensor {
    let [batch, height, width] = extents;
    Tensor::from_index([batch, height, width, raw.len()], dtype, |i| raw[i % raw.len()]).unwrap()
}

fn devices() -> Vec<Device> {
    [Some(Device::Cpu), test_device()].into_iter().flatten().collect()
}

fn close(left: &Tensor, right: &Tensor, tolerance: f64) {
    let (left, right) = (left.to_f64_vec().unwrap(), right.to_f64_vec().unwrap());
    assert_eq!(left.len(), right.len());
    for (a, b) in left.iter().zip(&right) {
        assert!((a - b).abs() <= tolerance * b.abs().max(1.0), "{a} and {b}");
    }
}

#[test]
fn a_regular_grid_is_an_ordinary_depthwise_convolution() {
    for device in devices() {
        let on = |tensor: Tensor| tensor.cast(DType::F32).unwrap().to_device(device).unwrap().variable().unwrap();
        let (x, w) = (on(randn(&[2, 5, 6, 4], 0)), on(randn(&[4, 1, 3, 3], 1)));
        let raw = uniform([2, 5, 6], &[0.0; 4 + 2 * 12], DType::F32).to_device(device).unwrap();
        let sampled = denfi_conv(&x, &raw, &w, DenfiOptions::new(12, [1.0, 1.0])).unwrap();
        let options = Conv2dOptions { padding: [1, 1], groups: 4, ..Conv2dOptions::default() };
        let ordinary = conv2d(&x, &w, None, options).unwrap();
        close(&sampled, &ordinary, 1e-6);
        let gradients = |y: &Tensor| {
            let loss = y.square().unwrap().sum_all().unwrap();
            autograd::grad(&loss, &[&x, &w], Default::default()).unwrap()
        };
        for (a, b) in gradients(&sampled).into_iter().zip(gradients(&ordinary)) {
            close(&a.unwrap(), &b.unwrap(), 1e-5);
        }
    }
}

#[test]
fn constant_maps_give_the_sum_of_the_taps() {
    // Sides of 0.8, 1.1, 0.6 and 0.9 m, turned by a third of the turn: within 2 cells of the centre.
    let sides = [0.8f64, 1.1, 0.6, 0.9].map(f64::ln);
    let raw = [&sides[..], &[0.0, 1.0, 0.5], &[0.3, 0.0, -0.2]].concat();
    let w = randn(&[3, 1, 3, 3], 0);
    let x = Tensor::full([1, 7, 7, 3], 2.5, DType::F64).unwrap();
    let y = denfi_conv(&x, &uniform([1, 7, 7], &raw, DType::F64), &w, DenfiOptions::new(3, [1.0, 1.0])).unwrap();
    let middle = y.narrow(1, 3, 1).unwrap().narrow(2, 3, 1).unwrap();
    close(&middle.reshape([3]).unwrap(), &w.sum(&[1, 2, 3], false).unwrap().scale(2.5).unwrap(), 1e-12);
}

#[test]
fn whole_cells_of_translation_move_the_result() {
    let raw = [&[0.2, -0.1, 0.4, 0.0][..], &[0.0, 1.0], &[0.7, 0.3]].concat();
    let (x, w) = (randn(&[1, 12, 12, 2], 0), randn(&[2, 1, 3, 3], 1));
    let convolve = |x: &Tensor| {
        denfi_conv(x, &uniform([1, 12, 12], &raw, DType::F64), &w, DenfiOptions::new(2, [1.0, 1.0])).unwrap()
    };
    let moved = x.narrow(1, 0, 10).unwrap().pad(1, 2, 0).unwrap();
    let part = |y: &Tensor, row: usize| y.narrow(1, row, 4).unwrap().narrow(2, 4, 4).unwrap();
    close(&part(&convolve(&moved), 5), &part(&convolve(&x), 3), 1e-12);
}

#[test]
fn half_a_turn_with_sides_exchanged_flips_the_kernel() {
    // (l, t, r, b) to (r, b, l, t), and the bin half a turn on.
    let turned = [&[0.4, 0.0, 0.2, -0.1][..], &[0.0, 0.0, 0.0, 1.0], &[0.0, 0.0, 0.0, 0.3]].concat();
    let raw = [&[0.2, -0.1, 0.4, 0.0][..], &[0.0, 1.0, 0.0, 0.0], &[0.0, 0.3, 0.0, 0.0]].concat();
    let (x, w) = (randn(&[1, 6, 7, 3], 0), randn(&[3, 1, 3, 3], 1));
    let values = w.to_f64_vec().unwrap();
    let flipped = Tensor::from_index([3, 1, 3, 3], DType::F64, |i| values[i / 9 * 9 + 8 - i % 9]).unwrap();
    let convolve = |raw: &[f64], w: &Tensor| {
        denfi_conv(&x, &uniform([1, 6, 7], raw, DType::F64), w, DenfiOptions::new(4, [0.9, 1.1])).unwrap()
    };
    close(&convolve(&turned, &w), &convolve(&raw, &flipped), 1e-12);
}

#[test]
fn boxes_far_outside_give_zeros_without_gradients() {
    // Half a metre wide and long, 500 m away: no side reaches back into the map.
    for device in devices() {
        let on = |tensor: Tensor| tensor.cast(DType::F32).unwrap().to_device(device).unwrap().variable().unwrap();
        let (x, w) = (on(randn(&[1, 4, 4, 5], 0)), on(randn(&[5, 1, 3, 3], 1)));
        // The sides are positive, so that a box has its cell inside; a small scale leaves its far centre.
        let raw = on(uniform([1, 4, 4], &[0.0, 6.9, 0.0, -7.0, 1.0, 0.2], DType::F64));
        let far = DenfiOptions { scale: 1e-3, ..options(1, [1.0, 1.0], true) };
        let y = denfi_conv(&x, &raw, &w, far).unwrap();
        assert!(y.to_f64_vec().unwrap().iter().all(|&value| value == 0.0));
        let gradients = autograd::grad(&y.sum_all().unwrap(), &[&x, &w, &raw], Default::default()).unwrap();
        for gradient in gradients {
            assert!(gradient.unwrap().to_f64_vec().unwrap().iter().all(|&value| value == 0.0));
        }
    }
}

#[test]
fn what_is_not_a_number_shows() {
    for device in devices() {
        let on = |tensor: Tensor| tensor.cast(DType::F32).unwrap().to_device(device).unwrap();
        let raw = uniform([1, 1, 2], &[0.0, 0.0, 0.0, 0.0, 1.0, 0.0], DType::F64).to_f64_vec().unwrap();
        let raw = Tensor::from_index([1, 1, 2, 6], DType::F64, |i| if i == 1 { f64::NAN } else { raw[i] }).unwrap();
        let (x, w) = (on(randn(&[1, 1, 2, 2], 0)), on(randn(&[2, 1, 3, 3], 1)));
        let y = denfi_conv(&x, &on(raw), &w, DenfiOptions::new(1, [1.0, 1.0])).unwrap().to_f64_vec().unwrap();
        assert!(y[..2].iter().all(|value| value.is_nan()) && y[2..].iter().all(|value| value.is_finite()), "{y:?}");
    }
}

#[test]
fn the_boundary_has_a_gradient_only_where_asked_for() {
    let case = DenfiConv { shape: [1, 3, 4, 2], options: options(4, [0.8, 0.7], false), reach: 0.0 };
    let inputs: Vec<Tensor> = case.inputs().iter().map(|input| input.variable().unwrap()).collect();
    let gradients = case.run(&inputs).unwrap().sum_all().unwrap().backward().unwrap();
    assert!(gradients.get(&inputs[0]).is_some() && gradients.get(&inputs[2]).is_some());
    assert!(gradients.get(&inputs[1]).is_none());
}

/// A map in half precision takes a boundary in f32, and computes its places from that.
#[test]
fn places_may_be_finer_than_features() {
    let case = DenfiConv { shape: [1, 5, 6, 8], options: options(4, [0.8, 0.7], true), reach: 0.3 };
    let single = inputs_as(&case, DType::F32);
    for device in devices() {
        let half = inputs_as(&case, DType::Bf16);
        let mixed = [&half[0], &single[1], &half[2]].map(|t| t.to_device(device).unwrap().variable().unwrap());
        let y = case.run(&mixed).unwrap();
        assert_eq!(y.dtype(), DType::Bf16);
        let widened: Vec<Tensor> = mixed.iter().map(|t| t.detach().cast(DType::F32).unwrap()).collect();
        close(&y, &case.run(&widened).unwrap(), 1.0 / 128.0);
        let gradients = y.sum_all().unwrap().backward().unwrap();
        assert_eq!(gradients.get(&mixed[1]).unwrap().dtype(), DType::F32);
    }
}

#[derive(Debug)]
struct Density {
    /// Batch, boxes, height, width.
    shape: [usize; 4],
    range: MapRange,
}

impl fmt::Display for Density {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

impl OpCase for Density {
    fn inputs(&self) -> Vec<Tensor> {
        let [batch, boxes, height, width] = self.shape;
        let MapRange { x, y } = self.range;
        let random = randn(&[batch, boxes, 7], 0).to_f64_vec().unwrap();
        let value = |i: usize| match i % 7 {
            0 => (x[0] + x[1]) / 2.0 + random[i] * (x[1] - x[0]) / 4.0,
            1 => (y[0] + y[1]) / 2.0 + random[i] * (y[1] - y[0]) / 4.0,
            3..=5 => 0.5 + random[i].abs() * 2.0,
            _ => random[i],
        };
        let counts = randn(&[batch, height, width], 1).to_f64_vec().unwrap();
        let counts: Vec<i64> = counts.iter().map(|value| (value * 6.0).max(0.0) as i64).collect();
        vec![
            Tensor::from_index([batch, boxes, 7], DType::F64, value).unwrap(),
            Tensor::new(&counts, [batch, height, width]).unwrap(),
        ]
    }

    fn run(&self, inputs: &[Tensor]) -> Result<Tensor> {
        boundary_density(&inputs[0], &inputs[1], self.range)
    }

    fn reference(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        let [_, boxes, height, width] = self.shape;
        let MapRange { x, y } = self.range;
        let mut output = Vec::new();
        for (number, values) in inputs[0].chunks(7).enumerate() {
            let value = |i: usize, j: usize| (1.0 + inputs[1][(number / boxes * height + i) * width + j]).ln();
            let (sin, cos) = values[6].sin_cos();
            let mut taps = Vec::new();
            for alpha in [-0.5, 0.0, 0.5] {
                for beta in [-0.5, 0.0, 0.5] {
                    let (u, v) = (beta * values[3], alpha * values[4]);
                    let place = (values[0] + cos * u - sin * v, values[1] + sin * u + cos * v);
                    let row = (place.1 - y[0]) / ((y[1] - y[0]) / height as f64) - 0.5;
                    let column = (place.0 - x[0]) / ((x[1] - x[0]) / width as f64) - 0.5;
                    taps.push(bilinear(value, [height, width], row, column));
                }
            }
            let centre = taps.remove(4);
            let boundary = taps.iter().sum::<f64>() / 8.0;
            output.extend([boundary, centre, boundary - centre]);
        }
        output
    }

    fn work(&self) -> Work {
        let boxes = (self.shape[0] * self.shape[1]) as u64;
        Work { bytes: boxes * (10 * 4 + 36 * 8), flops: 400 * boxes }
    }

    fn tolerance(&self) -> Tolerance {
        // Places in the map are off by a rounding of metres from its origin.
        Tolerance { f64: 1e-12, f32: 1e-4, gradient: 1e-5 }
    }

    fn derivatives(&self) -> Derivatives {
        Derivatives::First
    }
}

#[test]
fn boundary_density_agrees_with_its_formula() {
    let range = MapRange { x: [0.0, 7.0], y: [-4.0, 5.0] };
    let case = |shape, range| Box::new(Density { shape, range }) as Box<dyn OpCase>;
    check(&[
        case([2, 5, 9, 8], range),
        case([1, 1, 1, 1], MapRange { x: [-1.0, 1.0], y: [0.0, 3.0] }),
        case([1, 257, 6, 13], range),
        case([1, 0, 4, 4], range),
        case([0, 3, 4, 4], range),
    ]);
}

/// Eight points on each tap of a 4 by 2 m box but its centre: ln 9 there, and none in the middle.
#[test]
fn points_on_the_boundary_make_the_contrast() {
    let on_boundary = |i: usize| {
        let (row, column) = (i / 9, i % 9);
        [2, 4, 6].contains(&column) && [3, 4, 5].contains(&row) && (row, column) != (4, 4)
    };
    let counts: Vec<i64> = (0..81).map(|i| if on_boundary(i) { 8 } else { 0 }).collect();
    let counts = Tensor::new(&counts, [1, 9, 9]).unwrap();
    let range = MapRange { x: [0.0, 9.0], y: [0.0, 9.0] };
    let place = Tensor::new(&[4.5f64, 4.5, -1.0, 4.0, 2.0, 1.5, 0.0], [1, 1, 7]).unwrap();
    let got = boundary_density(&place, &counts, range).unwrap().to_f64_vec().unwrap();
    assert!((got[0] - 9f64.ln()).abs() < 1e-12 && got[1] == 0.0 && (got[2] - got[0]).abs() < 1e-12, "{got:?}");
    let negative = Tensor::new(&[-1i64; 81], [1, 9, 9]).unwrap();
    assert!(boundary_density(&place, &negative, range).unwrap().to_f64_vec().unwrap()[0].is_nan());
}

#[test]
fn bad_arguments_are_errors() {
    let message = |result: Result<Tensor>| result.unwrap_err().to_string();
    let (x, raw, w) = (randn(&[1, 3, 4, 2], 0), randn(&[1, 3, 4, 8], 1), randn(&[2, 1, 3, 3], 2));
    let good = DenfiOptions::new(2, [1.0, 1.0]);
    assert!(message(denfi_conv(&x, &raw, &w, DenfiOptions::new(3, [1.0, 1.0]))).contains("expected [1, 3, 4, 10]"));
    assert!(message(denfi_conv(&x, &raw, &x, good)).contains("expected (2, 1, 3, 3)"));
    assert!(message(denfi_conv(&w, &raw, &w, good)).contains("denfi_conv: boundary (1, 3, 4, 8)"));
    assert!(message(denfi_conv(&x, &raw.cast(DType::F32).unwrap(), &w, good)).contains("expected f64 as the input"));
    for cell in [[0.0, 1.0], [1.0, f64::NAN], [-1.0, 1.0]] {
        assert!(message(denfi_conv(&x, &raw, &w, DenfiOptions { cell, ..good })).contains("positive extents"));
    }
    for options in [DenfiOptions { bins: 0, ..good }, DenfiOptions { scale: f64::INFINITY, ..good }] {
        assert!(message(denfi_conv(&x, &raw, &w, options)).contains("1 to 65536 bins"));
    }
    let (boxes, counts) = (randn(&[1, 2, 7], 0), Tensor::new(&[1i64; 6], [1, 2, 3]).unwrap());
    let range = MapRange { x: [0.0, 1.0], y: [0.0, 1.0] };
    assert!(message(boundary_density(&randn(&[1, 2, 6], 0), &counts, range)).contains("boxes (1, 2, 6)"));
    assert!(message(boundary_density(&boxes, &randn(&[1, 2, 3], 0), range)).contains("got dtype f64"));
    let empty = MapRange { x: [1.0, 1.0], ..range };
    assert!(message(boundary_density(&boxes, &counts, empty)).contains("not empty"));
    if let Some(device) = test_device() {
        let on_device = x.cast(DType::F32).unwrap().to_device(device).unwrap();
        let single = |tensor: &Tensor| tensor.cast(DType::F32).unwrap();
        let error = denfi_conv(&on_device, &single(&raw), &single(&w), good).unwrap_err();
        assert!(matches!(error, gridgrad::Error::DeviceMismatch { .. }), "{error}");
    }
}
