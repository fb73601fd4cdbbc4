//! DoRA's gains of adapters in slots. An image comes with magnitudes, for gains take the base; they become gains on the
//! engine's stream before the slot's first step, and stay with the slot.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DeviceRepr};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Storage, Tensor};
use half::bf16;

use crate::arch::Site;
use crate::lora::BaseMatrices;
use crate::lora::image::{ImageLayout, SiteBlock};
use crate::lora::magnitude::{changed_norms, row_squares};
use crate::ops::quant;
use crate::{Error, Result};

/// Which slots have gains, and what new ones are made of.
#[derive(Default)]
pub struct Gains {
    /// Adapters with magnitudes that are in slots.
    slots: HashMap<u32, Scaled>,
    /// Squared norms of the base's rows `[1, n]`, by entry, since an adapter first needed them: they never change.
    squares: HashMap<usize, Tensor>,
}

/// An adapter with magnitudes.
struct Scaled {
    /// Where its image starts in the arena, in values.
    start: usize,
    /// Where everything is in its image.
    layout: ImageLayout,
    /// Entries whose magnitudes are not gains yet.
    left: Vec<usize>,
}

impl Gains {
    /// An adapter is in its slot, at `start` of the arena.
    pub fn arrived(&mut self, slot: u32, start: usize, layout: ImageLayout) {
        let left: Vec<usize> = layout.gained().collect();
        if !left.is_empty() {
            self.slots.insert(slot, Scaled { start, layout, left });
        }
    }

    /// A slot is free.
    pub fn remove(&mut self, slot: u32) {
        self.slots.remove(&slot);
    }

    /// Whether a slot has gains. Errors: they are magnitudes still.
    pub fn of(&self, slot: u32) -> Result<bool> {
        match self.slots.get(&slot) {
            None => Ok(false),
            Some(scaled) if scaled.left.is_empty() => Ok(true),
            Some(_) => Err(Error::internal("DoRA's gains were not prepared")),
        }
    }

    /// Makes gains of a slot's magnitudes, if it has any left.
    pub fn prepare(
        &mut self,
        slot: u32,
        arena: &mut CudaSlice<u16>,
        device: &CudaDevice,
        base: &dyn BaseMatrices,
    ) -> Result<()> {
        let Some(Scaled { start, layout, left }) = self.slots.get_mut(&slot) else { return Ok(()) };
        // An entry goes only once it is done: after an error the rest are taken up again, none twice.
        while let Some(&entry) = left.last() {
            let block = layout.block(entry).ok_or_else(|| Error::internal(format!("no block at entry {entry}")))?;
            let layer = entry / 4;
            let site = if layer == base.num_layers() { Site::Head } else { Site::ALL[entry % 4] };
            let weight = base.matrix(layer, site);
            let squares: &Tensor = match self.squares.entry(entry) {
                Entry::Occupied(squares) => squares.into_mut(),
                Entry::Vacant(place) => place.insert(row_squares(weight)?),
            };
            let at = *start + block.at;
            let a = read::<bf16>(arena, at, (block.rank(), block.k), device)?;
            let crossed = quant::matmul(weight, &a, DType::F32)?;
            let gains = gains(block, arena, at, [&a.to_dtype(DType::F32)?, &crossed, squares], device)?;
            for (i, gains) in gains {
                write(arena, at + block.gain(i), &gains, device)?;
            }
            left.pop();
        }
        Ok(())
    }
}

/// Gains `[1, n]` of each module of a block at `at` of the arena that has magnitudes, given its A `[Σ rank, k]`, the product
/// of A and the base `[Σ rank, Σ n]`, and the squared norms of the base's rows `[1, Σ n]`.
fn gains(
    block: &SiteBlock,
    arena: &CudaSlice<u16>,
    at: usize,
    [a, crossed, squares]: [&Tensor; 3],
    device: &CudaDevice,
) -> Result<Vec<(usize, Tensor)>> {
    let (mut first_rank, mut offset) = (0, 0);
    let mut gains = Vec::new();
    for i in 0..3 {
        let (rank, n) = (block.ranks[i], block.n[i]);
        if block.magnitudes[i] {
            let b = read::<bf16>(arena, at + block.b(i), (n, rank), device)?.to_dtype(DType::F32)?;
            let magnitudes = read::<f32>(arena, at + block.gain(i), (1, n), device)?;
            let crossed = crossed.narrow(0, first_rank, rank)?.narrow(1, offset, n)?;
            let (a, squares) = (a.narrow(0, first_rank, rank)?, squares.narrow(1, offset, n)?);
            gains.push((i, (magnitudes / changed_norms(&squares, &a, &b, &crossed, block.scales[i])?)?));
        }
        (first_rank, offset) = (first_rank + rank, offset + n);
    }
    Ok(gains)
}

/// A copy of values of the arena.
fn read<T: CudaDType + DeviceRepr>(
    arena: &CudaSlice<u16>,
    at: usize,
    shape: (usize, usize),
    device: &CudaDevice,
) -> Result<Tensor> {
    let count = shape.0 * shape.1;
    let from = arena.slice(at..at + count * size_of::<T>() / 2);
    // SAFETY: bf16 and f32 have no invalid bits, and modules' values start at multiples of 4 bytes.
    let from = unsafe { from.transmute::<T>(count) }.ok_or_else(outside)?;
    let copy = device.cuda_stream().clone_dtod(&from).map_err(|e| Error::internal(format!("copying gains: {e}")))?;
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(copy, device.clone()));
    Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), false))
}

/// Writes f32 values into the arena.
fn write(arena: &mut CudaSlice<u16>, at: usize, values: &Tensor, device: &CudaDevice) -> Result<()> {
    let values = values.contiguous()?;
    let (storage, layout) = values.storage_and_layout();
    let (Storage::Cuda(storage), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else {
        return Err(Error::internal("gains that are not in a GPU's memory"));
    };
    let from = storage.as_cuda_slice::<f32>()?.slice(start..end);
    let mut to = arena.slice_mut(at..at + 2 * (end - start));
    // SAFETY: as in `read`.
    let mut to = unsafe { to.transmute_mut::<f32>(end - start) }.ok_or_else(outside)?;
    Ok(device.memcpy_dtod(&from, &mut to)?)
}

fn outside() -> Error {
    Error::internal("gains outside their image")
}
