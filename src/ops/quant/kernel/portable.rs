//! Plain Rust: the reference that the other kernels must equal bit for bit.

use super::super::activations::ActivationTile;
use super::super::affine::{GROUP, PANEL, Scales};
use super::super::float::FloatPanel;
use super::{BlockFormat, Products};

/// See [`super::affine`].
pub fn affine<F: BlockFormat>(codes: &[u8], scales: &[u8], x: &ActivationTile, out: &mut Products) {
    out.fill([0.0; PANEL]);
    for (g, codes) in codes.chunks_exact(F::LAYOUT.group_bytes()).enumerate() {
        let codes = F::LAYOUT.expand(codes);
        let [[scale, min], [scale1, min1]] = F::LAYOUT.scales(scales, g);
        for t in 0..x.rows {
            let mut dots = [[0; PANEL]; 2];
            for i in 0..GROUP {
                let q = x.q(t, GROUP * g + i);
                for r in 0..PANEL {
                    dots[i / 16][r] += i32::from(codes[64 * (i / 4) + 4 * r + i % 4]) * q;
                }
            }
            let cell = g * x.rows + t;
            for (r, acc) in out[t].iter_mut().enumerate() {
                if F::LAYOUT.scales == Scales::SuperHalves {
                    *acc = scale[r].mul_add(dots[0][r] as f32, *acc);
                    *acc = scale1[r].mul_add(dots[1][r] as f32, *acc);
                    *acc = min[r].mul_add(x.half_sums[2 * cell], *acc);
                    *acc = min1[r].mul_add(x.half_sums[2 * cell + 1], *acc);
                } else {
                    *acc = scale[r].mul_add((dots[0][r] + dots[1][r]) as f32, *acc);
                    *acc = min[r].mul_add(x.sums[cell], *acc);
                }
            }
        }
    }
}

/// See [`super::float`].
pub fn float(panel: FloatPanel, x: &ActivationTile, out: &mut Products) {
    out.fill([0.0; PANEL]);
    for (step, x8) in x.values.chunks_exact(8 * x.rows).enumerate() {
        let w = panel.decode(step);
        for (out, t) in out.iter_mut().zip(0..x.rows) {
            for i in 0..8 {
                for r in 0..PANEL {
                    out[r] = w[i][r].mul_add(x8[i * x.rows + t], out[r]);
                }
            }
        }
    }
}
