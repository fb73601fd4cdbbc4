//! Memory bandwidth of a device, the bound that decode steps are compared with.

use std::hint::black_box;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};

use crate::Result;
use crate::ops::pool::{parallel_for, threads};

/// Bytes of the buffer, more than the last-level cache of any processor.
const BYTES: usize = 1 << 30;

/// Number of passes. The fastest counts, because other load on the machine only slows a pass down.
const PASSES: usize = 5;

/// Measures bytes per second: all threads of the pool read on a CPU; a copy reads and writes on a GPU.
///
/// # Errors
/// The device has less than 1 GiB free, or 2 GiB on a GPU.
pub(crate) fn measure(device: &Device) -> Result<f64> {
    if device.is_cpu() {
        let buffer = vec![1u64; BYTES / size_of::<u64>()];
        let part = buffer.len() / (8 * threads());
        return fastest(BYTES, || {
            parallel_for(buffer.len().div_ceil(part), |i| {
                let part = &buffer[i * part..buffer.len().min((i + 1) * part)];
                black_box(part.iter().fold(0u64, |sum, x| sum.wrapping_add(*x)));
            });
            Ok(())
        });
    }
    let tensor = Tensor::zeros(BYTES / size_of::<f32>(), DType::F32, device)?;
    fastest(2 * BYTES, || {
        tensor.copy()?;
        Ok(device.synchronize()?)
    })
}

/// Bytes per second of the fastest pass over `bytes`.
fn fastest(bytes: usize, pass: impl Fn() -> Result<()>) -> Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..PASSES {
        let start = Instant::now();
        pass()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(bytes as f64 / best)
}
