//! Matrices of integer codes with scales. All GGUF block formats become this one form, and keep their exact values.
//!
//! A panel is 16 rows, one vector lane per row: a kernel loads the same inputs of 16 rows at once and never adds across lanes.
//! Along `k`, a panel consists of groups of 32 inputs.
//!
//! Expanded, a group's codes are 512 bytes, `[8 vectors][16 rows][4 inputs]`, as 8-bit dot products of four take them: vector `v` has
//! inputs `4v .. 4v + 4`. Stored, they take as many bytes as in the file:
//!
//! | bits | stored vectors of a group |
//! |---|---|
//! | 4 | four: low nibbles are the codes of vectors 0-3, high nibbles those of 4-7 |
//! | 5 | four as above for the low four bits; one whose bit `v` is the fifth bit of vector `v` |
//! | 6 | four as above; two whose bits `2v, 2v + 1` are the upper bits of vectors 0-3 and 4-7 |
//! | 8 | the eight expanded vectors |

use std::ops::Range;

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::Codec;
use super::activations::ActivationTile;
use super::blocks::GgmlBlock;
use super::kernel::{self, Isa, Products};
use super::resident::Resident;
use super::transposed::COLUMNS;
use crate::ops::pool::{SharedMut, parallel_for};
use crate::ops::simd::{LANES, Lanes};
use crate::{Error, Result};

/// Rows of a panel.
pub const PANEL: usize = 16;
/// Inputs of a group.
pub const GROUP: usize = 32;
/// Groups of a K-quant's block.
const SUPER: usize = 8;

/// The scales that a format stores. Each item is one value for each of the 16 rows. All products below are exact in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scales {
    /// Per group: f16 scale.
    Scale,
    /// Per group: f16 scale, f16 min.
    ScaleMin,
    /// Per 8 groups: f16 `d`, f16 `-dmin`; then per group: u8 `sc`, u8 `m`. The scale is `d · sc`, the min `-dmin · m`.
    SuperMin,
    /// Per 8 groups: f16 `d`; then per group: i8 `sc` of its first and of its second 16 inputs. The scale is `d · sc`.
    SuperHalves,
}

/// How a block format is stored in panels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PanelLayout {
    /// Bits of a code: 4, 5, 6 or 8.
    pub bits: usize,
    /// The code of zero. In formats without mins, values are `scale · (code - zero)`; in the others, `scale · code + min`.
    pub zero: u8,
    /// The stored scales.
    pub scales: Scales,
}

/// A record of a panel's scales.
#[derive(Debug, Clone, Copy)]
pub struct ScaleRecord {
    /// Groups that share the record.
    pub groups: usize,
    /// Its size.
    pub bytes: usize,
}

impl PanelLayout {
    /// The layout of a block format; `None` for dense formats.
    pub const fn of(codec: Codec) -> Option<Self> {
        let (bits, zero, scales) = match codec {
            Codec::Q4_0 => (4, 8, Scales::Scale),
            Codec::Q4_1 => (4, 0, Scales::ScaleMin),
            Codec::Q5_0 => (5, 16, Scales::Scale),
            Codec::Q5_1 => (5, 0, Scales::ScaleMin),
            Codec::Q8_0 => (8, 128, Scales::Scale),
            Codec::Q4K => (4, 0, Scales::SuperMin),
            Codec::Q5K => (5, 0, Scales::SuperMin),
            Codec::Q6K => (6, 32, Scales::SuperHalves),
            Codec::F32 | Codec::F16 | Codec::BF16 => return None,
        };
        Some(Self { bits, zero, scales })
    }

    /// Bytes of a group's codes.
    pub const fn group_bytes(self) -> usize {
        GROUP * PANEL * self.bits / 8
    }

    /// The record of a panel's scales.
    pub const fn record(self) -> ScaleRecord {
        let (groups, bytes) = match self.scales {
            Scales::Scale => (1, 2 * PANEL),
            Scales::ScaleMin => (1, 4 * PANEL),
            Scales::SuperMin => (SUPER, 4 * PANEL + SUPER * 2 * PANEL),
            Scales::SuperHalves => (SUPER, 2 * PANEL + SUPER * 2 * PANEL),
        };
        ScaleRecord { groups, bytes }
    }

    /// Where in its record the byte-sized scales of group `g` lie.
    #[inline(always)]
    pub const fn sub_scales_at(self, g: usize) -> usize {
        let heads = if matches!(self.scales, Scales::SuperMin) { 2 } else { 1 };
        PANEL * (2 * heads + 2 * (g % SUPER))
    }

    /// `[half][scale, min][row]` of group `g`, from a panel's `scales`. A format without mins gets the min `-zero · scale`, which gives the
    /// same values up to rounding.
    #[inline(always)]
    pub fn scales(self, scales: &[u8], g: usize) -> [[[f32; PANEL]; 2]; 2] {
        let ScaleRecord { groups, bytes } = self.record();
        let record = &scales[g / groups * bytes..][..bytes];
        let mut halves = [[[0.0; PANEL]; 2]; 2];
        for (h, [scale, min]) in halves.iter_mut().enumerate() {
            floats(record, 0, scale);
            match self.scales {
                Scales::Scale => {}
                Scales::ScaleMin => floats(record, 1, min),
                Scales::SuperMin => {
                    floats(record, 1, min);
                    let (sub_scales, sub_mins) = record[self.sub_scales_at(g)..].split_at(PANEL);
                    scale.iter_mut().zip(sub_scales).for_each(|(scale, sub)| *scale *= f32::from(*sub));
                    min.iter_mut().zip(sub_mins).for_each(|(min, sub)| *min *= f32::from(*sub));
                }
                Scales::SuperHalves => {
                    let sub_scales = &record[self.sub_scales_at(g) + h * PANEL..];
                    scale.iter_mut().zip(sub_scales).for_each(|(scale, sub)| *scale *= f32::from(*sub as i8));
                }
            }
            if matches!(self.scales, Scales::Scale | Scales::SuperHalves) {
                let zero = -f32::from(self.zero);
                min.iter_mut().zip(scale).for_each(|(min, scale)| *min = zero * *scale);
            }
        }
        halves
    }

    /// Expands the stored codes of a group.
    #[inline(always)]
    pub fn expand(self, codes: &[u8]) -> [u8; GROUP * PANEL] {
        let mut out = [0; GROUP * PANEL];
        if self.bits == 8 {
            out.copy_from_slice(codes);
            return out;
        }
        let (low, high) = out.split_at_mut(256);
        for ((low, high), both) in low.iter_mut().zip(high).zip(codes) {
            (*low, *high) = (both & 15, both >> 4);
        }
        for (v, vector) in out.chunks_exact_mut(64).enumerate() {
            // The compiler vectorises inner loops that have no branches.
            match self.bits {
                5 => vector.iter_mut().zip(&codes[256..]).for_each(|(code, bits)| *code |= (bits >> v & 1) << 4),
                6 => {
                    let bits = &codes[256 + v / 4 * 64..];
                    vector.iter_mut().zip(bits).for_each(|(code, bits)| *code |= (bits >> (v % 4 * 2) & 3) << 4);
                }
                _ => {}
            }
        }
        out
    }

    /// The inverse of [`PanelLayout::expand`], into zeroed `codes`.
    fn compress(self, expanded: &[u8; GROUP * PANEL], codes: &mut [u8]) {
        if self.bits == 8 {
            codes.copy_from_slice(expanded);
            return;
        }
        for b in 0..256 {
            codes[b] = expanded[b] & 15 | expanded[b + 256] << 4;
        }
        for (v, vector) in expanded.chunks_exact(64).enumerate() {
            for (b, code) in vector.iter().enumerate() {
                match self.bits {
                    5 => codes[256 + b] |= (code >> 4) << v,
                    6 => codes[256 + v / 4 * 64 + b] |= (code >> 4) << (v % 4 * 2),
                    _ => {}
                }
            }
        }
    }

    /// Writes the scales of a block's group `g` to row `r` of their record.
    fn put_scales(self, block: &GgmlBlock, g: usize, r: usize, record: &mut [u8]) {
        record[2 * r..2 * r + 2].copy_from_slice(&block.d.to_le_bytes());
        if matches!(self.scales, Scales::ScaleMin | Scales::SuperMin) {
            record[2 * (PANEL + r)..][..2].copy_from_slice(&block.m.to_le_bytes());
        }
        let (first, second) = match self.scales {
            Scales::Scale | Scales::ScaleMin => return,
            Scales::SuperMin => (block.sub_scales[g], block.sub_mins[g]),
            Scales::SuperHalves => (block.sub_scales[2 * g], block.sub_scales[2 * g + 1]),
        };
        let at = self.sub_scales_at(g) + r;
        (record[at], record[at + PANEL]) = (first, second);
    }
}

/// The f16 values of an item of a record.
#[inline(always)]
fn floats(record: &[u8], item: usize, out: &mut [f32; PANEL]) {
    let mut values = [f16::ZERO; PANEL];
    for (value, bytes) in values.iter_mut().zip(record[2 * item * PANEL..].as_chunks().0) {
        *value = f16::from_le_bytes(*bytes);
    }
    values.convert_to_f32_slice(out);
}

/// One panel's part of an array that holds `panels` of them.
pub fn share<T>(all: &[T], panel: usize, panels: usize) -> &[T] {
    let len = all.len() / panels;
    &all[panel * len..(panel + 1) * len]
}

/// A matrix `[n, k]` in panels. Rows past `n` in the last panel are zero.
pub struct AffinePanels {
    n: usize,
    k: usize,
    codec: Codec,
    layout: PanelLayout,
    /// `[panel][k / 32][group_bytes]`.
    codes: Resident<u8>,
    /// `[panel][records]`.
    scales: Resident<u8>,
}

impl AffinePanels {
    /// Repacks `n` rows of blocks of `codec`. Errors: a `k` that is not whole blocks, bytes that do not fit the shape, no memory.
    pub fn pack(codec: Codec, n: usize, k: usize, bytes: &[u8]) -> Result<Self> {
        let layout = PanelLayout::of(codec).ok_or_else(|| Error::internal(format!("{codec:?} has no blocks")))?;
        let (values, size) = (codec.block(), codec.block_bytes());
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
        let (panels, record) = (n.div_ceil(PANEL), layout.record());
        let (panel_codes, panel_scales) = (k / GROUP * layout.group_bytes(), k / GROUP / record.groups * record.bytes);
        let mut codes = Resident::zeroed(panels * panel_codes)?;
        let mut scales = Resident::zeroed(panels * panel_scales)?;
        let (c, s) = (SharedMut::new(codes.values_mut()), SharedMut::new(scales.values_mut()));
        parallel_for(panels, |panel| {
            // SAFETY: panels have disjoint ranges; each panel is written by one task.
            let (codes, scales) =
                unsafe { (c.slice(panel * panel_codes, panel_codes), s.slice(panel * panel_scales, panel_scales)) };
            let rows = &bytes[panel * PANEL * row_bytes..n.min((panel + 1) * PANEL) * row_bytes];
            for b in 0..k / values {
                let groups = values / GROUP;
                let mut expanded = [[0; GROUP * PANEL]; SUPER];
                for (r, row) in rows.chunks_exact(row_bytes).enumerate() {
                    let block = GgmlBlock::read(codec, &row[b * size..][..size]);
                    for (g, codes) in block.codes[..values].chunks_exact(GROUP).enumerate() {
                        for (i, code) in codes.iter().enumerate() {
                            expanded[g][64 * (i / 4) + 4 * r + i % 4] = *code;
                        }
                        layout.put_scales(&block, g, r, &mut scales[b * record.bytes..][..record.bytes]);
                    }
                }
                let codes = &mut codes[b * groups * layout.group_bytes()..][..groups * layout.group_bytes()];
                for (expanded, codes) in expanded.iter().zip(codes.chunks_exact_mut(layout.group_bytes())) {
                    layout.compress(expanded, codes);
                }
            }
        });
        Ok(Self { n, k, codec, layout, codes, scales })
    }

    /// Rows.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Resident bytes.
    pub fn bytes(&self) -> usize {
        self.codes.bytes() + self.scales.bytes()
    }

    /// The number of panels, the last of which may be padded.
    pub fn panels(&self) -> usize {
        self.n.div_ceil(PANEL)
    }

    /// Codes and scales of a panel.
    fn panel(&self, panel: usize) -> (&[u8], &[u8]) {
        (share(self.codes.values(), panel, self.panels()), share(self.scales.values(), panel, self.panels()))
    }

    /// The exact values of one row, including the sign of zeros.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        let (codes, scales) = self.panel(row / PANEL);
        let r = row % PANEL;
        let groups = codes.chunks_exact(self.layout.group_bytes()).zip(out.chunks_exact_mut(GROUP));
        for (g, (codes, out)) in groups.enumerate() {
            let codes = self.layout.expand(codes);
            let halves = self.layout.scales(scales, g);
            for (i, out) in out.iter_mut().enumerate() {
                let code = codes[64 * (i / 4) + 4 * r + i % 4];
                let [scale, min] = halves[i / 16].map(|of| of[r]);
                *out = match self.layout.scales {
                    Scales::Scale | Scales::SuperHalves => scale * (f32::from(code) - f32::from(self.layout.zero)),
                    Scales::ScaleMin | Scales::SuperMin => scale * f32::from(code) + min,
                };
            }
        }
    }

    /// The exact values of `columns`, whole groups, of all rows of a panel, except for the sign of zeros.
    #[inline(always)]
    pub fn columns<L: Lanes>(&self, panel: usize, columns: Range<usize>, out: &mut [[f32; COLUMNS]; PANEL]) {
        let (codes, scales) = self.panel(panel);
        let size = self.layout.group_bytes();
        for (i, g) in (columns.start / GROUP..columns.end / GROUP).enumerate() {
            let codes = self.layout.expand(&codes[g * size..(g + 1) * size]);
            let halves = self.layout.scales(scales, g);
            for (r, out) in out.iter_mut().enumerate() {
                let (mut bytes, mut row) = ([0; GROUP], [0.0; GROUP]);
                for v in 0..8 {
                    bytes[4 * v..4 * v + 4].copy_from_slice(&codes[64 * v + 4 * r..][..4]);
                }
                for (row, byte) in row.iter_mut().zip(bytes) {
                    *row = f32::from(byte);
                }
                let out = out[GROUP * i..][..GROUP].as_chunks_mut::<LANES>().0;
                for ((row, out), [scale, min]) in row.as_chunks::<LANES>().0.iter().zip(out).zip(&halves) {
                    // The product is exact, so a fused multiply-add rounds to the same value.
                    L::load(row).mul_add(L::splat(scale[r]), L::splat(min[r])).store(out);
                }
            }
        }
    }

    /// The products of one panel with the rows of a tile.
    pub fn multiply(&self, isa: Isa, panel: usize, tile: &ActivationTile, out: &mut Products) {
        let (codes, scales) = self.panel(panel);
        assert_eq!(tile.planes.len(), self.k * 2 * tile.rows, "the tile has another k");
        kernel::affine(isa, self.codec, codes, scales, tile, out);
        for (out, scale) in out.iter_mut().zip(tile.scales) {
            out.iter_mut().for_each(|v| *v *= scale);
        }
    }
}
