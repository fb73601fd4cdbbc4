//! Pinned host memory, which the GPU copies from without the host's help.

use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaSlice, DeviceRepr, PinnedHostSlice, ValidAsZeroBits};

use super::{Context, driver_error};
use crate::Result;

/// Integers: any bits are a value, so that memory needs no initialisation.
pub trait Integer: DeviceRepr + ValidAsZeroBits + 'static {}
impl Integer for u16 {}
impl Integer for u32 {}

/// A pinned buffer of integers.
pub struct PinnedBuffer<T: Integer> {
    values: PinnedHostSlice<T>,
    /// Completes when the last [`PinnedBuffer::upload`] has read the buffer.
    uploaded: Option<CudaEvent>,
}

impl<T: Integer> PinnedBuffer<T> {
    /// A buffer of `len` arbitrary values. Allocating it may hold up the GPU. Errors: no pinned memory.
    pub fn new(context: &Context, len: usize) -> Result<Self> {
        // SAFETY: any bits are a `T`.
        let slice = unsafe { context.driver().alloc_pinned_with_flags(len, 0) };
        let values = slice.map_err(driver_error("allocating pinned memory"))?;
        Ok(Self { values, uploaded: None })
    }

    /// Values.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// The values, to read and write them. Waits until the last [`PinnedBuffer::upload`] has read them: the device reads them when
    /// its stream comes to the copy, which may be behind a whole step.
    pub fn as_mut_slice(&mut self) -> Result<&mut [T]> {
        if let Some(uploaded) = self.uploaded.take() {
            uploaded.synchronize().map_err(driver_error("waiting for an upload"))?;
        }
        self.values.as_mut_slice().map_err(driver_error("using pinned memory"))
    }

    /// Copies the first `len` values to the start of `to`, in the order of the device's stream. Does not wait.
    pub fn upload(&mut self, context: &Context, len: usize, to: &mut CudaSlice<T>) -> Result<()> {
        let values = self.as_mut_slice()?;
        context.device().memcpy_htod(&values[..len], &mut to.slice_mut(..len))?;
        let uploaded = context.stream().record_event(None).map_err(driver_error("recording an upload"))?;
        self.uploaded = Some(uploaded);
        Ok(())
    }
}
