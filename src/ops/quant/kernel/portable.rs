//! The plain kernel: what the others must equal bit for bit.

use std::ops::Range;

use half::f16;

use super::super::activations::Activations;
use super::super::affine::{Kind, Layout, PANEL};
use super::Store;

/// Scale and minimum (or zero) of each row in a group; `tail` is what follows the group's codes.
#[inline(always)]
pub fn scales(layout: &Layout, record: &[u8], tail: &[u8]) -> ([f32; PANEL], [f32; PANEL]) {
    let half = |b: &[u8], lane: usize| f16::from_le_bytes([b[2 * lane], b[2 * lane + 1]]).to_f32();
    let (mut d, mut m) = ([0f32; PANEL], [0f32; PANEL]);
    for lane in 0..PANEL {
        match layout.kind {
            Kind::Zero => d[lane] = half(tail, lane),
            Kind::Min => {
                d[lane] = half(tail, lane);
                m[lane] = half(&tail[32..], lane);
            }
            Kind::SuperMin => {
                d[lane] = half(record, lane) * f32::from(tail[lane]);
                m[lane] = -(half(&record[32..], lane) * f32::from(tail[16 + lane]));
            }
            Kind::SuperZero => d[lane] = half(record, lane) * f32::from(tail[lane] as i8),
        }
    }
    (d, m)
}

/// `Σ code·q` of 16 rows over a group whose integers start at `at` in one row of planes.
#[inline(always)]
fn dot(layout: &Layout, codes: &[u8], planes: &[i8], at: usize) -> [i32; PANEL] {
    let mut sums = [0i32; PANEL];
    for i in 0..layout.group {
        let at = at + i;
        let byte = 64 * (at / 32) + at % 32;
        let q = 256 * i32::from(planes[byte]) + i32::from(planes[byte + 32]);
        let (line, shift) = match layout.bits {
            4 => (64 * (i / 4 % 4), 4 * (i / 16)),
            _ => (64 * (i / 4), 0),
        };
        let mask = ((1u32 << layout.bits) - 1) as i32;
        for (lane, sum) in sums.iter_mut().enumerate() {
            *sum += ((i32::from(codes[line + 4 * lane + i % 4]) >> shift) & mask) * q;
        }
    }
    sums
}

/// See [`super::multiply`].
pub fn multiply(layout: &Layout, panel: &[u8], a: &Activations, rows: Range<usize>, store: Store) {
    multiply_with(layout, panel, a, rows, store, dot);
}

/// The kernel around a group's integer dot product.
#[inline(always)]
pub fn multiply_with(
    layout: &Layout,
    panel: &[u8],
    a: &Activations,
    rows: Range<usize>,
    store: Store,
    dot: impl Fn(&Layout, &[u8], &[i8], usize) -> [i32; PANEL],
) {
    for row in rows {
        let planes = &a.planes[row * 2 * a.k..(row + 1) * 2 * a.k];
        let sums = &a.sums[row * a.k / 32..(row + 1) * a.k / 32];
        let mut acc = [0f32; PANEL];
        let mut at = 0;
        for record in panel.chunks_exact(layout.record_bytes()) {
            for group in record[layout.head_bytes()..].chunks_exact(layout.group_bytes()) {
                let (codes, tail) = group.split_at(layout.code_bytes());
                let (d, m) = scales(layout, record, tail);
                let products = dot(layout, codes, planes, at);
                let sum = if layout.group == 16 { sums[at / 32].halves[at / 16 % 2] } else { sums[at / 32].whole };
                for lane in 0..PANEL {
                    match layout.kind {
                        Kind::Min | Kind::SuperMin => {
                            acc[lane] = (products[lane] as f32).mul_add(d[lane], acc[lane]);
                            acc[lane] = m[lane].mul_add(sum as f32, acc[lane]);
                        }
                        Kind::Zero | Kind::SuperZero => {
                            let centred = products[lane] - (sum << layout.zero_shift);
                            acc[lane] = (centred as f32).mul_add(d[lane], acc[lane]);
                        }
                    }
                }
                at += layout.group;
            }
        }
        store(row, &acc.map(|v| v * a.scales[row]));
    }
}
