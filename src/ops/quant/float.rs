//! Matrices of floats (dense f32, f16, bf16) or of codebook entries (NF4, FP4), in panels of 16 rows.
//!
//! Along `k`, a panel consists of steps of eight inputs. A dense step is `[8 inputs][16 rows]` in the values' own precision. A
//! codebook's step is 16 lanes of 32 bits, with input `i` of the step in bits `4i .. 4i + 4`.

use std::ops::Range;

use half::{bf16, f16};

use super::Codec;
use super::activations::ActivationTile;
use super::affine::{PANEL, share};
use super::kernel::{self, Isa, Products};
use super::resident::{PlainNumber, Resident};
use super::transposed::COLUMNS;
use crate::{Error, Result};

/// Inputs of a step.
const STEP: usize = 8;

/// The values of all panels, back to back.
enum FloatStorage {
    F32(Resident<f32>),
    F16(Resident<f16>),
    BF16(Resident<bf16>),
    Codebook {
        /// `[panel][k / 8][16]`.
        codes: Resident<u32>,
        /// `[panel][k / block][16]`.
        scales: Resident<f32>,
        /// Inputs that share a scale, a multiple of 8.
        block: usize,
        /// The codebook.
        values: [f32; 16],
    },
}

/// The values of one panel.
#[derive(Clone, Copy)]
pub enum FloatPanel<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
    Codebook { codes: &'a [u32], scales: &'a [f32], block: usize, values: &'a [f32; 16] },
}

impl FloatPanel<'_> {
    /// Steps along k.
    pub fn steps(&self) -> usize {
        match self {
            FloatPanel::F32(w) => w.len() / (STEP * PANEL),
            FloatPanel::F16(w) => w.len() / (STEP * PANEL),
            FloatPanel::BF16(w) => w.len() / (STEP * PANEL),
            FloatPanel::Codebook { codes, .. } => codes.len() / PANEL,
        }
    }

    /// The values of one step, `[8 inputs][16 rows]`.
    #[inline(always)]
    pub fn decode(&self, step: usize) -> [[f32; PANEL]; STEP] {
        let at = |i: usize, r: usize| (STEP * step + i) * PANEL + r;
        std::array::from_fn(|i| {
            std::array::from_fn(|r| match self {
                FloatPanel::F32(w) => w[at(i, r)],
                FloatPanel::F16(w) => w[at(i, r)].to_f32(),
                FloatPanel::BF16(w) => w[at(i, r)].to_f32(),
                FloatPanel::Codebook { codes, scales, block, values } => {
                    values[(codes[step * PANEL + r] >> (4 * i) & 15) as usize] * scales[STEP * step / block * PANEL + r]
                }
            })
        })
    }
}

/// A matrix `[n, k]` in panels. Rows past `n` in the last panel and inputs past `k` in the last step are zero.
pub struct FloatPanels {
    n: usize,
    values: FloatStorage,
}

/// Fills panels `[panel][columns, padded to a multiple of step][16]` with `value(row, column)`.
fn panels<T: PlainNumber>(
    n: usize,
    columns: usize,
    step: usize,
    value: impl Fn(usize, usize) -> T,
) -> Result<Resident<T>> {
    let padded = columns.next_multiple_of(step);
    let mut out = Resident::zeroed(n.div_ceil(PANEL) * padded * PANEL)?;
    let values = out.values_mut();
    for row in 0..n {
        for column in 0..columns {
            values[(row / PANEL * padded + column) * PANEL + row % PANEL] = value(row, column);
        }
    }
    Ok(out)
}

/// Transposes columns of a dense panel into rows of floats.
#[inline(always)]
fn transpose<T: PlainNumber>(
    w: &[T],
    columns: Range<usize>,
    out: &mut [[f32; COLUMNS]; PANEL],
    float: impl Fn(T) -> f32,
) {
    for (i, w) in w.as_chunks::<PANEL>().0[columns].iter().enumerate() {
        for r in 0..PANEL {
            out[r][i] = float(w[r]);
        }
    }
}

impl FloatPanels {
    /// Packs row-major values `[n, k]`. Errors: no memory.
    pub fn f32(n: usize, k: usize, rows: &[f32]) -> Result<Self> {
        Ok(Self { n, values: FloatStorage::F32(panels(n, k, STEP, |r, i| rows[r * k + i])?) })
    }

    /// Packs little-endian rows of a dense `codec`. Errors: bytes that do not fit the shape, no memory.
    pub fn dense(codec: Codec, n: usize, k: usize, bytes: &[u8]) -> Result<Self> {
        let size = codec.block_bytes();
        if bytes.len() != n * k * size {
            let want = n * k * size;
            return Err(Error::invalid(format!("{codec:?} [{n}, {k}] takes {want} bytes, got {}", bytes.len())));
        }
        let two = |r: usize, i: usize| [bytes[2 * (r * k + i)], bytes[2 * (r * k + i) + 1]];
        let four = |r: usize, i: usize| {
            let at = 4 * (r * k + i);
            [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]
        };
        let values = match codec {
            Codec::F32 => FloatStorage::F32(panels(n, k, STEP, |r, i| f32::from_le_bytes(four(r, i)))?),
            Codec::F16 => FloatStorage::F16(panels(n, k, STEP, |r, i| f16::from_le_bytes(two(r, i)))?),
            Codec::BF16 => FloatStorage::BF16(panels(n, k, STEP, |r, i| bf16::from_le_bytes(two(r, i)))?),
            _ => return Err(Error::internal(format!("{codec:?} is not dense"))),
        };
        Ok(Self { n, values })
    }

    /// Packs rows of a [`super::Source::Codebook`]. Matrices whose blocks cross rows or steps become dense f32. Errors: data that do
    /// not fit the shape, no memory.
    pub fn codebook(n: usize, k: usize, block: usize, codes: &[u8], scales: &[f32], values: [f32; 16]) -> Result<Self> {
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
        if !k.is_multiple_of(block) || !block.is_multiple_of(STEP) {
            let value = |r: usize, i: usize| values[usize::from(code(r * k + i))] * scales[(r * k + i) / block];
            return Ok(Self { n, values: FloatStorage::F32(panels(n, k, STEP, value)?) });
        }
        let lane = |r: usize, s: usize| (0..STEP).map(|i| u32::from(code(r * k + STEP * s + i)) << (4 * i)).sum();
        let codes = panels(n, k / STEP, 1, lane)?;
        let scales = panels(n, k / block, 1, |r, b| scales[r * (k / block) + b])?;
        Ok(Self { n, values: FloatStorage::Codebook { codes, scales, block, values } })
    }

    /// Rows.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Resident bytes.
    pub fn bytes(&self) -> usize {
        match &self.values {
            FloatStorage::F32(v) => v.bytes(),
            FloatStorage::F16(v) => v.bytes(),
            FloatStorage::BF16(v) => v.bytes(),
            FloatStorage::Codebook { codes, scales, .. } => codes.bytes() + scales.bytes(),
        }
    }

    /// The number of panels, the last of which may be padded.
    pub fn panels(&self) -> usize {
        self.n.div_ceil(PANEL)
    }

    fn panel(&self, panel: usize) -> FloatPanel<'_> {
        let panels = self.panels();
        match &self.values {
            FloatStorage::F32(v) => FloatPanel::F32(share(v.values(), panel, panels)),
            FloatStorage::F16(v) => FloatPanel::F16(share(v.values(), panel, panels)),
            FloatStorage::BF16(v) => FloatPanel::BF16(share(v.values(), panel, panels)),
            FloatStorage::Codebook { codes, scales, block, values } => FloatPanel::Codebook {
                codes: share(codes.values(), panel, panels),
                scales: share(scales.values(), panel, panels),
                block: *block,
                values,
            },
        }
    }

    /// The exact values of one row.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        let panel = self.panel(row / PANEL);
        for (step, out) in out.chunks_mut(STEP).enumerate() {
            for (out, w) in out.iter_mut().zip(panel.decode(step)) {
                *out = w[row % PANEL];
            }
        }
    }

    /// The values of `columns`, which start at a multiple of a step, of all rows of a panel.
    #[inline(always)]
    pub fn columns(&self, panel: usize, columns: Range<usize>, out: &mut [[f32; COLUMNS]; PANEL]) {
        match self.panel(panel) {
            FloatPanel::F32(w) => transpose(w, columns, out, |w| w),
            FloatPanel::F16(w) => transpose(w, columns, out, f16::to_f32),
            FloatPanel::BF16(w) => transpose(w, columns, out, bf16::to_f32),
            FloatPanel::Codebook { codes, scales, block, values } => {
                for (r, out) in out.iter_mut().enumerate() {
                    for (s, out) in (columns.start / STEP..columns.end / STEP).zip(out.as_chunks_mut::<STEP>().0) {
                        let (codes, scale) = (codes[s * PANEL + r], scales[STEP * s / block * PANEL + r]);
                        for (i, out) in out.iter_mut().enumerate() {
                            *out = values[(codes >> (4 * i) & 15) as usize] * scale;
                        }
                    }
                }
            }
        }
    }

    /// The products of one panel with the rows of a tile.
    pub fn multiply(&self, isa: Isa, panel: usize, tile: &ActivationTile, out: &mut Products) {
        kernel::float(isa, self.panel(panel), tile, out);
    }
}
