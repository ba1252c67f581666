//! Convolutions, by the algorithm that the library's own search finds to be the fastest.

use std::ffi::c_void;

use cudarc::cudnn::sys::{self, cudnnStatus_t as Status};

use super::{ConvolutionDescriptor, Cudnn, FilterDescriptor, TensorDescriptor};
use super::{bytes, data_type, int, one, pointer, zero};
use crate::gpu::Memory;
use crate::{DType, Error, Result, Tensor};

/// The order in which a map lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// (batch, height, width, channels), and weights (out, height, width, channels): this crate's order of maps.
    ChannelsLast,
    /// (batch, channels, height, width), and weights (out, channels, height, width).
    ChannelsFirst,
}

impl Layout {
    pub(super) fn format(self) -> sys::cudnnTensorFormat_t {
        match self {
            Layout::ChannelsLast => sys::cudnnTensorFormat_t::CUDNN_TENSOR_NHWC,
            Layout::ChannelsFirst => sys::cudnnTensorFormat_t::CUDNN_TENSOR_NCHW,
        }
    }
}

/// What is computed of x, the weight w, and y or its gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// y from x and w.
    Forward,
    /// The gradient of x from w and that of y.
    Input,
    /// The gradient of w from x and that of y.
    Weight,
}

/// A convolution of square windows, without groups and dilation.
#[derive(Clone, Copy, Debug)]
pub struct Windows {
    /// Of all tensors.
    pub dtype: DType,
    /// Images, height, width and channels of x.
    pub input: [usize; 4],
    /// Channels of y.
    pub out: usize,
    /// Side of a window.
    pub side: usize,
    /// Steps between windows.
    pub stride: usize,
    /// Zeros around x.
    pub padding: usize,
}

impl Windows {
    /// Height and width of y; `None` where x has no window.
    pub fn output_map(&self) -> Option<[usize; 2]> {
        let along = |extent: usize| {
            let room = (extent + 2 * self.padding).checked_sub(self.side)?;
            room.checked_div(self.stride).map(|steps| steps + 1)
        };
        Some([along(self.input[1])?, along(self.input[2])?])
    }

    /// Elements of x, w and y.
    fn elements(&self, [height, width]: [usize; 2]) -> [usize; 3] {
        let [batch, _, _, channels] = self.input;
        let weight = self.out * self.side * self.side * channels;
        [self.input.iter().product(), weight, batch * height * width * self.out]
    }
}

#[derive(Clone, Copy)]
enum Algorithm {
    Forward(sys::cudnnConvolutionFwdAlgo_t),
    Input(sys::cudnnConvolutionBwdDataAlgo_t),
    Weight(sys::cudnnConvolutionBwdFilterAlgo_t),
}

/// What the search measured of one algorithm.
struct Found {
    algorithm: Algorithm,
    status: Status,
    milliseconds: f32,
    workspace: usize,
    math: sys::cudnnMathType_t,
}

/// One pass of a convolution with its algorithm.
pub struct Convolution<'a> {
    cudnn: &'a Cudnn,
    pass: Pass,
    dtype: DType,
    elements: [usize; 3],
    x: TensorDescriptor,
    w: FilterDescriptor,
    y: TensorDescriptor,
    convolution: ConvolutionDescriptor,
    algorithm: Algorithm,
    workspace: Option<Memory>,
    milliseconds: f32,
}

/// The most memory that an algorithm may work in.
const MOST_WORKSPACE: usize = 1 << 30;
/// Results that a search may give: every algorithm, with and without tensor cores.
const MOST_RESULTS: usize = 16;

impl<'a> Convolution<'a> {
    /// Searches among all algorithms, on these tensors, for the fastest with up to a gigabyte of workspace. Operands and
    /// output are those of [`Pass`], in its order; their values are overwritten or not looked at.
    ///
    /// # Errors
    /// Where the tensors do not fit, or the library has no algorithm for the problem.
    pub fn search(
        cudnn: &'a Cudnn,
        windows: Windows,
        layout: Layout,
        pass: Pass,
        operands: [&Tensor; 2],
        output: &mut Tensor,
    ) -> Result<Self> {
        let Windows { dtype, input: [n, h, w, c], out, side, stride, padding } = windows;
        let no_window = || Error::shape("cudnn", format!("{windows:?} has no window"));
        let [rows, columns] = windows.output_map().ok_or_else(no_window)?;
        let mut convolution = Convolution {
            cudnn,
            pass,
            dtype,
            elements: windows.elements([rows, columns]),
            x: TensorDescriptor::map(cudnn, layout, dtype, [n, c, h, w])?,
            w: filter(cudnn, layout, dtype, [out, c, side, side])?,
            y: TensorDescriptor::map(cudnn, layout, dtype, [n, out, rows, columns])?,
            convolution: describe(cudnn, dtype, stride, padding)?,
            algorithm: Algorithm::Forward(
                sys::cudnnConvolutionFwdAlgo_t::CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM,
            ),
            workspace: None,
            milliseconds: f32::INFINITY,
        };
        let best = convolution.find(operands, output)?;
        // SAFETY: the descriptor is alive.
        let status = unsafe { sys::cudnnSetConvolutionMathType(convolution.convolution.0, best.math) };
        super::accept(cudnn.gpu, "cudnnSetConvolutionMathType", status)?;
        convolution.algorithm = best.algorithm;
        convolution.milliseconds = best.milliseconds;
        convolution.workspace = cudnn.workspace(best.workspace)?;
        Ok(convolution)
    }

    /// What the search measured, in milliseconds.
    pub fn milliseconds(&self) -> f32 {
        self.milliseconds
    }

    fn find(&self, operands: [&Tensor; 2], output: &mut Tensor) -> Result<Found> {
        // Whatever the device has, from a gigabyte down.
        let sizes = std::iter::successors(Some(MOST_WORKSPACE), |size| (*size > 1 << 20).then_some(size / 4));
        let room = sizes
            .map(|size| self.cudnn.workspace(size))
            .find(|room| !matches!(room, Err(Error::OutOfDeviceMemory { .. })));
        let room = room.transpose()?.flatten();
        let [first, second, target] = self.addresses(operands, output)?;
        let results = match self.pass {
            Pass::Forward => self.find_forward(first, second, target.cast_mut(), &room)?,
            Pass::Input => self.find_input(first, second, target.cast_mut(), &room)?,
            Pass::Weight => self.find_weight(first, second, target.cast_mut(), &room)?,
        };
        let usable = |found: &Found| found.status == Status::CUDNN_STATUS_SUCCESS && found.workspace <= bytes(&room);
        let best = results.into_iter().filter(usable).min_by(|a, b| a.milliseconds.total_cmp(&b.milliseconds));
        best.ok_or_else(|| Error::Gpu {
            device: self.cudnn.gpu.device(),
            call: "cudnnFindConvolution",
            reason: format!("no algorithm for {:?} in {}", self.pass, self.dtype),
        })
    }

    /// Where operands and output are, compared with what the pass reads and writes.
    fn addresses(&self, [first, second]: [&Tensor; 2], output: &mut Tensor) -> Result<[*const c_void; 3]> {
        let [x, w, y] = self.elements;
        let [one, two, target] = match self.pass {
            Pass::Forward => [x, w, y],
            Pass::Input => [w, y, x],
            Pass::Weight => [x, y, w],
        };
        let read = |tensor, elements| self.cudnn.read(tensor, self.dtype, elements);
        Ok([read(first, one)?, read(second, two)?, self.cudnn.write(output, self.dtype, target)?.cast_const()])
    }

    /// Computes the pass.
    ///
    /// # Errors
    /// Where tensors do not fit, or the library fails.
    pub fn run(&self, operands: [&Tensor; 2], output: &mut Tensor) -> Result<()> {
        let [first, second, target] = self.addresses(operands, output)?;
        let target = target.cast_mut();
        let (x, w, y, convolution) = (self.x.0, self.w.0, self.y.0, self.convolution.0);
        let (workspace, size) = (pointer(&self.workspace), bytes(&self.workspace));
        self.cudnn.call("cudnnConvolution", |handle| {
            // SAFETY: descriptors and workspace live as long as `self`; the addresses are of live memory as large as the
            // descriptors say, and the factors are read before the call returns. Later work in the stream comes after.
            unsafe {
                match self.algorithm {
                    Algorithm::Forward(algorithm) => sys::cudnnConvolutionForward(
                        handle,
                        one(),
                        x,
                        first,
                        w,
                        second,
                        convolution,
                        algorithm,
                        workspace,
                        size,
                        zero(),
                        y,
                        target,
                    ),
                    Algorithm::Input(algorithm) => sys::cudnnConvolutionBackwardData(
                        handle,
                        one(),
                        w,
                        first,
                        y,
                        second,
                        convolution,
                        algorithm,
                        workspace,
                        size,
                        zero(),
                        x,
                        target,
                    ),
                    Algorithm::Weight(algorithm) => sys::cudnnConvolutionBackwardFilter(
                        handle,
                        one(),
                        x,
                        first,
                        y,
                        second,
                        convolution,
                        algorithm,
                        workspace,
                        size,
                        zero(),
                        w,
                        target,
                    ),
                }
            }
        })
    }
}

/// Declares a search of one pass.
macro_rules! find {
    ($name:ident, $call:ident, $result:ident, $first:ident, $second:ident, $target:ident, $algorithm:ident) => {
        fn $name(
            &self,
            first: *const c_void,
            second: *const c_void,
            target: *mut c_void,
            room: &Option<Memory>,
        ) -> Result<Vec<Found>> {
            let mut results = [std::mem::MaybeUninit::<sys::$result>::uninit(); MOST_RESULTS];
            let mut count = 0;
            let (place, counter) = (results.as_mut_ptr().cast(), &raw mut count);
            let [first_descriptor, second_descriptor] = [self.$first.0.cast::<c_void>(), self.$second.0.cast()];
            self.cudnn.call(stringify!($call), |handle| {
                // SAFETY: descriptors live as long as `self`; the addresses are of live memory as large as the
                // descriptors say. At most `MOST_RESULTS` results and one number are written, to places that outlive
                // the call.
                unsafe {
                    sys::$call(
                        handle,
                        first_descriptor.cast(),
                        first,
                        second_descriptor.cast(),
                        second,
                        self.convolution.0,
                        self.$target.0,
                        target,
                        MOST_RESULTS as i32,
                        counter,
                        place,
                        pointer(room),
                        bytes(room),
                    )
                }
            })?;
            let count = usize::try_from(count).unwrap_or(0).min(MOST_RESULTS);
            let found = results[..count].iter().map(|result| {
                // SAFETY: the library wrote the first `count` results.
                let result = unsafe { result.assume_init() };
                Found {
                    algorithm: Algorithm::$algorithm(result.algo),
                    status: result.status,
                    milliseconds: result.time,
                    workspace: result.memory,
                    math: result.mathType,
                }
            });
            Ok(found.collect())
        }
    };
}

impl Convolution<'_> {
    find!(find_forward, cudnnFindConvolutionForwardAlgorithmEx, cudnnConvolutionFwdAlgoPerf_t, x, w, y, Forward);
    find!(find_input, cudnnFindConvolutionBackwardDataAlgorithmEx, cudnnConvolutionBwdDataAlgoPerf_t, w, y, x, Input);
    find!(
        find_weight,
        cudnnFindConvolutionBackwardFilterAlgorithmEx,
        cudnnConvolutionBwdFilterAlgoPerf_t,
        x,
        y,
        w,
        Weight
    );
}

/// A weight (out, channels, height, width), in either layout.
fn filter(cudnn: &Cudnn, layout: Layout, dtype: DType, extents: [usize; 4]) -> Result<FilterDescriptor> {
    let descriptor = FilterDescriptor::new(cudnn)?;
    let [k, c, h, w] = [int(extents[0])?, int(extents[1])?, int(extents[2])?, int(extents[3])?];
    // SAFETY: the descriptor is alive.
    let status =
        unsafe { sys::cudnnSetFilter4dDescriptor(descriptor.0, data_type(dtype)?, layout.format(), k, c, h, w) };
    super::accept(cudnn.gpu, "cudnnSetFilter4dDescriptor", status)?;
    Ok(descriptor)
}

/// Sums are `f32` for all dtypes; factors are not rounded to TF32, as this crate's are not.
fn describe(cudnn: &Cudnn, dtype: DType, stride: usize, padding: usize) -> Result<ConvolutionDescriptor> {
    let descriptor = ConvolutionDescriptor::new(cudnn)?;
    let (stride, padding) = (int(stride)?, int(padding)?);
    let mode = sys::cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION;
    let sums = sys::cudnnDataType_t::CUDNN_DATA_FLOAT;
    // SAFETY: the descriptor is alive.
    let status = unsafe {
        sys::cudnnSetConvolution2dDescriptor(descriptor.0, padding, padding, stride, stride, 1, 1, mode, sums)
    };
    super::accept(cudnn.gpu, "cudnnSetConvolution2dDescriptor", status)?;
    let math = match dtype {
        DType::F32 => sys::cudnnMathType_t::CUDNN_FMA_MATH,
        _ => sys::cudnnMathType_t::CUDNN_TENSOR_OP_MATH,
    };
    // SAFETY: the descriptor is alive.
    let status = unsafe { sys::cudnnSetConvolutionMathType(descriptor.0, math) };
    super::accept(cudnn.gpu, "cudnnSetConvolutionMathType", status)?;
    Ok(descriptor)
}
