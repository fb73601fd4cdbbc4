//! The CUDA half: see `kernels/dropout.cu`.

use candle_core::Tensor;
use half::bf16;

use super::Dropout;
use crate::Result;
use crate::gpu::kernels::{Arg, Grid, launch};
use crate::gpu::{input, output};

/// As [`super::dropout`], in bf16.
pub fn dropout(x: &Tensor, op: &Dropout) -> Result<Tensor> {
    let n = x.elem_count();
    let device = x.device().as_cuda_device()?;
    let (y, to) = output::<bf16>(device, x.shape())?;
    let args = [
        input::<bf16>(x)?.into(),
        n.into(),
        Arg::Ptr(op.seed),
        Arg::Int(op.threshold as i32),
        op.scale.into(),
        to.into(),
    ];
    // SAFETY: shapes as the kernel's contract; the seed is a 64-bit number, as an address is.
    unsafe { launch(device, "dropout", Grid::new(n.div_ceil(512), 256), &args)? };
    Ok(y)
}
