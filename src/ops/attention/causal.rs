//! Training's attention: causal attention within whole sequences, without a cache, and its gradient. The computation is that of
//! FlashAttention-2 (Dao, 2023), tiled by queries only.
//!
//! This file is the CPU half. A task is one key-value head of one sequence. It takes the query heads of its group one after another.

use std::f32::consts::LOG2_E;
use std::ops::Range;

use candle_core::{Device, Tensor};

use super::Heads;
#[cfg(feature = "cuda")]
use super::cuda;
use crate::ops::cpu;
use crate::ops::pool::SharedMut;
use crate::ops::simd::{self, LANES, Lanes, SimdKernel};
use crate::ops::task_gemm::{Strides, TaskGemm};
use crate::{Error, Result};

/// Queries of a tile. With fewer, sums move to memory and back too often; with more, too much above the diagonal is computed.
const TILE: usize = 32;

/// Attends each row of `qkv [T, (query + 2·kv)·dim]`, to which RoPE was applied, to the keys of its sequence up to itself. Scores are
/// divided by `sqrt(dim)`. Returns `out [T, query·dim]` and `lse [T, query]` f32, the natural logarithm of the sum of the scores'
/// exponentials. `sequences` are the rows of each sequence, ascending and without gaps. f32; on a GPU `qkv` and `out` are bf16.
/// Errors: shapes or sequences that do not fit.
pub fn causal(qkv: &Tensor, sequences: &[Range<usize>], heads: Heads) -> Result<(Tensor, Tensor)> {
    check(qkv, sequences, heads)?;
    #[cfg(feature = "cuda")]
    if qkv.device().is_cuda() {
        return cuda::causal(qkv, sequences, heads);
    }
    let t = qkv.dim(0)?;
    let qkv = cpu::values("causal", qkv)?;
    let (mut out, mut lse) = (vec![0.0; t * heads.query * heads.dim], vec![0.0; t * heads.query]);
    let (to_out, to_lse) = (SharedMut::new(&mut out), SharedMut::new(&mut lse));
    for_each(sequences, heads, |rows, kv_head| {
        simd::run(CausalForward { head: KvHead { heads, qkv: &qkv, rows, kv_head }, out: to_out, lse: to_lse });
    });
    let out = Tensor::from_vec(out, (t, heads.query * heads.dim), &Device::Cpu)?;
    Ok((out, Tensor::from_vec(lse, (t, heads.query), &Device::Cpu)?))
}

/// The gradient of [`causal`] with respect to `qkv`, in the shape of `qkv`: from the arguments and results of the forward, and the
/// gradient `dout [T, query·dim]` of `out`. f32; on a GPU all but `lse` is bf16. Errors: shapes or sequences that do not fit.
pub fn causal_backward(
    qkv: &Tensor,
    out: &Tensor,
    lse: &Tensor,
    dout: &Tensor,
    sequences: &[Range<usize>],
    heads: Heads,
) -> Result<Tensor> {
    check(qkv, sequences, heads)?;
    let t = qkv.dim(0)?;
    let width = [t, heads.query * heads.dim];
    if out.dims() != width || dout.dims() != width || lse.dims() != [t, heads.query] {
        return Err(Error::internal(format!(
            "backward of attention with {heads:?}: qkv {:?}, out {:?}, dout {:?}, lse {:?}",
            qkv.shape(),
            out.shape(),
            dout.shape(),
            lse.shape()
        )));
    }
    #[cfg(feature = "cuda")]
    if qkv.device().is_cuda() {
        return cuda::causal_backward(qkv, out, lse, dout, sequences, heads);
    }
    const OP: &str = "causal-backward";
    let shape = qkv.shape();
    let (qkv, out, lse, dout) =
        (cpu::values(OP, qkv)?, cpu::values(OP, out)?, cpu::values(OP, lse)?, cpu::values(OP, dout)?);
    let mut dqkv = vec![0.0; qkv.len()];
    let to = SharedMut::new(&mut dqkv);
    for_each(sequences, heads, |rows, kv_head| {
        let head = KvHead { heads, qkv: &qkv, rows, kv_head };
        simd::run(CausalBackward { head, out: &out, lse: &lse, dout: &dout, dqkv: to });
    });
    Ok(Tensor::from_vec(dqkv, shape, &Device::Cpu)?)
}

fn check(qkv: &Tensor, sequences: &[Range<usize>], heads: Heads) -> Result<()> {
    let (t, width) = qkv.dims2()?;
    let mut end = 0;
    let follow = sequences.iter().all(|rows| {
        let follows = rows.start == end && rows.end > end;
        end = rows.end;
        follows
    });
    if !follow || end != t || width != heads.qkv_width() || heads.kv == 0 || !heads.query.is_multiple_of(heads.kv) {
        return Err(Error::internal(format!(
            "attention with {heads:?} of qkv {:?} in sequences {sequences:?}",
            qkv.shape()
        )));
    }
    Ok(())
}

/// Runs `task` for every sequence and key-value head. The longest run first, so that no thread is left alone with one at the end.
fn for_each(sequences: &[Range<usize>], heads: Heads, task: impl Fn(Range<usize>, usize) + Sync) {
    let mut order: Vec<&Range<usize>> = sequences.iter().collect();
    order.sort_by_key(|rows| std::cmp::Reverse(rows.len()));
    let work = order.iter().map(|rows| rows.len() * rows.len() * heads.query * heads.dim).sum();
    cpu::for_each(order.len() * heads.kv, work, |i| task(order[i / heads.kv].clone(), i % heads.kv));
}

/// One key-value head of one sequence.
struct KvHead<'a> {
    heads: Heads,
    qkv: &'a [f32],
    /// The sequence's rows.
    rows: Range<usize>,
    kv_head: usize,
}

impl KvHead<'_> {
    /// The query heads that attend to it.
    fn query_heads(&self) -> Range<usize> {
        let group = self.heads.query / self.heads.kv;
        self.kv_head * group..(self.kv_head + 1) * group
    }

    /// Column of its key in a row of qkv.
    fn key_column(&self) -> usize {
        (self.heads.query + self.kv_head) * self.heads.dim
    }

    /// Column of its value in a row of qkv.
    fn value_column(&self) -> usize {
        (self.heads.query + self.heads.kv + self.kv_head) * self.heads.dim
    }

    /// Columns `at..at + dim` of the sequence's rows of `x`, whose rows are `width` wide. In vectors, padded with zeros.
    fn rows(&self, x: &[f32], width: usize, at: usize) -> Vec<[f32; LANES]> {
        let vectors = self.heads.dim.div_ceil(LANES);
        let mut packed = vec![[0.0; LANES]; self.rows.len() * vectors];
        let x = x.chunks_exact(width).skip(self.rows.start);
        for (to, x) in packed.chunks_exact_mut(vectors).zip(x) {
            to.as_flattened_mut()[..self.heads.dim].copy_from_slice(&x[at..at + self.heads.dim]);
        }
        packed
    }

    /// Columns `at..at + dim` of the sequence's rows of qkv, transposed: `[dim][rows]`. In vectors, padded with zeros.
    fn columns(&self, at: usize) -> Vec<[f32; LANES]> {
        let vectors = self.rows.len().div_ceil(LANES);
        let mut packed = vec![[0.0; LANES]; self.heads.dim * vectors];
        let x = self.qkv.chunks_exact(self.heads.qkv_width()).skip(self.rows.start);
        for (i, x) in x.take(self.rows.len()).enumerate() {
            let to = packed.as_flattened_mut().iter_mut().skip(i).step_by(vectors * LANES);
            to.zip(&x[at..at + self.heads.dim]).for_each(|(to, x)| *to = *x);
        }
        packed
    }

    /// `to [rows, keys] = x · yᵀ` for the rows `x` of a tile, which are `width` apart. `y` are [`KvHead::columns`].
    fn scores(&self, tile: &Range<usize>, x: &[f32], width: usize, y: &[[f32; LANES]], to: &mut [[f32; LANES]]) {
        let stride = self.rows.len().div_ceil(LANES);
        let columns = tile.end.div_ceil(LANES);
        for to in to.chunks_exact_mut(stride).take(tile.len()) {
            to[..columns].fill([0.0; LANES]);
        }
        let (inner, a_strides) = (self.heads.dim, Strides { row: width, column: 1 });
        simd::run(TaskGemm {
            rows: tile.len(),
            inner,
            columns,
            a: x,
            a_strides,
            b: y,
            b_stride: stride,
            c: to,
            c_stride: stride,
        });
    }

    /// Writes rows of vectors to the columns `column..column + dim` of the gradient's rows from `first` on. Only this head's
    /// task writes these columns: those of its own key and value, and those of its query heads.
    fn write(&self, dqkv: SharedMut<f32>, first: usize, column: usize, from: &[[f32; LANES]]) {
        let (width, dim) = (self.heads.qkv_width(), self.heads.dim);
        for (i, from) in from.chunks_exact(dim.div_ceil(LANES)).enumerate() {
            // SAFETY: inside the gradient, at rows and columns of this task.
            let to = unsafe { dqkv.slice((first + i) * width + column, dim) };
            to.copy_from_slice(&from.as_flattened()[..dim]);
        }
    }
}

/// The forward of one [`KvHead`].
struct CausalForward<'a> {
    head: KvHead<'a>,
    out: SharedMut<f32>,
    lse: SharedMut<f32>,
}

impl SimdKernel for CausalForward<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Self { head: kv, out, lse } = self;
        let (Heads { query, dim, .. }, width) = (kv.heads, kv.heads.qkv_width());
        let (len, vectors, stride) = (kv.rows.len(), dim.div_ceil(LANES), kv.rows.len().div_ceil(LANES));
        let (k, v) = (kv.columns(kv.key_column()), kv.rows(kv.qkv, width, kv.value_column()));
        let scale = 1.0 / (dim as f32).sqrt();
        let mut scores = vec![[0.0; LANES]; TILE * stride];
        let mut sums = [0.0; TILE];
        for head in kv.query_heads() {
            for start in (0..len).step_by(TILE) {
                let tile = start..len.min(start + TILE);
                let first = kv.rows.start + start;
                kv.scores(&tile, &kv.qkv[first * width + head * dim..], width, &k, &mut scores);

                // The softmax of each row, not divided by its sum yet.
                for (i, scores) in scores.chunks_exact_mut(stride).take(tile.len()).enumerate() {
                    let scores = &mut scores[..tile.end.div_ceil(LANES)];
                    scores.as_flattened_mut()[start + i + 1..].fill(f32::NEG_INFINITY);
                    let mut max = L::splat(f32::NEG_INFINITY);
                    for s in &*scores {
                        max = max.max(L::load(s));
                    }
                    let max = max.max_lane();
                    let mut sum = L::splat(0.0);
                    for s in scores {
                        let p = L::load(s).sub(L::splat(max)).mul(L::splat(scale * LOG2_E)).exp2();
                        p.store(s);
                        sum = sum.add(p);
                    }
                    sums[i] = sum.sum();
                    // SAFETY: one head of one row; each belongs to one task.
                    let lse = unsafe { lse.slice((first + i) * query + head, 1) };
                    lse[0] = max * scale + sums[i].ln();
                }

                // The weighted sums of the values, divided by the sums of the weights.
                let mut acc = vec![[0.0; LANES]; tile.len() * vectors];
                simd::run(TaskGemm {
                    rows: tile.len(),
                    inner: tile.end,
                    columns: vectors,
                    a: scores.as_flattened(),
                    a_strides: Strides { row: stride * LANES, column: 1 },
                    b: &v,
                    b_stride: vectors,
                    c: &mut acc,
                    c_stride: vectors,
                });
                for (i, acc) in acc.chunks_exact(vectors).enumerate() {
                    // SAFETY: as above.
                    let out = unsafe { out.slice(((first + i) * query + head) * dim, dim) };
                    out.iter_mut().zip(acc.as_flattened()).for_each(|(out, acc)| *out = acc / sums[i]);
                }
            }
        }
    }
}

/// The gradient of one [`KvHead`] and of the query heads that attend to it.
struct CausalBackward<'a> {
    head: KvHead<'a>,
    out: &'a [f32],
    lse: &'a [f32],
    dout: &'a [f32],
    dqkv: SharedMut<f32>,
}

impl SimdKernel for CausalBackward<'_> {
    /// `p = exp(s - lse)` are the probabilities and `dp = dout · vᵀ` their gradients. Then `ds = p · (dp - rowsum(dout · out)) · scale`,
    /// `dq = ds · k`, `dk = dsᵀ · q`, `dv = pᵀ · dout`.
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Self { head: kv, out, lse, dout, dqkv } = self;
        let (Heads { query, dim, .. }, width) = (kv.heads, kv.heads.qkv_width());
        let (len, vectors, stride) = (kv.rows.len(), dim.div_ceil(LANES), kv.rows.len().div_ceil(LANES));
        let (k, v) = (kv.columns(kv.key_column()), kv.columns(kv.value_column()));
        let k_rows = kv.rows(kv.qkv, width, kv.key_column());
        let scale = 1.0 / (dim as f32).sqrt();
        let (mut p, mut ds) = (vec![[0.0; LANES]; TILE * stride], vec![[0.0; LANES]; TILE * stride]);
        let (mut dk, mut dv) = (vec![[0.0; LANES]; len * vectors], vec![[0.0; LANES]; len * vectors]);
        for head in kv.query_heads() {
            let (q, d) = (kv.rows(kv.qkv, width, head * dim), kv.rows(dout, query * dim, head * dim));
            for start in (0..len).step_by(TILE) {
                let tile = start..len.min(start + TILE);
                let first = kv.rows.start + start;

                // Scores and `dp`, from which `p` and `ds` are computed in place.
                kv.scores(&tile, &kv.qkv[first * width + head * dim..], width, &k, &mut p);
                kv.scores(&tile, &dout[(first * query + head) * dim..], query * dim, &v, &mut ds);
                let rows = p.chunks_exact_mut(stride).zip(ds.chunks_exact_mut(stride)).take(tile.len());
                for (i, (p, ds)) in rows.enumerate() {
                    let (p, ds) = (&mut p[..tile.end.div_ceil(LANES)], &mut ds[..tile.end.div_ceil(LANES)]);
                    p.as_flattened_mut()[start + i + 1..].fill(f32::NEG_INFINITY);
                    let at = (first + i) * query + head;
                    let dot = simd::dot::<L>(&out[at * dim..(at + 1) * dim], &dout[at * dim..(at + 1) * dim]);
                    let shift = L::splat(-lse[at] * LOG2_E);
                    for (p, ds) in p.iter_mut().zip(ds) {
                        let x = L::load(p).mul_add(L::splat(scale * LOG2_E), shift).exp2();
                        x.store(p);
                        x.mul(L::load(ds).sub(L::splat(dot))).mul(L::splat(scale)).store(ds);
                    }
                }

                // The tile's share of the gradients.
                let mut dq = vec![[0.0; LANES]; tile.len() * vectors];
                let (by_rows, by_columns) =
                    (Strides { row: stride * LANES, column: 1 }, Strides { row: 1, column: stride * LANES });
                let product = |rows, inner, a, a_strides, b, c| {
                    let (b_stride, c_stride) = (vectors, vectors);
                    TaskGemm { rows, inner, columns: vectors, a, a_strides, b, b_stride, c, c_stride }
                };
                let (d, q) = (&d[start * vectors..], &q[start * vectors..]);
                simd::run(product(tile.len(), tile.end, ds.as_flattened(), by_rows, &k_rows, &mut dq));
                simd::run(product(tile.end, tile.len(), ds.as_flattened(), by_columns, q, &mut dk));
                simd::run(product(tile.end, tile.len(), p.as_flattened(), by_columns, d, &mut dv));
                kv.write(dqkv, first, head * dim, &dq);
            }
        }
        kv.write(dqkv, kv.rows.start, kv.key_column(), &dk);
        kv.write(dqkv, kv.rows.start, kv.value_column(), &dv);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{BLOCK, append, attention, block_len};
    use super::*;
    use crate::ops::batch::Batch;
    use crate::ops::reference::{assert_close, dot, gradient, random};
    use crate::ops::rope::RopeTable;

    const LENGTHS: [usize; 7] = [1, 2, 17, 64, 65, 130, 1];

    fn sequences(lengths: &[usize]) -> Vec<Range<usize>> {
        let mut end = 0;
        let follow = lengths.iter().map(|len| {
            end += len;
            end - len..end
        });
        follow.collect()
    }

    fn tensor(x: &[f32], rows: usize) -> Tensor {
        Tensor::from_slice(x, (rows, x.len() / rows), &Device::Cpu).unwrap()
    }

    fn values(x: &Tensor) -> Vec<f32> {
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// Attention of one head of one sequence, `q`, `k` and `v` `[len, dim]`: output, and logarithms of the sums.
    fn reference(q: &[f64], k: &[f64], v: &[f64], dim: usize) -> (Vec<f64>, Vec<f64>) {
        let (mut out, mut lse) = (Vec::new(), Vec::new());
        for (i, q) in q.chunks_exact(dim).enumerate() {
            let score = |k: &[f64]| q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() / (dim as f64).sqrt();
            let scores: Vec<f64> = k.chunks_exact(dim).take(i + 1).map(score).collect();
            let max = scores.iter().fold(f64::NEG_INFINITY, |m, s| m.max(*s));
            let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
            lse.push(max + sum.ln());
            for d in 0..dim {
                let terms = scores.iter().zip(v.chunks_exact(dim)).map(|(s, v)| (s - max).exp() / sum * v[d]);
                out.push(terms.sum());
            }
        }
        (out, lse)
    }

    /// Head `head` of some rows of `x`, each of `heads` heads.
    fn head<T: Copy + Into<f64>>(x: &[T], rows: &Range<usize>, heads: usize, head: usize, dim: usize) -> Vec<f64> {
        let x = x.chunks_exact(heads * dim).skip(rows.start).take(rows.len());
        x.flat_map(|row| row[head * dim..(head + 1) * dim].iter().map(|&x| x.into())).collect()
    }

    #[test]
    fn matches_f64_and_the_gradient_finite_differences() {
        for (query, kv, dim) in [(1, 1, 8), (4, 2, 12), (3, 1, 64)] {
            let heads = Heads { query, kv, dim };
            let (all, t) = (query + 2 * kv, LENGTHS.iter().sum::<usize>());
            let sequences = sequences(&LENGTHS);
            let x: Vec<f32> = random(1, t * all * dim).iter().map(|x| x * 2.0).collect();
            let dy = random(2, t * query * dim);
            let qkv = tensor(&x, t);
            let (out, lse) = causal(&qkv, &sequences, heads).unwrap();
            let d = causal_backward(&qkv, &out, &lse, &tensor(&dy, t), &sequences, heads).unwrap();
            let (out, lse, d) = (values(&out), values(&lse), values(&d));
            for rows in &sequences {
                // One key-value head at a time: its query heads, its keys and its values.
                for kv_head in 0..kv {
                    let group = kv_head * query / kv..(kv_head + 1) * query / kv;
                    let mut own: Vec<usize> = group.clone().collect();
                    own.extend([query + kv_head, query + kv + kv_head]);
                    let part: Vec<f32> =
                        own.iter().flat_map(|&h| head(&x, rows, all, h, dim)).map(|x| x as f32).collect();
                    let attend = |part: &[f64]| -> Vec<(Vec<f64>, Vec<f64>)> {
                        let heads: Vec<&[f64]> = part.chunks_exact(rows.len() * dim).collect();
                        let (k, v) = (heads[heads.len() - 2], heads[heads.len() - 1]);
                        heads[..group.len()].iter().map(|q| reference(q, k, v, dim)).collect()
                    };
                    let exact: Vec<f64> = part.iter().map(|&x| x.into()).collect();
                    for (h, (expected, sums)) in group.clone().zip(attend(&exact)) {
                        let of = |x: &[f32], dim| -> Vec<f32> {
                            head(x, rows, query, h, dim).into_iter().map(|x| x as f32).collect()
                        };
                        assert_close(&of(&out, dim), &expected, 1e-5);
                        assert_close(&of(&lse, 1), &sums, 1e-5);
                    }
                    let dys: Vec<Vec<f32>> = group
                        .clone()
                        .map(|h| head(&dy, rows, query, h, dim).into_iter().map(|x| x as f32).collect())
                        .collect();
                    let loss = |part: &[f64]| attend(part).iter().zip(&dys).map(|((out, _), dy)| dot(out, dy)).sum();
                    let got: Vec<f32> =
                        own.iter().flat_map(|&h| head(&d, rows, all, h, dim)).map(|x| x as f32).collect();
                    // About 80 of the values, each with two passes in f64.
                    let at: Vec<usize> = (0..part.len()).step_by((part.len() / 80).max(1) | 1).collect();
                    let expected = gradient(&part, at.iter().copied(), loss);
                    // A single value may be much smaller than the others.
                    let scale = got.iter().fold(0f32, |m, d| m.max(d.abs())).max(1e-3);
                    for (i, expected) in at.into_iter().zip(expected) {
                        let error = (f64::from(got[i]) - expected).abs();
                        assert!(error < 1e-5 * f64::from(scale), "{} instead of {expected} at {i} of {rows:?}", got[i]);
                    }
                }
            }
        }
    }

    #[test]
    fn bits_do_not_depend_on_neighbours() {
        let heads = Heads { query: 4, kv: 2, dim: 20 };
        let t = LENGTHS.iter().sum::<usize>();
        let (x, dy) = (random(3, t * heads.qkv_width()), random(4, t * heads.query * heads.dim));
        let run = |rows: &Range<usize>, sequences: &[Range<usize>]| {
            let of = |x: &[f32]| tensor(&x[rows.start * x.len() / t..rows.end * x.len() / t], rows.len());
            let (out, lse) = causal(&of(&x), sequences, heads).unwrap();
            let d = causal_backward(&of(&x), &out, &lse, &of(&dy), sequences, heads).unwrap();
            [values(&out), values(&lse), values(&d)]
        };
        let all = run(&(0..t), &sequences(&LENGTHS));
        for rows in sequences(&LENGTHS) {
            let alone = run(&rows, std::slice::from_ref(&(0..rows.len())));
            for (all, alone) in all.iter().zip(alone) {
                assert_eq!(all[rows.start * all.len() / t..rows.end * all.len() / t], alone);
            }
        }
    }

    #[test]
    fn agrees_with_serving() {
        let heads = Heads { query: 6, kv: 2, dim: 20 };
        let len = 150;
        let x = random(5, len * heads.qkv_width());
        let qkv = tensor(&x, len);
        let blocks: Vec<u32> = (0..len.div_ceil(BLOCK) as u32).collect();
        let mut batch = Batch::default();
        batch.push(&vec![0; len], 0, &blocks, BLOCK, &[]);
        let shape = (blocks.len(), block_len(heads, &Device::Cpu));
        let cache = Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu).unwrap();
        let table = RopeTable::new(&vec![0.1; heads.dim / 2], len, &Device::Cpu).unwrap();
        append(&cache, &qkv, &batch, &table, heads).unwrap();
        let served = values(&attention(&qkv, &cache, &batch, heads).unwrap());
        let (out, _) = causal(&qkv, std::slice::from_ref(&(0..len)), heads).unwrap();
        assert_close(&values(&out), &served.iter().map(|&x| x.into()).collect::<Vec<_>>(), 1e-5);
    }

    #[test]
    fn refuses_sequences_that_do_not_cover_the_rows() {
        let heads = Heads { query: 2, kv: 1, dim: 4 };
        let qkv = Tensor::zeros((6, heads.qkv_width()), candle_core::DType::F32, &Device::Cpu).unwrap();
        assert!(causal(&qkv, &[0..2, 2..6], heads).is_ok());
        for wrong in [vec![0..2, 2..5], vec![0..2, 3..6], vec![0..4, 2..6], vec![0..0, 0..6], vec![0..3, 3..7], vec![]]
        {
            assert!(causal(&qkv, &wrong, heads).is_err(), "{wrong:?}");
        }
        assert!(causal(&qkv, std::slice::from_ref(&(0..6)), Heads { query: 1, kv: 0, dim: 16 }).is_err());
        let (out, lse) = causal(&qkv, std::slice::from_ref(&(0..6)), heads).unwrap();
        assert!(causal_backward(&qkv, &out, &lse, &lse, std::slice::from_ref(&(0..6)), heads).is_err());
    }
}
