//! The CUDA half: see `kernels/swiglu.cu`.

use candle_core::Tensor;
use half::bf16;

use crate::gpu::kernels::{Grid, launch};
use crate::gpu::{input, output};
use crate::{Error, Result};

/// As [`super::swiglu`], in bf16.
pub fn swiglu(gate_up: &Tensor) -> Result<Tensor> {
    let (t, width) = gate_up.dims2()?;
    if width % 4 != 0 {
        return Err(Error::internal(format!("swiglu of {:?}: gate and up have the same, even width", gate_up.shape())));
    }
    let n = width / 2;
    let device = gate_up.device().as_cuda_device()?;
    let (y, to) = output::<bf16>(device, (t, n))?;
    let grid = Grid { blocks: (n.div_ceil(512) as u32, t as u32, 1), ..Grid::new(1, 256) };
    // SAFETY: shapes as the kernel's contract.
    unsafe { launch(device, "swiglu", grid, &[input::<bf16>(gate_up)?.into(), n.into(), to.into()])? };
    Ok(y)
}
