//! Repacks matrices for the GPU's kernels: tiles of 16 rows and 64 inputs, in the order of the tensor cores' fragments.
//!
//! A strip is the tiles of 16 rows, cut into chunks of two or four tiles. A chunk holds the codes of its tiles, then their scales, then
//! Q4_K's block scales. `kernels/quant.cuh` describes the order of bits.

use half::{bf16, f16};

use super::blocks::GgmlBlock;
use super::{Codec, Source};
use crate::gpu::constants;
use crate::ops::pool::{SharedMut, parallel_for};
use crate::{Error, Result};

pub use crate::gpu::constants::{MATRIX_TILE_INPUTS as INPUTS, MATRIX_TILE_ROWS as ROWS};

/// How a matrix is stored in tiles. The kernels' names contain these names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TileFormat {
    /// 4 bits, a scale per 32 inputs.
    S16,
    /// 4 bits, scale and min per 32 inputs.
    Sm16,
    /// 4 bits, with Q4_K's two levels of scales and mins.
    K4,
    /// 4-bit indices of a codebook, a scale per 64 inputs.
    Lut,
    /// 8 bits, a scale per 16 inputs.
    S8,
    /// 8 bits, scale and min per 16 inputs.
    Sm8,
    /// bf16.
    Dense,
}

impl TileFormat {
    /// All formats, in the order of the variants and of the arrays in `kernels/constants.cuh`.
    pub const ALL: [Self; 7] = [Self::S16, Self::Sm16, Self::K4, Self::Lut, Self::S8, Self::Sm8, Self::Dense];

    /// Its name in the kernels' names.
    pub fn name(self) -> &'static str {
        match self {
            Self::S16 => "s16",
            Self::Sm16 => "sm16",
            Self::K4 => "k4",
            Self::Lut => "lut",
            Self::S8 => "s8",
            Self::Sm8 => "sm8",
            Self::Dense => "dense",
        }
    }

    /// Tiles of a chunk, which a warp copies at a time.
    pub fn chunk(self) -> usize {
        constants::CHUNK_TILES[self as usize]
    }

    /// Whether codes have 8 bits. Their products take inputs in another order than those of 4-bit codes.
    pub fn bits8(self) -> bool {
        matches!(self, Self::S8 | Self::Sm8)
    }

    /// 32-bit words of codes, per lane and tile.
    fn code_words(self) -> usize {
        constants::CODE_WORDS[self as usize]
    }

    /// 32-bit words of scales, per pair of rows and tile.
    fn scale_words(self) -> usize {
        constants::SCALE_WORDS[self as usize]
    }

    /// 32-bit words of block scales, per chunk.
    fn super_words(self) -> usize {
        constants::SUPER_WORDS[self as usize]
    }

    /// Bytes of a whole chunk.
    pub fn chunk_bytes(self) -> usize {
        4 * (self.chunk() * (32 * self.code_words() + 8 * self.scale_words()) + self.super_words())
    }

    /// Inputs that share a min, if the format has mins.
    pub fn sum_group(self) -> Option<usize> {
        Some(constants::SUM_GROUP[self as usize]).filter(|group| *group > 0)
    }

    fn of(codec: Codec) -> Self {
        match codec {
            Codec::Q4_0 => Self::S16,
            Codec::Q4_1 => Self::Sm16,
            Codec::Q4K => Self::K4,
            Codec::Q5_0 | Codec::Q8_0 | Codec::Q6K => Self::S8,
            Codec::Q5_1 | Codec::Q5K => Self::Sm8,
            Codec::F32 | Codec::F16 | Codec::BF16 => Self::Dense,
        }
    }

    /// The first of the two inputs in register `register` of quad lane `q` in product `j`.
    fn input(self, j: usize, q: usize, register: usize) -> usize {
        let pair = register / 2 * 2;
        match self {
            Self::S8 | Self::Sm8 => 16 * j + 4 * q + pair,
            _ => 32 * (j / 2) + 8 * q + 4 * (j % 2) + pair,
        }
    }
}

/// A repacked matrix in host memory.
pub struct PackedTiles {
    pub format: TileFormat,
    pub n: usize,
    pub k: usize,
    /// Its strips, back to back.
    pub words: Vec<u32>,
    /// The code of zero.
    pub zero: f32,
    /// The codebook of [`TileFormat::Lut`].
    pub codebook: [f32; 16],
}

/// Unpacked codes and scales of 16 rows. Rows past the matrix are zero.
struct Strip<'a> {
    format: TileFormat,
    /// Codes, or bits of bf16 values, `[16][padded k]`.
    codes: Vec<u16>,
    /// Scale and min `[16][padded k / 16]`, for 8-bit formats only.
    scales: Vec<(f32, f32)>,
    source: &'a Source<'a>,
    /// The strip's first row in the matrix.
    first: usize,
    n: usize,
    k: usize,
}

impl PackedTiles {
    /// Repacks a source. Dense f32 and f16 values, and codebooks whose blocks do not align with tiles, become bf16. All other values
    /// stay exact. Errors: data that do not fit the shape.
    pub fn pack(source: &Source) -> Result<Self> {
        let (n, k) = source.check()?;
        let format = match source {
            Source::Blocks { codec, .. } => TileFormat::of(*codec),
            Source::Codebook { block, .. } if k.is_multiple_of(INPUTS) && block.is_multiple_of(INPUTS) => {
                TileFormat::Lut
            }
            Source::Codebook { .. } => TileFormat::Dense,
        };
        // The size of a strip.
        let (strips, tiles) = (n.div_ceil(ROWS), k.div_ceil(INPUTS));
        let (codes, scales, supers) = (32 * format.code_words(), 8 * format.scale_words(), format.super_words());
        let strip_words = tiles * (codes + scales) + tiles.div_ceil(format.chunk()) * supers;
        let mut packed = Self {
            format,
            n,
            k,
            words: vec![0; strips * strip_words],
            zero: match source {
                Source::Blocks { codec: Codec::Q5_0, .. } => 16.0,
                Source::Blocks { codec: Codec::Q8_0, .. } => 128.0,
                Source::Blocks { codec: Codec::Q6K, .. } => 32.0,
                _ => 0.0,
            },
            codebook: match source {
                Source::Codebook { codebook, .. } => *codebook,
                Source::Blocks { .. } => [0.0; 16],
            },
        };

        // Each strip, chunk by chunk.
        let words = SharedMut::new(&mut packed.words);
        parallel_for(strips, |i| {
            // SAFETY: inside the buffer; each strip is written by one task.
            let mut words = unsafe { words.slice(i * strip_words, strip_words) };
            let strip = Strip::read(format, source, i * ROWS, n, k);
            for first in (0..tiles).step_by(format.chunk()) {
                let size = format.chunk().min(tiles - first);
                let chunk;
                (chunk, words) = words.split_at_mut(size * (codes + scales) + supers);
                let (to_codes, rest) = chunk.split_at_mut(size * codes);
                let (to_scales, to_supers) = rest.split_at_mut(size * scales);
                for (i, to) in to_codes.chunks_exact_mut(codes).enumerate() {
                    strip.put_codes(to, first + i);
                }
                if scales > 0 {
                    for (i, to) in to_scales.chunks_exact_mut(scales).enumerate() {
                        strip.put_scales(to, first + i);
                    }
                }
                if supers > 0 {
                    strip.put_supers(to_supers, first / 4);
                }
            }
        });
        Ok(packed)
    }

    /// Whether the rows of `next` can be appended, so that both form one matrix.
    pub fn continues_with(&self, next: &Self) -> bool {
        let alike = (self.format, self.k, self.zero, self.codebook) == (next.format, next.k, next.zero, next.codebook);
        alike && self.n.is_multiple_of(ROWS)
    }

    /// Appends the rows of `next`, for which [`PackedTiles::continues_with`] holds.
    pub fn append(&mut self, next: Self) {
        self.n += next.n;
        self.words.extend_from_slice(&next.words);
    }
}

impl<'a> Strip<'a> {
    /// Reads the 16 rows from row `first` on.
    fn read(format: TileFormat, source: &'a Source, first: usize, n: usize, k: usize) -> Self {
        let padded = k.next_multiple_of(INPUTS);
        let mut codes = vec![0u16; ROWS * padded];
        let mut scales = vec![(0.0, 0.0); if format.bits8() { ROWS * padded / 16 } else { 0 }];
        for row in first..n.min(first + ROWS) {
            let to = &mut codes[(row - first) * padded..][..k];
            match source {
                // Dense values as bits of bf16.
                Source::Blocks { codec: codec @ (Codec::F32 | Codec::F16 | Codec::BF16), bytes, .. } => {
                    let size = codec.block_bytes();
                    for (to, v) in to.iter_mut().zip(bytes[row * k * size..].chunks_exact(size)) {
                        *to = match codec {
                            Codec::F32 => bf16::from_f32(f32::from_le_bytes([v[0], v[1], v[2], v[3]])).to_bits(),
                            Codec::F16 => bf16::from_f32(f16::from_le_bytes([v[0], v[1]]).to_f32()).to_bits(),
                            _ => u16::from_le_bytes([v[0], v[1]]),
                        };
                    }
                }
                // Codes of blocks; for 8-bit formats also the scale and min of each 16 values.
                Source::Blocks { codec, .. } => {
                    for (b, to) in to.chunks_exact_mut(codec.block()).enumerate() {
                        let block = block_of(source, row, b, k);
                        to.iter_mut().zip(block.codes).for_each(|(to, code)| *to = code.into());
                        if format.bits8() {
                            let at = ((row - first) * padded + b * codec.block()) / 16;
                            for (i, to) in scales[at..at + codec.block() / 16].iter_mut().enumerate() {
                                *to = scale_of(*codec, &block, i);
                            }
                        }
                    }
                }
                // Indices of the codebook, or its values as bits of bf16.
                Source::Codebook { block, codes, scales, codebook, .. } => {
                    for (i, to) in to.iter_mut().enumerate() {
                        let at = row * k + i;
                        let code = if at.is_multiple_of(2) { codes[at / 2] >> 4 } else { codes[at / 2] & 15 };
                        *to = match format {
                            TileFormat::Lut => code.into(),
                            _ => bf16::from_f32(codebook[usize::from(code)] * scales[at / block]).to_bits(),
                        };
                    }
                }
            }
        }
        Self { format, codes, scales, source, first, n, k }
    }

    /// Writes the codes of a tile to zeroed words.
    fn put_codes(&self, out: &mut [u32], tile: usize) {
        let format = self.format;
        let padded = self.codes.len() / ROWS;
        for lane in 0..32 {
            let (r, q) = (lane / 4, lane % 4);
            for j in 0..4 {
                for register in 0..4 {
                    let at = (r + register % 2 * 8) * padded + tile * INPUTS + format.input(j, q, register);
                    let (lo, hi) = (u32::from(self.codes[at]), u32::from(self.codes[at + 1]));
                    let (word, bits) = match format {
                        TileFormat::Dense => (4 * j + register, lo | hi << 16),
                        TileFormat::S8 | TileFormat::Sm8 => {
                            (2 * j + register / 2, (lo | hi << 8) << (16 * (register % 2)))
                        }
                        TileFormat::Lut => (j, (lo | hi << 4) << (8 * register)),
                        _ => (j, (lo | hi << 16) << (4 * register)),
                    };
                    out[(word / 4 * 32 + lane) * 4 + word % 4] |= bits;
                }
            }
        }
    }

    /// Writes the scales of a tile to zeroed words.
    fn put_scales(&self, out: &mut [u32], tile: usize) {
        let (words, k) = (self.format.scale_words(), self.k);
        let padded = self.codes.len() / ROWS;
        for (half, r) in [0, 1].into_iter().flat_map(|half| (0..8).map(move |r| (half, r))) {
            let (row, out) = (self.first + r + 8 * half, &mut out[r * words..][..words]);
            if row >= self.n {
                continue;
            }
            match (self.format, self.source) {
                // One f32 scale.
                (TileFormat::Lut, Source::Codebook { block, scales, .. }) => {
                    out[half] = scales[(row * k + tile * INPUTS) / block].to_bits();
                }
                // f32 scale, and min, of each 16 inputs.
                (TileFormat::S8 | TileFormat::Sm8, _) => {
                    for g in 0..4 {
                        let (scale, min) = self.scales[((r + 8 * half) * padded + tile * INPUTS) / 16 + g];
                        if self.format == TileFormat::S8 {
                            out[2 * g + half] = scale.to_bits();
                        } else {
                            out[4 * g + 2 * half] = scale.to_bits();
                            out[4 * g + 2 * half + 1] = min.to_bits();
                        }
                    }
                }
                // 6-bit scale and min of each 32 inputs, whose factors `put_supers` writes.
                (TileFormat::K4, _) => {
                    let block = block_of(self.source, row, tile / 4, k);
                    for g in 0..2 {
                        let sub = tile % 4 * 2 + g;
                        let pair = u32::from(block.sub_scales[sub]) | u32::from(block.sub_mins[sub]) << 8;
                        out[g] |= pair << (16 * half);
                    }
                }
                // f16 scale, and min, of each 32 inputs.
                _ => {
                    // The last tile of a row may have only one group.
                    for g in (0..2).filter(|g| tile * INPUTS + 32 * g < k) {
                        let block = block_of(self.source, row, 2 * tile + g, k);
                        if self.format == TileFormat::S16 {
                            out[g] |= u32::from(block.d) << (16 * half);
                        } else {
                            out[2 * g + half] = u32::from(block.d) | u32::from(block.m) << 16;
                        }
                    }
                }
            }
        }
    }

    /// Writes `d` and `-dmin` of Q4_K's block `b` of each row.
    fn put_supers(&self, out: &mut [u32], b: usize) {
        for row in self.first..self.n.min(self.first + ROWS) {
            let block = block_of(self.source, row, b, self.k);
            let r = row - self.first;
            out[2 * (r % 8) + r / 8] = u32::from(block.d) | u32::from(block.m) << 16;
        }
    }
}

/// Block `b` of a row. The source must be of a block format.
fn block_of(source: &Source, row: usize, b: usize, k: usize) -> GgmlBlock {
    let Source::Blocks { codec, bytes, .. } = source else { unreachable!("only block formats have blocks") };
    let size = codec.block_bytes();
    GgmlBlock::read(*codec, &bytes[(row * (k / codec.block()) + b) * size..][..size])
}

/// Scale and min of the `i`-th 16 values of a block, for formats that are stored in 8 bits. Exact in f32.
fn scale_of(codec: Codec, block: &GgmlBlock, i: usize) -> (f32, f32) {
    let (d, m) = (f16::from_bits(block.d).to_f32(), f16::from_bits(block.m).to_f32());
    match codec {
        Codec::Q5K => (d * f32::from(block.sub_scales[i / 2]), m * f32::from(block.sub_mins[i / 2])),
        Codec::Q6K => (d * f32::from(block.sub_scales[i] as i8), 0.0),
        Codec::Q5_1 => (d, m),
        _ => (d, 0.0),
    }
}

impl Source<'_> {
    /// The number of rows and columns. Errors: data that do not fit them.
    fn check(&self) -> Result<(usize, usize)> {
        let (n, k, fits) = match self {
            Source::Blocks { codec, n, k, bytes } => {
                let whole = k.is_multiple_of(codec.block());
                (*n, *k, whole && bytes.len() == n * (k / codec.block()) * codec.block_bytes())
            }
            Source::Codebook { n, k, block, codes, scales, .. } => {
                let count = n * k;
                let fits =
                    *block > 0 && codes.len() == count.div_ceil(2) && scales.len() == count.div_ceil((*block).max(1));
                (*n, *k, fits)
            }
        };
        if !fits || n == 0 || k == 0 {
            return Err(Error::invalid(format!("the data of a [{n}, {k}] matrix do not fit its shape")));
        }
        Ok((n, k))
    }
}
