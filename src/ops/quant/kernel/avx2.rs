//! AVX2, FMA and F16C. A vector holds one value, or four codes, of each of eight rows: half a panel.

use std::arch::x86_64::*;

use super::super::activations::{ActivationTile, ROWS};
use super::super::affine::{PANEL, Scales};
use super::super::float::FloatPanel;
use super::{BlockFormat, Products};

/// See [`super::affine`].
///
/// # Safety
/// `codes`, `scales` and `x` consist of the same number of whole groups of `F`. `x` has 1 to 8 rows.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn affine<F: BlockFormat>(codes: &[u8], scales: &[u8], x: &ActivationTile, out: &mut Products) {
    let record_layout = const { F::LAYOUT.record() };
    let group_bytes = const { F::LAYOUT.group_bytes() };
    let halves = matches!(F::LAYOUT.scales, Scales::SuperHalves);
    for side in 0..2 {
        let mut acc = [_mm256_setzero_ps(); ROWS];
        for g in 0..codes.len() / group_bytes {
            // SAFETY: all pointers stay inside group `g` and its record, which exist as the caller promises.
            unsafe {
                let w = unpack::<F>(codes.as_ptr().add(g * group_bytes), side);
                let record = scales.as_ptr().add(g / record_layout.groups * record_layout.bytes);
                let [(scale, min), (scale1, min1)] =
                    scales_of::<F>(record, record.add(F::LAYOUT.sub_scales_at(g)), side);
                for t in 0..x.rows {
                    let cell = g * x.rows + t;
                    let hi = x.planes.as_ptr().add(64 * cell).cast::<i32>();
                    let dots = if halves {
                        [dot::<F>(&w[..4], hi), dot::<F>(&w[4..], hi.add(4))]
                    } else {
                        [dot::<F>(&w, hi), _mm256_setzero_ps()]
                    };
                    acc[t] = _mm256_fmadd_ps(scale, dots[0], acc[t]);
                    if halves {
                        let sums = &x.half_sums[2 * cell..];
                        acc[t] = _mm256_fmadd_ps(scale1, dots[1], acc[t]);
                        acc[t] = _mm256_fmadd_ps(min, _mm256_set1_ps(sums[0]), acc[t]);
                        acc[t] = _mm256_fmadd_ps(min1, _mm256_set1_ps(sums[1]), acc[t]);
                    } else {
                        acc[t] = _mm256_fmadd_ps(min, _mm256_set1_ps(x.sums[cell]), acc[t]);
                    }
                }
            }
        }
        for t in 0..x.rows {
            // SAFETY: half of an array of 16 floats.
            unsafe { _mm256_storeu_ps(out[t].as_mut_ptr().add(8 * side), acc[t]) };
        }
    }
}

/// `Σ code · q` over the inputs of `w`. The high plane of `q` is at `hi`, the low plane 32 bytes after it.
///
/// # Safety
/// Four bytes for each vector of `w` can be read in both planes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dot<F: BlockFormat>(w: &[__m256i], hi: *const i32) -> __m256 {
    // An instruction adds two products of a code and a byte of at most 128. So many of its sums fit in 16 bits:
    let (four, five, six) = (8, 4, 2);
    let planes = [0, 8].map(|plane| {
        // SAFETY: promised by the caller.
        let dot = |w: &[__m256i], adds| unsafe { plane_dot(w, hi.add(plane), adds) };
        match F::LAYOUT.bits {
            4 => dot(w, four),
            5 => dot(w, five),
            6 => dot(w, six),
            _ => {
                // Two products of 8-bit codes can overflow, so high and low nibbles are multiplied apart.
                let nibble = _mm256_set1_epi8(15);
                let (mut low, mut high) = ([_mm256_setzero_si256(); 8], [_mm256_setzero_si256(); 8]);
                for (v, &w) in w.iter().enumerate() {
                    low[v] = _mm256_and_si256(w, nibble);
                    high[v] = _mm256_and_si256(_mm256_srli_epi16::<4>(w), nibble);
                }
                _mm256_add_epi32(_mm256_slli_epi32::<4>(dot(&high, four)), dot(&low, four))
            }
        }
    });
    _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_slli_epi32::<8>(planes[0]), planes[1]))
}

/// `Σ code · byte` over the inputs of `w`, with the bytes at `plane`. 16-bit sums hold `adds` additions.
///
/// # Safety
/// Four bytes for each vector of `w` can be read at `plane`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn plane_dot(w: &[__m256i], plane: *const i32, adds: usize) -> __m256i {
    let mut sum = _mm256_setzero_si256();
    for (c, w) in w.chunks(adds).enumerate() {
        let mut products = _mm256_setzero_si256();
        for (v, &w) in w.iter().enumerate() {
            // SAFETY: promised by the caller.
            let bytes = _mm256_set1_epi32(unsafe { plane.add(c * adds + v).read_unaligned() });
            products = _mm256_add_epi16(products, _mm256_maddubs_epi16(w, bytes));
        }
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(products, _mm256_set1_epi16(1)));
    }
    sum
}

/// Half of each of the eight vectors of a group's codes, expanded as by [`super::PanelLayout::expand`].
///
/// # Safety
/// A group of `F` can be read at `codes`; `side` is 0 or 1.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn unpack<F: BlockFormat>(codes: *const u8, side: usize) -> [__m256i; 8] {
    // SAFETY: promised by the caller. A group has eight vectors with 8-bit codes, and as many as are read with fewer bits.
    let load = |v: usize| unsafe { _mm256_loadu_si256(codes.add(64 * v + 32 * side).cast()) };
    let mut w = [_mm256_setzero_si256(); 8];
    if F::LAYOUT.bits == 8 {
        for v in 0..8 {
            w[v] = load(v);
        }
        return w;
    }
    let nibble = _mm256_set1_epi8(15);
    for v in 0..4 {
        let both = load(v);
        w[v] = _mm256_and_si256(both, nibble);
        w[v + 4] = _mm256_and_si256(_mm256_srli_epi16::<4>(both), nibble);
    }
    for v in 0..8 {
        // The upper bits of this vector's codes, moved to bit 4. Bits that a shift brings in from the next byte are masked.
        let (bits, at, mask) = match F::LAYOUT.bits {
            5 => (load(4), v, 0x10),
            6 => (load(4 + v / 4), v % 4 * 2, 0x30),
            _ => continue,
        };
        let up = _mm_cvtsi32_si128(4usize.saturating_sub(at) as i32);
        let down = _mm_cvtsi32_si128(at.saturating_sub(4) as i32);
        let bits = _mm256_srl_epi16(_mm256_sll_epi16(bits, up), down);
        w[v] = _mm256_or_si256(w[v], _mm256_and_si256(bits, _mm256_set1_epi8(mask)));
    }
    w
}

/// Scale and min of eight rows, for both halves of a group, as [`super::PanelLayout::scales`] computes them.
///
/// # Safety
/// A record of `F` can be read at `record`, in which the group's byte-sized scales are at `sub`. `side` is 0 or 1.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn scales_of<F: BlockFormat>(record: *const u8, sub: *const u8, side: usize) -> [(__m256, __m256); 2] {
    // SAFETY: promised by the caller. Each read is half an item of the record.
    let half =
        |item: usize| unsafe { _mm256_cvtph_ps(_mm_loadu_si128(record.add(2 * PANEL * item + PANEL * side).cast())) };
    // SAFETY: as above.
    let bytes = |item: usize| unsafe { _mm_loadl_epi64(sub.add(PANEL * item + PANEL / 2 * side).cast()) };
    let zero = _mm256_set1_ps(-f32::from(F::LAYOUT.zero));
    match F::LAYOUT.scales {
        Scales::Scale => [(half(0), _mm256_mul_ps(zero, half(0))); 2],
        Scales::ScaleMin => [(half(0), half(1)); 2],
        Scales::SuperMin => {
            let float = |item: usize| _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes(item)));
            [(_mm256_mul_ps(half(0), float(0)), _mm256_mul_ps(half(1), float(1))); 2]
        }
        Scales::SuperHalves => [0, 1].map(|item| {
            let scale = _mm256_mul_ps(half(0), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes(item))));
            (scale, _mm256_mul_ps(zero, scale))
        }),
    }
}

/// See [`super::float`].
///
/// # Safety
/// `x` has the panel's number of steps, and 1 to 8 rows.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn float(panel: FloatPanel, x: &ActivationTile, out: &mut Products) {
    // SAFETY: promised by the caller. A step of a panel has 8 · 16 values, or 64 bytes of codes, and loads stay in one step.
    unsafe {
        match panel {
            FloatPanel::F32(w) => steps(x, out, |step, side, w8| {
                for i in 0..8 {
                    w8[i] = _mm256_loadu_ps(w.as_ptr().add((8 * step + i) * PANEL + 8 * side));
                }
            }),
            FloatPanel::F16(w) => steps(x, out, |step, side, w8| {
                for i in 0..8 {
                    let bits = _mm_loadu_si128(w.as_ptr().add((8 * step + i) * PANEL + 8 * side).cast());
                    w8[i] = _mm256_cvtph_ps(bits);
                }
            }),
            FloatPanel::BF16(w) => steps(x, out, |step, side, w8| {
                for i in 0..8 {
                    let bits = _mm_loadu_si128(w.as_ptr().add((8 * step + i) * PANEL + 8 * side).cast());
                    w8[i] = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits)));
                }
            }),
            FloatPanel::Codebook { codes, scales, block, values } => {
                let low = _mm256_loadu_ps(values.as_ptr());
                let high = _mm256_loadu_ps(values.as_ptr().add(8));
                steps(x, out, |step, side, w8| {
                    let mut codes = _mm256_loadu_si256(codes.as_ptr().add(step * PANEL + 8 * side).cast());
                    let scale = _mm256_loadu_ps(scales.as_ptr().add(8 * step / block * PANEL + 8 * side));
                    for i in 0..8 {
                        // Permutations use the low three bits of each lane. The fourth bit selects between them.
                        let low = _mm256_permutevar8x32_ps(low, codes);
                        let high = _mm256_permutevar8x32_ps(high, codes);
                        let fourth = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes));
                        w8[i] = _mm256_mul_ps(_mm256_blendv_ps(low, high, fourth), scale);
                        codes = _mm256_srli_epi32::<4>(codes);
                    }
                })
            }
        }
    }
}

/// Runs all steps of eight inputs. `decode` gives a step's weights for half a panel.
///
/// # Safety
/// The processor has AVX2 and FMA.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn steps(x: &ActivationTile, out: &mut Products, decode: impl Fn(usize, usize, &mut [__m256; 8])) {
    let rows = x.rows;
    for side in 0..2 {
        let mut acc = [_mm256_setzero_ps(); ROWS];
        for (step, x) in x.values.chunks_exact(8 * rows).enumerate() {
            let mut w = [_mm256_setzero_ps(); 8];
            decode(step, side, &mut w);
            for t in 0..rows {
                for i in 0..8 {
                    acc[t] = _mm256_fmadd_ps(w[i], _mm256_set1_ps(x[i * rows + t]), acc[t]);
                }
            }
        }
        for t in 0..rows {
            // SAFETY: half of an array of 16 floats.
            unsafe { _mm256_storeu_ps(out[t].as_mut_ptr().add(8 * side), acc[t]) };
        }
    }
}
