//! Reading and adding by index.

use std::fmt;

use gridgrad::ops::embedding;
use gridgrad::random::Philox;
use gridgrad::{DType, Result, Tensor};

use crate::harness::{OpCase, Work, check, randn};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Embedding,
    IndexSelect,
    IndexAdd,
    Gather,
    ScatterAdd,
}

/// Shape (outer, extent, inner), `count` indices on the middle axis.
#[derive(Debug)]
struct ByIndex {
    kind: Kind,
    shape: [usize; 3],
    count: usize,
}

impl fmt::Display for ByIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

impl OpCase for ByIndex {
    fn inputs(&self) -> Vec<Tensor> {
        let [outer, extent, inner] = self.shape;
        let random = |shape: &[usize]| {
            let value = |i: usize| (Philox::new(7).uniform_f64(i as u64) * extent as f64).floor();
            Tensor::from_index(shape, DType::I64, value).unwrap()
        };
        let part = [outer, self.count, inner];
        match self.kind {
            Kind::Embedding => vec![randn(&[extent, inner], 0), random(&[outer, self.count])],
            Kind::IndexSelect => vec![randn(&self.shape, 0), random(&[self.count])],
            Kind::IndexAdd => vec![randn(&self.shape, 0), random(&[self.count]), randn(&part, 1)],
            Kind::Gather => vec![randn(&self.shape, 0), random(&part)],
            Kind::ScatterAdd => vec![randn(&self.shape, 0), random(&part), randn(&part, 1)],
        }
    }

    fn run(&self, inputs: &[Tensor]) -> Result<Tensor> {
        match self.kind {
            Kind::Embedding => embedding(&inputs[0], &inputs[1]),
            Kind::IndexSelect => inputs[0].index_select(1, &inputs[1]),
            Kind::IndexAdd => inputs[0].index_add(-2, &inputs[1], &inputs[2]),
            Kind::Gather => inputs[0].gather(1, &inputs[1]),
            Kind::ScatterAdd => inputs[0].scatter_add(-2, &inputs[1], &inputs[2]),
        }
    }

    fn reference(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        let [outer, extent, inner] = self.shape;
        let mut sums = inputs[0].clone();
        let mut read = Vec::new();
        for o in 0..outer {
            for i in 0..self.count {
                for j in 0..inner {
                    let place = (o * self.count + i) * inner + j;
                    let index = match self.kind {
                        Kind::Embedding => inputs[1][o * self.count + i],
                        Kind::IndexSelect | Kind::IndexAdd => inputs[1][i],
                        Kind::Gather | Kind::ScatterAdd => inputs[1][place],
                    } as usize;
                    let outer = if self.kind == Kind::Embedding { 0 } else { o };
                    let at = (outer * extent + index) * inner + j;
                    match self.kind {
                        Kind::IndexAdd | Kind::ScatterAdd => sums[at] += inputs[2][place],
                        _ => read.push(inputs[0][at]),
                    }
                }
            }
        }
        if matches!(self.kind, Kind::IndexAdd | Kind::ScatterAdd) { sums } else { read }
    }

    fn work(&self) -> Work {
        let [outer, extent, inner] = self.shape.map(|extent| extent as u64);
        let moved = outer * self.count as u64 * inner;
        let (values, indices) = match self.kind {
            Kind::Embedding => (2 * moved, outer * self.count as u64),
            Kind::IndexSelect => (2 * moved, self.count as u64),
            Kind::Gather => (2 * moved, moved),
            Kind::IndexAdd => (moved + 2 * outer * extent * inner, self.count as u64),
            Kind::ScatterAdd => (moved + 2 * outer * extent * inner, moved),
        };
        let adds = matches!(self.kind, Kind::IndexAdd | Kind::ScatterAdd);
        Work { bytes: 4 * values + 8 * indices, flops: if adds { moved } else { 0 } }
    }
}

const KINDS: [Kind; 5] = [Kind::Embedding, Kind::IndexSelect, Kind::IndexAdd, Kind::Gather, Kind::ScatterAdd];

fn cases() -> Vec<Box<dyn OpCase>> {
    let shapes = [
        ([1, 1, 1], 1),
        ([2, 3, 5], 7),
        ([3, 7, 1], 2),
        ([1, 5, 13], 11),
        // Nothing to read, and nothing read.
        ([2, 4, 3], 0),
        ([0, 4, 3], 2),
        ([2, 4, 0], 2),
        ([2, 0, 3], 0),
        // Several pieces.
        ([3, 50, 129], 171),
        // A GPU's vectors, and rows with so many readers that their sums are split.
        ([2, 3, 8], 200),
        ([1, 2, 1], 130),
    ];
    let case = |kind, (shape, count)| Box::new(ByIndex { kind, shape, count }) as Box<dyn OpCase>;
    shapes.into_iter().flat_map(|shape| KINDS.map(|kind| case(kind, shape))).collect()
}

/// The classes of a conditional generator, and the relative positions of a window's biases.
pub fn benchmarks() -> Vec<Box<dyn OpCase>> {
    let case = |kind, shape, count| Box::new(ByIndex { kind, shape, count }) as Box<dyn OpCase>;
    vec![
        case(Kind::Embedding, [1, 1000, 512], 4096),
        case(Kind::IndexSelect, [12, 169, 1], 2401),
        case(Kind::IndexAdd, [1, 1000, 512], 4096),
        case(Kind::Gather, [4096, 1000, 1], 1),
    ]
}

#[test]
fn indices_agree_with_their_definition() {
    check(&cases());
}

#[test]
fn bad_indices_are_errors() {
    let x = randn(&[2, 3, 4], 0);
    let indices = |values: &[i64], shape: &[usize]| Tensor::new(values, shape).unwrap();
    let message = |result: Result<Tensor>| result.unwrap_err().to_string();
    let outside = message(x.index_select(1, &indices(&[0, 3], &[2])));
    assert_eq!(outside, "index_select: index 3 (number 1) on axis 1 of extent 3");
    assert!(message(x.index_select(1, &indices(&[-1], &[1]))).contains("index -1"));
    assert!(message(embedding(&randn(&[3, 2], 0), &indices(&[i64::MAX], &[1]))).contains("of extent 3"));
    assert!(message(embedding(&x, &indices(&[0], &[1]))).contains("weight (entries, features)"));
    assert!(message(x.index_select(3, &indices(&[0], &[1]))).contains("axis 3"));
    assert!(message(x.index_select(1, &indices(&[0], &[1, 1]))).contains("indices (count)"));
    assert!(message(x.index_select(1, &randn(&[1], 0))).contains("dtype f64"));
    assert!(message(x.gather(1, &indices(&[0; 8], &[2, 4]))).contains("indices (2, 4)"));
    assert!(message(x.gather(1, &indices(&[0; 12], &[3, 1, 4]))).contains("indices (3, 1, 4)"));
    assert!(message(x.gather(1, &indices(&[5; 8], &[2, 1, 4]))).contains("index 5 (number 0) on axis 1 of extent 3"));
    assert!(message(x.scatter_add(1, &indices(&[0; 8], &[2, 1, 4]), &x)).contains("source (2, 3, 4)"));
    assert!(message(x.index_add(0, &indices(&[0], &[1]), &x)).contains("expected (1, 3, 4)"));
    let labels = Tensor::zeros([2, 3], DType::I64).unwrap();
    assert!(message(labels.gather(1, &indices(&[0, 0], &[2, 1]))).contains("dtype i64"));
}
