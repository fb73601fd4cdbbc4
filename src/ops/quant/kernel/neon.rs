//! NEON with the dot products of ARMv8.2. A vector holds four codes of each of four rows. The panel is multiplied a quarter at a time,
//! so that a group's eight vectors stay in registers while activation rows pass.

use std::arch::aarch64::*;
use std::arch::asm;

use super::super::activations::{ActivationTile, ROWS};
use super::super::affine::Scales;
use super::{BlockFormat, Products};

/// See [`super::affine`].
///
/// # Safety
/// The processor has the dot products. `codes`, `scales` and `x` consist of the same number of whole groups of `F`. `x` has 1 to 8 rows.
#[target_feature(enable = "neon,dotprod")]
pub unsafe fn affine<F: BlockFormat>(codes: &[u8], scales: &[u8], x: &ActivationTile, out: &mut Products) {
    let halves = matches!(F::LAYOUT.scales, Scales::SuperHalves);
    for quarter in 0..4 {
        let mut acc = [vdupq_n_f32(0.0); ROWS];
        for (g, codes) in codes.chunks_exact(F::LAYOUT.group_bytes()).enumerate() {
            // SAFETY: `codes` is a whole group of `F`, and `quarter` is 0 to 3.
            let w = unsafe { unpack::<F>(codes.as_ptr(), quarter) };
            let [[scale, min], [scale1, min1]] = F::LAYOUT.scales(scales, g).map(|half| {
                // SAFETY: a quarter of 16 floats.
                half.map(|of| unsafe { vld1q_f32(of.as_ptr().add(4 * quarter)) })
            });
            for t in 0..x.rows {
                let cell = g * x.rows + t;
                // SAFETY: a cell's two planes of 32 bytes.
                let planes = unsafe { x.planes.as_ptr().add(64 * cell) };
                // SAFETY: as above.
                let (hi, lo) = unsafe { (dots(&w, planes), dots(&w, planes.add(32))) };
                let sums = &x.half_sums[2 * cell..2 * cell + 2];
                let mut dot = [0, 1].map(|h| {
                    let dot = vaddq_s32(vshlq_n_s32::<8>(hi[h]), lo[h]);
                    // Adds what the codes lack because 128 was subtracted from them. The sums are exact integers.
                    if F::LAYOUT.bits == 8 { vaddq_s32(dot, vdupq_n_s32(128 * sums[h] as i32)) } else { dot }
                });
                if halves {
                    acc[t] = vfmaq_f32(acc[t], scale, vcvtq_f32_s32(dot[0]));
                    acc[t] = vfmaq_f32(acc[t], scale1, vcvtq_f32_s32(dot[1]));
                    acc[t] = vfmaq_n_f32(acc[t], min, sums[0]);
                    acc[t] = vfmaq_n_f32(acc[t], min1, sums[1]);
                } else {
                    dot[0] = vaddq_s32(dot[0], dot[1]);
                    acc[t] = vfmaq_f32(acc[t], scale, vcvtq_f32_s32(dot[0]));
                    acc[t] = vfmaq_n_f32(acc[t], min, x.sums[cell]);
                }
            }
        }
        for t in 0..x.rows {
            // SAFETY: a quarter of an array of 16 floats.
            unsafe { vst1q_f32(out[t].as_mut_ptr().add(4 * quarter), acc[t]) };
        }
    }
}

/// `Σ code · byte` over the first and the second 16 inputs, with the bytes at `plane`.
///
/// # Safety
/// 32 bytes can be read at `plane`.
#[inline]
#[target_feature(enable = "neon,dotprod")]
unsafe fn dots(w: &[int8x16_t; 8], plane: *const i8) -> [int32x4_t; 2] {
    // SAFETY: promised by the caller.
    let x = unsafe { [vld1q_s8(plane), vld1q_s8(plane.add(16))] };
    [0, 1].map(|h| {
        let mut dot = vdupq_n_s32(0);
        // The intrinsic, `vdotq_laneq_s32`, is not stable yet.
        // SAFETY: uses registers only, and the function's features include the instruction.
        unsafe {
            asm!(
                "sdot {dot:v}.4s, {w0:v}.16b, {x:v}.4b[0]",
                "sdot {dot:v}.4s, {w1:v}.16b, {x:v}.4b[1]",
                "sdot {dot:v}.4s, {w2:v}.16b, {x:v}.4b[2]",
                "sdot {dot:v}.4s, {w3:v}.16b, {x:v}.4b[3]",
                dot = inout(vreg) dot,
                w0 = in(vreg) w[4 * h],
                w1 = in(vreg) w[4 * h + 1],
                w2 = in(vreg) w[4 * h + 2],
                w3 = in(vreg) w[4 * h + 3],
                x = in(vreg) x[h],
                options(pure, nomem, nostack, preserves_flags),
            );
        }
        dot
    })
}

/// A quarter of each of the eight vectors of a group's codes, expanded as by [`super::PanelLayout::expand`]. 128 is subtracted from 8-bit
/// codes, so that they fit in signed bytes.
///
/// # Safety
/// A group of `F` can be read at `codes`; `quarter` is 0 to 3.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn unpack<F: BlockFormat>(codes: *const u8, quarter: usize) -> [int8x16_t; 8] {
    // SAFETY: promised by the caller. A group has eight vectors with 8-bit codes, and as many as are read with fewer bits.
    let load = |v: usize| unsafe { vld1q_u8(codes.add(64 * v + 16 * quarter)) };
    let mut w = [vdupq_n_u8(0); 8];
    for v in 0..8 {
        w[v] = match F::LAYOUT.bits {
            8 => veorq_u8(load(v), vdupq_n_u8(0x80)),
            _ if v < 4 => vandq_u8(load(v), vdupq_n_u8(15)),
            _ => vshrq_n_u8::<4>(load(v - 4)),
        };
        // The upper bits, moved to bit 4.
        let (bits, at, mask) = match F::LAYOUT.bits {
            5 => (load(4), v, 1),
            6 => (load(4 + v / 4), v % 4 * 2, 3),
            _ => continue,
        };
        let upper = vandq_u8(vshlq_u8(bits, vdupq_n_s8(-(at as i8))), vdupq_n_u8(mask));
        w[v] = vorrq_u8(w[v], vshlq_n_u8::<4>(upper));
    }
    w.map(|w| vreinterpretq_s8_u8(w))
}
