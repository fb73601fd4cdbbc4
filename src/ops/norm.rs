//! RMSNorm (Zhang and Sennrich, 2019): `y = x / sqrt(mean(x²) + eps) · weight`, alone or fused with the residual sum before it.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Device, Layout, Shape, Tensor};

use super::cpu;
use super::pool::SharedMut;
use super::simd::{self, Lanes, SimdKernel};
use crate::{Error, Result};

#[cfg(feature = "cuda")]
mod cuda;

/// Rows of a task.
const ROWS: usize = 16;

/// The norm of each row of `x [T, n]` with `weight [n]`: `[T, n]`. All f32; on a GPU the result is bf16. Errors: shapes that do not
/// fit.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::rms_norm(x, weight, eps);
    }
    Ok(x.apply_op1_no_bwd(&RmsNorm { weight, eps })?)
}

/// `(x + delta, rms_norm(x + delta))`, each `[T, n]`: the residual stream after a sublayer, and the input of the next sublayer. All
/// f32; on a GPU `delta` and the norm are bf16. Errors: shapes that do not fit.
pub fn add_rms_norm(x: &Tensor, delta: &Tensor, weight: &Tensor, eps: f32) -> Result<(Tensor, Tensor)> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::add_rms_norm(x, delta, weight, eps);
    }
    let both = x.apply_op2_no_bwd(delta, &RmsNorm { weight, eps })?;
    Ok((both.get(0)?, both.get(1)?))
}

/// The gradient of [`rms_norm`] with respect to `x [T, n]`, from the gradient `dy [T, n]` of its result. If given, `residual [T, n]` is
/// added: the gradient of the residual stream, which by-passes the norm. The weight is frozen and has no gradient. All f32; on
/// a GPU `dy` is bf16. Errors: shapes that do not fit.
pub fn rms_norm_backward(
    x: &Tensor,
    weight: &Tensor,
    dy: &Tensor,
    residual: Option<&Tensor>,
    eps: f32,
) -> Result<Tensor> {
    let n = x.dims2()?.1;
    if weight.dims() != [n] || dy.dims() != x.dims() || residual.is_some_and(|r| r.dims() != x.dims()) {
        return Err(Error::internal(format!(
            "backward of RMSNorm: x {:?}, weights {:?}, dy {:?}, residual {:?}",
            x.shape(),
            weight.shape(),
            dy.shape(),
            residual.map(Tensor::shape)
        )));
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::rms_norm_backward(x, weight, dy, residual, eps);
    }
    const OP: &str = "rms-norm-backward";
    let t = x.dim(0)?;
    let shape = x.shape();
    let (x, weight, dy) = (cpu::values(OP, x)?, cpu::values(OP, weight)?, cpu::values(OP, dy)?);
    let residual = residual.map(|r| cpu::values(OP, r)).transpose()?;
    let (x, weight, dy, residual) = (&x[..], &weight[..], &dy[..], residual.as_deref());
    let mut dx = vec![0.0; t * n];
    let out = SharedMut::new(&mut dx);
    cpu::for_each(t.div_ceil(ROWS), 2 * t * n, |task| {
        for row in cpu::chunk(task, ROWS, t) {
            let range = row * n..(row + 1) * n;
            // SAFETY: inside the gradient; each row belongs to one task.
            let d = unsafe { out.slice(row * n, n) };
            d.copy_from_slice(&dy[range.clone()]);
            simd::run(RmsNormRowBackward { x: &x[range.clone()], weight, eps, d });
            if let Some(residual) = residual {
                d.iter_mut().zip(&residual[range]).for_each(|(d, r)| *d += r);
            }
        }
    });
    Ok(Tensor::from_vec(dx, shape, &Device::Cpu)?)
}

struct RmsNorm<'a> {
    /// Frozen, so not passed to candle as an operand.
    weight: &'a Tensor,
    eps: f32,
}

impl CustomOp1 for RmsNorm<'_> {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let x = cpu::slice("rms-norm", s, l)?;
        let mut y = vec![0.0; x.len()];
        self.rows(x, None, &mut [], &mut y, l.shape())?;
        Ok((CpuStorage::F32(y), l.shape().clone()))
    }
}

impl CustomOp2 for RmsNorm<'_> {
    fn name(&self) -> &'static str {
        "add-rms-norm"
    }

    /// `[2, T, n]`: the sum, then its norm.
    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (t, n) = l1.shape().dims2()?;
        if l1.shape() != l2.shape() {
            candle_core::bail!("add-rms-norm: x {:?}, delta {:?}", l1.shape(), l2.shape());
        }
        let (x, delta) = (cpu::slice("add-rms-norm", s1, l1)?, cpu::slice("add-rms-norm", s2, l2)?);
        let mut both = vec![0.0; 2 * t * n];
        let (sum, y) = both.split_at_mut(t * n);
        self.rows(x, Some(delta), sum, y, l1.shape())?;
        Ok((CpuStorage::F32(both), (2, t, n).into()))
    }
}

impl RmsNorm<'_> {
    /// Writes `sum = x + delta` and its norm `y`. Without a delta, `sum` is empty and `y` is the norm of `x`.
    fn rows(
        &self,
        x: &[f32],
        delta: Option<&[f32]>,
        sum: &mut [f32],
        y: &mut [f32],
        shape: &Shape,
    ) -> candle_core::Result<()> {
        let (t, n) = shape.dims2()?;
        if self.weight.dims() != [n] {
            candle_core::bail!("rms-norm: x {shape:?}, weights {:?}", self.weight.shape());
        }
        let weight = cpu::values("rms-norm", self.weight)?;
        let weight = &weight[..];
        let (sum, y) = (SharedMut::new(sum), SharedMut::new(y));
        cpu::for_each(t.div_ceil(ROWS), t * n, |task| {
            for row in cpu::chunk(task, ROWS, t) {
                let range = row * n..(row + 1) * n;
                // SAFETY: inside the tensor; each row belongs to one task.
                let y = unsafe { y.slice(row * n, n) };
                let x = match delta {
                    None => &x[range],
                    Some(delta) => {
                        // SAFETY: as above. With a delta, the sum has the shape of `x`.
                        let sum = unsafe { sum.slice(row * n, n) };
                        for ((s, x), d) in sum.iter_mut().zip(&x[range.clone()]).zip(&delta[range]) {
                            *s = x + d;
                        }
                        &*sum
                    }
                };
                simd::run(RmsNormRow { x, weight, eps: self.eps, y });
            }
        });
        Ok(())
    }
}

/// The norm of one row.
struct RmsNormRow<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    y: &'a mut [f32],
}

impl SimdKernel for RmsNormRow<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let scale = inverse_rms::<L>(self.x, self.eps);
        for ((y, x), w) in self.y.iter_mut().zip(self.x).zip(self.weight) {
            *y = x * scale * w;
        }
    }
}

/// `1 / sqrt(mean(x²) + eps)`.
#[inline(always)]
pub(super) fn inverse_rms<L: Lanes>(x: &[f32], eps: f32) -> f32 {
    let mean = simd::dot::<L>(x, x) / x.len() as f32;
    1.0 / (mean + eps).sqrt()
}

/// The gradient of one row, in place: `d` is the gradient of the norm before, and of `x` after.
pub(super) struct RmsNormRowBackward<'a> {
    pub x: &'a [f32],
    pub weight: &'a [f32],
    pub eps: f32,
    pub d: &'a mut [f32],
}

impl SimdKernel for RmsNormRowBackward<'_> {
    /// `dx = s · g - s³ · x · mean(g · x)`, where `s` is the inverse RMS and `g = d · weight`.
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Self { x, weight, eps, d } = self;
        let scale = inverse_rms::<L>(x, eps);
        d.iter_mut().zip(weight).for_each(|(d, w)| *d *= w);
        let along = scale * scale * scale * simd::dot::<L>(d, x) / x.len() as f32;
        d.iter_mut().zip(x).for_each(|(d, x)| *d = *d * scale - x * along);
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::ops::reference::{assert_close, dot, gradient, random};

    fn norm(x: &[f32], n: usize, weight: &[f32]) -> Vec<f32> {
        let x = Tensor::from_slice(x, (x.len() / n, n), &Device::Cpu).unwrap();
        let weight = Tensor::from_slice(weight, n, &Device::Cpu).unwrap();
        rms_norm(&x, &weight, 1e-5).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn matches_f64_and_rows_stand_alone() {
        for (t, n) in [(1, 1), (1, 16), (3, 17), (5, 64), (70, 576), (2, 100)] {
            let (x, weight) = (random(1, t * n), random(2, n));
            let y = norm(&x, n, &weight);
            for row in 0..t {
                let x = &x[row * n..(row + 1) * n];
                let mean = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n as f64;
                let expected: Vec<f64> =
                    x.iter().zip(&weight).map(|(&x, &w)| f64::from(x) / (mean + 1e-5).sqrt() * f64::from(w)).collect();
                let y = &y[row * n..(row + 1) * n];
                assert_close(y, &expected, 1e-6);
                assert_eq!(y, norm(x, n, &weight));
            }
        }
    }

    #[test]
    fn fused_sum_is_the_sum_and_its_norm() {
        let (t, n) = (33, 100);
        let tensor = |seed| Tensor::from_vec(random(seed, t * n), (t, n), &Device::Cpu).unwrap();
        let (x, delta) = (tensor(1), tensor(2));
        let weight = Tensor::from_vec(random(3, n), n, &Device::Cpu).unwrap();
        let (sum, normed) = add_rms_norm(&x, &delta, &weight, 1e-5).unwrap();
        let plain = (x + delta).unwrap();
        assert_eq!(sum.to_vec2::<f32>().unwrap(), plain.to_vec2::<f32>().unwrap());
        let expected = rms_norm(&plain, &weight, 1e-5).unwrap();
        assert_eq!(normed.to_vec2::<f32>().unwrap(), expected.to_vec2::<f32>().unwrap());
    }

    #[test]
    fn refuses_other_shapes() {
        let x = Tensor::zeros((2, 8), candle_core::DType::F32, &Device::Cpu).unwrap();
        let short = Tensor::zeros(7, candle_core::DType::F32, &Device::Cpu).unwrap();
        assert!(rms_norm(&x, &short, 1e-5).is_err());
        assert!(add_rms_norm(&x, &x.narrow(0, 0, 1).unwrap(), &short, 1e-5).is_err());
        assert!(rms_norm_backward(&x, &short, &x, None, 1e-5).is_err());
    }

    #[test]
    fn the_gradient_matches_finite_differences() {
        for (t, n) in [(1, 2), (1, 16), (3, 17), (2, 64), (33, 20)] {
            let (x, weight, dy, residual) = (random(1, t * n), random(2, n), random(3, t * n), random(4, t * n));
            let loss = |x: &[f64]| {
                let rows = x.chunks_exact(n).flat_map(|x| {
                    let mean = x.iter().map(|x| x * x).sum::<f64>() / n as f64;
                    x.iter().zip(&weight).map(move |(x, &w)| x / (mean + 1e-5).sqrt() * f64::from(w))
                });
                dot(&rows.collect::<Vec<_>>(), &dy)
            };
            let mut expected = gradient(&x, 0..t * n, loss);
            let backward = |rows: std::ops::Range<usize>, residual: Option<&[f32]>| -> Vec<f32> {
                let range = rows.start * n..rows.end * n;
                let tensor = |v: &[f32]| Tensor::from_slice(&v[range.clone()], (rows.len(), n), &Device::Cpu).unwrap();
                let weight = Tensor::from_slice(&weight, n, &Device::Cpu).unwrap();
                let residual = residual.map(tensor);
                let dx = rms_norm_backward(&tensor(&x), &weight, &tensor(&dy), residual.as_ref(), 1e-5).unwrap();
                dx.flatten_all().unwrap().to_vec1().unwrap()
            };
            assert_close(&backward(0..t, None), &expected, 1e-6);
            expected.iter_mut().zip(&residual).for_each(|(e, &r)| *e += f64::from(r));
            let dx = backward(0..t, Some(&residual));
            assert_close(&dx, &expected, 1e-6);
            assert_eq!(dx[(t - 1) * n..], backward(t - 1..t, Some(&residual)));
        }
    }
}
