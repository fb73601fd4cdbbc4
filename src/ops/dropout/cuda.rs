//! The CUDA half: see `kernels/dropout.cu`.

use candle_core::Tensor;
use half::bf16;

use super::Dropout;
use crate::Result;
use crate::gpu::kernels::{Arg, LaunchGrid, kernel_set};
use crate::gpu::{Context, input};

kernel_set!(DropoutKernels { dropout });

/// As [`super::dropout`], in bf16.
pub fn dropout(x: &Tensor, op: &Dropout) -> Result<Tensor> {
    let n = x.elem_count();
    let gpu = Context::of_tensor(x)?;
    let (y, to) = gpu.output::<bf16>(x.shape())?;
    let args = [
        input::<bf16>(x)?.into(),
        n.into(),
        Arg::Ptr(op.seed),
        Arg::Int(op.threshold as i32),
        op.scale.into(),
        to.into(),
    ];
    // SAFETY: shapes as in the kernel's contract; the seed is a 64-bit number, as an address is.
    unsafe { gpu.launch(&gpu.kernels::<DropoutKernels>()?.dropout, LaunchGrid::new(n.div_ceil(512), 256), &args)? };
    Ok(y)
}
