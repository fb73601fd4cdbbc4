//! What the CPU halves of the ops share: slices out of candle's storage, and rows as tasks.

use std::ops::{Deref, Range};

use candle_core::{CpuStorage, Layout, Result, Storage, Tensor};

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

/// The values of a contiguous f32 tensor that is no operand of a candle op, held against changes while they are read. Errors:
/// it is not on the CPU, not contiguous, or not f32.
pub fn values<'a>(op: &'static str, tensor: &'a Tensor) -> Result<impl Deref<Target = [f32]> + 'a> {
    let (storage, layout) = tensor.storage_and_layout();
    let (start, end) = layout.contiguous_offsets().ok_or(candle_core::Error::RequiresContiguous { op })?;
    if !matches!(&*storage, Storage::Cpu(CpuStorage::F32(_))) {
        candle_core::bail!("{op} takes f32 tensors on the CPU");
    }
    Ok(TensorValues { storage, range: start..end })
}

/// `S` is candle's lock guard, whose type is not public.
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
