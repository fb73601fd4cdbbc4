//! Steps between the qkv product and RoPE in some models: biases (Qwen2), RMS norms of query and key heads (Qwen3).

use candle_core::{CpuStorage, InplaceOp1, InplaceOp2, Layout, Tensor};

use super::cpu;
use super::norm::{self, RmsNormRowBackward};
use super::pool::SharedMut;
use super::simd::{self, Lanes, SimdKernel};
use crate::arch::Heads;
use crate::{Error, Result};

#[cfg(feature = "cuda")]
mod cuda;

/// Rows of a task.
const ROWS: usize = 16;

/// The op's name in errors.
const OP: &str = "bias-and-qk-norm";

/// The RMS norms of query and key heads: Qwen3's `q_norm` and `k_norm`.
#[derive(Debug, Clone, Copy)]
pub struct QkNorm<'a> {
    /// Weights of every query head `[dim]`, f32.
    pub query: &'a Tensor,
    /// Weights of every key head `[dim]`, f32.
    pub key: &'a Tensor,
    /// Added to the mean of the squares.
    pub eps: f32,
}

impl QkNorm<'_> {
    fn fits(&self, heads: Heads) -> bool {
        self.query.dims() == [heads.dim] && self.key.dims() == [heads.dim]
    }
}

/// Adds `bias [width]` to each row of `qkv [T, width]`, where `width = (query + 2·kv)·dim`, then normalises each query and key head.
/// In place. `qkv` is f32, on a GPU bf16; the rest is f32. Errors: shapes that do not fit.
pub fn bias_and_qk_norm(qkv: &Tensor, bias: Option<&Tensor>, norm: Option<QkNorm>, heads: Heads) -> Result<()> {
    let width = heads.qkv_width();
    let fits = qkv.dims2()?.1 == width
        && bias.is_none_or(|b| b.dims() == [width])
        && norm.as_ref().is_none_or(|norm| norm.fits(heads));
    if !fits {
        return Err(Error::internal(format!(
            "biases {:?} and norms {:?} for qkv {:?} of {heads:?}",
            bias.map(Tensor::shape),
            norm.map(|norm| (norm.query.shape(), norm.key.shape())),
            qkv.shape()
        )));
    }
    if bias.is_none() && norm.is_none() {
        return Ok(());
    }
    #[cfg(feature = "cuda")]
    if qkv.device().is_cuda() {
        return cuda::bias_and_qk_norm(qkv, bias, norm, heads);
    }
    let bias = bias.map(|b| cpu::values(OP, b)).transpose()?;
    let weights = norm
        .map(|norm| Ok::<_, Error>((cpu::values(OP, norm.query)?, cpu::values(OP, norm.key)?, norm.eps)))
        .transpose()?;
    let norm = weights.as_ref().map(|(query, key, eps)| NormWeights { query, key, eps: *eps });
    Ok(qkv.inplace_op1(&BiasAndQkNorm { bias: bias.as_deref(), norm, heads })?)
}

/// Turns the gradient of the normalised `dqkv [T, width]` into that of `qkv_raw [T, width]`, in place. `qkv_raw` is the input of the
/// norms, with the bias already added, whose gradient is the same. Both are f32, on a GPU bf16. Errors: shapes that do not fit.
pub fn qk_norm_backward(dqkv: &Tensor, qkv_raw: &Tensor, norm: QkNorm, heads: Heads) -> Result<()> {
    if dqkv.dims2()?.1 != heads.qkv_width() || qkv_raw.dims() != dqkv.dims() || !norm.fits(heads) {
        return Err(Error::internal(format!(
            "gradients {:?} of norms {:?} for qkv {:?} of {heads:?}",
            dqkv.shape(),
            (norm.query.shape(), norm.key.shape()),
            qkv_raw.shape()
        )));
    }
    #[cfg(feature = "cuda")]
    if dqkv.device().is_cuda() {
        return cuda::qk_norm_backward(dqkv, qkv_raw, norm, heads);
    }
    let (query, key) = (cpu::values(OP, norm.query)?, cpu::values(OP, norm.key)?);
    let norm = NormWeights { query: &query, key: &key, eps: norm.eps };
    Ok(dqkv.inplace_op2(qkv_raw, &QkNormBackward { norm, heads })?)
}

/// A [`QkNorm`] on the CPU. The weights are frozen, so they are not passed to candle as operands.
#[derive(Clone, Copy)]
struct NormWeights<'a> {
    query: &'a [f32],
    key: &'a [f32],
    eps: f32,
}

impl NormWeights<'_> {
    /// Weights of head `i` of a row, counted over the query heads, then the key heads.
    fn of_head(&self, i: usize, heads: Heads) -> &[f32] {
        if i < heads.query { self.query } else { self.key }
    }
}

struct BiasAndQkNorm<'a> {
    bias: Option<&'a [f32]>,
    norm: Option<NormWeights<'a>>,
    heads: Heads,
}

impl InplaceOp1 for BiasAndQkNorm<'_> {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, s: &mut CpuStorage, l: &Layout) -> candle_core::Result<()> {
        let (t, width) = l.shape().dims2()?;
        let x = SharedMut::new(cpu::slice_mut(OP, s, l)?);
        cpu::for_each(t.div_ceil(ROWS), t * width, |task| {
            for row in cpu::chunk(task, ROWS, t) {
                // SAFETY: inside the tensor; each row belongs to one task.
                let x = unsafe { x.slice(row * width, width) };
                simd::run(BiasAndQkNormRow { x, op: self });
            }
        });
        Ok(())
    }
}

/// All heads of one row.
struct BiasAndQkNormRow<'a> {
    x: &'a mut [f32],
    op: &'a BiasAndQkNorm<'a>,
}

impl SimdKernel for BiasAndQkNormRow<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let BiasAndQkNorm { bias, norm, heads } = self.op;
        if let Some(bias) = bias {
            self.x.iter_mut().zip(*bias).for_each(|(x, b)| *x += b);
        }
        let Some(norm) = norm else { return };
        for (i, head) in self.x.chunks_exact_mut(heads.dim).take(heads.query + heads.kv).enumerate() {
            let scale = norm::inverse_rms::<L>(head, norm.eps);
            let weight = norm.of_head(i, *heads);
            head.iter_mut().zip(weight).for_each(|(x, w)| *x = *x * scale * w);
        }
    }
}

struct QkNormBackward<'a> {
    norm: NormWeights<'a>,
    heads: Heads,
}

impl InplaceOp2 for QkNormBackward<'_> {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, s1: &mut CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> candle_core::Result<()> {
        let Self { norm, heads } = *self;
        let (t, width) = l1.shape().dims2()?;
        let (d, x) = (SharedMut::new(cpu::slice_mut(OP, s1, l1)?), cpu::slice(OP, s2, l2)?);
        cpu::for_each(t.div_ceil(ROWS), 2 * t * width, |task| {
            for row in cpu::chunk(task, ROWS, t) {
                for head in 0..heads.query + heads.kv {
                    let start = row * width + head * heads.dim;
                    // SAFETY: a head of one row of the tensor; each row belongs to one task.
                    let d = unsafe { d.slice(start, heads.dim) };
                    let (weight, eps) = (norm.of_head(head, heads), norm.eps);
                    simd::run(RmsNormRowBackward { x: &x[start..start + heads.dim], weight, eps, d });
                }
            }
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::ops::reference::{assert_close, dot, gradient, random};

    #[test]
    fn matches_f64_and_rows_stand_alone() {
        for (query, kv, dim, t) in [(1, 1, 2, 1), (4, 2, 12, 5), (3, 1, 64, 40), (2, 2, 128, 3), (2, 1, 80, 17)] {
            let heads = Heads { query, kv, dim };
            let width = heads.qkv_width();
            let (x, bias, q, k) = (random(1, t * width), random(2, width), random(3, dim), random(4, dim));
            let tensor = |v: &[f32]| Tensor::from_slice(v, v.len(), &Device::Cpu).unwrap();
            let (bias_t, q_t, k_t) = (tensor(&bias), tensor(&q), tensor(&k));
            for (with_bias, with_norms) in [(true, false), (false, true), (true, true), (false, false)] {
                let run = |x: &[f32]| {
                    let y = Tensor::from_slice(x, (x.len() / width, width), &Device::Cpu).unwrap();
                    let norm = QkNorm { query: &q_t, key: &k_t, eps: 1e-6 };
                    bias_and_qk_norm(&y, with_bias.then_some(&bias_t), with_norms.then_some(norm), heads).unwrap();
                    y.flatten_all().unwrap().to_vec1::<f32>().unwrap()
                };
                let y = run(&x);
                let mut expected: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
                for row in expected.chunks_mut(width) {
                    if with_bias {
                        row.iter_mut().zip(&bias).for_each(|(x, &b)| *x += f64::from(b));
                    }
                    for (i, head) in row.chunks_mut(dim).take(if with_norms { query + kv } else { 0 }).enumerate() {
                        let mean = head.iter().map(|x| x * x).sum::<f64>() / dim as f64;
                        let weight = if i < query { &q } else { &k };
                        head.iter_mut().zip(weight).for_each(|(x, &w)| *x *= f64::from(w) / (mean + 1e-6).sqrt());
                    }
                }
                assert_close(&y, &expected, 1e-6);
                let last = (t - 1) * width;
                assert_eq!(run(&x[last..]), y[last..]);
            }
        }
    }

    #[test]
    fn refuses_other_shapes() {
        let heads = Heads { query: 2, kv: 1, dim: 4 };
        let zeros = |n: usize| Tensor::zeros(n, DType::F32, &Device::Cpu).unwrap();
        let qkv = zeros(48).reshape((3, 16)).unwrap();
        let (query, key) = (&zeros(4), &zeros(5));
        assert!(bias_and_qk_norm(&qkv, Some(&zeros(16)), None, heads).is_ok());
        assert!(bias_and_qk_norm(&qkv, Some(&zeros(15)), None, heads).is_err());
        assert!(bias_and_qk_norm(&qkv, None, Some(QkNorm { query, key, eps: 1e-6 }), heads).is_err());
        assert!(bias_and_qk_norm(&qkv, None, None, Heads { dim: 6, ..heads }).is_err());
        let norm = QkNorm { query, key: query, eps: 1e-6 };
        assert!(qk_norm_backward(&qkv, &qkv.narrow(0, 0, 1).unwrap(), norm, heads).is_err());
    }

    #[test]
    fn the_gradient_matches_finite_differences() {
        for (query, kv, dim, t) in [(1, 1, 2, 1), (4, 2, 12, 5), (3, 1, 64, 2), (2, 1, 10, 17)] {
            let heads = Heads { query, kv, dim };
            let width = heads.qkv_width();
            let (raw, d, q, k) = (random(1, t * width), random(2, t * width), random(3, dim), random(4, dim));
            let loss = |x: &[f64]| {
                let mut y = x.to_vec();
                for row in y.chunks_mut(width) {
                    for (i, head) in row.chunks_mut(dim).take(query + kv).enumerate() {
                        let mean = head.iter().map(|x| x * x).sum::<f64>() / dim as f64;
                        let weight = if i < query { &q } else { &k };
                        head.iter_mut().zip(weight).for_each(|(x, &w)| *x *= f64::from(w) / (mean + 1e-6).sqrt());
                    }
                }
                dot(&y, &d)
            };
            let tensor = |v: &[f32]| Tensor::from_slice(v, v.len(), &Device::Cpu).unwrap();
            let rows = |v: &[f32]| tensor(v).reshape((t, width)).unwrap();
            let dqkv = rows(&d);
            let norm = QkNorm { query: &tensor(&q), key: &tensor(&k), eps: 1e-6 };
            qk_norm_backward(&dqkv, &rows(&raw), norm, heads).unwrap();
            let dqkv = dqkv.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_close(&dqkv, &gradient(&raw, 0..t * width, loss), 1e-6);
        }
    }
}
