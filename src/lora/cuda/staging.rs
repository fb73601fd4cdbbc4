//! Adapters laid out in pinned memory, on their way to a GPU.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::arch::ModelConfig;
use crate::gpu::Context;
use crate::gpu::pinned::PinnedBuffer;
use crate::lora::image::{ImageLayout, SlotEntry};
use crate::lora::weights::AdapterWeights;
use crate::{Error, Result};

/// Pinned buffers: one for each loader thread, and one being copied meanwhile.
const BUFFERS: usize = 3;

/// Pinned buffers have a multiple of this many 16-bit values, so that the next adapter of a similar size fits too.
const BUFFER_STEP: usize = 1 << 20;

/// An adapter laid out on the host, ready to be copied.
pub struct AdapterImage {
    pub(super) layout: ImageLayout,
    buffer: StagingBuffer,
}

/// Pinned buffers for adapters on their way to the GPU. Allocating pinned memory may hold up the GPU, so buffers are kept.
pub struct PinnedStaging {
    gpu: Arc<Context>,
    buffers: Mutex<StagingBuffers>,
    returned: Condvar,
}

#[derive(Default)]
struct StagingBuffers {
    free: Vec<PinnedBuffer<u16>>,
    /// Number of buffers in use.
    in_use: usize,
}

/// A buffer that goes back to the staging when it is dropped.
struct StagingBuffer {
    memory: Option<PinnedBuffer<u16>>,
    staging: Arc<PinnedStaging>,
}

impl AdapterImage {
    /// Bytes that it takes of the slots' memory.
    pub fn bytes(&self) -> usize {
        self.layout.bytes
    }

    /// The image and the slot's row of the table behind it, which is written now that the image's address is known.
    pub(super) fn with_row(&mut self, row: &[u16]) -> Result<(&[u16], &[u16])> {
        let values = self.layout.bytes / 2;
        let all = self.buffer.values(values + row.len())?;
        all[values..].copy_from_slice(row);
        Ok(all.split_at(values))
    }
}

impl PinnedStaging {
    /// Without buffers yet.
    pub(super) fn new(gpu: Arc<Context>) -> Self {
        Self { gpu, buffers: Mutex::default(), returned: Condvar::new() }
    }

    /// Lays an adapter out; waits for a buffer. Errors: no pinned memory.
    pub fn image(self: &Arc<Self>, weights: &AdapterWeights, model: &ModelConfig) -> Result<AdapterImage> {
        let layout = ImageLayout::new(weights, model)?;
        let values = layout.bytes / 2;
        // The row of the table comes behind the image.
        let mut buffer = self.take(values + SlotEntry::count(model.num_layers) * SlotEntry::WORDS)?;
        layout.write(weights, model, buffer.values(values)?);
        Ok(AdapterImage { layout, buffer })
    }

    fn lock(&self) -> MutexGuard<'_, StagingBuffers> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(self: &Arc<Self>, values: usize) -> Result<StagingBuffer> {
        let mut buffers = self.lock();
        while buffers.in_use == BUFFERS {
            buffers = self.returned.wait(buffers).unwrap_or_else(PoisonError::into_inner);
        }
        buffers.in_use += 1;
        let mut buffer = StagingBuffer { memory: None, staging: self.clone() };
        let fitting = (0..buffers.free.len()).filter(|i| buffers.free[*i].len() >= values);
        if let Some(i) = fitting.min_by_key(|i| buffers.free[*i].len()) {
            buffer.memory = Some(buffers.free.swap_remove(i));
            return Ok(buffer);
        }
        // A buffer that is too small gives way to the new one.
        let small = if buffers.free.len() + buffers.in_use > BUFFERS { buffers.free.pop() } else { None };
        drop(buffers);
        drop(small);
        buffer.memory = Some(PinnedBuffer::new(&self.gpu, values.next_multiple_of(BUFFER_STEP))?);
        Ok(buffer)
    }
}

impl StagingBuffer {
    fn values(&mut self, len: usize) -> Result<&mut [u16]> {
        let memory = self.memory.as_mut().ok_or_else(|| Error::internal("an adapter's buffer is gone"))?;
        Ok(&mut memory.as_mut_slice()?[..len])
    }
}

impl Drop for StagingBuffer {
    fn drop(&mut self) {
        let mut buffers = self.staging.lock();
        buffers.in_use -= 1;
        buffers.free.extend(self.memory.take());
        drop(buffers);
        self.staging.returned.notify_one();
    }
}
