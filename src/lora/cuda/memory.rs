//! The memory that the images of all slots share.

use std::sync::Arc;

use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DeviceRepr};
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, Storage, Tensor};

use crate::gpu::Context;
use crate::{Error, Result};

/// One allocation of 16-bit values. It never moves, so that a captured graph serves whatever adapters are loaded later.
pub struct SlotMemory {
    pub gpu: Arc<Context>,
    pub values: CudaSlice<u16>,
}

impl SlotMemory {
    /// A copy of the `T` from value `at` on. Errors: outside the memory, or no memory for the copy.
    pub fn read<T: CudaDType + DeviceRepr>(&self, at: usize, shape: (usize, usize)) -> Result<Tensor> {
        let count = shape.0 * shape.1;
        let from = self.values.slice(at..at + count * size_of::<T>() / 2);
        // SAFETY: bf16 and f32 have no invalid bits, and modules' values start at multiples of 4 bytes.
        let from = unsafe { from.transmute::<T>(count) }.ok_or_else(outside)?;
        let copy = self.gpu.stream().clone_dtod(&from);
        let copy = copy.map_err(|e| Error::internal(format!("copying an adapter's values: {e}")))?;
        let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(copy, self.gpu.device().clone()));
        Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), false))
    }

    /// Writes f32 values from value `at` on.
    pub fn write(&mut self, at: usize, values: &Tensor) -> Result<()> {
        let values = values.contiguous()?;
        let (storage, layout) = values.storage_and_layout();
        let (Storage::Cuda(storage), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else {
            return Err(Error::internal("values that are not in a GPU's memory"));
        };
        let from = storage.as_cuda_slice::<f32>()?.slice(start..end);
        let mut to = self.values.slice_mut(at..at + 2 * (end - start));
        // SAFETY: as in `read`.
        let mut to = unsafe { to.transmute_mut::<f32>(end - start) }.ok_or_else(outside)?;
        Ok(self.gpu.device().memcpy_dtod(&from, &mut to)?)
    }
}

fn outside() -> Error {
    Error::internal("an adapter's values outside its image")
}
