//! The CUDA half: see `kernels/heads.cu`.

use candle_core::Tensor;
use half::bf16;

use crate::gpu::input;
use crate::gpu::kernels::{Grid, launch};
use crate::ops::attention::Heads;
use crate::{Error, Result};

/// Heads of a block, a warp each.
const WARPS: usize = 8;
/// Widest head: what a warp keeps in registers.
const MAX_DIM: usize = 256;

/// As [`super::finish`], whose checks were made, `qkv` bf16.
pub fn finish(
    qkv: &Tensor,
    bias: Option<&Tensor>,
    norms: Option<(&Tensor, &Tensor)>,
    heads: Heads,
    eps: f32,
) -> Result<()> {
    if !heads.dim.is_multiple_of(2) || heads.dim > MAX_DIM {
        return Err(Error::internal(format!("heads of width {}: at most {MAX_DIM}, and even", heads.dim)));
    }
    let rows = qkv.dim(0)?;
    // Values are only added to.
    let touched = heads.query + if bias.is_some() { 2 * heads.kv } else { heads.kv };
    let address = |t: Option<&Tensor>| t.map_or(Ok(0), input::<f32>);
    let args = [
        input::<bf16>(qkv)?.into(),
        address(bias)?.into(),
        address(norms.map(|n| n.0))?.into(),
        address(norms.map(|n| n.1))?.into(),
        eps.into(),
        heads.query.into(),
        heads.kv.into(),
        touched.into(),
        heads.dim.into(),
    ];
    let grid = Grid { blocks: (touched.div_ceil(WARPS) as u32, rows as u32, 1), ..Grid::new(1, 32 * WARPS as u32) };
    // SAFETY: shapes as the kernel's contract, checked by `super::finish` and above.
    unsafe { launch(qkv.device().as_cuda_device()?, "finish_heads", grid, &args)? };
    Ok(())
}
