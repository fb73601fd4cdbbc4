//! What the tests on a GPU share.

use std::cell::OnceCell;

use candle_core::Device;
use half::bf16;
use quiver::gpu::{self, DeviceChoice, OpenOptions};

/// The GPU, opened once a thread: each test has a device of its own, with its own stream and workspaces.
pub fn device() -> Device {
    thread_local! {
        static DEVICE: OnceCell<Device> = const { OnceCell::new() };
    }
    let open = || gpu::open(DeviceChoice::Cuda(0), OpenOptions::default()).expect("these tests need a GPU");
    DEVICE.with(|device| device.get_or_init(open).clone())
}

/// `len` values in [-1, 1), rounded to bf16, the same for the same seed.
pub fn random(seed: u64, len: usize) -> Vec<bf16> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| bf16::from_f32(next())).collect()
}

/// `‖got - want‖ / ‖want‖`; NaN if anything is.
pub fn relative_error(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let error = norm(&mut got.iter().zip(want).map(|(g, w)| f64::from(*g) - w));
    error / norm(&mut want.iter().copied()).max(f64::MIN_POSITIVE)
}
