//! Launches the kernels of `kernels/sample.cu`.

use candle_core::backend::BackendStorage;
use candle_core::{CudaStorage, Layout, Shape};

use super::SamplePlan;
use crate::gpu::kernels::{Arg, Grid, launch};
use crate::gpu::{address, tensor_address};

/// Ids that a warp takes of a row.
const SEGMENT: usize = 1024;

/// Largest logits of parts of a segment, one a lane.
const CHUNKS: usize = 32;

/// Warps a block where a warp works alone.
const WARPS: usize = 8;

/// Threads a block where a block has a row.
const THREADS: u32 = 512;

/// `u32 [2 rows + stride tasks]`: see [`super::SampleLaunch`].
pub(super) fn forward(
    plan: &SamplePlan,
    logits: &CudaStorage,
    layout: &Layout,
) -> candle_core::Result<(CudaStorage, Shape)> {
    let device = logits.device();
    let (rows, vocab) = layout.shape().dims2()?;
    let x = tensor_address::<f32>("sample", logits, layout)?;
    let segments = vocab.div_ceil(SEGMENT);

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
    let by_segment = |rows: usize| Grid {
        blocks: (segments.div_ceil(WARPS) as u32, rows as u32, 1),
        threads: 32 * WARPS as u32,
        shared: 0,
    };
    let by_row = Grid::new(plan.tasks, THREADS);
    if plan.edits {
        // SAFETY: tasks point to rows of the logits and to lists in their own buffer (Plan::new); nothing else uses the
        // logits at this point of the stream.
        unsafe { launch(device, "sample_edit", by_row, &[x.into(), vocab_arg, tasks.into()])? };
    }
    // SAFETY: logits of this shape, and scratch of the sizes above.
    unsafe {
        launch(device, "sample_max", by_segment(rows), &[x.into(), vocab_arg, partials.into(), maxima_at.into()])?
    };
    let by_best = Grid::new(rows.div_ceil(WARPS), 32 * WARPS as u32);
    // SAFETY: as above; `out` starts with two words a row.
    unsafe { launch(device, "sample_best", by_best, &[partials.into(), vocab_arg, rows.into(), best.into()])? };
    if plan.picks {
        let sum = [x.into(), vocab_arg, tasks.into(), best.into(), sums_at.into()];
        // SAFETY: as above, two sums a task and segment.
        unsafe { launch(device, "sample_sum", by_segment(plan.tasks), &sum)? };
        let pick = [x.into(), vocab_arg, tasks.into(), best.into(), maxima_at.into(), sums_at.into(), records.into()];
        let pick = [&pick[..], &[plan.stride.into()]].concat();
        // SAFETY: as above; `out` goes on with `stride` words a task, enough for its alternatives.
        unsafe { launch(device, "sample_pick", by_row, &pick)? };
    }
    Ok((CudaStorage::wrap_cuda_slice(out, device.clone()), Shape::from(len)))
}
