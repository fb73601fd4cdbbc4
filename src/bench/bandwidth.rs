//! How fast a device reads memory: what a decode step is measured against.

use std::hint::black_box;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};

use crate::Result;
use crate::ops::pool::{parallel_for, threads};

/// More than the last cache of any processor holds.
const BYTES: usize = 1 << 30;

/// The best of so many passes counts: others on the machine only make one slower.
const PASSES: usize = 5;

/// Bytes a second: on a CPU read by all threads of the pool, on a GPU read and written by a copy.
///
/// # Errors
/// No gibibyte, or two on a GPU, is free.
pub fn measure(device: &Device) -> Result<f64> {
    if device.is_cpu() {
        let buffer = vec![1u64; BYTES / size_of::<u64>()];
        let part = buffer.len() / (8 * threads());
        return best(BYTES, || {
            parallel_for(buffer.len().div_ceil(part), |i| {
                let part = &buffer[i * part..buffer.len().min((i + 1) * part)];
                black_box(part.iter().fold(0u64, |sum, x| sum.wrapping_add(*x)));
            });
            Ok(())
        });
    }
    let tensor = Tensor::zeros(BYTES / size_of::<f32>(), DType::F32, device)?;
    best(2 * BYTES, || {
        tensor.copy()?;
        Ok(device.synchronize()?)
    })
}

/// Bytes a second of the fastest pass.
fn best(bytes: usize, pass: impl Fn() -> Result<()>) -> Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..PASSES {
        let start = Instant::now();
        pass()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(bytes as f64 / best)
}
