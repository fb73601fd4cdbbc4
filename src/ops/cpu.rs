//! What the CPU halves of the ops share: slices out of candle's storage, and rows as tasks.

use std::ops::Range;

use candle_core::{CpuStorage, Layout, Result};

use super::pool;

/// The values of a contiguous f32 tensor.
pub fn slice<'a>(op: &'static str, storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let (start, end) = layout.contiguous_offsets().ok_or(candle_core::Error::RequiresContiguous { op })?;
    Ok(&storage.as_slice::<f32>()?[start..end])
}

/// The values of a contiguous f32 tensor that an op changes in place.
pub fn slice_mut<'a>(op: &'static str, storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    let (start, end) = layout.contiguous_offsets().ok_or(candle_core::Error::RequiresContiguous { op })?;
    match storage {
        CpuStorage::F32(values) => Ok(&mut values[start..end]),
        _ => candle_core::bail!("{op} takes f32 tensors"),
    }
}

/// Runs tasks on the pool, or right here when all of them together take fewer than `ops` multiply-adds' worth of time:
/// handing work to the pool costs about two microseconds.
pub fn for_each(tasks: usize, multiply_adds: usize, f: impl Fn(usize) + Sync) {
    if tasks < 2 || multiply_adds < 1 << 15 {
        (0..tasks).for_each(f);
    } else {
        pool::parallel_for(tasks, f);
    }
}

/// Cuts `rows` rows into tasks of `step`: the rows of task `i`.
pub fn chunk(i: usize, step: usize, rows: usize) -> Range<usize> {
    i * step..((i + 1) * step).min(rows)
}
