//! AVX-512 VNNI and AVX2 kernels.

use std::arch::is_x86_feature_detected;
use std::arch::x86_64::*;
use std::ops::Range;

use super::super::activations::Activations;
use super::super::affine::{Kind, Layout, PANEL};
use super::{Store, portable};

/// Whether [`multiply_avx512`] may run.
pub fn has_avx512_vnni() -> bool {
    is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("f16c")
        && is_x86_feature_detected!("fma")
}

/// Whether [`multiply_avx2`] may run.
pub fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

const ZERO: u8 = 0;
const MIN: u8 = 1;
const SUPER_MIN: u8 = 2;
const SUPER_ZERO: u8 = 3;

/// See [`super::multiply`].
pub fn multiply_avx512(layout: &Layout, panel: &[u8], a: &Activations, rows: Range<usize>, store: Store) {
    assert!(has_avx512_vnni(), "AVX-512 VNNI kernel on a processor without it");
    assert!(panel.len().is_multiple_of(layout.record_bytes()));
    assert_eq!(
        panel.len() / layout.record_bytes() * layout.groups * layout.group,
        a.k,
        "panel and activations differ in k"
    );
    assert!(rows.end <= a.rows() && a.planes.len() == 2 * a.rows() * a.k && a.sums.len() == a.rows() * a.k / 32);
    macro_rules! run {
        ($bits:literal, $group:literal, $kind:ident, $shift:literal) => {
            // SAFETY: the features were checked above; sizes were checked to agree.
            unsafe { all_rows::<$bits, $group, $kind, $shift>(layout, panel, a, rows, store) }
        };
    }
    match (layout.bits, layout.group, layout.kind, layout.zero_shift) {
        (4, 32, Kind::Zero, 3) => run!(4, 32, ZERO, 3),
        (4, 32, Kind::Min, 0) => run!(4, 32, MIN, 0),
        (4, 32, Kind::SuperMin, 0) => run!(4, 32, SUPER_MIN, 0),
        (8, 32, Kind::Zero, 4) => run!(8, 32, ZERO, 4),
        (8, 32, Kind::Zero, 7) => run!(8, 32, ZERO, 7),
        (8, 32, Kind::Min, 0) => run!(8, 32, MIN, 0),
        (8, 32, Kind::SuperMin, 0) => run!(8, 32, SUPER_MIN, 0),
        (8, 16, Kind::SuperZero, 5) => run!(8, 16, SUPER_ZERO, 5),
        _ => portable::multiply(layout, panel, a, rows, store),
    }
}

/// All activation rows, in tiles of eight and then fewer.
///
/// # Safety
/// As `tile`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c,fma")]
unsafe fn all_rows<const BITS: usize, const GROUP: usize, const KIND: u8, const SHIFT: u32>(
    layout: &Layout,
    panel: &[u8],
    a: &Activations,
    rows: Range<usize>,
    store: Store,
) {
    let mut row = rows.start;
    macro_rules! tiles {
        ($($m:literal)*) => {$(
            while rows.end - row >= $m {
                // SAFETY: as promised by the caller; rows `row..row + m` exist.
                unsafe { tile::<BITS, GROUP, KIND, SHIFT, $m>(layout, panel, a, row, store) };
                row += $m;
            }
        )*};
    }
    tiles!(8 4 2 1);
}

/// `M` activation rows from `first`: each group's codes are unpacked once for all of them.
///
/// # Safety
/// The processor has the features; `panel` is whole records of `layout`, which is what the constants say, for `a.k`
/// values; rows `first..first + M` of `a` exist.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c,fma")]
unsafe fn tile<const BITS: usize, const GROUP: usize, const KIND: u8, const SHIFT: u32, const M: usize>(
    layout: &Layout,
    panel: &[u8],
    a: &Activations,
    first: usize,
    store: Store,
) {
    // SAFETY: all pointers stay inside the buffers whose sizes the caller promises; loads are unaligned.
    unsafe {
        let half = |p: *const u8| _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()));
        let byte = |p: *const u8| _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast())));
        let signed = |p: *const u8| _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast())));
        let nibbles = _mm512_set1_epi8(15);
        let lines = GROUP / 4;
        let planes: [*const i8; M] = std::array::from_fn(|t| a.planes.as_ptr().add((first + t) * 2 * a.k));
        let sums: [_; M] = std::array::from_fn(|t| a.sums.as_ptr().add((first + t) * (a.k / 32)));
        let mut acc = [_mm512_setzero_ps(); M];
        let mut at = 0;
        let mut record = panel.as_ptr();
        let end = record.add(panel.len());
        while record < end {
            let mut group = record.add(layout.head_bytes());
            let (head_d, head_m) = match KIND {
                SUPER_MIN => (half(record), half(record.add(32))),
                SUPER_ZERO => (half(record), _mm512_setzero_ps()),
                _ => (_mm512_setzero_ps(), _mm512_setzero_ps()),
            };
            for _ in 0..layout.groups {
                let mut w = [_mm512_setzero_si512(); 8];
                for i in 0..lines {
                    w[i] = if BITS == 8 {
                        _mm512_loadu_si512(group.add(64 * i).cast())
                    } else if i < 4 {
                        _mm512_and_si512(_mm512_loadu_si512(group.add(64 * i).cast()), nibbles)
                    } else {
                        let line = _mm512_loadu_si512(group.add(64 * (i - 4)).cast());
                        _mm512_and_si512(_mm512_srli_epi16::<4>(line), nibbles)
                    };
                }
                let tail = group.add(PANEL * GROUP * BITS / 8);
                let (d, m) = match KIND {
                    ZERO => (half(tail), _mm512_setzero_ps()),
                    MIN => (half(tail), half(tail.add(32))),
                    SUPER_MIN => {
                        let m = _mm512_mul_ps(head_m, byte(tail.add(16)));
                        (_mm512_mul_ps(head_d, byte(tail)), _mm512_sub_ps(_mm512_set1_ps(-0.0), m))
                    }
                    _ => (_mm512_mul_ps(head_d, signed(tail)), _mm512_setzero_ps()),
                };
                let offset = 64 * (at / 32) + at % 32;
                for t in 0..M {
                    let high = planes[t].add(offset).cast::<i32>();
                    let low = planes[t].add(offset + 32).cast::<i32>();
                    let mut dot = _mm512_setzero_si512();
                    for i in 0..lines {
                        dot = _mm512_dpbusd_epi32(dot, w[i], _mm512_set1_epi32(high.add(i).read_unaligned()));
                    }
                    dot = _mm512_slli_epi32::<8>(dot);
                    for i in 0..lines {
                        dot = _mm512_dpbusd_epi32(dot, w[i], _mm512_set1_epi32(low.add(i).read_unaligned()));
                    }
                    let sum = &*sums[t].add(at / 32);
                    if KIND == ZERO || KIND == SUPER_ZERO {
                        let sum = if GROUP == 16 { sum.halves[at / 16 % 2] } else { sum.whole };
                        dot = _mm512_sub_epi32(dot, _mm512_set1_epi32(sum << SHIFT));
                        acc[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), d, acc[t]);
                    } else {
                        acc[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), d, acc[t]);
                        acc[t] = _mm512_fmadd_ps(m, _mm512_set1_ps(sum.whole_f32), acc[t]);
                    }
                }
                at += GROUP;
                group = group.add(PANEL * GROUP * BITS / 8 + tail_bytes(KIND));
            }
            record = record.add(layout.record_bytes());
        }
        for t in 0..M {
            let mut out = [0f32; PANEL];
            _mm512_storeu_ps(out.as_mut_ptr(), _mm512_mul_ps(acc[t], _mm512_set1_ps(a.scales[first + t])));
            store(first + t, &out);
        }
    }
}

/// Bytes of scales after a group's codes.
const fn tail_bytes(kind: u8) -> usize {
    match kind {
        ZERO | SUPER_MIN => 32,
        MIN => 64,
        _ => 16,
    }
}

/// See [`super::multiply`].
pub fn multiply_avx2(layout: &Layout, panel: &[u8], a: &Activations, rows: Range<usize>, store: Store) {
    assert!(has_avx2(), "AVX2 kernel on a processor without it");
    // SAFETY: the features were checked.
    unsafe { with_avx2(layout, panel, a, rows, store) }
}

/// # Safety
/// The processor has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
fn with_avx2(layout: &Layout, panel: &[u8], a: &Activations, rows: Range<usize>, store: Store) {
    portable::multiply_with(layout, panel, a, rows, store, |l, codes, planes, at| dot_avx2(l, codes, planes, at));
}

/// `Σ code·q` of 16 rows over a group: 16-bit products of four k of four rows at a time.
///
/// # Safety
/// The processor has AVX2.
#[target_feature(enable = "avx2")]
fn dot_avx2(layout: &Layout, codes: &[u8], planes: &[i8], at: usize) -> [i32; PANEL] {
    let offset = 64 * (at / 32) + at % 32;
    let (high, low) = (&planes[offset..][..layout.group], &planes[offset + 32..][..layout.group]);
    let codes = &codes[..layout.code_bytes()];
    // Per four rows: two partial sums a row.
    let mut acc = [_mm256_setzero_si256(); 4];
    for step in 0..layout.group / 4 {
        let mut q = [0i16; 4];
        for (i, q) in q.iter_mut().enumerate() {
            *q = 256 * i16::from(high[4 * step + i]) + i16::from(low[4 * step + i]);
        }
        let q = u64::from(q[0] as u16)
            | u64::from(q[1] as u16) << 16
            | u64::from(q[2] as u16) << 32
            | u64::from(q[3] as u16) << 48;
        let q = _mm256_set1_epi64x(q as i64);
        let line = if layout.bits == 4 { 64 * (step % 4) } else { 64 * step };
        for (rows, acc) in acc.iter_mut().enumerate() {
            let bytes: [u8; 16] = std::array::from_fn(|i| codes[line + 16 * rows + i]);
            // SAFETY: a 16-byte array is read as 16 bytes.
            let mut w = unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) };
            if layout.bits == 4 {
                w = if step < 4 { w } else { _mm_srli_epi16::<4>(w) };
                w = _mm_and_si128(w, _mm_set1_epi8(15));
            }
            *acc = _mm256_add_epi32(*acc, _mm256_madd_epi16(_mm256_cvtepu8_epi16(w), q));
        }
    }
    let mut sums = [0i32; PANEL];
    for (rows, acc) in acc.iter().enumerate() {
        let mut parts = [0i32; 8];
        // SAFETY: 32 bytes into an array of 32 bytes.
        unsafe { _mm256_storeu_si256(parts.as_mut_ptr().cast(), *acc) };
        for row in 0..4 {
            sums[4 * rows + row] = parts[2 * row] + parts[2 * row + 1];
        }
    }
    sums
}
