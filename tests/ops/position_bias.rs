//! The dynamic position bias network.

use std::fmt;

use gridgrad::ops::position_bias::{
    Affine, BiasLayer, PositionBiasNetwork, dynamic_position_bias, dynamic_position_biases,
};
use gridgrad::ops::{concat, layer_norm, linear};
use gridgrad::random::Philox;
use gridgrad::{DType, Device, Result, Tensor, autograd};

use crate::harness::{Derivatives, OpCase, ROUNDING, Tolerance, Work, check, inputs_as, randn, test_device};

#[derive(Debug)]
struct PositionBias {
    width: usize,
    heads: usize,
    group: [usize; 2],
    residual: bool,
}

impl fmt::Display for PositionBias {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

fn network(tensors: &[Tensor], residual: bool) -> PositionBiasNetwork {
    let affine = |at: usize| Affine { weight: tensors[at].clone(), bias: tensors[at + 1].clone() };
    let layer = |number: usize| BiasLayer { norm: affine(2 + 4 * number), linear: affine(4 + 4 * number) };
    PositionBiasNetwork { projection: affine(0), layers: [layer(0), layer(1), layer(2)], residual, eps: 1e-5 }
}

/// The network, op by op.
fn composed(inputs: &[Tensor], [height, width]: [usize; 2], residual: bool) -> Result<Tensor> {
    let columns = 2 * width - 1;
    let rows = (2 * height - 1) * columns;
    let offset = |i: usize| match i % 2 {
        0 => (i / 2 / columns) as f64 - (height - 1) as f64,
        _ => (i / 2 % columns) as f64 - (width - 1) as f64,
    };
    let offsets = Tensor::from_index([rows, 2], inputs[0].dtype(), offset)?;
    let mut hidden = linear(&offsets, &inputs[0], Some(&inputs[1]))?;
    for (number, layer) in inputs[2..].chunks(4).enumerate() {
        let rectified = layer_norm(&hidden, &layer[0], &layer[1], 1e-5)?.relu()?;
        let output = linear(&rectified, &layer[2], Some(&layer[3]))?;
        hidden = if residual && number < 2 { output.add(&hidden)? } else { output };
    }
    Ok(hidden)
}

impl OpCase for PositionBias {
    fn inputs(&self) -> Vec<Tensor> {
        let (p, h) = (self.width, self.heads);
        let mut shapes = vec![vec![p, 2], vec![p]];
        for out in [p, p, h] {
            shapes.extend([vec![p], vec![p], vec![out, p], vec![out]]);
        }
        shapes.iter().zip(0..).map(|(shape, number)| randn(shape, number)).collect()
    }

    fn run(&self, inputs: &[Tensor]) -> Result<Tensor> {
        dynamic_position_bias(&network(inputs, self.residual), self.group)
    }

    fn reference(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        let p = self.width;
        let linear = |at: usize, x: &[f64]| -> Vec<f64> {
            let row = |(out, bias): (usize, &f64)| {
                bias + x.iter().enumerate().map(|(i, value)| inputs[at][out * x.len() + i] * value).sum::<f64>()
            };
            inputs[at + 1].iter().enumerate().map(row).collect()
        };
        let layer = |number: usize, x: &[f64]| -> Vec<f64> {
            let at = 2 + 4 * number;
            let mean = x.iter().sum::<f64>() / p as f64;
            let variance = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / p as f64;
            let norm = |(i, v): (usize, &f64)| {
                ((v - mean) / (variance + 1e-5).sqrt() * inputs[at][i] + inputs[at + 1][i]).max(0.0)
            };
            linear(at + 2, &x.iter().enumerate().map(norm).collect::<Vec<_>>())
        };
        let skip = |x: &[f64], y: Vec<f64>| -> Vec<f64> {
            if self.residual { x.iter().zip(y).map(|(x, y)| x + y).collect() } else { y }
        };
        let [gh, gw] = self.group.map(|g| g as i64);
        let mut table = Vec::new();
        for dy in 1 - gh..gh {
            for dx in 1 - gw..gw {
                let h0 = linear(0, &[dy as f64, dx as f64]);
                let h1 = skip(&h0, layer(0, &h0));
                let h2 = skip(&h1, layer(1, &h1));
                table.extend(layer(2, &h2));
            }
        }
        table
    }

    fn work(&self) -> Work {
        let rows = ((2 * self.group[0] - 1) * (2 * self.group[1] - 1)) as u64;
        let (p, h) = (self.width as u64, self.heads as u64);
        let parameters = 2 * p * p + 11 * p + p * h + h;
        Work { bytes: 4 * (parameters + rows * h), flops: 2 * rows * (2 * p + 2 * p * p + p * h) }
    }

    fn tolerance(&self) -> Tolerance {
        // Layer norms over two units amplify rounding by 1 / √eps where both are nearly equal.
        Tolerance { f64: 1e-10, f32: if self.width < 3 { 1e-3 } else { 2e-5 }, gradient: 10.0 * ROUNDING.gradient }
    }

    fn composed(&self, inputs: &[Tensor]) -> Option<Result<Tensor>> {
        Some(composed(inputs, self.group, self.residual))
    }

    fn derivatives(&self) -> Derivatives {
        Derivatives::First
    }
}

/// Networks of one width evaluated together, each for groups of its own; the output is their tables one after the other.
#[derive(Debug)]
struct Several {
    width: usize,
    heads: usize,
    groups: Vec<[usize; 2]>,
    residual: bool,
}

impl fmt::Display for Several {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

impl Several {
    fn alone(&self) -> Vec<PositionBias> {
        let &Several { width, heads, residual, .. } = self;
        self.groups.iter().map(|&group| PositionBias { width, heads, group, residual }).collect()
    }

    fn tables(&self, inputs: &[Tensor], dtype: DType) -> Result<Vec<Tensor>> {
        let networks: Vec<_> = inputs.chunks(14).map(|inputs| network(inputs, self.residual)).collect();
        let pairs: Vec<_> = networks.iter().zip(self.groups.iter().copied()).collect();
        dynamic_position_biases(&pairs, dtype)
    }
}

fn joined(tables: &[Tensor]) -> Result<Tensor> {
    concat(&tables.iter().collect::<Vec<_>>(), 0)
}

impl OpCase for Several {
    fn inputs(&self) -> Vec<Tensor> {
        let networks = self.alone().into_iter().zip(1..);
        networks
            .flat_map(|(case, factor)| {
                case.inputs().into_iter().map(move |input| input.scale(1.0 / factor as f64).unwrap())
            })
            .collect()
    }

    fn run(&self, inputs: &[Tensor]) -> Result<Tensor> {
        joined(&self.tables(inputs, inputs[0].dtype())?)
    }

    fn reference(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        self.alone().iter().zip(inputs.chunks(14)).flat_map(|(case, inputs)| case.reference(inputs)).collect()
    }

    fn work(&self) -> Work {
        let add = |sum: Work, work: Work| Work { bytes: sum.bytes + work.bytes, flops: sum.flops + work.flops };
        self.alone().iter().map(OpCase::work).fold(Work::default(), add)
    }

    fn tolerance(&self) -> Tolerance {
        self.alone()[0].tolerance()
    }

    fn composed(&self, inputs: &[Tensor]) -> Option<Result<Tensor>> {
        let tables = self.groups.iter().zip(inputs.chunks(14));
        let tables: Result<Vec<Tensor>> =
            tables.map(|(&group, inputs)| composed(inputs, group, self.residual)).collect();
        Some(tables.and_then(|tables| joined(&tables)))
    }

    fn derivatives(&self) -> Derivatives {
        Derivatives::First
    }
}

fn cases() -> Vec<Box<dyn OpCase>> {
    let case =
        |(width, heads, group, residual)| Box::new(PositionBias { width, heads, group, residual }) as Box<dyn OpCase>;
    [
        (6, 3, [7, 7], false),
        (4, 2, [3, 3], true),
        (5, 1, [1, 4], false),
        (3, 7, [2, 5], true),
        (1, 2, [2, 2], false),
        (48, 24, [2, 2], false),
        // More units than a warp has lanes, and an odd number of them; the whole range of groups.
        (33, 1, [2, 3], true),
        (3, 3, [16, 9], false),
        (2, 1, [1, 1], true),
    ]
    .into_iter()
    .map(case)
    .collect()
}

fn stages() -> Vec<Box<dyn OpCase>> {
    let case = |width, heads, groups: &[[usize; 2]], residual| {
        Box::new(Several { width, heads, groups: groups.to_vec(), residual }) as Box<dyn OpCase>
    };
    vec![
        case(4, 2, &[[3, 3], [2, 5]], false),
        case(7, 3, &[[1, 1], [4, 3], [2, 2]], true),
        // More networks than a launch takes.
        case(3, 1, &[[1, 2]; 33], false),
    ]
}

/// The tables of CrossFormer-S's first and last stage and of CrossFormer++'s third, and those of the six blocks of
/// CrossFormer-S's third stage together.
pub fn benchmarks() -> Vec<Box<dyn OpCase>> {
    let case = |width, heads, side| {
        Box::new(PositionBias { width, heads, group: [side; 2], residual: false }) as Box<dyn OpCase>
    };
    let stage = Several { width: 24, heads: 12, groups: vec![[7, 7]; 6], residual: false };
    vec![case(6, 3, 7), case(48, 24, 7), case(16, 8, 14), Box::new(stage)]
}

#[test]
fn tables_agree_with_their_definition() {
    check(&cases());
    check(&stages());
}

fn bits(tensor: &Tensor) -> Vec<u8> {
    tensor.to_device(Device::Cpu).unwrap().raw_bytes().unwrap().to_vec()
}

/// The bits of the gradients of all inputs by the sum of `tables`, weighted; none for those without one.
fn gradient_bits(tables: &[Tensor], inputs: &[Tensor], retain_graph: bool) -> Vec<Option<Vec<u8>>> {
    let table = joined(tables).unwrap();
    let weights = Tensor::randn(table.shape(), DType::F32, Philox::new(3)).unwrap();
    let weights = weights.cast(table.dtype()).unwrap().to_device(table.device()).unwrap();
    let options =
        autograd::GradOptions { grad_output: Some(weights), retain_graph, ..autograd::GradOptions::default() };
    let gradients = autograd::grad(&table, &inputs.iter().collect::<Vec<_>>(), options).unwrap();
    gradients.iter().map(|gradient| gradient.as_ref().map(bits)).collect()
}

#[test]
fn networks_together_have_the_bits_of_each_alone() {
    let case = Several { width: 5, heads: 3, groups: vec![[7, 7], [2, 3], [4, 4]], residual: false };
    for device in [Some(Device::Cpu), test_device()].into_iter().flatten() {
        let variable = |input: &Tensor| input.to_device(device).unwrap().variable().unwrap();
        let inputs: Vec<Tensor> = inputs_as(&case, DType::F32).iter().map(variable).collect();
        for dtype in [DType::F32, DType::Bf16, DType::F16] {
            let together = case.tables(&inputs, dtype).unwrap();
            let alone = case.alone().into_iter().zip(inputs.chunks(14));
            let alone: Vec<Tensor> =
                alone.map(|(case, inputs)| case.run(inputs).unwrap().cast(dtype).unwrap()).collect();
            assert!(together.iter().map(bits).eq(alone.iter().map(bits)), "{device} {dtype}");
            let expected = gradient_bits(&alone, &inputs, false);
            assert!(expected.iter().all(Option::is_some));
            // The second walk finds everything as the first did.
            assert!(gradient_bits(&together, &inputs, true) == expected, "{device} {dtype}");
            assert!(gradient_bits(&together, &inputs, false) == expected, "{device} {dtype}");
        }
    }
}

#[test]
fn a_table_that_nothing_depends_on_has_no_gradient() {
    let case = Several { width: 3, heads: 2, groups: vec![[2, 2]; 3], residual: true };
    for device in [Some(Device::Cpu), test_device()].into_iter().flatten() {
        let variable = |input: &Tensor| input.to_device(device).unwrap().variable().unwrap();
        let inputs: Vec<Tensor> = inputs_as(&case, DType::F32).iter().map(variable).collect();
        let tables = case.tables(&inputs, DType::F32).unwrap();
        let gradients = gradient_bits(&[tables[0].clone(), tables[2].clone()], &inputs, false);
        for (network, gradients) in gradients.chunks(14).enumerate() {
            assert!(gradients.iter().all(|gradient| gradient.is_some() == (network != 1)), "{device} {network}");
        }
    }
}

#[test]
fn networks_of_different_kinds_are_an_error() {
    let networks = [(4, 2, true), (4, 3, true), (4, 2, false)].map(|(width, heads, residual)| {
        network(&PositionBias { width, heads, group: [1, 1], residual }.inputs(), residual)
    });
    for other in [1, 2] {
        let pairs = [(&networks[0], [2, 2]), (&networks[other], [2, 2])];
        let message = dynamic_position_biases(&pairs, DType::F64).unwrap_err().to_string();
        assert!(message.contains("network 1 has") && message.contains("expected the same"), "{message}");
    }
    assert!(dynamic_position_biases(&[], DType::F32).unwrap().is_empty());
    let message = dynamic_position_biases(&[(&networks[0], [2, 0])], DType::F64).unwrap_err().to_string();
    assert!(message.contains("[2, 0]"), "{message}");
}

#[test]
fn a_smaller_group_has_the_centre_of_the_table() {
    let inputs = PositionBias { width: 5, heads: 2, group: [1, 1], residual: false }.inputs();
    let table = |side: usize| dynamic_position_bias(&network(&inputs, false), [side; 2]).unwrap().to_f64_vec().unwrap();
    let (small, large) = (table(3), table(5));
    for (row, small) in small.chunks(2).enumerate() {
        let (y, x) = (row / 5 + 2, row % 5 + 2);
        assert_eq!(small, &large[(y * 9 + x) * 2..][..2]);
    }
}

#[test]
fn width_two_gives_no_nan() {
    let inputs: Vec<Tensor> = PositionBias { width: 2, heads: 1, group: [1, 1], residual: false }
        .inputs()
        .iter()
        .map(|input| input.cast(gridgrad::DType::F32).unwrap().variable().unwrap())
        .collect();
    let table = dynamic_position_bias(&network(&inputs, false), [7, 7]).unwrap();
    let gradients = table.sum_all().unwrap().backward().unwrap();
    assert!(
        inputs.iter().all(|input| gradients.get(input).unwrap().to_f64_vec().unwrap().iter().all(|v| v.is_finite()))
    );
}

#[test]
fn parameters_that_do_not_fit_are_errors() {
    let mut inputs = PositionBias { width: 5, heads: 2, group: [1, 1], residual: false }.inputs();
    assert!(dynamic_position_bias(&network(&inputs, false), [0, 3]).unwrap_err().to_string().contains("[0, 3]"));
    inputs[4] = randn(&[5, 4], 0);
    let message = dynamic_position_bias(&network(&inputs, false), [3, 3]).unwrap_err().to_string();
    assert!(message.contains("parameter 4 is (5, 4), expected [5, 5]"), "{message}");
}

/// Table and gradients of its sum, weighted.
fn table_and_gradients(case: &PositionBias, device: Device) -> Vec<Vec<f64>> {
    let inputs: Vec<Tensor> =
        inputs_as(case, DType::F32).iter().map(|input| input.to_device(device).unwrap().variable().unwrap()).collect();
    let table = case.run(&inputs).unwrap();
    let weights = randn(table.shape(), 99).cast(DType::F32).unwrap().to_device(device).unwrap();
    let options = autograd::GradOptions { grad_output: Some(weights), ..autograd::GradOptions::default() };
    let gradients = autograd::grad(&table, &inputs.iter().collect::<Vec<_>>(), options).unwrap();
    std::iter::once(table).chain(gradients.into_iter().flatten()).map(|tensor| tensor.to_f64_vec().unwrap()).collect()
}

#[test]
fn weights_too_large_for_shared_memory_are_read_where_they_are() {
    let Some(device) = test_device() else { return };
    let case = PositionBias { width: 165, heads: 2, group: [1, 2], residual: true };
    let (host, device) = (table_and_gradients(&case, Device::Cpu), table_and_gradients(&case, device));
    assert_eq!((host.len(), device.len()), (15, 15));
    for (number, (host, device)) in host.iter().zip(&device).enumerate() {
        let scale = host.iter().fold(1.0f64, |scale, value| scale.max(value.abs()));
        let error = host.iter().zip(device).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(error < 1e-5 * scale, "result {number}: error {error:e} of {scale:e}");
    }
}

#[test]
fn activations_too_large_for_shared_memory_are_an_error() {
    let Some(device) = test_device() else { return };
    let case = PositionBias { width: 1, heads: 60_000, group: [1, 1], residual: false };
    let inputs: Vec<Tensor> =
        inputs_as(&case, DType::F32).iter().map(|input| input.to_device(device).unwrap().variable().unwrap()).collect();
    let table = case.run(&inputs).unwrap();
    let weights = randn(table.shape(), 99).cast(DType::F32).unwrap().to_device(device).unwrap();
    let options = autograd::GradOptions { grad_output: Some(weights), ..autograd::GradOptions::default() };
    let error = autograd::grad(&table, &[&inputs[0]], options).unwrap_err().to_string();
    assert!(error.contains("width 1 with 60000 heads needs 240052 bytes of shared memory"), "{error}");
}
