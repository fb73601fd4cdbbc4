//! Cache of small index arrays (positions, tiles of work) on the device, keyed by content. Every decoder block of a training step
//! reuses them.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;

use crate::Result;

/// Arrays kept: a step needs four, and several jobs may alternate.
const KEPT: usize = 32;

/// Recently used arrays, the most recent one first.
#[derive(Default)]
pub(super) struct UploadCache(Mutex<VecDeque<UploadedArray>>);

struct UploadedArray {
    /// The source of the copy, which may still read it.
    host: Vec<u32>,
    device: Arc<CudaSlice<u32>>,
}

impl UploadCache {
    /// See [`super::Context::upload`].
    pub fn upload(&self, device: &CudaDevice, words: &[u32]) -> Result<Arc<CudaSlice<u32>>> {
        let mut arrays = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(i) = arrays.iter().position(|array| array.host == words) {
            arrays.swap(0, i);
            return Ok(arrays[0].device.clone());
        }
        arrays.truncate(KEPT - 1);
        let host = words.to_vec();
        let on_device = Arc::new(device.clone_htod(&host)?);
        arrays.push_front(UploadedArray { host, device: on_device.clone() });
        Ok(on_device)
    }
}
