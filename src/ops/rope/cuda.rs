//! The CUDA half: see `kernels/rope.cu`.

use candle_core::Tensor;
use half::bf16;

use super::{Direction, RopeTable};
use crate::Result;
use crate::gpu::constants::ROPE_THREADS;
use crate::gpu::kernels::{LaunchGrid, kernel_set};
use crate::gpu::{Context, address, input};

kernel_set!(RopeKernels { apply_rope_1, apply_rope_8 });

/// As [`super::rotate`], whose checks were made.
pub fn rotate(x: &Tensor, heads: usize, positions: &[u32], table: &RopeTable, direction: Direction) -> Result<()> {
    let ((rows, width), dim) = (x.dims2()?, table.head_dim());
    let gpu = Context::of_tensor(x)?;
    let kernels = gpu.kernels::<RopeKernels>()?;
    // A thread takes 16 bytes of each half of a head where these are aligned.
    let vectors = dim % 16 == 0 && width % 8 == 0;
    let (kernel, pairs) = if vectors { (&kernels.apply_rope_8, 8) } else { (&kernels.apply_rope_1, 1) };
    let pieces = heads * (dim / 2 / pairs);
    let positions = gpu.upload(positions)?;
    let args = [
        input::<bf16>(x)?.into(),
        address(&positions).into(),
        input::<f32>(table.values())?.into(),
        heads.into(),
        width.into(),
        dim.into(),
        direction.sign().into(),
    ];
    let grid = LaunchGrid::new_2d(rows, pieces.div_ceil(ROPE_THREADS), ROPE_THREADS);
    // SAFETY: shapes as in the contract, and positions of the table, by the caller's checks.
    unsafe { gpu.launch(kernel, grid, &args)? };
    Ok(())
}
