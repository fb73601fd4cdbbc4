//! The CUDA half: see `kernels/swiglu.cu`.

use candle_core::Tensor;
use half::bf16;

use crate::gpu::kernels::{Grid, launch};
use crate::gpu::{input, output};
use crate::{Error, Result};

/// As [`super::swiglu`], in bf16.
pub fn swiglu(gate_up: &Tensor) -> Result<Tensor> {
    let (t, n) = shape(gate_up)?;
    let device = gate_up.device().as_cuda_device()?;
    let (y, to) = output::<bf16>(device, (t, n))?;
    let (values, grid) = grid(t, n);
    let args = [input::<bf16>(gate_up)?.into(), n.into(), to.into()];
    // SAFETY: shapes as the kernel's contract.
    unsafe { launch(device, &format!("swiglu_{values}"), grid, &args)? };
    Ok(y)
}

/// As [`super::swiglu_backward`], whose checks were made, in bf16.
pub fn swiglu_backward(gate_up: &Tensor, dh: &Tensor) -> Result<Tensor> {
    let (t, n) = shape(gate_up)?;
    let device = gate_up.device().as_cuda_device()?;
    let (dx, to) = output::<bf16>(device, (t, 2 * n))?;
    let (values, grid) = grid(t, n);
    let args = [input::<bf16>(gate_up)?.into(), input::<bf16>(dh)?.into(), n.into(), to.into()];
    // SAFETY: shapes as the kernel's contract.
    unsafe { launch(device, &format!("swiglu_backward_{values}"), grid, &args)? };
    Ok(dx)
}

fn shape(gate_up: &Tensor) -> Result<(usize, usize)> {
    let (t, width) = gate_up.dims2()?;
    if width % 4 != 0 {
        return Err(Error::internal(format!("swiglu of {:?}: gate and up have the same, even width", gate_up.shape())));
    }
    Ok((t, width / 2))
}

/// Values a thread takes, and the grid: many where there are enough rows to fill the GPU all the same.
fn grid(t: usize, n: usize) -> (usize, Grid) {
    let values = if t > 64 && n.is_multiple_of(8) { 8 } else { 2 };
    // Rows along x, of which there may be more than 65,535.
    (values, Grid { blocks: (t as u32, n.div_ceil(256 * values) as u32, 1), ..Grid::new(1, 256) })
}
