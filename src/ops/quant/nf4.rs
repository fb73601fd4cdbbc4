//! NF4 with double quantisation (QLoRA, Dettmers et al., 2023), in the arithmetic of bitsandbytes: 4.13 bits per weight.
//!
//! A block of 64 consecutive values of the flattened matrix shares an absolute maximum. The maxima, less their mean, are quantised
//! to 8 bits in blocks of 256.

use std::borrow::Cow;
use std::sync::LazyLock;

use super::Source;
use crate::ops::pool::{SharedMut, parallel_for};

/// Values of a block, which share an absolute maximum.
pub const BLOCK: usize = 64;

/// Blocks of a task.
const TASK: usize = 1024;

/// Absolute maxima that share a scale.
pub(crate) const NESTED_BLOCK: usize = 256;

/// The 16 values of NF4: quantiles of the normal distribution, scaled to [-1, 1], with an exact zero.
pub const CODEBOOK: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// The signed 8-bit map of bitsandbytes (`create_dynamic_map`), bit for bit. Absolute maxima and AdamW's first moments use it.
pub fn dynamic_map() -> &'static [f32; 256] {
    static MAP: LazyLock<[f32; 256]> = LazyLock::new(|| dynamic(true));
    &MAP
}

/// The unsigned 8-bit map of bitsandbytes, for AdamW's second moments.
pub(crate) fn unsigned_dynamic_map() -> &'static [f32; 256] {
    static MAP: LazyLock<[f32; 256]> = LazyLock::new(|| dynamic(false));
    &MAP
}

/// Seven decades. Decade `i` has `2^i` values on each side of zero, or twice as many above zero in the unsigned map: the midpoints of an
/// even division of [0.1, 1], times `10^(i-6)`. The division is that of `torch.linspace`: fused multiply-adds from both ends.
fn dynamic(signed: bool) -> [f32; 256] {
    let mut values = vec![0.0, 1.0];
    for i in 0..7 {
        let n = (if signed { 1usize } else { 2 } << i) + 1;
        let step = (1.0 - 0.1f32) / (n - 1) as f32;
        let boundary = |k: usize| {
            if k < n / 2 { step.mul_add(k as f32, 0.1) } else { (-step).mul_add((n - 1 - k) as f32, 1.0) }
        };
        // In Python the decade is a double, which is rounded once.
        let decade = 10f64.powi(i - 6) as f32;
        for k in 0..n - 1 {
            let middle = decade * ((boundary(k) + boundary(k + 1)) / 2.0);
            values.push(middle);
            if signed {
                values.push(-middle);
            }
        }
    }
    values.sort_by(f32::total_cmp);
    values.try_into().expect("2 + 2 * (2^7 - 1) values")
}

/// A matrix in NF4 with double quantisation.
pub struct Nf4 {
    /// Two codes in each byte, that of the even value in the high nibble.
    pub codes: Vec<u8>,
    /// The quantised maximum of each block: an index of [`dynamic_map`].
    pub absmax: Vec<u8>,
    /// The scale of each [`NESTED_BLOCK`] of `absmax`.
    pub nested_absmax: Vec<f32>,
    /// The mean of the absolute maxima, subtracted before their quantisation.
    pub offset: f32,
}

impl Nf4 {
    /// Quantises the flattened rows of a matrix, deterministically. Every code is the nearest one, the lower one for a tie.
    pub fn quantize(values: &[f32]) -> Self {
        // The codes, and the absolute maximum of each block.
        let midpoints: [f32; 15] = std::array::from_fn(|i| (CODEBOOK[i] + CODEBOOK[i + 1]) / 2.0);
        let mut codes = vec![0u8; values.len().div_ceil(2)];
        let mut absmax = vec![0f32; values.len().div_ceil(BLOCK)];
        let (blocks, bytes) = (absmax.len(), codes.len());
        let (shared_codes, shared_absmax) = (SharedMut::new(&mut codes), SharedMut::new(&mut absmax));
        parallel_for(blocks.div_ceil(TASK), |task| {
            let range = task * TASK..blocks.min((task + 1) * TASK);
            let first = range.start * BLOCK / 2;
            // SAFETY: inside the buffer; each block belongs to one task.
            let absmax = unsafe { shared_absmax.slice(range.start, range.len()) };
            // SAFETY: inside the buffer; a block's codes are whole bytes, which belong to its task.
            let codes = unsafe { shared_codes.slice(first, bytes.min(range.end * BLOCK / 2) - first) };
            let values = values[range.start * BLOCK..].chunks(BLOCK);
            for ((block, absmax), codes) in values.zip(absmax).zip(codes.chunks_mut(BLOCK / 2)) {
                let max = block.iter().fold(0f32, |m, v| m.max(v.abs()));
                *absmax = max;
                // A block of zeros takes the code of zero, as in bitsandbytes on the CPU.
                let inverse = if max > 0.0 { 1.0 / max } else { 0.0 };
                let code = |v: &f32| midpoints.iter().filter(|&&m| m < v * inverse).count() as u8;
                for (byte, pair) in codes.iter_mut().zip(block.chunks(2)) {
                    *byte = code(&pair[0]) << 4 | pair.get(1).map_or(0, code);
                }
            }
        });

        // The quantised maxima.
        let sum: f64 = absmax.iter().map(|&m| f64::from(m)).sum();
        let offset = if absmax.is_empty() { 0.0 } else { (sum / absmax.len() as f64) as f32 };
        let mut nested_absmax = vec![0f32; absmax.len().div_ceil(NESTED_BLOCK)];
        let mut quantised = vec![0u8; absmax.len()];
        let (shared_maxima, shared_quantised) = (SharedMut::new(&mut nested_absmax), SharedMut::new(&mut quantised));
        parallel_for(absmax.len().div_ceil(NESTED_BLOCK), |i| {
            let block = &absmax[i * NESTED_BLOCK..absmax.len().min((i + 1) * NESTED_BLOCK)];
            let max = block.iter().fold(0f32, |m, v| m.max((v - offset).abs()));
            let inverse = if max > 0.0 { 1.0 / max } else { 0.0 };
            // SAFETY: inside the buffer; each nested block has one maximum and belongs to one task.
            let maximum = unsafe { shared_maxima.slice(i, 1) };
            // SAFETY: inside the buffer; each nested block belongs to one task.
            let codes = unsafe { shared_quantised.slice(i * NESTED_BLOCK, block.len()) };
            maximum[0] = max;
            codes.iter_mut().zip(block).for_each(|(to, v)| *to = nearest(dynamic_map(), (v - offset) * inverse));
        });
        Self { codes, absmax: quantised, nested_absmax, offset }
    }

    /// The scale of each block of [`BLOCK`] values.
    pub fn scales(&self) -> Vec<f32> {
        decode_scales(&self.absmax, dynamic_map(), &self.nested_absmax, self.offset)
    }

    /// The rows `[n, k]` as a source for packing.
    pub fn into_source(self, n: usize, k: usize) -> Source<'static> {
        let scales = self.scales();
        Source::Codebook { n, k, block: BLOCK, codes: Cow::Owned(self.codes), scales, codebook: CODEBOOK }
    }
}

/// Undoes the double quantisation: `map[absmax[b]] · nested_absmax[b / 256] + offset`, rounded after each operation. A fused
/// multiply-add would change bits.
pub fn decode_scales(absmax: &[u8], map: &[f32; 256], nested_absmax: &[f32], offset: f32) -> Vec<f32> {
    let block =
        |(codes, scale): (&[u8], &f32)| codes.iter().map(|&c| map[c as usize] * scale + offset).collect::<Vec<_>>();
    absmax.chunks(NESTED_BLOCK).zip(nested_absmax).flat_map(block).collect()
}

/// The index of the value nearest to `v` in the sorted `map`, the lower one for a tie.
fn nearest(map: &[f32; 256], v: f32) -> u8 {
    let upper = map.partition_point(|&m| m <= v);
    let code = match upper {
        0 => 0,
        256 => 255,
        _ if v > (map[upper - 1] + map[upper]) / 2.0 => upper,
        _ => upper - 1,
    };
    code as u8
}
