//! The CUDA half: see `kernels/rope.cu`.

use candle_core::Tensor;
use half::bf16;

use super::{Direction, RopeTable};
use crate::Result;
use crate::gpu::kernels::{Grid, launch};
use crate::gpu::uploads::upload;
use crate::gpu::{address, input};

/// Threads a block.
const THREADS: usize = 128;

/// As [`super::rotate`], whose checks were made.
pub fn rotate(x: &Tensor, heads: usize, positions: &[u32], table: &RopeTable, direction: Direction) -> Result<()> {
    let (device, (rows, width), dim) = (x.device().as_cuda_device()?, x.dims2()?, table.head_dim());
    // 16 bytes of both halves of a head at once, where they are aligned.
    let (name, pairs) = if dim % 16 == 0 && width % 8 == 0 { ("rope_turn_8", 8) } else { ("rope_turn_1", 1) };
    let pieces = heads * (dim / 2 / pairs);
    let positions = upload(device, positions)?;
    let args = [
        input::<bf16>(x)?.into(),
        address(&positions).into(),
        input::<f32>(table.values())?.into(),
        heads.into(),
        width.into(),
        dim.into(),
        direction.sign().into(),
    ];
    let blocks = (rows as u32, pieces.div_ceil(THREADS) as u32, 1);
    // SAFETY: shapes as the contract, and positions of the table, by the caller's checks.
    unsafe { launch(device, name, Grid { blocks, ..Grid::new(1, THREADS as u32) }, &args)? };
    Ok(())
}
