//! Pinned host memory, which the GPU copies from without the host's help.

use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, PinnedHostSlice, ValidAsZeroBits};

use super::{Context, driver_error};
use crate::Result;

/// Integers: any bits are a value, so that memory needs no initialisation.
pub trait Integer: DeviceRepr + ValidAsZeroBits {}
impl Integer for u16 {}
impl Integer for u32 {}

/// A pinned buffer of integers.
pub struct PinnedBuffer<T: Integer>(PinnedHostSlice<T>);

impl<T: Integer> PinnedBuffer<T> {
    /// A buffer of `len` arbitrary values. Allocating it may hold up the GPU. Errors: no pinned memory.
    pub fn new(context: &Context, len: usize) -> Result<Self> {
        // SAFETY: any bits are a `T`.
        let slice = unsafe { context.driver().alloc_pinned_with_flags(len, 0) };
        slice.map(Self).map_err(driver_error("allocating pinned memory"))
    }

    /// Values.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The values, to read and write them.
    pub fn as_mut_slice(&mut self) -> Result<&mut [T]> {
        self.0.as_mut_slice().map_err(driver_error("using pinned memory"))
    }
}
