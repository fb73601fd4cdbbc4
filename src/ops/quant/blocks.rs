//! GGUF block formats, taken apart into integer codes and scales (ggml's `block_*` structs, little-endian).

use half::f16;

use super::Codec;

/// A run of consecutive values of one row that share a scale: value = `d·(code - zero)`, plus `m` in formats with minima.
pub struct Group<'a> {
    /// Unsigned codes, 16 or 32 of them.
    pub codes: &'a [u8],
    /// Index of the group in its block.
    pub index: usize,
    /// The block's scales.
    pub scales: Scales,
}

/// Scales of one group, as stored.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scales {
    /// Value = `d·(code - zero)`.
    Zero {
        /// Scale.
        d: f16,
    },
    /// Value = `d·code + m`.
    Min {
        /// Scale.
        d: f16,
        /// Minimum.
        m: f16,
    },
    /// Value = `(d·sc)·code - dmin·m`; `d`, `dmin` are the block's, `sc`, `m` the group's.
    SuperMin {
        /// Block scale.
        d: f16,
        /// Block scale of the minima.
        dmin: f16,
        /// Group scale, 6 bits.
        sc: u8,
        /// Group minimum, 6 bits.
        m: u8,
    },
    /// Value = `(d·sc)·(code - zero)`.
    SuperZero {
        /// Block scale.
        d: f16,
        /// Group scale.
        sc: i8,
    },
}

/// Size of a block: values and bytes. `None` for formats without blocks.
pub fn block_size(codec: Codec) -> Option<(usize, usize)> {
    Some(match codec {
        Codec::Q4_0 => (32, 18),
        Codec::Q4_1 => (32, 20),
        Codec::Q5_0 => (32, 22),
        Codec::Q5_1 => (32, 24),
        Codec::Q8_0 => (32, 34),
        Codec::Q4K => (256, 144),
        Codec::Q5K => (256, 176),
        Codec::Q6K => (256, 210),
        Codec::F32 | Codec::F16 | Codec::BF16 => return None,
    })
}

fn half(bytes: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// Scale and minimum `i` of the 12 bytes that pack eight 6-bit pairs in Q4_K and Q5_K.
fn six_bit_pair(s: &[u8], i: usize) -> (u8, u8) {
    if i < 4 {
        (s[i] & 63, s[i + 4] & 63)
    } else {
        ((s[i + 4] & 15) | ((s[i - 4] >> 6) << 4), (s[i + 4] >> 4) | ((s[i] >> 6) << 4))
    }
}

/// Calls `f` with each group of one block, in order of its values.
pub fn for_each_group(codec: Codec, block: &[u8], mut f: impl FnMut(Group)) {
    let mut codes = [0u8; 32];
    let nibbles = |codes: &mut [u8; 32], qs: &[u8]| {
        for j in 0..16 {
            codes[j] = qs[j] & 15;
            codes[j + 16] = qs[j] >> 4;
        }
    };
    let fifth_bits = |codes: &mut [u8; 32], qh: &[u8]| {
        let bits = u32::from_le_bytes([qh[0], qh[1], qh[2], qh[3]]);
        for (j, code) in codes.iter_mut().enumerate() {
            *code |= ((bits >> j) as u8 & 1) << 4;
        }
    };
    match codec {
        Codec::Q4_0 => {
            nibbles(&mut codes, &block[2..18]);
            f(Group { codes: &codes, index: 0, scales: Scales::Zero { d: half(block, 0) } });
        }
        Codec::Q4_1 => {
            nibbles(&mut codes, &block[4..20]);
            f(Group { codes: &codes, index: 0, scales: Scales::Min { d: half(block, 0), m: half(block, 2) } });
        }
        Codec::Q5_0 => {
            nibbles(&mut codes, &block[6..22]);
            fifth_bits(&mut codes, &block[2..6]);
            f(Group { codes: &codes, index: 0, scales: Scales::Zero { d: half(block, 0) } });
        }
        Codec::Q5_1 => {
            nibbles(&mut codes, &block[8..24]);
            fifth_bits(&mut codes, &block[4..8]);
            f(Group { codes: &codes, index: 0, scales: Scales::Min { d: half(block, 0), m: half(block, 2) } });
        }
        Codec::Q8_0 => {
            for (code, q) in codes.iter_mut().zip(&block[2..34]) {
                *code = (*q as i8 as i16 + 128) as u8;
            }
            f(Group { codes: &codes, index: 0, scales: Scales::Zero { d: half(block, 0) } });
        }
        Codec::Q4K | Codec::Q5K => {
            let (d, dmin, packed) = (half(block, 0), half(block, 2), &block[4..16]);
            let (qh, qs) = if codec == Codec::Q5K { block[16..].split_at(32) } else { (&block[..0], &block[16..]) };
            for index in 0..8 {
                for (l, code) in codes.iter_mut().enumerate() {
                    let q = qs[32 * (index / 2) + l];
                    *code = if index % 2 == 0 { q & 15 } else { q >> 4 };
                    if codec == Codec::Q5K {
                        *code |= ((qh[l] >> index) & 1) << 4;
                    }
                }
                let (sc, m) = six_bit_pair(packed, index);
                f(Group { codes: &codes, index, scales: Scales::SuperMin { d, dmin, sc, m } });
            }
        }
        Codec::Q6K => {
            let (ql, qh, sc, d) = (&block[..128], &block[128..192], &block[192..208], half(block, 208));
            for index in 0..16 {
                let (part, row) = (index / 8, (index % 8) / 2);
                for (i, code) in codes[..16].iter_mut().enumerate() {
                    let l = 16 * (index % 2) + i;
                    let low = ql[64 * part + 32 * (row % 2) + l];
                    let low = if row < 2 { low & 15 } else { low >> 4 };
                    *code = low | (((qh[32 * part + l] >> (2 * row)) & 3) << 4);
                }
                f(Group { codes: &codes[..16], index, scales: Scales::SuperZero { d, sc: sc[index] as i8 } });
            }
        }
        Codec::F32 | Codec::F16 | Codec::BF16 => unreachable!("dense formats have no blocks; see `block_size`"),
    }
}
