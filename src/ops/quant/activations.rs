//! Activations as integers, for integer dot products with weight codes.
//!
//! A row becomes 16-bit integers with one scale, each split into two signed bytes: `x ≈ scale·(256·high + low)`. One byte is
//! not enough: on SmolLM2, 8-bit groups of 32 move log-probabilities by 0.069 nats on average (0.68 at most), two bytes with
//! one scale a row by 0.002 (0.02).

use crate::ops::pool::{SharedMut, parallel_for};

/// Largest magnitude of an integer: its high byte is 127.
const LIMIT: f32 = 32639.0;

/// Rows of integers, ready for every kernel.
pub struct Activations {
    /// Values a row, a multiple of 32.
    pub k: usize,
    /// Per row and group of 32: 32 high bytes, then 32 low bytes.
    pub planes: Vec<i8>,
    /// Per row and group of 32: sums of its integers, which offsets and minima of weights multiply.
    pub sums: Vec<GroupSums>,
    /// Per row: what one integer step is worth. NaN for a row with a value that is not finite.
    pub scales: Vec<f32>,
}

/// Sums over one group of 32 integers, in the forms that kernels broadcast.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct GroupSums {
    /// Over its first and second 16.
    pub halves: [i32; 2],
    /// Over all 32.
    pub whole: i32,
    /// The same, exact in f32.
    pub whole_f32: f32,
}

impl Activations {
    /// Quantises `x [m, k]`.
    pub fn quantise(x: &[f32], k: usize) -> Self {
        let m = x.len() / k;
        let mut planes = vec![0i8; m * 2 * k];
        let mut sums = vec![GroupSums::default(); m * k / 32];
        let mut scales = vec![0f32; m];
        let (p, s, d) = (SharedMut::new(&mut planes), SharedMut::new(&mut sums), SharedMut::new(&mut scales));
        const ROWS: usize = 16;
        parallel_for(m.div_ceil(ROWS), |task| {
            for row in task * ROWS..m.min((task + 1) * ROWS) {
                // SAFETY: each row is its own range, and belongs to one task.
                let (planes, sums, scale) =
                    unsafe { (p.slice(row * 2 * k, 2 * k), s.slice(row * k / 32, k / 32), d.slice(row, 1)) };
                scale[0] = quantise_row(&x[row * k..(row + 1) * k], planes, sums);
            }
        });
        Self { k, planes, sums, scales }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.scales.len()
    }
}

/// Fills zeroed planes and sums of one row; returns its scale.
fn quantise_row(x: &[f32], planes: &mut [i8], sums: &mut [GroupSums]) -> f32 {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512bw") {
            // SAFETY: the feature was detected.
            return unsafe { quantise_row_avx512(x, planes, sums) };
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the feature was detected.
            return unsafe { quantise_row_avx2(x, planes, sums) };
        }
    }
    quantise_row_plain(x, planes, sums)
}

/// # Safety
/// The processor has AVX-512 BW.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn quantise_row_avx512(x: &[f32], planes: &mut [i8], sums: &mut [GroupSums]) -> f32 {
    quantise_row_plain(x, planes, sums)
}

/// # Safety
/// The processor has AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn quantise_row_avx2(x: &[f32], planes: &mut [i8], sums: &mut [GroupSums]) -> f32 {
    quantise_row_plain(x, planes, sums)
}

#[inline(always)]
fn quantise_row_plain(x: &[f32], planes: &mut [i8], sums: &mut [GroupSums]) -> f32 {
    // Sixteen running maxima, so that the loop needs no order.
    let mut max = [0f32; 16];
    let mut finite = true;
    for chunk in x.chunks_exact(16) {
        for (m, v) in max.iter_mut().zip(chunk) {
            let a = v.abs();
            finite &= a < f32::INFINITY;
            *m = if a > *m { a } else { *m };
        }
    }
    if !finite {
        return f32::NAN;
    }
    let max = max.iter().fold(0f32, |a, &b| a.max(b));
    let inverse = LIMIT / max;
    if !inverse.is_finite() {
        // All zero, or so small that the products vanish in f32 anyway.
        return 0.0;
    }
    for (g, group) in x.chunks_exact(32).enumerate() {
        let (high, low) = planes[64 * g..64 * (g + 1)].split_at_mut(32);
        for half in 0..2 {
            let mut sum = 0i32;
            for i in 16 * half..16 * (half + 1) {
                // The magic number rounds to nearest, ties to even, and leaves the integer in the low mantissa bits.
                let q = (group[i] * inverse + 12_582_912.0).to_bits() as i32 - 12_582_912f32.to_bits() as i32;
                sum += q;
                let h = (q + 128) >> 8;
                high[i] = h as i8;
                low[i] = (q - (h << 8)) as i8;
            }
            sums[g].halves[half] = sum;
        }
        sums[g].whole = sums[g].halves[0] + sums[g].halves[1];
        sums[g].whole_f32 = sums[g].whole as f32;
    }
    max / LIMIT
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_are_close_and_sums_are_theirs() {
        let k = 96;
        let x: Vec<f32> = (0..3 * k).map(|i| ((i * 7919) % 1000) as f32 / 37.0 - 13.0).collect();
        let a = Activations::quantise(&x, k);
        for row in 0..3 {
            for g in 0..k / 32 {
                let at = row * 2 * k + 64 * g;
                let q = |i: usize| 256 * i32::from(a.planes[at + i]) + i32::from(a.planes[at + 32 + i]);
                for i in 0..32 {
                    let want = x[row * k + 32 * g + i];
                    assert!((q(i) as f32 * a.scales[row] - want).abs() <= 0.51 * a.scales[row]);
                }
                let sums = a.sums[row * k / 32 + g];
                assert_eq!(sums.halves, [(0..16).map(q).sum::<i32>(), (16..32).map(q).sum::<i32>()]);
                assert_eq!(sums.whole_f32, sums.whole as f32);
            }
        }
    }

    #[test]
    fn odd_rows() {
        let k = 32;
        let mut x = vec![0f32; 4 * k];
        x[k] = f32::NAN;
        x[2 * k + 3] = f32::NEG_INFINITY;
        x[3 * k] = 1e-45;
        let a = Activations::quantise(&x, k);
        assert_eq!(a.scales[0], 0.0);
        assert!(a.scales[1].is_nan() && a.scales[2].is_nan());
        assert_eq!(a.scales[3], 0.0);
    }
}
