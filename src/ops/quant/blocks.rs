//! Reads ggml's block formats (`block_*` in ggml-common.h), all little-endian.

use super::Codec;

/// One block: integer codes and their scales. Value `i` is `scale(i) · (codes[i] - zero)` or `scale(i) · codes[i] + min(i)`: see
/// [`super::affine::Scales`].
pub struct GgmlBlock {
    /// Codes in `0 .. 2^bits`, of which the first [`Codec::block`] are used.
    pub codes: [u8; 256],
    /// f16 bits of the block's scale.
    pub d: u16,
    /// f16 bits of the block's min (`Q4_1`, `Q5_1`) or of the negated scale of its mins (`Q4K`, `Q5K`).
    pub m: u16,
    /// 6-bit scale of each 32 values (`Q4K`, `Q5K`), or i8 scale of each 16 values (`Q6K`).
    pub sub_scales: [u8; 16],
    /// 6-bit min of each 32 values (`Q4K`, `Q5K`).
    pub sub_mins: [u8; 8],
}

impl Codec {
    /// Values of a block. 1 for dense formats.
    pub fn block(self) -> usize {
        match self {
            Codec::F32 | Codec::F16 | Codec::BF16 => 1,
            Codec::Q4K | Codec::Q5K | Codec::Q6K => 256,
            _ => 32,
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self {
            Codec::F32 => 4,
            Codec::F16 | Codec::BF16 => 2,
            Codec::Q4_0 => 18,
            Codec::Q4_1 => 20,
            Codec::Q5_0 => 22,
            Codec::Q5_1 => 24,
            Codec::Q8_0 => 34,
            Codec::Q4K => 144,
            Codec::Q5K => 176,
            Codec::Q6K => 210,
        }
    }
}

fn half(b: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([b[at], b[at + 1]])
}

impl GgmlBlock {
    /// Reads a block of a block format from its [`Codec::block_bytes`] bytes.
    pub fn read(codec: Codec, b: &[u8]) -> Self {
        let mut o = GgmlBlock { codes: [0; 256], d: half(b, 0), m: 0, sub_scales: [0; 16], sub_mins: [0; 8] };
        match codec {
            Codec::Q4_0 => o.nibbles(&b[2..], None),
            Codec::Q4_1 => {
                o.m = half(b, 2);
                o.nibbles(&b[4..], None);
            }
            Codec::Q5_0 => o.nibbles(&b[6..], Some(&b[2..6])),
            Codec::Q5_1 => {
                o.m = half(b, 2);
                o.nibbles(&b[8..], Some(&b[4..8]));
            }
            Codec::Q8_0 => (0..32).for_each(|i| o.codes[i] = b[2 + i] ^ 0x80),
            Codec::Q4K => {
                o.k_scales(b);
                o.k_nibbles(&b[16..]);
            }
            Codec::Q5K => {
                o.k_scales(b);
                o.k_nibbles(&b[48..]);
                for i in 0..256 {
                    o.codes[i] |= (b[16 + i % 32] >> (i / 32) & 1) << 4;
                }
            }
            Codec::Q6K => {
                o.d = half(b, 208);
                o.sub_scales.copy_from_slice(&b[192..208]);
                for i in 0..256 {
                    let (half, row, l) = (i / 128, i / 32 % 4, i % 32);
                    let low = b[64 * half + 32 * (row % 2) + l] >> (4 * (row / 2)) & 15;
                    let high = b[128 + 32 * half + l] >> (2 * row) & 3;
                    o.codes[i] = low | high << 4;
                }
            }
            Codec::F32 | Codec::F16 | Codec::BF16 => unreachable!("{codec:?} has no blocks"),
        }
        o
    }

    /// 32 codes. Byte `i` holds value `i` in its low nibble and value `i + 16` in its high one. Bit `i` of `fifth` is value `i`'s fifth bit.
    fn nibbles(&mut self, qs: &[u8], fifth: Option<&[u8]>) {
        for i in 0..16 {
            self.codes[i] = qs[i] & 15;
            self.codes[i + 16] = qs[i] >> 4;
        }
        if let Some(h) = fifth {
            (0..32).for_each(|i| self.codes[i] |= (h[i / 8] >> (i % 8) & 1) << 4);
        }
    }

    /// 256 codes. Each 32 bytes hold 32 values in their low nibbles and the next 32 values in their high ones.
    fn k_nibbles(&mut self, qs: &[u8]) {
        for i in 0..256 {
            self.codes[i] = qs[32 * (i / 64) + i % 32] >> (4 * (i / 32 % 2)) & 15;
        }
    }

    /// `dmin`, and the eight 6-bit scales and mins packed in 12 bytes.
    fn k_scales(&mut self, b: &[u8]) {
        self.m = half(b, 2) ^ 0x8000;
        let s = &b[4..16];
        for i in 0..4 {
            self.sub_scales[i] = s[i] & 63;
            self.sub_mins[i] = s[i + 4] & 63;
            self.sub_scales[i + 4] = s[i + 8] & 15 | s[i] >> 6 << 4;
            self.sub_mins[i + 4] = s[i + 8] >> 4 | s[i + 4] >> 6 << 4;
        }
    }
}
