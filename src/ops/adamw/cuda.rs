//! The CUDA half: see `kernels/adamw.cu`.

use candle_core::Tensor;

use super::{AdamwFactors, BLOCK, Moment, total};
use crate::gpu::kernels::{Arg, LaunchGrid, kernel_set};
use crate::gpu::{Context, address, input};
use crate::{Error, Result};

/// Values of a thread block.
const VALUES: usize = 1024;
/// Values of a thread block with 8-bit moments.
const VALUES8: usize = 8 * BLOCK;
/// Most thread blocks, and so partial sums, of a sum of squares.
const SUMS: usize = 1024;

kernel_set!(AdamwKernels { adamw, adamw8bit, squares });

impl AdamwFactors {
    /// The kernels' `FACTORS`, in their order.
    fn args(&self) -> [Arg; 9] {
        let Self { grad_scale, first, second, keep, step_size, root_correction, eps } = *self;
        [grad_scale, first.old, first.new, second.old, second.new, keep, step_size, root_correction, eps].map(Arg::from)
    }
}

/// As [`super::adamw_step`], which has checked the sizes.
pub fn step(params: &Tensor, grads: &Tensor, m: &Tensor, v: &Tensor, factors: &AdamwFactors) -> Result<()> {
    let (count, gpu) = (params.elem_count(), Context::of_tensor(params)?);
    let args = [values(params)?, values(grads)?, values(m)?, values(v)?, count.into()];
    let grid = LaunchGrid::new(count.div_ceil(VALUES), 256);
    // SAFETY: four buffers of `count` values, aligned as `values` has checked.
    unsafe { gpu.launch(&gpu.kernels::<AdamwKernels>()?.adamw, grid, &[&args[..], &factors.args()].concat())? };
    Ok(())
}

/// As [`super::adamw8bit_step`], which has checked the sizes.
pub fn step8(params: &Tensor, grads: &Tensor, m: &Tensor, v: &Tensor, factors: &AdamwFactors) -> Result<()> {
    let (count, gpu) = (params.elem_count(), Context::of_tensor(params)?);
    let mut maps: Vec<u32> = Vec::with_capacity(4 * BLOCK);
    for moment in [Moment::First, Moment::Second] {
        maps.extend(moment.map().iter().chain(moment.midpoints()).map(|x| x.to_bits()));
        maps.push(0);
    }
    let maps = gpu.upload(&maps)?;
    let moments = [input::<u8>(m)?.into(), input::<u8>(v)?.into()];
    let args =
        [&[values(params)?, values(grads)?], &moments[..], &[address(&maps).into(), count.into()], &factors.args()];
    let grid = LaunchGrid::new(count.div_ceil(VALUES8), 256);
    // SAFETY: as above, and the moments are whole blocks, which keeps their words aligned.
    unsafe { gpu.launch(&gpu.kernels::<AdamwKernels>()?.adamw8bit, grid, &args.concat())? };
    Ok(())
}

/// As [`super::sum_of_squares`].
pub fn sum_of_squares(x: &Tensor) -> Result<f32> {
    let (count, gpu) = (x.elem_count(), Context::of_tensor(x)?);
    let blocks = count.div_ceil(VALUES).min(SUMS);
    let (sums, to) = gpu.output::<f32>(blocks)?;
    // SAFETY: `count` values, aligned, and a sum for each thread block.
    unsafe {
        let squares = &gpu.kernels::<AdamwKernels>()?.squares;
        gpu.launch(squares, LaunchGrid::new(blocks, 256), &[values(x)?, count.into(), to.into()])?
    };
    Ok(total(&sums.to_vec1()?))
}

/// The address of f32 values that kernels read four at a time and count with an `int`.
fn values(x: &Tensor) -> Result<Arg> {
    let at = input::<f32>(x)?;
    if !at.is_multiple_of(16) || x.elem_count() > i32::MAX as usize {
        return Err(Error::internal(format!(
            "{:?} at {at:#x}: needs alignment to 16 bytes, and fewer than 2^31 values",
            x.shape()
        )));
    }
    Ok(at.into())
}
