//! AVX-512 with VNNI. A vector holds one value, or four codes, of each of the 16 rows.

use std::arch::x86_64::*;

use super::super::activations::ActivationTile;
use super::super::affine::{PANEL, Scales};
use super::super::float::FloatPanel;
use super::{BlockFormat, Products};

/// Runs `$f` with the tile's number of rows as a constant.
macro_rules! by_rows {
    ($rows:expr, $f:ident::<$($param:ty),*>($($arg:expr),*)) => {
        match $rows {
            1 => $f::<$($param,)* 1>($($arg),*),
            2 => $f::<$($param,)* 2>($($arg),*),
            3 => $f::<$($param,)* 3>($($arg),*),
            4 => $f::<$($param,)* 4>($($arg),*),
            5 => $f::<$($param,)* 5>($($arg),*),
            6 => $f::<$($param,)* 6>($($arg),*),
            7 => $f::<$($param,)* 7>($($arg),*),
            _ => $f::<$($param,)* 8>($($arg),*),
        }
    };
}

/// Bytes by which codes are prefetched with three rows or more: the processor does not look that far ahead by itself. With fewer rows
/// it is faster alone.
const AHEAD: usize = 4096;

/// See [`super::affine`].
///
/// # Safety
/// `codes`, `scales` and `x` consist of the same number of whole groups of `F`. `x` has 1 to 8 rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub unsafe fn affine<F: BlockFormat>(codes: &[u8], scales: &[u8], x: &ActivationTile, out: &mut Products) {
    // SAFETY: promised by the caller. The constant is the tile's number of rows.
    unsafe { by_rows!(x.rows, affine_rows::<F>(codes, scales, x, out)) }
}

/// # Safety
/// As [`affine`]; `x` has `R` rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn affine_rows<F: BlockFormat, const R: usize>(
    codes: &[u8],
    scales: &[u8],
    x: &ActivationTile,
    out: &mut Products,
) {
    let record_layout = const { F::LAYOUT.record() };
    let group_bytes = const { F::LAYOUT.group_bytes() };
    let (mut planes, mut sums, mut half_sums) = (x.planes.as_ptr(), x.sums.as_ptr(), x.half_sums.as_ptr());
    let mut acc = [_mm512_setzero_ps(); R];
    // SAFETY: the pointers advance by whole groups together, `codes.len() / group_bytes` times.
    unsafe {
        for g in 0..codes.len() / group_bytes {
            let at = codes.as_ptr().add(g * group_bytes);
            if R > 2 {
                for line in 0..group_bytes / 64 {
                    _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD + 64 * line).cast());
                }
            }
            let w = unpack::<F>(at);
            let record = scales.as_ptr().add(g / record_layout.groups * record_layout.bytes);
            let [(scale, min), (scale1, min1)] = scales_of::<F>(record, record.add(F::LAYOUT.sub_scales_at(g)));
            for t in 0..R {
                let hi = planes.add(64 * t).cast::<i32>();
                let lo = hi.add(8);
                // Two chains of additions, whose latencies overlap.
                let mut dots = [[_mm512_setzero_si512(); 2]; 2];
                for v in 0..8 {
                    let half = if matches!(F::LAYOUT.scales, Scales::SuperHalves) { v / 4 } else { 0 };
                    dots[half][0] =
                        _mm512_dpbusd_epi32(dots[half][0], w[v], _mm512_set1_epi32(hi.add(v).read_unaligned()));
                    dots[half][1] =
                        _mm512_dpbusd_epi32(dots[half][1], w[v], _mm512_set1_epi32(lo.add(v).read_unaligned()));
                }
                let [dot, dot1] =
                    dots.map(|[hi, lo]| _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32::<8>(hi), lo)));
                acc[t] = _mm512_fmadd_ps(scale, dot, acc[t]);
                if matches!(F::LAYOUT.scales, Scales::SuperHalves) {
                    acc[t] = _mm512_fmadd_ps(scale1, dot1, acc[t]);
                    acc[t] = _mm512_fmadd_ps(min, _mm512_set1_ps(*half_sums.add(2 * t)), acc[t]);
                    acc[t] = _mm512_fmadd_ps(min1, _mm512_set1_ps(*half_sums.add(2 * t + 1)), acc[t]);
                } else {
                    acc[t] = _mm512_fmadd_ps(min, _mm512_set1_ps(*sums.add(t)), acc[t]);
                }
            }
            planes = planes.add(64 * R);
            sums = sums.add(R);
            half_sums = half_sums.add(2 * R);
        }
        for t in 0..R {
            _mm512_storeu_ps(out[t].as_mut_ptr(), acc[t]);
        }
    }
}

/// The eight vectors of a group's codes, expanded as by [`super::PanelLayout::expand`].
///
/// # Safety
/// A group of `F` can be read at `codes`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn unpack<F: BlockFormat>(codes: *const u8) -> [__m512i; 8] {
    // SAFETY: promised by the caller. A group has eight vectors with 8-bit codes, and as many as are read with fewer bits.
    let load = |v: usize| unsafe { _mm512_loadu_si512(codes.add(64 * v).cast()) };
    let mut w = [_mm512_setzero_si512(); 8];
    if F::LAYOUT.bits == 8 {
        for v in 0..8 {
            w[v] = load(v);
        }
        return w;
    }
    let nibble = _mm512_set1_epi8(15);
    for v in 0..4 {
        let both = load(v);
        w[v] = _mm512_and_si512(both, nibble);
        w[v + 4] = _mm512_and_si512(_mm512_srli_epi16::<4>(both), nibble);
    }
    // Moves bit `from` of each byte to bit 4. Bits that cross into the next byte are masked later.
    let to_four = |bits: __m512i, from: usize| match from {
        0 => _mm512_slli_epi16::<4>(bits),
        1 => _mm512_slli_epi16::<3>(bits),
        2 => _mm512_slli_epi16::<2>(bits),
        3 => _mm512_slli_epi16::<1>(bits),
        4 => bits,
        5 => _mm512_srli_epi16::<1>(bits),
        6 => _mm512_srli_epi16::<2>(bits),
        _ => _mm512_srli_epi16::<3>(bits),
    };
    for v in 0..8 {
        let (bits, mask) = match F::LAYOUT.bits {
            5 => (to_four(load(4), v), 0x10),
            6 => (to_four(load(4 + v / 4), v % 4 * 2), 0x30),
            _ => continue,
        };
        w[v] = _mm512_or_si512(w[v], _mm512_and_si512(bits, _mm512_set1_epi8(mask)));
    }
    w
}

/// Scale and min of the rows, for both halves of a group, as [`super::PanelLayout::scales`] computes them. The halves differ for
/// `SuperHalves` only.
///
/// # Safety
/// A record of `F` can be read at `record`, in which the group's byte-sized scales are at `sub`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn scales_of<F: BlockFormat>(record: *const u8, sub: *const u8) -> [(__m512, __m512); 2] {
    // SAFETY: promised by the caller. Each read is one item of the record.
    let half = |item: usize| unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(record.add(2 * PANEL * item).cast())) };
    // SAFETY: as above.
    let bytes = |item: usize| unsafe { _mm_loadu_si128(sub.add(PANEL * item).cast()) };
    let zero = _mm512_set1_ps(-f32::from(F::LAYOUT.zero));
    match F::LAYOUT.scales {
        Scales::Scale => [(half(0), _mm512_mul_ps(zero, half(0))); 2],
        Scales::ScaleMin => [(half(0), half(1)); 2],
        Scales::SuperMin => {
            let float = |item: usize| _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes(item)));
            [(_mm512_mul_ps(half(0), float(0)), _mm512_mul_ps(half(1), float(1))); 2]
        }
        Scales::SuperHalves => [0, 1].map(|item| {
            let scale = _mm512_mul_ps(half(0), _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes(item))));
            (scale, _mm512_mul_ps(zero, scale))
        }),
    }
}

/// See [`super::float`].
///
/// # Safety
/// `x` has the panel's number of steps, and 1 to 8 rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub unsafe fn float(panel: FloatPanel, x: &ActivationTile, out: &mut Products) {
    // SAFETY: promised by the caller. A step of a panel has 8 · 16 values, or 64 bytes of codes, and loads stay in one step.
    unsafe {
        match panel {
            FloatPanel::F32(w) => by_rows!(
                x.rows,
                steps::<_>(x, out, |step, w8: &mut [__m512; 8]| {
                    for i in 0..8 {
                        w8[i] = _mm512_loadu_ps(w.as_ptr().add((8 * step + i) * PANEL));
                    }
                })
            ),
            FloatPanel::F16(w) => by_rows!(
                x.rows,
                steps::<_>(x, out, |step, w8: &mut [__m512; 8]| {
                    for i in 0..8 {
                        w8[i] = _mm512_cvtph_ps(_mm256_loadu_si256(w.as_ptr().add((8 * step + i) * PANEL).cast()));
                    }
                })
            ),
            FloatPanel::BF16(w) => by_rows!(
                x.rows,
                steps::<_>(x, out, |step, w8: &mut [__m512; 8]| {
                    for i in 0..8 {
                        let bits = _mm256_loadu_si256(w.as_ptr().add((8 * step + i) * PANEL).cast());
                        w8[i] = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)));
                    }
                })
            ),
            FloatPanel::Codebook { codes, scales, block, values } => {
                let values = _mm512_loadu_ps(values.as_ptr());
                by_rows!(
                    x.rows,
                    steps::<_>(x, out, |step, w8: &mut [__m512; 8]| {
                        let mut codes = _mm512_loadu_si512(codes.as_ptr().add(step * PANEL).cast());
                        let scale = _mm512_loadu_ps(scales.as_ptr().add(8 * step / block * PANEL));
                        for i in 0..8 {
                            // The permutation uses the low four bits of each lane.
                            w8[i] = _mm512_mul_ps(_mm512_permutexvar_ps(codes, values), scale);
                            codes = _mm512_srli_epi32::<4>(codes);
                        }
                    })
                )
            }
        }
    }
}

/// Runs all steps of eight inputs. `decode` gives a step's weights.
///
/// # Safety
/// `x` has `R` rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn steps<D: Fn(usize, &mut [__m512; 8]), const R: usize>(x: &ActivationTile, out: &mut Products, decode: D) {
    let mut acc = [_mm512_setzero_ps(); R];
    for (step, x) in x.values.chunks_exact(8 * R).enumerate() {
        let mut w = [_mm512_setzero_ps(); 8];
        decode(step, &mut w);
        for i in 0..8 {
            for t in 0..R {
                acc[t] = _mm512_fmadd_ps(w[i], _mm512_set1_ps(x[i * R + t]), acc[t]);
            }
        }
    }
    for t in 0..R {
        // SAFETY: 16 floats into an array of 16.
        unsafe { _mm512_storeu_ps(out[t].as_mut_ptr(), acc[t]) };
    }
}
