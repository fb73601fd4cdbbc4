//! The CUDA half: see `kernels/swiglu.cu`.

use candle_core::Tensor;
use half::bf16;

use crate::gpu::kernels::{KernelHandle, LaunchGrid, kernel_set};
use crate::gpu::{Context, input};
use crate::{Error, Result};

/// Threads of a block.
const THREADS: usize = 256;

kernel_set!(SwigluKernels { swiglu_2, swiglu_8, swiglu_backward_2, swiglu_backward_8 });

/// As [`super::swiglu`], in bf16.
pub fn swiglu(gate_up: &Tensor) -> Result<Tensor> {
    let (t, n) = shape(gate_up)?;
    let gpu = Context::of_tensor(gate_up)?;
    let kernels = gpu.kernels::<SwigluKernels>()?;
    let (y, to) = gpu.output::<bf16>((t, n))?;
    let (kernel, grid) = choose(t, n, &kernels.swiglu_2, &kernels.swiglu_8);
    let args = [input::<bf16>(gate_up)?.into(), n.into(), to.into()];
    // SAFETY: shapes as in the kernel's contract.
    unsafe { gpu.launch(kernel, grid, &args)? };
    Ok(y)
}

/// As [`super::swiglu_backward`], whose checks were made, in bf16.
pub fn swiglu_backward(gate_up: &Tensor, dh: &Tensor) -> Result<Tensor> {
    let (t, n) = shape(gate_up)?;
    let gpu = Context::of_tensor(gate_up)?;
    let kernels = gpu.kernels::<SwigluKernels>()?;
    let (dx, to) = gpu.output::<bf16>((t, 2 * n))?;
    let (kernel, grid) = choose(t, n, &kernels.swiglu_backward_2, &kernels.swiglu_backward_8);
    let args = [input::<bf16>(gate_up)?.into(), input::<bf16>(dh)?.into(), n.into(), to.into()];
    // SAFETY: shapes as in the kernel's contract.
    unsafe { gpu.launch(kernel, grid, &args)? };
    Ok(dx)
}

fn shape(gate_up: &Tensor) -> Result<(usize, usize)> {
    let (t, width) = gate_up.dims2()?;
    if width % 4 != 0 {
        return Err(Error::internal(format!("swiglu of {:?}: gate and up have the same, even width", gate_up.shape())));
    }
    Ok((t, width / 2))
}

/// The kernel whose threads take 2 or 8 values each, and its grid: 8 where the rows fill the GPU all the same.
fn choose<'a>(t: usize, n: usize, two: &'a KernelHandle, eight: &'a KernelHandle) -> (&'a KernelHandle, LaunchGrid) {
    let (kernel, values) = if t > 64 && n.is_multiple_of(8) { (eight, 8) } else { (two, 2) };
    (kernel, LaunchGrid::new_2d(t, n.div_ceil(THREADS * values), THREADS))
}
