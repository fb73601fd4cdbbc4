//! The CUDA half: see `kernels/norm.cu`.

use candle_core::Tensor;
use half::bf16;

use crate::gpu::constants::NORM_VALUES_PER_THREAD;
use crate::gpu::kernels::{LaunchGrid, kernel_set};
use crate::gpu::{Context, input};
use crate::{Error, Result};

kernel_set!(NormKernels { rms_norm, add_rms_norm, rms_norm_backward });

/// As [`super::rms_norm`], `x` f32 and the result bf16.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    let (t, n, grid) = shape(x, weight)?;
    let gpu = Context::of_tensor(x)?;
    let (y, to) = gpu.output::<bf16>((t, n))?;
    let args = [input::<f32>(x)?.into(), input::<f32>(weight)?.into(), eps.into(), n.into(), to.into()];
    // SAFETY: shapes as in the kernel's contract, checked by `shape`.
    unsafe { gpu.launch(&gpu.kernels::<NormKernels>()?.rms_norm, grid, &args)? };
    Ok(y)
}

/// As [`super::add_rms_norm`], `x` and the sum f32, `delta` and the norm bf16.
pub fn add_rms_norm(x: &Tensor, delta: &Tensor, weight: &Tensor, eps: f32) -> Result<(Tensor, Tensor)> {
    let (t, n, grid) = shape(x, weight)?;
    if delta.dims() != x.dims() {
        return Err(Error::internal(format!("sum of {:?} and {:?}", x.shape(), delta.shape())));
    }
    let gpu = Context::of_tensor(x)?;
    let (sum, sum_at) = gpu.output::<f32>((t, n))?;
    let (y, to) = gpu.output::<bf16>((t, n))?;
    let weight = input::<f32>(weight)?;
    let (x, delta) = (input::<f32>(x)?, input::<bf16>(delta)?);
    let args = [x.into(), delta.into(), weight.into(), eps.into(), n.into(), sum_at.into(), to.into()];
    // SAFETY: as above, and `delta` has the shape of `x`.
    unsafe { gpu.launch(&gpu.kernels::<NormKernels>()?.add_rms_norm, grid, &args)? };
    Ok((sum, y))
}

/// As [`super::rms_norm_backward`], whose checks were made; `dy` bf16, the rest f32.
pub fn rms_norm_backward(
    x: &Tensor,
    weight: &Tensor,
    dy: &Tensor,
    residual: Option<&Tensor>,
    eps: f32,
) -> Result<Tensor> {
    let (t, n, _) = shape(x, weight)?;
    let gpu = Context::of_tensor(x)?;
    let (dx, to) = gpu.output::<f32>((t, n))?;
    let args = [
        input::<f32>(x)?.into(),
        input::<f32>(weight)?.into(),
        input::<bf16>(dy)?.into(),
        residual.map_or(Ok(0), input::<f32>)?.into(),
        eps.into(),
        n.into(),
        to.into(),
    ];
    // Training has many long rows: with few threads a block, each keeping all it can, several blocks hide each other's waits.
    let grid = LaunchGrid::new(t, n.div_ceil(NORM_VALUES_PER_THREAD).next_multiple_of(32));
    // SAFETY: shapes as in the kernel's contract.
    unsafe { gpu.launch(&gpu.kernels::<NormKernels>()?.rms_norm_backward, grid, &args)? };
    Ok(dx)
}

fn shape(x: &Tensor, weight: &Tensor) -> Result<(usize, usize, LaunchGrid)> {
    let (t, n) = x.dims2()?;
    if weight.dims() != [n] || n % 4 != 0 || n > NORM_VALUES_PER_THREAD * 1024 {
        return Err(Error::internal(format!(
            "norm of {:?} with weights {:?}: the width must be a multiple of 4, at most {}",
            x.shape(),
            weight.shape(),
            NORM_VALUES_PER_THREAD * 1024
        )));
    }
    Ok((t, n, LaunchGrid::new(t, (n / 4).next_multiple_of(32).min(1024))))
}
