//! Memory of recorded steps: the outputs of their ops, at fixed places, without allocation nodes between the kernels of a graph.
//!
//! Graphs run one at a time, so all share one arena. It has two halves that decoder blocks take in turn: what a block makes
//! lives until the end of the next, so that a step touches little memory and activations stay in the second-level cache.

use std::cell::RefCell;
use std::mem::ManuallyDrop;

use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DeviceRepr};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, Shape, Storage, Tensor};

use super::address;
use crate::Result;

/// Every output starts at a multiple of this, in bytes.
const ALIGN: usize = 256;

/// The memory; kept as long as graphs that use it.
pub struct Arena {
    device: CudaDevice,
    memory: CudaSlice<u8>,
}

/// Tensors whose memory is the arena's: dropping them would free it piece by piece, so that nobody does.
pub type Kept = ManuallyDrop<Vec<Tensor>>;

/// An arena in use by this thread.
struct Active {
    device: CudaDevice,
    start: u64,
    half: usize,
    /// Bytes taken in each half, and the half in turn.
    taken: [usize; 2],
    turn: usize,
    kept: Vec<Tensor>,
}

thread_local! {
    static ACTIVE: RefCell<Option<Active>> = const { RefCell::new(None) };
}

impl Arena {
    /// Two halves of `half` bytes. Errors: no memory.
    pub fn new(device: &CudaDevice, half: usize) -> Result<Self> {
        // SAFETY: kernels read of it what they have written.
        let memory = unsafe { device.alloc::<u8>(2 * half.next_multiple_of(ALIGN))? };
        Ok(Self { device: device.clone(), memory })
    }

    /// Runs `step` with its outputs in the arena; those that find no room are allocated as usual.
    pub fn run<T>(&self, step: impl FnOnce() -> Result<T>) -> Result<(T, Kept)> {
        let (start, half) = (address(&self.memory), self.memory.len() / 2);
        let active = Active { device: self.device.clone(), start, half, taken: [0; 2], turn: 0, kept: Vec::new() };
        ACTIVE.set(Some(active));
        let result = step();
        let kept = ManuallyDrop::new(ACTIVE.take().map_or_else(Vec::new, |active| active.kept));
        Ok((result?, kept))
    }
}

/// A decoder block begins: outputs of the block before the last are not needed any more.
pub fn next_block() {
    ACTIVE.with_borrow_mut(|active| {
        if let Some(active) = active {
            active.turn ^= 1;
            active.taken[active.turn] = 0;
        }
    });
}

/// Room for an output in the arena that is in use, if one is.
pub fn take<T: CudaDType + DeviceRepr>(shape: &Shape) -> Option<(Tensor, u64)> {
    ACTIVE.with_borrow_mut(|active| {
        let active = active.as_mut()?;
        let (count, at) = (shape.elem_count(), active.taken[active.turn]);
        let end = at + (count * size_of::<T>()).next_multiple_of(ALIGN);
        if end > active.half {
            return None;
        }
        active.taken[active.turn] = end;
        let at = active.start + (active.turn * active.half + at) as u64;
        // SAFETY: inside the arena, given to nobody else until the block after the next; never freed, see `Kept`.
        let slice = unsafe { active.device.cuda_stream().upgrade_device_ptr::<T>(at, count) };
        let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, active.device.clone()));
        let tensor = Tensor::from_storage(storage, shape.clone(), BackpropOp::none(), false);
        active.kept.push(tensor.clone());
        Some((tensor, at))
    })
}
