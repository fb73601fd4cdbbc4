//! SwiGLU (Shazeer, 2020): `silu(gate) · up`, with `silu(x) = x / (1 + e^-x)`.

use std::f32::consts::LOG2_E;

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};

use super::cpu;
use super::pool::SharedMut;
use super::simd::{self, Kernel, LANES, Lanes};
use crate::Result;

#[cfg(feature = "cuda")]
mod cuda;

/// Rows a task takes.
const ROWS: usize = 8;

/// `[gate | up] [T, 2·n] -> [T, n]`, f32; on a GPU bf16.
pub fn swiglu(gate_up: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if gate_up.device().is_cuda() {
        return cuda::swiglu(gate_up);
    }
    Ok(gate_up.apply_op1_no_bwd(&SwiGlu)?)
}

struct SwiGlu;

impl CustomOp1 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (t, width) = l.shape().dims2()?;
        if width % 2 != 0 {
            candle_core::bail!("swiglu of {:?}: gate and up have the same width", l.shape());
        }
        let n = width / 2;
        let x = cpu::slice("swiglu", s, l)?;
        let mut y = vec![0.0; t * n];
        let out = SharedMut::new(&mut y);
        // An exponential and a division are worth about sixteen multiply-adds.
        cpu::for_each(t.div_ceil(ROWS), 16 * t * n, |task| {
            for row in cpu::chunk(task, ROWS, t) {
                let (gate, up) = x[row * width..(row + 1) * width].split_at(n);
                // SAFETY: inside the output, and each row belongs to one task.
                let y = unsafe { out.slice(row * n, n) };
                simd::run(Row { gate, up, y });
            }
        });
        Ok((CpuStorage::F32(y), (t, n).into()))
    }
}

struct Row<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    y: &'a mut [f32],
}

impl Kernel for Row<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let (gate, gate_tail) = self.gate.as_chunks::<LANES>();
        let (up, up_tail) = self.up.as_chunks::<LANES>();
        let (y, y_tail) = self.y.as_chunks_mut::<LANES>();
        for ((g, u), y) in gate.iter().zip(up).zip(y) {
            silu(L::load(g)).mul(L::load(u)).store(y);
        }
        let mut last = [0.0; LANES];
        silu(simd::load_part::<L>(gate_tail)).mul(simd::load_part(up_tail)).store(&mut last);
        y_tail.copy_from_slice(&last[..y_tail.len()]);
    }
}

#[inline(always)]
fn silu<L: Lanes>(x: L) -> L {
    x.div(x.mul(L::splat(-LOG2_E)).exp2().add(L::splat(1.0)))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::ops::reference::{assert_close, random};

    fn op(x: &[f32], t: usize) -> Vec<f32> {
        let x = Tensor::from_slice(x, (t, x.len() / t), &Device::Cpu).unwrap();
        swiglu(&x).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    fn reference(gate: f32, up: f32) -> f64 {
        let (gate, up) = (f64::from(gate), f64::from(up));
        gate / (1.0 + (-gate).exp()) * up
    }

    #[test]
    fn matches_f64_and_rows_stand_alone() {
        for (t, n) in [(1, 1), (1, 16), (3, 17), (40, 160), (9, 33)] {
            let x: Vec<f32> = random(1, t * 2 * n).iter().map(|x| x * 8.0).collect();
            let y = op(&x, t);
            for row in 0..t {
                let x = &x[row * 2 * n..(row + 1) * 2 * n];
                let expected: Vec<f64> = (0..n).map(|i| reference(x[i], x[n + i])).collect();
                assert_close(&y[row * n..(row + 1) * n], &expected, 1e-6);
                assert_eq!(&y[row * n..(row + 1) * n], op(x, 1));
            }
        }
    }

    #[test]
    fn extremes_stay_finite_and_nan_stays_nan() {
        let y = op(&[-1e4, -100.0, -0.0, 100.0, 1e30, f32::NAN, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 1);
        assert!(y[0].abs() < 1e-30 && y[1].abs() < 1e-30, "{y:?}");
        assert_eq!(&y[2..5], [0.0, 100.0, 1e30]);
        assert!(y[5].is_nan());
    }
}
