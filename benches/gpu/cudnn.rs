//! cuDNN: convolutions by the best algorithm of its own search in the better of two layouts, pooling, batch norm, softmax.

use std::cell::OnceCell;

use gridgrad::driver::cudnn::{BatchNorm, Convolution, Cudnn, Layout, MaxPool, Pass, Softmax, Windows};
use gridgrad::{DType, Device, Error, Result, Tensor};

use crate::baseline::{Bench, Run};
use crate::model::Direction;
use crate::ours::EPS;
use crate::shapes::Op;

thread_local! {
    /// One handle for all measurements, never given back: they borrow it.
    static LIBRARY: OnceCell<&'static Cudnn> = const { OnceCell::new() };
}

fn library(device: Device) -> Result<&'static Cudnn> {
    LIBRARY.with(|library| match library.get() {
        Some(found) => Ok(*found),
        None => {
            let opened: &'static Cudnn = Box::leak(Box::new(Cudnn::open(device)?));
            Ok(*library.get_or_init(|| opened))
        }
    })
}

pub fn run(bench: &Bench<'_>) -> Result<Option<Run>> {
    let (dtype, batch) = (bench.dtype, bench.case.batch);
    let run = match &bench.case.op {
        Op::CrossScaleEmbedding { map: [h, w], channels, sides, out, stride, image } => {
            let cudnn = library(bench.device)?;
            let windows = sides.iter().zip(out).map(|(&side, &out)| {
                let padding = (side - stride) / 2;
                Windows { dtype, input: [batch, *h, *w, *channels], out, side, stride: *stride, padding }
            });
            convolutions(bench, cudnn, &windows.collect::<Vec<_>>(), *image)
        }
        Op::Softmax { rows, width } => softmax(bench, library(bench.device)?, batch * rows, *width),
        Op::MaxPool { map: [h, w], channels } => {
            let cudnn = library(bench.device)?;
            let input = [batch, *h, *w, *channels];
            pool(bench, cudnn, Windows { dtype, input, out: *channels, side: 3, stride: 2, padding: 1 })
        }
        Op::BatchNorm { map: [h, w], channels } => {
            batch_norm(bench, library(bench.device)?, [batch, *h, *w, *channels])
        }
        // Layer norm and attention are in its graph interface alone, which the bindings lack.
        _ => return Ok(None),
    };
    run.map(Some)
}

/// A convolution's pass with its own output and gradient, in one layout; x is shared.
struct Part {
    windows: Windows,
    convolution: Convolution<'static>,
    pass: Pass,
    weight: Tensor,
    y: Tensor,
    output: Tensor,
}

/// The separate convolutions one after the other: forward, or the gradients of weights and, but for images, input.
fn convolutions(bench: &Bench<'_>, cudnn: &'static Cudnn, windows: &[Windows], image: bool) -> Result<Run> {
    let passes: &[Pass] = match (bench.direction, image) {
        (Direction::Forward, _) => &[Pass::Forward],
        (Direction::Backward, true) => &[Pass::Weight],
        (Direction::Backward, false) => &[Pass::Weight, Pass::Input],
    };
    let input = windows[0].input;
    let copies = bench.copies(input.iter().product());
    let images: Vec<Tensor> = (0..copies).map(|copy| bench.random(&input, copy as u64)).collect::<Result<_>>()?;
    let mut parts = Vec::new();
    for &windows in windows {
        for &pass in passes {
            parts.push(Part::new(bench, cudnn, windows, pass, &images[0])?);
        }
    }
    Ok(Box::new(move |copy| parts.iter_mut().try_for_each(|part| part.run(&images[copy % images.len()]))))
}

impl Part {
    fn new(bench: &Bench<'_>, cudnn: &'static Cudnn, windows: Windows, pass: Pass, x: &Tensor) -> Result<Self> {
        let Windows { input: [batch, _, _, channels], out, side, .. } = windows;
        let no_window = || Error::Config(format!("{windows:?} has no window"));
        let [rows, columns] = windows.output_map().ok_or_else(no_window)?;
        let weight = bench.random(&[out, side, side, channels], 1)?;
        let y = bench.random(&[batch, rows, columns, out], 2)?;
        let mut output = match pass {
            Pass::Forward => bench.random(y.shape(), 3)?,
            Pass::Input => bench.random(&windows.input, 3)?,
            Pass::Weight => bench.random(weight.shape(), 3)?,
        };
        // Only one layout may have an algorithm.
        let mut found = [Layout::ChannelsLast, Layout::ChannelsFirst].map(|layout| {
            let operands = operands(pass, x, &weight, &y);
            Convolution::search(cudnn, windows, layout, pass, operands, &mut output)
        });
        found.sort_by(|a, b| {
            let time =
                |found: &Result<Convolution<'_>>| found.as_ref().map_or(f32::INFINITY, Convolution::milliseconds);
            time(a).total_cmp(&time(b))
        });
        let [best, _] = found;
        Ok(Part { windows, convolution: best?, pass, weight, y, output })
    }

    fn run(&mut self, x: &Tensor) -> Result<()> {
        debug_assert_eq!(self.windows.input.iter().product::<usize>(), x.elements());
        self.convolution.run(operands(self.pass, x, &self.weight, &self.y), &mut self.output)
    }
}

/// In the order of `Pass`.
fn operands<'t>(pass: Pass, x: &'t Tensor, weight: &'t Tensor, y: &'t Tensor) -> [&'t Tensor; 2] {
    match pass {
        Pass::Forward => [x, weight],
        Pass::Input => [weight, y],
        Pass::Weight => [x, y],
    }
}

fn softmax(bench: &Bench<'_>, cudnn: &'static Cudnn, rows: usize, width: usize) -> Result<Run> {
    let softmax = Softmax::new(cudnn, bench.dtype, rows, width)?;
    let maps = copies(bench, &[rows, width], 1)?;
    let grads = copies(bench, &[rows, width], 1 << 20)?;
    let mut output = bench.random(&[rows, width], 0)?;
    if bench.direction == Direction::Forward {
        softmax.forward(&maps[0], &mut output)?;
        return Ok(Box::new(move |copy| softmax.forward(&maps[copy % maps.len()], &mut output)));
    }
    softmax.backward(&maps[0], &grads[0], &mut output)?;
    Ok(Box::new(move |copy| softmax.backward(&maps[copy % maps.len()], &grads[copy % grads.len()], &mut output)))
}

fn pool(bench: &Bench<'_>, cudnn: &'static Cudnn, windows: Windows) -> Result<Run> {
    let no_window = || Error::Config(format!("{windows:?} has no window"));
    let [rows, columns] = windows.output_map().ok_or_else(no_window)?;
    let [batch, _, _, channels] = windows.input;
    let pool = MaxPool::new(cudnn, windows)?;
    let maps = copies(bench, &windows.input, 1)?;
    let small = [batch, rows, columns, channels];
    let mut output = bench.random(&small, 0)?;
    pool.forward(&maps[0], &mut output)?;
    if bench.direction == Direction::Forward {
        return Ok(Box::new(move |copy| pool.forward(&maps[copy % maps.len()], &mut output)));
    }
    let outputs: Vec<Tensor> = maps
        .iter()
        .map(|map| {
            let mut output = bench.random(&small, 0)?;
            pool.forward(map, &mut output)?;
            Ok(output)
        })
        .collect::<Result<_>>()?;
    let (grad, mut gradient) = (bench.random(&small, 1)?, bench.random(&windows.input, 2)?);
    Ok(Box::new(move |copy| {
        let copy = copy % maps.len();
        pool.backward(&maps[copy], &outputs[copy], &grad, &mut gradient)
    }))
}

fn batch_norm(bench: &Bench<'_>, cudnn: &'static Cudnn, extents: [usize; 4]) -> Result<Run> {
    let mut norm = BatchNorm::new(cudnn, bench.dtype, extents, EPS)?;
    let maps = copies(bench, &extents, 1)?;
    let parameter = |number| bench.random_as(&[extents[3]], number, DType::F32);
    let (weight, bias) = (parameter(0)?, parameter(1)?);
    let mut output = bench.random(&extents, 0)?;
    norm.forward(&maps[0], [&weight, &bias], &mut output)?;
    if bench.direction == Direction::Forward {
        return Ok(Box::new(move |copy| norm.forward(&maps[copy % maps.len()], [&weight, &bias], &mut output)));
    }
    // The statistics are those of the first copy; what is read and computed is the same.
    let grads = copies(bench, &extents, 1 << 20)?;
    let (mut weight_grad, mut bias_grad) = (parameter(2)?, parameter(3)?);
    Ok(Box::new(move |copy| {
        let copy = copy % maps.len();
        let results = [&mut output, &mut weight_grad, &mut bias_grad];
        norm.backward(&maps[copy], [&weight, &bias], &grads[copy], results)
    }))
}

fn copies(bench: &Bench<'_>, shape: &[usize], first: u64) -> Result<Vec<Tensor>> {
    let count = bench.copies(shape.iter().product());
    (0..count as u64).map(|copy| bench.random(shape, first + copy)).collect()
}
