//! Pooling.

use std::fmt;

use gridgrad::ops::{Pool2dOptions, adaptive_avg_pool2d, avg_pool2d, global_avg_pool2d, max_pool2d};
use gridgrad::{DType, Result, Tensor};

use crate::harness::{OpCase, Work, check, randn};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Max(Pool2dOptions),
    Average(Pool2dOptions),
    Adaptive([usize; 2]),
    Global,
}

#[derive(Debug)]
struct Pool {
    /// batch, height, width, channels
    input: [usize; 4],
    kind: Kind,
}

impl fmt::Display for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// Windows along one axis as (first, end) in input coordinates, which may lie in the padding, and beyond it for `end`.
fn windows(extent: usize, kind: Kind, axis: usize) -> Vec<(isize, isize)> {
    match kind {
        Kind::Global => vec![(0, extent as isize)],
        Kind::Adaptive(size) => (0..size[axis])
            .map(|i| (i * extent / size[axis], ((i + 1) * extent).div_ceil(size[axis])))
            .map(|(first, end)| (first as isize, end as isize))
            .collect(),
        Kind::Max(options) | Kind::Average(options) => {
            let (kernel, stride, padding) = (options.kernel[axis], options.stride[axis], options.padding[axis]);
            let positions = extent + 2 * padding;
            (0..)
                .map(|i| i * stride)
                .take_while(|start| {
                    if options.ceil_mode {
                        // The first window that reaches the end is the last one.
                        start + kernel < positions + stride && *start < extent + padding
                    } else {
                        start + kernel <= positions
                    }
                })
                .map(|start| (start as isize - padding as isize, (start + kernel) as isize - padding as isize))
                .collect()
        }
    }
}

impl OpCase for Pool {
    fn inputs(&self) -> Vec<Tensor> {
        vec![randn(&self.input, 0)]
    }

    fn run(&self, inputs: &[Tensor]) -> Result<Tensor> {
        match self.kind {
            Kind::Max(options) => max_pool2d(&inputs[0], options),
            Kind::Average(options) => avg_pool2d(&inputs[0], options),
            Kind::Adaptive(size) => adaptive_avg_pool2d(&inputs[0], size),
            Kind::Global => global_avg_pool2d(&inputs[0]),
        }
    }

    fn reference(&self, inputs: &[Vec<f64>]) -> Vec<f64> {
        let [batch, height, width, channels] = self.input;
        let mut output = Vec::new();
        for b in 0..batch {
            for (top, bottom) in windows(height, self.kind, 0) {
                for (left, right) in windows(width, self.kind, 1) {
                    for c in 0..channels {
                        let inside = |x: isize, extent: usize| x >= 0 && x < extent as isize;
                        let values: Vec<f64> = (top..bottom)
                            .flat_map(|y| (left..right).map(move |x| (y, x)))
                            .filter(|&(y, x)| inside(y, height) && inside(x, width))
                            .map(|(y, x)| inputs[0][((b * height + y as usize) * width + x as usize) * channels + c])
                            .collect();
                        let count = match self.kind {
                            Kind::Average(options) if options.count_include_pad => {
                                let end = |end: isize, extent: usize, axis: usize| {
                                    end.min((extent + options.padding[axis]) as isize)
                                };
                                (end(bottom, height, 0) - top) * (end(right, width, 1) - left)
                            }
                            _ => values.len() as isize,
                        };
                        output.push(match self.kind {
                            Kind::Max(_) => values.into_iter().fold(f64::NEG_INFINITY, f64::max),
                            _ => values.into_iter().sum::<f64>() / count as f64,
                        });
                    }
                }
            }
        }
        output
    }

    fn work(&self) -> Work {
        let [batch, height, width, channels] = self.input;
        let (rows, columns) = (windows(height, self.kind, 0), windows(width, self.kind, 1));
        let read = |windows: &[(isize, isize)]| windows.iter().map(|(first, end)| end - first).sum::<isize>() as u64;
        let maps = (batch * channels) as u64;
        let values = self.input.iter().product::<usize>() as u64 + maps * (rows.len() * columns.len()) as u64;
        Work { bytes: 4 * values, flops: maps * read(&rows) * read(&columns) }
    }
}

fn pool(input: [usize; 4], kind: Kind) -> Box<dyn OpCase> {
    Box::new(Pool { input, kind })
}

fn cases() -> Vec<Box<dyn OpCase>> {
    let tiling = Pool2dOptions::tiling;
    let mut cases = Vec::new();
    for (input, options) in [
        ([1, 1, 1, 1], tiling([1, 1])),
        ([2, 6, 4, 3], tiling([2, 2])),
        ([1, 7, 5, 17], tiling([2, 3])),
        ([1, 7, 5, 2], Pool2dOptions { ceil_mode: true, ..tiling([2, 3]) }),
        ([2, 7, 8, 2], Pool2dOptions { stride: [2, 2], padding: [1, 1], ..tiling([3, 3]) }),
        ([1, 7, 8, 2], Pool2dOptions { stride: [2, 2], padding: [1, 1], count_include_pad: false, ..tiling([3, 3]) }),
        ([1, 8, 7, 2], Pool2dOptions { stride: [3, 2], padding: [1, 1], ceil_mode: true, ..tiling([3, 2]) }),
        // A last window that begins in the padding behind the map does not count.
        ([1, 5, 5, 1], Pool2dOptions { stride: [3, 3], padding: [1, 1], ceil_mode: true, ..tiling([2, 2]) }),
        ([1, 11, 13, 2], Pool2dOptions { stride: [5, 4], ..tiling([2, 1]) }),
        ([1, 3, 2, 2], Pool2dOptions { stride: [1, 1], padding: [2, 1], ..tiling([5, 3]) }),
        ([1, 7, 7, 3], Pool2dOptions { stride: [1, 1], ..tiling([5, 2]) }),
        ([0, 4, 4, 3], tiling([2, 2])),
        ([2, 4, 4, 0], tiling([2, 2])),
    ] {
        cases.push(pool(input, Kind::Max(options)));
        cases.push(pool(input, Kind::Average(options)));
    }
    for (input, size) in [
        ([1, 1, 1, 1], [1, 1]),
        ([2, 7, 5, 3], [3, 2]),
        ([1, 7, 7, 2], [1, 1]),
        ([1, 3, 2, 2], [5, 4]),
        ([2, 8, 6, 5], [4, 6]),
        ([0, 3, 3, 2], [2, 2]),
    ] {
        cases.push(pool(input, Kind::Adaptive(size)));
    }
    cases.extend([[1, 1, 1, 1], [3, 7, 5, 11], [0, 2, 2, 3]].map(|input| pool(input, Kind::Global)));
    cases
}

/// ImageNet's stem and VGG's pooling, and the end of a ResNet.
pub fn benchmarks() -> Vec<Box<dyn OpCase>> {
    let stem = Pool2dOptions { stride: [2; 2], padding: [1; 2], ..Pool2dOptions::tiling([3, 3]) };
    vec![
        pool([8, 112, 112, 64], Kind::Max(stem)),
        pool([128, 32, 32, 64], Kind::Max(Pool2dOptions::tiling([2, 2]))),
        pool([128, 32, 32, 64], Kind::Average(Pool2dOptions::tiling([2, 2]))),
        pool([128, 7, 7, 512], Kind::Global),
    ]
}

#[test]
fn pools_agree_with_their_definition() {
    check(&cases());
}

#[test]
fn the_first_of_equal_values_has_the_gradient_and_nan_wins() {
    let x = Tensor::new(&[1.0f32, 1.0, 0.0, 1.0], [1, 2, 2, 1]).unwrap().variable().unwrap();
    let options = Pool2dOptions::tiling([2, 2]);
    let gradients = max_pool2d(&x, options).unwrap().sum_all().unwrap().backward().unwrap();
    assert_eq!(gradients.get(&x).unwrap().to_vec::<f32>().unwrap(), [1.0, 0.0, 0.0, 0.0]);
    for place in 0..4 {
        let mut values = [0.0f32, f32::INFINITY, 2.0, 3.0];
        values[place] = f32::NAN;
        let x = Tensor::new(&values, [1, 2, 2, 1]).unwrap();
        assert!(max_pool2d(&x, options).unwrap().item().unwrap().is_nan(), "{place}");
    }
    let low = Tensor::full([1, 2, 2, 1], f64::NEG_INFINITY, DType::F32).unwrap();
    assert_eq!(max_pool2d(&low, options).unwrap().item().unwrap(), f64::NEG_INFINITY);
}

#[test]
fn bad_arguments_are_errors() {
    let x = randn(&[1, 4, 5, 2], 0);
    let good = Pool2dOptions::tiling([2, 2]);
    for pool in [max_pool2d, avg_pool2d] {
        let refuse = |options| pool(&x, options).unwrap_err().to_string();
        assert!(refuse(Pool2dOptions { stride: [1, 0], ..good }).contains("must be positive"));
        assert!(refuse(Pool2dOptions { kernel: [0, 1], ..good }).contains("must be positive"));
        assert!(refuse(Pool2dOptions { padding: [2, 0], ..good }).contains("more than half the kernel"));
        assert!(refuse(Pool2dOptions::tiling([5, 2])).contains("larger than the padded input"));
        assert!(
            refuse(Pool2dOptions { kernel: [usize::MAX; 2], padding: [usize::MAX / 2; 2], ..good }).contains("larger")
        );
        let far = Pool2dOptions { stride: [usize::MAX; 2], ceil_mode: true, ..good };
        assert_eq!(**pool(&x, far).unwrap().shape(), [1, 1, 1, 2]);
        assert!(pool(&randn(&[4, 5, 2], 0), good).unwrap_err().to_string().contains("expected input"));
        assert!(pool(&Tensor::zeros([1, 4, 4, 1], DType::I64).unwrap(), good).unwrap_err().to_string().contains("i64"));
        assert!(pool(&Tensor::zeros([1, 0, 4, 1], DType::F32).unwrap(), good).is_err());
    }
    assert!(adaptive_avg_pool2d(&x, [0, 1]).unwrap_err().to_string().contains("must be positive"));
    assert!(adaptive_avg_pool2d(&x, [usize::MAX, 2]).unwrap_err().to_string().contains("too many elements"));
    assert!(global_avg_pool2d(&Tensor::zeros([1, 0, 4, 1], DType::F32).unwrap()).is_err());
}
