//! SwiGLU (Shazeer, 2020): `silu(gate) · up`, with `silu(x) = x / (1 + e^-x)`.

use std::f32::consts::LOG2_E;

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Shape, Tensor};

use super::cpu;
use super::pool::SharedMut;
use super::simd::{self, LANES, Lanes, SimdKernel};
use crate::{Error, Result};

#[cfg(feature = "cuda")]
mod cuda;

/// Rows of a task.
const ROWS: usize = 8;

/// SwiGLU of each row of `gate_up [T, 2·n]`, whose first half is the gate: `[T, n]`. f32; on a GPU bf16. Errors: an odd width.
pub fn swiglu(gate_up: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if gate_up.device().is_cuda() {
        return cuda::swiglu(gate_up);
    }
    Ok(gate_up.apply_op1_no_bwd(&SwiGlu)?)
}

/// The gradient of [`swiglu`] with respect to `gate_up [T, 2·n]`, from the gradient `dh [T, n]` of its result. f32; on a GPU bf16.
/// Errors: shapes that do not fit.
pub fn swiglu_backward(gate_up: &Tensor, dh: &Tensor) -> Result<Tensor> {
    let (t, width) = gate_up.dims2()?;
    let (rows, n) = dh.dims2()?;
    if rows != t || width != 2 * n {
        return Err(Error::internal(format!("backward of SwiGLU: gate_up {:?}, dh {:?}", gate_up.shape(), dh.shape())));
    }
    #[cfg(feature = "cuda")]
    if gate_up.device().is_cuda() {
        return cuda::swiglu_backward(gate_up, dh);
    }
    const OP: &str = "swiglu-backward";
    let shape = gate_up.shape();
    let (gate_up, dh) = (cpu::values(OP, gate_up)?, cpu::values(OP, dh)?);
    let (gate_up, dh) = (&gate_up[..], &dh[..]);
    let mut d = vec![0.0; t * width];
    let out = SharedMut::new(&mut d);
    cpu::for_each(t.div_ceil(ROWS), 16 * t * n, |task| {
        for row in cpu::chunk(task, ROWS, t) {
            let (gate, up) = gate_up[row * width..(row + 1) * width].split_at(n);
            // SAFETY: inside the gradient; each row belongs to one task.
            let (dgate, dup) = unsafe { out.slice(row * width, width) }.split_at_mut(n);
            simd::run(SwiGluRowBackward { gate, up, dh: &dh[row * n..(row + 1) * n], dgate, dup });
        }
    });
    Ok(Tensor::from_vec(d, shape, &Device::Cpu)?)
}

struct SwiGlu;

impl CustomOp1 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (t, width) = l.shape().dims2()?;
        if width % 2 != 0 {
            candle_core::bail!("swiglu of {:?}: the width must be even", l.shape());
        }
        let n = width / 2;
        let x = cpu::slice("swiglu", s, l)?;
        let mut y = vec![0.0; t * n];
        let out = SharedMut::new(&mut y);
        // An exponential and a division take about as long as sixteen multiply-adds.
        cpu::for_each(t.div_ceil(ROWS), 16 * t * n, |task| {
            for row in cpu::chunk(task, ROWS, t) {
                let (gate, up) = x[row * width..(row + 1) * width].split_at(n);
                // SAFETY: inside the output; each row belongs to one task.
                let y = unsafe { out.slice(row * n, n) };
                simd::run(SwiGluRow { gate, up, y });
            }
        });
        Ok((CpuStorage::F32(y), (t, n).into()))
    }
}

/// One row.
struct SwiGluRow<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    y: &'a mut [f32],
}

impl SimdKernel for SwiGluRow<'_> {
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

/// The gradient of one row.
struct SwiGluRowBackward<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    dh: &'a [f32],
    dgate: &'a mut [f32],
    dup: &'a mut [f32],
}

impl SimdKernel for SwiGluRowBackward<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let (gate, gate_tail) = self.gate.as_chunks::<LANES>();
        let (up, up_tail) = self.up.as_chunks::<LANES>();
        let (dh, dh_tail) = self.dh.as_chunks::<LANES>();
        let (dgate, dgate_tail) = self.dgate.as_chunks_mut::<LANES>();
        let (dup, dup_tail) = self.dup.as_chunks_mut::<LANES>();
        for ((((gate, up), dh), dgate), dup) in gate.iter().zip(up).zip(dh).zip(dgate).zip(dup) {
            let (g, u) = silu_backward(L::load(gate), L::load(up), L::load(dh));
            g.store(dgate);
            u.store(dup);
        }
        let (mut g, mut u) = ([0.0; LANES], [0.0; LANES]);
        let last = silu_backward::<L>(simd::load_part(gate_tail), simd::load_part(up_tail), simd::load_part(dh_tail));
        last.0.store(&mut g);
        last.1.store(&mut u);
        dgate_tail.copy_from_slice(&g[..dgate_tail.len()]);
        dup_tail.copy_from_slice(&u[..dup_tail.len()]);
    }
}

/// Gradients of gate and up. `silu'(x) = s · (1 + x · (1 - s))`, where `e = exp(-x)` and `s = 1 / (1 + e)`. Computing `1 - s` as
/// `e · s` avoids cancellation.
#[inline(always)]
fn silu_backward<L: Lanes>(gate: L, up: L, dh: L) -> (L, L) {
    let one = L::splat(1.0);
    let e = gate.mul(L::splat(-LOG2_E)).exp2();
    let s = one.div(e.add(one));
    let slope = gate.mul(e.mul(s)).mul_add(s, s);
    (dh.mul(up).mul(slope), dh.mul(gate.mul(s)))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::ops::reference::{assert_close, dot, gradient, random};

    fn op(x: &[f32], t: usize) -> Vec<f32> {
        let x = Tensor::from_slice(x, (t, x.len() / t), &Device::Cpu).unwrap();
        swiglu(&x).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    fn reference(gate: f64, up: f64) -> f64 {
        gate / (1.0 + (-gate).exp()) * up
    }

    fn backward(x: &[f32], dh: &[f32], t: usize) -> Vec<f32> {
        let x = Tensor::from_slice(x, (t, x.len() / t), &Device::Cpu).unwrap();
        let dh = Tensor::from_slice(dh, (t, dh.len() / t), &Device::Cpu).unwrap();
        swiglu_backward(&x, &dh).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn matches_f64_and_rows_stand_alone() {
        for (t, n) in [(1, 1), (1, 16), (3, 17), (40, 160), (9, 33)] {
            let x: Vec<f32> = random(1, t * 2 * n).iter().map(|x| x * 8.0).collect();
            let y = op(&x, t);
            for row in 0..t {
                let x = &x[row * 2 * n..(row + 1) * 2 * n];
                let expected: Vec<f64> = (0..n).map(|i| reference(x[i].into(), x[n + i].into())).collect();
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

    #[test]
    fn the_gradient_matches_finite_differences() {
        for (t, n) in [(1, 1), (1, 16), (3, 17), (9, 33)] {
            let x: Vec<f32> = random(1, t * 2 * n).iter().map(|x| x * 8.0).collect();
            let dh = random(2, t * n);
            let loss = |x: &[f64]| {
                let rows = x.chunks_exact(2 * n).flat_map(|x| (0..n).map(|i| reference(x[i], x[n + i])));
                dot(&rows.collect::<Vec<_>>(), &dh)
            };
            let d = backward(&x, &dh, t);
            assert_close(&d, &gradient(&x, 0..x.len(), loss), 1e-6);
            assert_eq!(d[(t - 1) * 2 * n..], backward(&x[(t - 1) * 2 * n..], &dh[(t - 1) * n..], 1));
        }
    }

    #[test]
    fn gradients_of_extremes_are_finite() {
        let d = backward(&[-1e4, -100.0, 0.0, 100.0, 1e30, 1.0, 2.0, 3.0, 4.0, 5.0], &[1.0; 5], 1);
        assert!(d[..2].iter().chain(&d[5..7]).all(|d| d.abs() < 1e-30), "{d:?}");
        assert_eq!(d[2..5], [1.5, 4.0, 5.0]);
        assert_eq!(d[7..], [0.0, 100.0, 1e30]);
    }
}
