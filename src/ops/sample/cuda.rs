//! Launches the kernels of `kernels/sample.cu`.

use candle_core::backend::BackendStorage;
use candle_core::{CudaStorage, Layout, Shape};

use super::SamplePlan;
use crate::Result;
use crate::gpu::constants::{SAMPLE_SEGMENT, SAMPLE_THREADS};
use crate::gpu::kernels::{Arg, LaunchGrid, kernel_set};
use crate::gpu::{Context, address, tensor_address};

/// Parts of a segment whose largest logits are kept, one a lane.
const CHUNKS: usize = 32;

/// Warps of a thread block where each warp works alone.
const WARPS: usize = 8;

kernel_set!(SampleKernels { sample_edit, sample_max, sample_best, sample_sum, sample_pick });

/// `u32 [2 rows + stride tasks]`: see [`super::SampleLaunch`].
pub(super) fn forward(
    plan: &SamplePlan,
    logits: &CudaStorage,
    layout: &Layout,
) -> candle_core::Result<(CudaStorage, Shape)> {
    run(plan, logits, layout).map_err(candle_core::Error::wrap)
}

fn run(plan: &SamplePlan, logits: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
    let device = logits.device();
    let gpu = Context::of(device)?;
    let kernels = gpu.kernels::<SampleKernels>()?;
    let (rows, vocab) = layout.shape().dims2()?;
    let x = tensor_address::<f32>("sample", logits, layout)?;
    let segments = vocab.div_ceil(SAMPLE_SEGMENT);

    let len = 2 * rows + plan.stride * plan.tasks;
    // SAFETY: read back only where the kernels have written.
    let out = unsafe { device.alloc::<u32>(len)? };
    let best = address(&out);
    let records = best + 8 * rows as u64;
    let uploaded = if plan.tasks > 0 { Some(device.clone_htod(&plan.words)?) } else { None };
    let tasks = uploaded.as_ref().map_or(0, address);
    // Partial maxima, and for picks two sums a task and segment, and a maximum a chunk (two in a word).
    let (sums, maxima) = if plan.picks { (2 * plan.tasks * segments, rows * segments * CHUNKS / 2) } else { (0, 0) };
    // SAFETY: the kernels read what kernels before have written.
    let scratch = unsafe { device.alloc::<u64>(rows * segments + sums + maxima)? };
    let partials = address(&scratch);
    let sums_at = partials + 8 * (rows * segments) as u64;
    let maxima_at = if plan.picks { sums_at + 8 * sums as u64 } else { 0 };

    let vocab_arg = Arg::from(vocab);
    let by_segment = |rows: usize| LaunchGrid::new_2d(segments.div_ceil(WARPS), rows, 32 * WARPS);
    let by_row = LaunchGrid::new(plan.tasks, SAMPLE_THREADS);
    if plan.edits {
        let args = [x.into(), vocab_arg, tasks.into()];
        // SAFETY: tasks point to rows of the logits and to lists in their own buffer (SamplePlan::new); nothing else uses the
        // logits at this point of the stream.
        unsafe { gpu.launch(&kernels.sample_edit, by_row, &args)? };
    }
    let args = [x.into(), vocab_arg, partials.into(), maxima_at.into()];
    // SAFETY: logits of this shape, and scratch of the sizes above.
    unsafe { gpu.launch(&kernels.sample_max, by_segment(rows), &args)? };
    let args = [partials.into(), vocab_arg, rows.into(), best.into()];
    // SAFETY: as above; `out` starts with two words a row.
    unsafe { gpu.launch(&kernels.sample_best, LaunchGrid::new(rows.div_ceil(WARPS), 32 * WARPS), &args)? };
    if plan.picks {
        let args = [x.into(), vocab_arg, tasks.into(), best.into(), sums_at.into()];
        // SAFETY: as above, two sums a task and segment.
        unsafe { gpu.launch(&kernels.sample_sum, by_segment(plan.tasks), &args)? };
        let args = [
            x.into(),
            vocab_arg,
            tasks.into(),
            best.into(),
            maxima_at.into(),
            sums_at.into(),
            records.into(),
            plan.stride.into(),
        ];
        // SAFETY: as above; `out` goes on with `stride` words a task, enough for its alternatives.
        unsafe { gpu.launch(&kernels.sample_pick, by_row, &args)? };
    }
    Ok((CudaStorage::wrap_cuda_slice(out, device.clone()), Shape::from(len)))
}
