//! Matrices whose values are floats (dense f32, f16, bf16) or a codebook's entries (NF4, FP4), in panels of 16 rows.
//!
//! The kernel decodes a stretch of k into f32 once for a block of activation rows, then accumulates
//! `acc = fma(w, x, acc)` in order of k, one lane a row of the panel: the same bits for any number of activation rows.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::affine::PANEL;
use crate::ops::pool::SharedMut;
use crate::{Error, Result};

/// Values of k decoded at a time.
const STRETCH: usize = 64;

/// How values are stored, `[panel][k][16 rows]`.
enum Values {
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
    Codebook {
        /// Two k a byte, the even one in the low nibble: `[panel][k / 2][16]`.
        codes: Vec<u8>,
        /// `[panel][k / block][16]`.
        scales: Vec<f32>,
        /// Values of k per scale.
        block: usize,
        /// What codes stand for.
        codebook: [f32; 16],
    },
}

/// A matrix `[n, k]` in panels; rows past `n` in the last one are zero.
pub struct Float {
    n: usize,
    k: usize,
    values: Values,
}

/// Reorders rows into panels.
fn panels<T: Copy + Default>(n: usize, k: usize, value: impl Fn(usize, usize) -> T) -> Vec<T> {
    let mut out = vec![T::default(); n.div_ceil(PANEL) * k * PANEL];
    for row in 0..n {
        let base = row / PANEL * k * PANEL + row % PANEL;
        for i in 0..k {
            out[base + i * PANEL] = value(row, i);
        }
    }
    out
}

impl Float {
    /// Packs f32 rows, `[n, k]` row-major.
    pub fn f32(n: usize, k: usize, rows: &[f32]) -> Self {
        Self { n, k, values: Values::F32(panels(n, k, |r, i| rows[r * k + i])) }
    }

    /// Packs little-endian f32 rows.
    pub fn f32_bytes(n: usize, k: usize, bytes: &[u8]) -> Self {
        let at = |r: usize, i: usize| {
            let at = 4 * (r * k + i);
            f32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        Self { n, k, values: Values::F32(panels(n, k, at)) }
    }

    /// Packs little-endian f16 rows.
    pub fn f16_bytes(n: usize, k: usize, bytes: &[u8]) -> Self {
        let at = |r: usize, i: usize| f16::from_le_bytes([bytes[2 * (r * k + i)], bytes[2 * (r * k + i) + 1]]);
        Self { n, k, values: Values::F16(panels(n, k, at)) }
    }

    /// Packs little-endian bf16 rows.
    pub fn bf16_bytes(n: usize, k: usize, bytes: &[u8]) -> Self {
        let at = |r: usize, i: usize| bf16::from_le_bytes([bytes[2 * (r * k + i)], bytes[2 * (r * k + i) + 1]]);
        Self { n, k, values: Values::BF16(panels(n, k, at)) }
    }

    /// Packs codebook rows (see [`super::Source::Codebook`]). Blocks that run across rows become dense f32.
    pub fn codebook(
        n: usize,
        k: usize,
        block: usize,
        codes: &[u8],
        scales: &[f32],
        codebook: [f32; 16],
    ) -> Result<Self> {
        let count = n * k;
        if block == 0 || codes.len() != count.div_ceil(2) || scales.len() != count.div_ceil(block) {
            return Err(Error::invalid(format!(
                "codebook matrix [{n}, {k}] in blocks of {block} takes {} code bytes and {} scales, got {} and {}",
                count.div_ceil(2),
                count.div_ceil(block.max(1)),
                codes.len(),
                scales.len()
            )));
        }
        let code = |at: usize| if at.is_multiple_of(2) { codes[at / 2] >> 4 } else { codes[at / 2] & 15 };
        if !k.is_multiple_of(block) || k % 2 == 1 {
            let value = |r: usize, i: usize| codebook[usize::from(code(r * k + i))] * scales[(r * k + i) / block];
            return Ok(Self { n, k, values: Values::F32(panels(n, k, value)) });
        }
        let pair = |r: usize, i: usize| code(r * k + 2 * i) | code(r * k + 2 * i + 1) << 4;
        let scale = |r: usize, b: usize| scales[r * (k / block) + b];
        let values =
            Values::Codebook { codes: panels(n, k / 2, pair), scales: panels(n, k / block, scale), block, codebook };
        Ok(Self { n, k, values })
    }

    /// Rows.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Resident bytes.
    pub fn bytes(&self) -> usize {
        match &self.values {
            Values::F32(v) => v.len() * 4,
            Values::F16(v) => v.len() * 2,
            Values::BF16(v) => v.len() * 2,
            Values::Codebook { codes, scales, .. } => codes.len() + scales.len() * 4,
        }
    }

    /// Panels, the last one padded.
    pub fn panels(&self) -> usize {
        self.n.div_ceil(PANEL)
    }

    /// Values `k0..k0 + len` of a panel's rows, `[len][16]`.
    fn decode(&self, panel: usize, k0: usize, len: usize, out: &mut [f32]) {
        let at = (panel * self.k + k0) * PANEL;
        let out = &mut out[..len * PANEL];
        match &self.values {
            Values::F32(v) => out.copy_from_slice(&v[at..at + len * PANEL]),
            Values::F16(v) => v[at..at + len * PANEL].convert_to_f32_slice(out),
            Values::BF16(v) => v[at..at + len * PANEL].convert_to_f32_slice(out),
            Values::Codebook { codes, scales, block, codebook } => {
                for (i, out) in out.chunks_exact_mut(PANEL).enumerate() {
                    let i = k0 + i;
                    let codes = &codes[(panel * (self.k / 2) + i / 2) * PANEL..][..PANEL];
                    let scales = &scales[(panel * (self.k / block) + i / block) * PANEL..][..PANEL];
                    for lane in 0..PANEL {
                        out[lane] = codebook[usize::from((codes[lane] >> (4 * (i % 2))) & 15)] * scales[lane];
                    }
                }
            }
        }
    }

    /// Exact values of one row.
    pub fn row(&self, row: usize) -> Vec<f32> {
        let mut stretch = [0f32; STRETCH * PANEL];
        let mut out = Vec::with_capacity(self.k);
        for k0 in (0..self.k).step_by(STRETCH) {
            let len = STRETCH.min(self.k - k0);
            self.decode(row / PANEL, k0, len, &mut stretch);
            out.extend((0..len).map(|i| stretch[i * PANEL + row % PANEL]));
        }
        out
    }

    /// Products of all rows of `x [m, k]` with one panel: `y[row, column0 + 16·panel ..]`, `y` having `ld` columns.
    pub fn multiply_panel(&self, panel: usize, x: &[f32], y: SharedMut<f32>, ld: usize, column0: usize) {
        let columns = PANEL.min(self.n - panel * PANEL);
        let column = column0 + panel * PANEL;
        let mut stretch = [0f32; STRETCH * PANEL];
        let mut sums = vec![[0f32; PANEL]; x.len() / self.k];
        for k0 in (0..self.k).step_by(STRETCH) {
            let len = STRETCH.min(self.k - k0);
            self.decode(panel, k0, len, &mut stretch);
            accumulate(&stretch[..len * PANEL], &x[k0..], self.k, &mut sums);
        }
        for (row, sums) in sums.iter().enumerate() {
            // SAFETY: one panel belongs to one task, and panels are disjoint columns of `y`.
            unsafe { y.slice(row * ld + column, columns) }.copy_from_slice(&sums[..columns]);
        }
    }
}

/// `sums[row] += w · x[row]`, `x` rows starting `stride` apart.
fn accumulate(w: &[f32], x: &[f32], stride: usize, sums: &mut [[f32; PANEL]]) {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512f") {
            // SAFETY: the feature was detected.
            return unsafe { accumulate_avx512(w, x, stride, sums) };
        }
        if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
            // SAFETY: the features were detected.
            return unsafe { accumulate_avx2(w, x, stride, sums) };
        }
    }
    accumulate_plain(w, x, stride, sums);
}

/// # Safety
/// The processor has AVX-512 F.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn accumulate_avx512(w: &[f32], x: &[f32], stride: usize, sums: &mut [[f32; PANEL]]) {
    accumulate_plain(w, x, stride, sums);
}

/// # Safety
/// The processor has AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn accumulate_avx2(w: &[f32], x: &[f32], stride: usize, sums: &mut [[f32; PANEL]]) {
    accumulate_plain(w, x, stride, sums);
}

#[inline(always)]
fn accumulate_plain(w: &[f32], x: &[f32], stride: usize, sums: &mut [[f32; PANEL]]) {
    let len = w.len() / PANEL;
    let mut rows = sums.chunks_exact_mut(4);
    let mut at = 0;
    for tile in &mut rows {
        let x: [&[f32]; 4] = std::array::from_fn(|t| &x[at + t * stride..][..len]);
        let mut acc: [[f32; PANEL]; 4] = std::array::from_fn(|t| tile[t]);
        for (i, w) in w.chunks_exact(PANEL).enumerate() {
            for t in 0..4 {
                for lane in 0..PANEL {
                    acc[t][lane] = w[lane].mul_add(x[t][i], acc[t][lane]);
                }
            }
        }
        tile.copy_from_slice(&acc);
        at += 4 * stride;
    }
    for sums in rows.into_remainder() {
        let x = &x[at..][..len];
        let mut acc = *sums;
        for (w, x) in w.chunks_exact(PANEL).zip(x) {
            for lane in 0..PANEL {
                acc[lane] = w[lane].mul_add(*x, acc[lane]);
            }
        }
        *sums = acc;
        at += stride;
    }
}
