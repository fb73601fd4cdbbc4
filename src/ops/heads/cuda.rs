//! The CUDA half: see `kernels/heads.cu`.

use candle_core::Tensor;
use half::bf16;

use super::QkNorm;
use crate::arch::Heads;
use crate::gpu::constants::MAX_HEAD_DIM;
use crate::gpu::kernels::{LaunchGrid, kernel_set};
use crate::gpu::{Context, input};
use crate::{Error, Result};

/// Heads of a thread block, one a warp.
const WARPS: usize = 8;

kernel_set!(HeadKernels { bias_and_qk_norm, qk_norm_backward });

/// As [`super::bias_and_qk_norm`], whose checks were made, `qkv` bf16.
pub fn bias_and_qk_norm(qkv: &Tensor, bias: Option<&Tensor>, norm: Option<QkNorm>, heads: Heads) -> Result<()> {
    check(heads)?;
    let rows = qkv.dim(0)?;
    // Values are only added to.
    let touched = heads.query + if bias.is_some() { 2 * heads.kv } else { heads.kv };
    let address = |t: Option<&Tensor>| t.map_or(Ok(0), input::<f32>);
    let args = [
        input::<bf16>(qkv)?.into(),
        address(bias)?.into(),
        address(norm.map(|norm| norm.query))?.into(),
        address(norm.map(|norm| norm.key))?.into(),
        norm.map_or(0.0, |norm| norm.eps).into(),
        heads.query.into(),
        heads.kv.into(),
        touched.into(),
        heads.dim.into(),
    ];
    let gpu = Context::of_tensor(qkv)?;
    // SAFETY: shapes as in the kernel's contract, checked by `super::bias_and_qk_norm` and above.
    unsafe { gpu.launch(&gpu.kernels::<HeadKernels>()?.bias_and_qk_norm, grid(rows, touched), &args)? };
    Ok(())
}

/// As [`super::qk_norm_backward`], whose checks were made, `dqkv` and `qkv_raw` bf16.
pub fn qk_norm_backward(dqkv: &Tensor, qkv_raw: &Tensor, norm: QkNorm, heads: Heads) -> Result<()> {
    check(heads)?;
    let args = [
        input::<bf16>(dqkv)?.into(),
        input::<bf16>(qkv_raw)?.into(),
        input::<f32>(norm.query)?.into(),
        input::<f32>(norm.key)?.into(),
        norm.eps.into(),
        heads.query.into(),
        heads.kv.into(),
        heads.dim.into(),
    ];
    let grid = grid(dqkv.dim(0)?, heads.query + heads.kv);
    let gpu = Context::of_tensor(dqkv)?;
    // SAFETY: as above.
    unsafe { gpu.launch(&gpu.kernels::<HeadKernels>()?.qk_norm_backward, grid, &args)? };
    Ok(())
}

fn check(heads: Heads) -> Result<()> {
    if !heads.dim.is_multiple_of(2) || heads.dim > MAX_HEAD_DIM {
        return Err(Error::internal(format!("heads of width {}: at most {MAX_HEAD_DIM}, and even", heads.dim)));
    }
    Ok(())
}

/// A warp for each of `heads` heads of each row.
fn grid(rows: usize, heads: usize) -> LaunchGrid {
    LaunchGrid::new_2d(rows, heads.div_ceil(WARPS), 32 * WARPS)
}
