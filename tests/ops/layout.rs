//! Changes of shape, order and type.

use std::fmt;

use gridgrad::ops::concat;
use gridgrad::{DType, Result, Tensor};

use crate::harness::{OpCase, Work, check, randn, test_device};

#[derive(Clone, Debug)]
enum Change {
    Reshape(Vec<usize>),
    Permute(Vec<usize>),
    /// First and second axis, from the front.
    Transpose(usize, usize),
    /// Axis, start, length.
    Narrow(usize, usize, usize),
    /// Axis, before, after.
    Pad(usize, usize, usize),
    Broadcast(Vec<usize>),
    /// From half precision to `f32`; nothing from others, of which a GPU knows no wider type.
    Cast,
    /// Axis, and the extents there of further tensors.
    Concat(usize, Vec<usize>),
}

#[derive(Debug)]
struct Layout {
    shape: Vec<usize>,
    change: Change,
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

fn with_extent(shape: &[usize], axis: usize, extent: usize) -> Vec<usize> {
    let mut shape = shape.to_vec();
    shape[axis] = extent;
    shape
}

/// Every position of a shape, in row-major order.
fn positions(shape: &[usize]) -> Vec<Vec<usize>> {
    shape.iter().fold(vec![vec![]], |prefixes, &extent| {
        let longer = |prefix: &Vec<usize>| (0..extent).map(|i| [&prefix[..], &[i]].concat()).collect::<Vec<_>>();
        prefixes.iter().flat_map(longer).collect()
    })
}

fn at(values: &[f64], shape: &[usize], position: &[usize]) -> f64 {
    values[shape.iter().zip(position).fold(0, |index, (&extent, &i)| index * extent + i)]
}

impl Layout {
    fn parts(&self) -> Vec<Vec<usize>> {
        match &self.change {
            Change::Concat(axis, extents) => {
                let others = extents.iter().map(|&extent| with_extent(&self.shape, *axis, extent));
                std::iter::once(self.shape.clone()).chain(others).collect()
            }
            _ => vec![self.shape.clone()],
        }
    }

    fn output_shape(&self) -> Vec<usize> {
        let shape = &self.shape;
        match &self.change {
            Change::Reshape(to) | Change::Broadcast(to) => to.clone(),
            Change::Permute(order) => order.iter().map(|&axis| shape[axis]).collect(),
            &Change::Transpose(a, b) => with_extent(&with_extent(shape, a, shape[b]), b, shape[a]),
            &Change::Narrow(axis, _, len) => with_extent(shape, axis, len),
            &Change::Pad(axis, before, after) => with_extent(shape, axis, before + shape[axis] + after),
            Change::Cast => shape.clone(),
            Change::Concat(axis, extents) => with_extent(shape, *axis, shape[*axis] + extents.iter().sum::<usize>()),
        }
    }
}

impl OpCase for Layout {
    fn inputs(&self) -> Vec<Tensor> {
        self.parts().iter().enumerate().map(|(number, shape)| randn(shape, number as u64)).collect()
    }

    fn run(&self, inputs: &[Tensor]) -> Result<Tensor> {
        let (x, rank) = (&inputs[0], self.shape.len() as isize);
        match &self.change {
            Change::Reshape(to) => x.reshape(&to[..]),
            Change::Permute(order) => x.permute(order),
            // One axis from the front, one from the back.
            &Change::Transpose(a, b) => x.transpose(a as isize, b as isize - rank),
            &Change::Narrow(axis, start, len) => x.narrow(axis as isize, start, len),
            &Change::Pad(axis, before, after) => x.pad(axis as isize - rank, before, after),
            Change::Broadcast(to) => x.broadcast_to(&to[..]),
            Change::Cast if x.dtype().size() == 2 => x.cast(DType::F32),
            Change::Cast => x.cast(x.dtype()),
            Change::Concat(axis, _) => concat(&inputs.iter().collect::<Vec<_>>(), *axis as isize),
        }
    }

    fn reference(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        let (shape, parts) = (&self.shape, self.parts());
        let value = |position: Vec<usize>| match &self.change {
            Change::Reshape(_) | Change::Cast => unreachable!("handled below"),
            Change::Permute(order) => {
                let mut source = vec![0; shape.len()];
                order.iter().zip(&position).for_each(|(&axis, &i)| source[axis] = i);
                at(&inputs[0], shape, &source)
            }
            &Change::Transpose(a, b) => {
                let mut source = position;
                source.swap(a, b);
                at(&inputs[0], shape, &source)
            }
            &Change::Narrow(axis, start, _) => {
                at(&inputs[0], shape, &with_extent(&position, axis, position[axis] + start))
            }
            &Change::Pad(axis, before, _) => match position[axis].checked_sub(before).filter(|&i| i < shape[axis]) {
                Some(i) => at(&inputs[0], shape, &with_extent(&position, axis, i)),
                None => 0.0,
            },
            Change::Broadcast(to) => {
                let tail = &position[to.len() - shape.len()..];
                let source: Vec<usize> = tail.iter().zip(shape).map(|(&i, &extent)| i.min(extent - 1)).collect();
                at(&inputs[0], shape, &source)
            }
            Change::Concat(axis, _) => {
                let (mut part, mut i) = (0, position[*axis]);
                while i >= parts[part][*axis] {
                    i -= parts[part][*axis];
                    part += 1;
                }
                at(&inputs[part], &parts[part], &with_extent(&position, *axis, i))
            }
        };
        match self.change {
            Change::Reshape(_) | Change::Cast => inputs[0].clone(),
            _ => positions(&self.output_shape()).into_iter().map(value).collect(),
        }
    }

    fn work(&self) -> Work {
        let count = |shape: &[usize]| shape.iter().product::<usize>();
        let moved = match self.change {
            Change::Reshape(_) => 0,
            // What is left out is not read.
            Change::Narrow(..) => 2 * count(&self.output_shape()),
            _ => self.parts().iter().map(|part| count(part)).sum::<usize>() + count(&self.output_shape()),
        };
        Work { bytes: 4 * moved as u64, flops: 0 }
    }
}

fn case(shape: &[usize], change: Change) -> Box<dyn OpCase> {
    Box::new(Layout { shape: shape.to_vec(), change })
}

fn cases() -> Vec<Box<dyn OpCase>> {
    use Change::*;
    let mut cases = vec![
        case(&[], Reshape(vec![1, 1])),
        case(&[6, 5], Reshape(vec![3, 2, 5])),
        case(&[0, 3], Reshape(vec![7, 0])),
        case(&[], Permute(vec![])),
        case(&[5], Permute(vec![0])),
        case(&[7, 11], Permute(vec![1, 0])),
        case(&[2, 3, 5, 7], Permute(vec![0, 2, 1, 3])),
        case(&[2, 3, 5, 7], Permute(vec![3, 1, 0, 2])),
        case(&[1, 4, 1], Permute(vec![2, 0, 1])),
        case(&[3, 0, 2], Permute(vec![2, 1, 0])),
        // Several pieces, whole runs and single elements.
        case(&[33, 31, 17], Permute(vec![1, 0, 2])),
        case(&[33, 31, 17], Permute(vec![2, 1, 0])),
        // Around tiles of 32, with axes on either side and between, in units of one and of four elements.
        case(&[31, 33], Permute(vec![1, 0])),
        case(&[2, 32, 65], Permute(vec![0, 2, 1])),
        case(&[17, 3, 16], Permute(vec![2, 1, 0])),
        case(&[18, 16, 4], Permute(vec![1, 0, 2])),
        case(&[2, 19, 17, 8], Permute(vec![2, 0, 1, 3])),
        case(&[3, 4, 5], Transpose(0, 2)),
        case(&[3, 4, 5], Transpose(1, 1)),
        case(&[7], Narrow(0, 2, 3)),
        case(&[3, 5, 2], Narrow(1, 4, 1)),
        case(&[3, 5, 2], Narrow(2, 0, 2)),
        case(&[3, 5, 2], Narrow(0, 3, 0)),
        case(&[0, 5], Narrow(1, 1, 3)),
        case(&[70, 131, 3], Narrow(1, 17, 101)),
        case(&[5, 6, 8], Narrow(1, 2, 3)),
        case(&[5, 24], Narrow(1, 8, 16)),
        case(&[1], Pad(0, 0, 0)),
        case(&[3, 5], Pad(0, 2, 1)),
        case(&[2, 3, 4], Pad(1, 0, 3)),
        case(&[2, 3, 4], Pad(2, 1, 0)),
        case(&[2, 0, 4], Pad(1, 1, 1)),
        case(&[3, 8], Pad(1, 16, 8)),
        case(&[2, 3, 16], Pad(1, 1, 2)),
        case(&[0, 2], Pad(1, 1, 1)),
        case(&[], Broadcast(vec![2, 3])),
        case(&[1], Broadcast(vec![1])),
        case(&[3, 1], Broadcast(vec![2, 3, 5])),
        case(&[1, 7], Broadcast(vec![4, 7])),
        case(&[2, 1, 3, 1], Broadcast(vec![2, 5, 3, 7])),
        case(&[1, 3], Broadcast(vec![0, 3])),
        case(&[3, 5], Cast),
        case(&[], Cast),
        case(&[0], Cast),
        case(&[9001], Cast),
        case(&[3], Concat(0, vec![])),
        case(&[2, 3], Concat(0, vec![1, 4])),
        case(&[2, 3], Concat(1, vec![0, 5])),
        case(&[2, 3, 5], Concat(1, vec![7])),
        case(&[2, 8], Concat(1, vec![16, 4])),
        case(&[0, 3], Concat(1, vec![2])),
    ];
    cases.push(case(&[41, 13, 17], Concat(1, vec![11, 2])));
    cases
}

/// Heads to the front, the shift of windows, and the joining of scales.
pub fn benchmarks() -> Vec<Box<dyn OpCase>> {
    vec![
        case(&[8, 3136, 3, 32], Change::Permute(vec![0, 2, 1, 3])),
        case(&[8, 3136, 96], Change::Permute(vec![0, 2, 1])),
        case(&[8, 56, 56, 96], Change::Pad(1, 0, 7)),
        case(&[8, 56, 56, 48], Change::Concat(3, vec![24, 12, 12])),
    ]
}

#[test]
fn layouts_agree_with_their_definition() {
    check(&cases());
}

#[test]
fn casts_round_and_send_gradients_back_in_their_own_dtype() {
    let x = Tensor::new(&[1.0f32, 1.0 + 1.0 / 512.0, -2.75], [3]).unwrap().variable().unwrap();
    let half = x.cast(DType::Bf16).unwrap();
    assert_eq!(half.to_f64_vec().unwrap(), [1.0, 1.0, -2.75]);
    let gradients = half.square().unwrap().sum_all().unwrap().backward().unwrap();
    assert_eq!(gradients.get(&x).unwrap().to_vec::<f32>().unwrap(), [2.0, 2.0, -5.5]);
    let integers = x.cast(DType::I64).unwrap();
    assert_eq!(integers.to_vec::<i64>().unwrap(), [1, 1, -2]);
    assert!(!integers.requires_grad());
}

/// Around the accesses of a GPU, with values that round, overflow or do not exist in the other type.
#[test]
fn casts_on_a_device_give_the_processors_bits() {
    let Some(device) = test_device() else { return };
    let special = [0.0, -0.0, 1.5, -2.75, 255.4, 300.0, 65519.0, 65520.0, -1e10, 1e30, f64::INFINITY, f64::NAN];
    let dtypes = [DType::F32, DType::Bf16, DType::F16, DType::I64, DType::U8];
    for elements in [0, 1, 7, 8, 9, 261] {
        let value = |i: usize| if i < 12 { special[i] } else { (i as f64 - 130.0) * 1.37 };
        for from in dtypes {
            let x = Tensor::from_index([elements], from, value).unwrap();
            for to in dtypes {
                let want = x.cast(to).unwrap().to_f64_vec().unwrap();
                let got = x.to_device(device).unwrap().cast(to).unwrap().to_f64_vec().unwrap();
                let same = got.iter().zip(&want).all(|(a, b)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()));
                assert!(same, "{from} to {to}: {got:?}, the processor gives {want:?}");
            }
        }
    }
}

#[test]
fn layouts_of_integers_are_the_same_on_a_device() {
    let Some(device) = test_device() else { return };
    let changes = |x: &Tensor| -> Vec<Tensor> {
        let results: Result<Vec<Tensor>> = [
            x.permute(&[2, 0, 1]),
            x.permute(&[1, 0, 2]),
            x.narrow(1, 3, 7),
            x.narrow(2, 16, 16),
            x.pad(1, 2, 1),
            x.reshape([2, 1, 20, 48]).and_then(|x| x.broadcast_to([2, 3, 20, 48])),
            concat(&[x, x], 2),
        ]
        .into_iter()
        .collect();
        results.unwrap()
    };
    for dtype in [DType::I64, DType::U8] {
        let x = Tensor::from_index([2, 20, 48], dtype, |i| (i * 7 % 251) as f64).unwrap();
        for (here, there) in changes(&x).iter().zip(changes(&x.to_device(device).unwrap())) {
            let bytes = there.to_device(here.device()).unwrap().raw_bytes().unwrap().to_vec();
            assert!(here.raw_bytes().unwrap() == bytes, "{dtype}, to {}", here.shape());
        }
    }
}

#[test]
fn bad_arguments_are_errors() {
    let x = randn(&[2, 3], 0);
    let message = |result: Result<Tensor>| result.unwrap_err().to_string();
    assert!(message(x.reshape([5])).contains("(2, 3) does not reshape to (5)"));
    assert!(message(x.reshape([usize::MAX, 2])).contains("too many elements"));
    assert!(message(x.permute(&[0, 0])).contains("[0, 0] does not order the axes of (2, 3)"));
    assert!(message(x.permute(&[0])).contains("does not order"));
    assert!(message(x.transpose(0, 2)).contains("axis 2"));
    assert!(message(x.narrow(1, 2, 2)).contains("2 from 2 on axis 1 of shape (2, 3)"));
    assert!(message(x.narrow(1, usize::MAX, 2)).contains("narrow"));
    assert!(message(x.narrow(-3, 0, 1)).contains("axis -3"));
    assert!(message(x.pad(0, usize::MAX, 1)).contains("overflow"));
    assert!(message(x.pad(0, usize::MAX / 2, 1)).contains("too many elements"));
    assert!(message(x.broadcast_to([3, 3])).contains("do not broadcast"));
    assert!(message(x.broadcast_to([3])).contains("does not broadcast to (3)"));
    assert!(message(randn(&[1], 0).broadcast_to([usize::MAX, 2])).contains("too many elements"));
    assert!(message(concat(&[], 0)).contains("no tensors"));
    assert!(message(concat(&[&x, &randn(&[2, 4], 0)], 0)).contains("(2, 3) and (2, 4) do not join on axis 0"));
    assert!(message(concat(&[&x, &randn(&[2], 0)], 0)).contains("do not join"));
    assert!(message(concat(&[&x, &x.cast(DType::F32).unwrap()], 0)).contains("dtype f32"));
    assert!(message(concat(&[&x], 2)).contains("axis 2"));
    if let Some(device) = test_device() {
        let x = x.cast(DType::F32).unwrap();
        assert!(message(concat(&[&x, &x.to_device(device).unwrap()], 0)).contains("concat: tensors are on cpu and"));
        let many = Tensor::zeros([2; 18], DType::U8).unwrap().to_device(device).unwrap();
        let order: Vec<usize> = (0..9).flat_map(|axis| [axis + 9, axis]).collect();
        assert!(message(many.permute(&order)).contains("axes that cannot be merged"));
    }
}
