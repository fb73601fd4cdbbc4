//! Helpers of the CPU halves: slices of candle's storage, and ranges of rows as tasks.

use std::ops::{Deref, Range};

use candle_core::{CpuStorage, Layout, Result, Storage, Tensor};

use super::pool;

/// The values of an operand, a contiguous f32 tensor.
pub fn slice<'a>(op: &'static str, storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let (start, end) = layout.contiguous_offsets().ok_or(candle_core::Error::RequiresContiguous { op })?;
    Ok(&storage.as_slice::<f32>()?[start..end])
}

/// The values of an operand that an op changes in place, a contiguous f32 tensor.
pub fn slice_mut<'a>(op: &'static str, storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    let (start, end) = layout.contiguous_offsets().ok_or(candle_core::Error::RequiresContiguous { op })?;
    match storage {
        CpuStorage::F32(values) => Ok(&mut values[start..end]),
        _ => candle_core::bail!("{op}: tensors must be f32"),
    }
}

/// The values of a contiguous f32 tensor that is not passed to a candle op as an operand. The storage stays locked while they are
/// read. Errors: a tensor that is not on the CPU, not contiguous, or not f32.
pub fn values<'a>(op: &'static str, tensor: &'a Tensor) -> Result<impl Deref<Target = [f32]> + 'a> {
    let (storage, layout) = tensor.storage_and_layout();
    let (start, end) = layout.contiguous_offsets().ok_or(candle_core::Error::RequiresContiguous { op })?;
    if !matches!(&*storage, Storage::Cpu(CpuStorage::F32(_))) {
        candle_core::bail!("{op}: tensors must be f32 and on the CPU");
    }
    Ok(TensorValues { storage, range: start..end })
}

/// The values under candle's lock. `S` is the lock's guard, whose type is not public.
struct TensorValues<S> {
    storage: S,
    range: Range<usize>,
}

impl<S: Deref<Target = Storage>> Deref for TensorValues<S> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => &values[self.range.clone()],
            _ => unreachable!("`values` checked it"),
        }
    }
}

/// Runs `f(0) .. f(tasks - 1)` on the pool. If all tasks together take less time than about 2^15 multiply-adds, they run on the
/// caller's thread: handing work to the pool costs about two microseconds.
pub fn for_each(tasks: usize, multiply_adds: usize, f: impl Fn(usize) + Sync) {
    if tasks < 2 || multiply_adds < 1 << 15 {
        (0..tasks).for_each(f);
    } else {
        pool::parallel_for(tasks, f);
    }
}

/// The rows of task `i`, when `rows` rows are cut into tasks of `step`.
pub fn chunk(i: usize, step: usize, rows: usize) -> Range<usize> {
    i * step..((i + 1) * step).min(rows)
}
