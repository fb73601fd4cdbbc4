//! Devices, random values and comparisons for the GPU tests.

use std::cell::OnceCell;

use candle_core::{DType, Device, Tensor};
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

/// `‖got - want‖ / ‖want‖`; NaN if any value is.
pub fn relative_error(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let error = norm(&mut got.iter().zip(want).map(|(g, w)| f64::from(*g) - w));
    error / norm(&mut want.iter().copied()).max(f64::MIN_POSITIVE)
}

/// Relative error of one rounding to bf16: 2^-9 / sqrt(3), with room for chance.
pub const ROUNDED: f64 = 3e-3;

/// The same values on the CPU as f32 and on the GPU as bf16.
pub fn both(values: &[bf16], shape: (usize, usize)) -> [Tensor; 2] {
    let gpu = Tensor::from_slice(values, shape, &device()).unwrap();
    [gpu.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap(), gpu]
}

/// The same values on both as f32.
pub fn both_f32(values: &[bf16], shape: &[usize]) -> [Tensor; 2] {
    let values: Vec<f32> = values.iter().map(|v| v.to_f32()).collect();
    [Device::Cpu, device()].map(|device| Tensor::from_slice(&values, shape, &device).unwrap())
}

/// A tensor's values as f32.
pub fn values(x: &Tensor) -> Vec<f32> {
    x.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The bits of a tensor's values as f32.
pub fn bits(x: &Tensor) -> Vec<u32> {
    values(x).iter().map(|v| v.to_bits()).collect()
}

/// Asserts that the relative error of `got` is below `bound`.
#[track_caller]
pub fn assert_close(got: &Tensor, want: &Tensor, bound: f64, what: &str) {
    assert_eq!(got.dims(), want.dims());
    let error = relative_error(&values(got), &values(want).into_iter().map(f64::from).collect::<Vec<_>>());
    assert!(error < bound, "{what}: {error}");
}
