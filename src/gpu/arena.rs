//! Memory of captured graphs: the outputs of their ops at fixed addresses, without allocation nodes between the kernels.
//!
//! Graphs run one at a time, so all share one arena. It has two halves, which decoder blocks use alternately: the outputs of
//! a block live until the end of the next, so that a step touches little memory and activations stay in the L2 cache.

use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DeviceRepr};
use candle_core::cuda_backend::{CudaDType, CudaStorageSlice};
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, CudaDevice, CudaStorage, InplaceOp1, Layout, Shape, Storage, Tensor};

use super::{Context, address};
use crate::Result;

/// Alignment of outputs in bytes.
const ALIGN: usize = 256;

/// The memory. It must live as long as the graphs that use it.
pub struct Arena {
    context: Arc<Context>,
    memory: CudaSlice<u8>,
}

/// An arena from which a capture takes its outputs.
pub(super) struct ActiveArena {
    /// Address of the first half.
    start: u64,
    /// Bytes of a half.
    half: usize,
    /// Bytes taken of each half.
    taken: [usize; 2],
    /// The half in use.
    current: usize,
    tensors: ArenaTensors,
}

/// The tensors that lie in the arena. They do not own their memory, so that dropping them must not free it.
#[derive(Default)]
pub struct ArenaTensors(Vec<Tensor>);

impl Arena {
    /// An arena of two halves of `half` bytes. Errors: no memory.
    pub fn new(context: Arc<Context>, half: usize) -> Result<Self> {
        // SAFETY: kernels read only what they have written.
        let memory = unsafe { context.device().alloc::<u8>(2 * half.next_multiple_of(ALIGN))? };
        Ok(Self { context, memory })
    }

    /// Runs `step` with its outputs in the arena; outputs that find no room are allocated as usual. The tensors must be kept
    /// as long as the graph is replayed.
    pub fn run<T>(&self, step: impl FnOnce() -> Result<T>) -> (Result<T>, ArenaTensors) {
        let (start, half) = (address(&self.memory), self.memory.len() / 2);
        let active = ActiveArena { start, half, taken: [0; 2], current: 0, tensors: ArenaTensors::default() };
        *self.context.arena() = Some(active);
        let result = step();
        let active = self.context.arena().take();
        (result, active.map(|active| active.tensors).unwrap_or_default())
    }
}

impl ActiveArena {
    /// See [`super::next_block`].
    pub fn next_block(&mut self) {
        self.current ^= 1;
        self.taken[self.current] = 0;
    }

    /// An output and its address; `None` if the half has no room.
    pub fn take<T: CudaDType + DeviceRepr>(&mut self, device: &CudaDevice, shape: &Shape) -> Option<(Tensor, u64)> {
        let (count, offset) = (shape.elem_count(), self.taken[self.current]);
        let end = offset + (count * size_of::<T>()).next_multiple_of(ALIGN);
        if end > self.half {
            return None;
        }
        self.taken[self.current] = end;
        let at = self.start + (self.current * self.half + offset) as u64;
        // SAFETY: inside the arena, and given to no other output until the block after the next; `ArenaTensors` never frees it.
        let slice = unsafe { device.cuda_stream().upgrade_device_ptr::<T>(at, count) };
        let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, device.clone()));
        let tensor = Tensor::from_storage(storage, shape.clone(), BackpropOp::none(), false);
        self.tensors.0.push(tensor.clone());
        Some((tensor, at))
    }
}

impl Drop for ArenaTensors {
    fn drop(&mut self) {
        for tensor in self.0.drain(..) {
            if tensor.inplace_op1(&DetachMemory).is_err() {
                // Then it still refers to the arena, and must never be freed.
                std::mem::forget(tensor);
            }
        }
    }
}

/// Takes a tensor's memory away without freeing it.
struct DetachMemory;

impl InplaceOp1 for DetachMemory {
    fn name(&self) -> &'static str {
        "arena-detach"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> candle_core::Result<()> {
        candle_core::bail!("the arena is on a GPU")
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, _: &Layout) -> candle_core::Result<()> {
        // SAFETY: nothing reads this byte.
        let other = unsafe { storage.device.alloc::<u8>(1)? };
        match std::mem::replace(&mut storage.slice, CudaStorageSlice::U8(other)) {
            CudaStorageSlice::BF16(slice) => slice.leak(),
            CudaStorageSlice::F32(slice) => slice.leak(),
            CudaStorageSlice::U32(slice) => slice.leak(),
            other => {
                std::mem::forget(other);
                0
            }
        };
        Ok(())
    }
}
