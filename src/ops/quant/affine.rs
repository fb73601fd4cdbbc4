//! Matrices of integer codes with scales: every GGUF block format in one internal form, exactly its values.
//!
//! A panel is 16 rows. Along k it is a run of records, one a GGUF block: the block's scales of the 16 rows, then its groups of
//! 32 (Q6_K: 16) values. A group is its codes, then its scales of the 16 rows. Codes come four k at a time, 16 rows
//! of four bytes each: what one integer dot instruction of 16 lanes reads. 4-bit codes put steps `i` and `i + 4` into the low
//! and high nibbles of one 64-byte line.

use std::ops::Range;

use half::f16;

use super::Codec;
use super::activations::Activations;
use super::blocks::{Scales, block_size, for_each_group};
use super::kernel;
use crate::ops::pool::SharedMut;
use crate::{Error, Result};

/// Rows in a panel.
pub const PANEL: usize = 16;

/// How records of a matrix are laid out; follows from the codec.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Bits a code: 4 or 8.
    pub bits: usize,
    /// Values a group: 32 or 16.
    pub group: usize,
    /// Groups a record.
    pub groups: usize,
    /// How scales are stored.
    pub kind: Kind,
    /// `value = scale·(code - 2^zero_shift)` in kinds without minima.
    pub zero_shift: u32,
}

/// How scales are stored, each for 16 rows: f16 (32 bytes) or one byte (16 bytes).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Group: d.
    Zero,
    /// Group: d, m.
    Min,
    /// Record: d, dmin. Group: sc, m.
    SuperMin,
    /// Record: d. Group: sc.
    SuperZero,
}

impl Layout {
    /// The layout of a block codec; `None` for dense formats.
    pub fn of(codec: Codec) -> Option<Self> {
        let (bits, group, groups, kind, zero_shift) = match codec {
            Codec::Q4_0 => (4, 32, 1, Kind::Zero, 3),
            Codec::Q4_1 => (4, 32, 1, Kind::Min, 0),
            Codec::Q5_0 => (8, 32, 1, Kind::Zero, 4),
            Codec::Q5_1 => (8, 32, 1, Kind::Min, 0),
            Codec::Q8_0 => (8, 32, 1, Kind::Zero, 7),
            Codec::Q4K => (4, 32, 8, Kind::SuperMin, 0),
            Codec::Q5K => (8, 32, 8, Kind::SuperMin, 0),
            Codec::Q6K => (8, 16, 16, Kind::SuperZero, 5),
            Codec::F32 | Codec::F16 | Codec::BF16 => return None,
        };
        Some(Self { bits, group, groups, kind, zero_shift })
    }

    /// Bytes of codes a group.
    pub const fn code_bytes(&self) -> usize {
        PANEL * self.group * self.bits / 8
    }

    /// Bytes a group.
    pub const fn group_bytes(&self) -> usize {
        self.code_bytes()
            + match self.kind {
                Kind::Zero | Kind::SuperMin => 32,
                Kind::Min => 64,
                Kind::SuperZero => 16,
            }
    }

    /// Bytes before the groups of a record.
    pub const fn head_bytes(&self) -> usize {
        match self.kind {
            Kind::Zero | Kind::Min => 0,
            Kind::SuperMin => 64,
            Kind::SuperZero => 32,
        }
    }

    /// Bytes a record.
    pub const fn record_bytes(&self) -> usize {
        self.head_bytes() + self.groups * self.group_bytes()
    }

    /// Where the code of `row` and the `i`th value of a group lies: byte and shift.
    const fn code_at(&self, row: usize, i: usize) -> (usize, u32) {
        let (step, lane) = (i / 4, 4 * row + i % 4);
        match self.bits {
            4 => (64 * (step % 4) + lane, if step < 4 { 0 } else { 4 }),
            _ => (64 * step + lane, 0),
        }
    }
}

/// A matrix `[n, k]` in panels.
pub struct Affine {
    n: usize,
    k: usize,
    layout: Layout,
    /// Panels, back to back.
    data: Vec<u8>,
}

impl Affine {
    /// Repacks `n` rows of blocks. Rows past `n` in the last panel stay zero.
    pub fn pack(codec: Codec, n: usize, k: usize, bytes: &[u8]) -> Result<Self> {
        let (Some(layout), Some((values, size))) = (Layout::of(codec), block_size(codec)) else {
            return Err(Error::internal(format!("{codec:?} has no blocks")));
        };
        if k == 0 || !k.is_multiple_of(values) {
            return Err(Error::invalid(format!("{codec:?} needs rows of a multiple of {values} values, got {k}")));
        }
        let row_bytes = k / values * size;
        if bytes.len() != n * row_bytes {
            return Err(Error::invalid(format!(
                "{codec:?} [{n}, {k}] takes {} bytes, got {}",
                n * row_bytes,
                bytes.len()
            )));
        }
        let records = k / values;
        let mut data = vec![0u8; n.div_ceil(PANEL) * records * layout.record_bytes()];
        for (row, blocks) in bytes.chunks_exact(row_bytes).enumerate() {
            let (panel, lane) = (row / PANEL, row % PANEL);
            for (r, block) in blocks.chunks_exact(size).enumerate() {
                let at = (panel * records + r) * layout.record_bytes();
                let record = &mut data[at..at + layout.record_bytes()];
                for_each_group(codec, block, |group| {
                    let at = layout.head_bytes() + group.index * layout.group_bytes();
                    for (i, code) in group.codes.iter().enumerate() {
                        let (byte, shift) = layout.code_at(lane, i);
                        record[at + byte] |= code << shift;
                    }
                    let at = at + layout.code_bytes();
                    let mut half = |at: usize, v: f16| {
                        record[at + 2 * lane..at + 2 * lane + 2].copy_from_slice(&v.to_le_bytes());
                    };
                    match group.scales {
                        Scales::Zero { d } => half(at, d),
                        Scales::Min { d, m } => {
                            half(at, d);
                            half(at + 32, m);
                        }
                        Scales::SuperMin { d, dmin, sc, m } => {
                            half(0, d);
                            half(32, dmin);
                            record[at + lane] = sc;
                            record[at + 16 + lane] = m;
                        }
                        Scales::SuperZero { d, sc } => {
                            half(0, d);
                            record[at + lane] = sc as u8;
                        }
                    }
                });
            }
        }
        Ok(Self { n, k, layout, data })
    }

    /// Rows.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Resident bytes.
    pub fn bytes(&self) -> usize {
        self.data.len()
    }

    /// Panels, the last one padded.
    pub fn panels(&self) -> usize {
        self.n.div_ceil(PANEL)
    }

    /// The panels' bytes, for kernel tests.
    #[cfg(test)]
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// Bytes a panel.
    pub fn panel_bytes(&self) -> usize {
        self.data.len() / self.panels()
    }

    /// Exact values of one row.
    pub fn row(&self, row: usize) -> Vec<f32> {
        let layout = &self.layout;
        let lane = row % PANEL;
        let panel = &self.data[row / PANEL * self.panel_bytes()..][..self.panel_bytes()];
        let mut out = Vec::with_capacity(self.k);
        for record in panel.chunks_exact(layout.record_bytes()) {
            for g in 0..layout.groups {
                let group = &record[layout.head_bytes() + g * layout.group_bytes()..][..layout.group_bytes()];
                let (d, m) = kernel::portable::scales(layout, record, &group[layout.code_bytes()..]);
                for i in 0..layout.group {
                    let (byte, shift) = layout.code_at(lane, i);
                    let code = (i32::from(group[byte]) >> shift) & ((1 << layout.bits) - 1);
                    out.push(match layout.kind {
                        Kind::Min | Kind::SuperMin => code as f32 * d[lane] + m[lane],
                        Kind::Zero | Kind::SuperZero => (code - (1 << layout.zero_shift)) as f32 * d[lane],
                    });
                }
            }
        }
        out
    }

    /// Products of activation rows with one panel: `y[row, column0 + 16·panel ..]`, `y` having `ld` columns.
    pub fn multiply_panel(
        &self,
        panel: usize,
        a: &Activations,
        rows: Range<usize>,
        y: SharedMut<f32>,
        ld: usize,
        column0: usize,
    ) {
        let data = &self.data[panel * self.panel_bytes()..][..self.panel_bytes()];
        let columns = PANEL.min(self.n - panel * PANEL);
        let column = column0 + panel * PANEL;
        kernel::multiply(&self.layout, data, a, rows, &mut |row, sums: &[f32; PANEL]| {
            // SAFETY: one panel belongs to one task, and panels are disjoint columns of `y`.
            unsafe { y.slice(row * ld + column, columns) }.copy_from_slice(&sums[..columns]);
        });
    }
}
