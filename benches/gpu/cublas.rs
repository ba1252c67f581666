//! Attention by batched products of cuBLASLt and a softmax between them, on q, k and v that lie in groups already: what
//! is left to a library once the partition is paid for.

use gridgrad::{Device, Result, Tensor};

use crate::baseline::{Bench, Run};
use crate::composed::Attention;
use crate::not_there;
use crate::shapes::Op;

pub fn run(bench: &Bench<'_>) -> Result<Option<Run>> {
    let Op::Lsda { map, heads, head_width, group, interval } = bench.case.op else {
        return Ok(None);
    };
    if !matches!(bench.device, Device::Cuda(_)) {
        return Err(not_there(bench.device, "cuBLAS computes on NVIDIA GPUs"));
    }
    if !gridgrad::driver::has_cublaslt() {
        return Err(not_there(bench.device, "no cuBLASLt was found"));
    }
    let attention = Attention { batch: bench.case.batch, map, heads, head_width, group, interval };
    let n = attention.tokens();
    let part = vec![attention.groups(), heads, n, head_width];
    let shapes = [part.clone(), part.clone(), part, vec![1, heads, n, n]];
    let attend =
        move |inputs: &[Tensor]| attention.mix([inputs[0].clone(), inputs[1].clone(), inputs[2].clone()], &inputs[3]);
    bench.of_op(&shapes, 0, attend).map(Some)
}
