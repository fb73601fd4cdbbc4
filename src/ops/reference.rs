//! Helpers of the ops' unit tests: random inputs, tolerances, finite differences.

use rand_pcg::Pcg64;
use rand_pcg::rand_core::{Rng, SeedableRng};

/// `n` values in -1..1, determined by the seed.
pub fn random(seed: u64, n: usize) -> Vec<f32> {
    let mut rng = Pcg64::seed_from_u64(seed);
    (0..n).map(|_| (rng.next_u32() >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
}

/// Asserts that every value is within `tolerance` times the largest expected magnitude.
#[track_caller]
pub fn assert_close(values: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(values.len(), expected.len());
    let scale = expected.iter().fold(1e-30, |m: f64, x| m.max(x.abs()));
    for (i, (&x, &e)) in values.iter().zip(expected).enumerate() {
        assert!((f64::from(x) - e).abs() <= tolerance * scale, "value {i} is {x}, expected {e} (largest {scale})");
    }
}

/// The partial derivatives of `f` at `x` with respect to the values with indices `at`, by central differences.
pub fn gradient(x: &[f32], at: impl IntoIterator<Item = usize>, f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    const STEP: f64 = 1e-5;
    let mut x: Vec<f64> = x.iter().map(|&x| x.into()).collect();
    let mut moved = |i: usize, by: f64| {
        let value = x[i];
        x[i] = value + by;
        let y = f(&x);
        x[i] = value;
        y
    };
    at.into_iter().map(|i| (moved(i, STEP) - moved(i, -STEP)) / (2.0 * STEP)).collect()
}

/// The dot product of `x` and `y`.
pub fn dot(x: &[f64], y: &[f32]) -> f64 {
    assert_eq!(x.len(), y.len());
    x.iter().zip(y).map(|(x, &y)| x * f64::from(y)).sum()
}
