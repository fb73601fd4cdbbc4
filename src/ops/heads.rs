//! What some models do to the projected heads before they are turned: biases (Qwen2), norms of query and key heads (Qwen3).

use candle_core::{CpuStorage, InplaceOp1, InplaceOp2, Layout, Tensor};

use super::cpu;
use super::norm::{self, RowBackward};
use super::pool::SharedMut;
use super::simd::{self, Kernel, Lanes};
use crate::arch::Heads;
use crate::{Error, Result};

#[cfg(feature = "cuda")]
mod cuda;

/// Rows a task takes.
const ROWS: usize = 16;

/// Its name in errors.
const OP: &str = "finish-heads";

/// Changes `qkv [T, (heads + 2·kv_heads)·dim]` in place: adds `bias` (of that width), then gives each query head the RMS
/// norm with the first weights `[dim]` and each key head that with the second. `qkv` is f32, on a GPU bf16; the rest is f32.
pub fn finish(
    qkv: &Tensor,
    bias: Option<&Tensor>,
    norms: Option<(&Tensor, &Tensor)>,
    heads: Heads,
    eps: f32,
) -> Result<()> {
    let width = heads.qkv_width();
    let fits = qkv.dims2()?.1 == width
        && bias.is_none_or(|b| b.dims() == [width])
        && norms.is_none_or(|(q, k)| q.dims() == [heads.dim] && k.dims() == [heads.dim]);
    if !fits {
        return Err(Error::internal(format!(
            "heads {heads:?} of {:?} with biases {:?} and norms {:?}",
            qkv.shape(),
            bias.map(Tensor::shape),
            norms.map(|(q, k)| (q.shape(), k.shape()))
        )));
    }
    if bias.is_none() && norms.is_none() {
        return Ok(());
    }
    #[cfg(feature = "cuda")]
    if qkv.device().is_cuda() {
        return cuda::finish(qkv, bias, norms, heads, eps);
    }
    let bias = bias.map(|b| cpu::values(OP, b)).transpose()?;
    let norms = norms.map(|(q, k)| Ok::<_, Error>((cpu::values(OP, q)?, cpu::values(OP, k)?))).transpose()?;
    let norms = norms.as_ref().map(|(q, k)| (&q[..], &k[..]));
    Ok(qkv.inplace_op1(&Finish { bias: bias.as_deref(), norms, heads, eps })?)
}

/// Turns the gradient of what [`finish`] gives with `norms`, `dqkv [T, (heads + 2·kv_heads)·dim]`, into that of `qkv_raw`, in
/// place; `qkv_raw`, of that shape, is what the norms are taken of: with the bias, whose gradient passes as it is. Both are
/// f32, on a GPU bf16.
pub fn finish_backward(
    dqkv: &Tensor,
    qkv_raw: &Tensor,
    norms: (&Tensor, &Tensor),
    heads: Heads,
    eps: f32,
) -> Result<()> {
    let norm = [heads.dim];
    if dqkv.dims2()?.1 != heads.qkv_width()
        || qkv_raw.dims() != dqkv.dims()
        || norms.0.dims() != norm
        || norms.1.dims() != norm
    {
        return Err(Error::internal(format!(
            "backward of heads {heads:?} of {:?} from {:?} with norms {:?}",
            qkv_raw.shape(),
            dqkv.shape(),
            (norms.0.shape(), norms.1.shape())
        )));
    }
    #[cfg(feature = "cuda")]
    if dqkv.device().is_cuda() {
        return cuda::finish_backward(dqkv, qkv_raw, norms, heads, eps);
    }
    let norms = (cpu::values(OP, norms.0)?, cpu::values(OP, norms.1)?);
    Ok(dqkv.inplace_op2(qkv_raw, &FinishBackward { norms: (&norms.0, &norms.1), heads, eps })?)
}

struct Finish<'a> {
    /// Frozen, hence not operands.
    bias: Option<&'a [f32]>,
    norms: Option<(&'a [f32], &'a [f32])>,
    heads: Heads,
    eps: f32,
}

impl InplaceOp1 for Finish<'_> {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, s: &mut CpuStorage, l: &Layout) -> candle_core::Result<()> {
        let (t, width) = l.shape().dims2()?;
        let x = SharedMut::new(cpu::slice_mut(OP, s, l)?);
        cpu::for_each(t.div_ceil(ROWS), t * width, |task| {
            for row in cpu::chunk(task, ROWS, t) {
                // SAFETY: inside the tensor, and each row belongs to one task.
                let x = unsafe { x.slice(row * width, width) };
                simd::run(Row { x, op: self });
            }
        });
        Ok(())
    }
}

struct Row<'a> {
    x: &'a mut [f32],
    op: &'a Finish<'a>,
}

impl Kernel for Row<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Finish { bias, norms, heads, eps } = self.op;
        if let Some(bias) = bias {
            self.x.iter_mut().zip(*bias).for_each(|(x, b)| *x += b);
        }
        let Some((query, key)) = norms else { return };
        for (i, head) in self.x.chunks_exact_mut(heads.dim).take(heads.query + heads.kv).enumerate() {
            let weight = if i < heads.query { *query } else { *key };
            let scale = norm::scale::<L>(head, *eps);
            head.iter_mut().zip(weight).for_each(|(x, w)| *x = *x * scale * w);
        }
    }
}

struct FinishBackward<'a> {
    /// Frozen, hence not operands.
    norms: (&'a [f32], &'a [f32]),
    heads: Heads,
    eps: f32,
}

impl InplaceOp2 for FinishBackward<'_> {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, s1: &mut CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> candle_core::Result<()> {
        let Self { norms, heads, eps } = *self;
        let (t, width) = l1.shape().dims2()?;
        let (d, x) = (SharedMut::new(cpu::slice_mut(OP, s1, l1)?), cpu::slice(OP, s2, l2)?);
        cpu::for_each(t.div_ceil(ROWS), 2 * t * width, |task| {
            for row in cpu::chunk(task, ROWS, t) {
                for head in 0..heads.query + heads.kv {
                    let start = row * width + head * heads.dim;
                    // SAFETY: a head of one row of the tensor, and each row belongs to one task.
                    let d = unsafe { d.slice(start, heads.dim) };
                    let weight = if head < heads.query { norms.0 } else { norms.1 };
                    simd::run(RowBackward { x: &x[start..start + heads.dim], weight, eps, d });
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
                    finish(&y, with_bias.then_some(&bias_t), with_norms.then_some((&q_t, &k_t)), heads, 1e-6).unwrap();
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
        assert!(finish(&qkv, Some(&zeros(16)), None, heads, 1e-6).is_ok());
        assert!(finish(&qkv, Some(&zeros(15)), None, heads, 1e-6).is_err());
        assert!(finish(&qkv, None, Some((&zeros(4), &zeros(5))), heads, 1e-6).is_err());
        assert!(finish(&qkv, None, None, Heads { dim: 6, ..heads }, 1e-6).is_err());
        let norm = zeros(4);
        assert!(finish_backward(&qkv, &qkv.narrow(0, 0, 1).unwrap(), (&norm, &norm), heads, 1e-6).is_err());
    }

    #[test]
    fn the_gradient_is_that_of_differences() {
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
            finish_backward(&dqkv, &rows(&raw), (&tensor(&q), &tensor(&k)), heads, 1e-6).unwrap();
            let dqkv = dqkv.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_close(&dqkv, &gradient(&raw, 0..t * width, loss), 1e-6);
        }
    }
}
