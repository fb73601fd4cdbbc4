//! Causal attention with grouped queries over a paged KV cache: [`append`] writes a step's keys and values, [`attention`] attends.
//!
//! Online softmax (Milakov and Gimelshein, 2018), tiled as in FlashAttention (Dao et al., 2022), over tiles of 64 keys at fixed
//! absolute positions. A row sees the same tiles, and adds in the same order, in a prompt chunk and in a decode step. Its bits
//! therefore do not depend on how its prompt was cut.
//!
//! A task is one key-value head and a tile of query rows: consecutive positions times the query heads of the group. Its rows share
//! each load of keys and values.
//!
//! This file is the CPU half. On a GPU, activations and cache are bf16, and decode rows take another path than prefill rows: see
//! `kernels/attention.cu`. Training attends without a cache: see [`causal()`].

use std::f32::consts::LOG2_E;
use std::ops::Range;

use candle_core::{CpuStorage, CustomOp2, Device, InplaceOp2, Layout, Shape, Tensor};

use super::batch::{Batch, Span};
use super::cpu;
use super::pool::SharedMut;
use super::rope::{self, RopeTable};
use super::simd::{self, LANES, Lanes, SimdKernel};
use crate::arch::Heads;
use crate::gpu::constants::KV_BLOCK;
use crate::{Error, Result};

mod causal;
#[cfg(feature = "cuda")]
mod cuda;
pub use causal::{causal, causal_backward};
#[cfg(feature = "cuda")]
pub use cuda::{decode_words, decode_work, prefill_words, prefill_work};

/// Tokens of a KV block.
pub const BLOCK: usize = KV_BLOCK;
const _: () = assert!(BLOCK == LANES, "on the CPU, a vector holds one dimension of a block's keys");
/// KV blocks of a key tile, which one step of the online softmax covers.
const TILE_BLOCKS: usize = 4;
/// Keys of a key tile.
const TILE: usize = TILE_BLOCKS * BLOCK;
/// Approximate query rows of a task: enough to reuse a tile of keys and values from the first-level cache.
const QUERY_ROWS: usize = 48;

/// The number of values in a KV block of one layer on a device.
///
/// On the CPU, a block holds the keys of each key-value head, `[head_dim][16 tokens]`, so that a vector holds one dimension of 16
/// keys; then the values of each head, `[16 tokens][head_dim rounded up to 16]`. On a GPU both are `[16 tokens][head_dim]`.
pub fn block_len(heads: Heads, device: &Device) -> usize {
    let value_dim = if device.is_cuda() { heads.dim } else { value_dim(heads) };
    heads.kv * BLOCK * (heads.dim + value_dim)
}

/// Width of a head's values in the CPU's cache.
fn value_dim(heads: Heads) -> usize {
    heads.dim.next_multiple_of(LANES)
}

/// Where the keys of a head lie in the CPU's cache.
fn key_range(heads: Heads, block: usize, head: usize) -> Range<usize> {
    let start = block * block_len(heads, &Device::Cpu) + head * BLOCK * heads.dim;
    start..start + BLOCK * heads.dim
}

/// Where the values of a head lie in the CPU's cache.
fn value_range(heads: Heads, block: usize, head: usize) -> Range<usize> {
    let value_dim = value_dim(heads);
    let start = block * block_len(heads, &Device::Cpu) + BLOCK * (heads.kv * heads.dim + head * value_dim);
    start..start + BLOCK * value_dim
}

/// Applies RoPE to the queries and keys of `qkv [T, (query + 2·kv)·dim]` in place, and writes keys and values to
/// `cache [blocks, block_len]` at the batch's slot mapping. f32; on a GPU bf16, where padding rows of a captured step write nothing.
/// Errors: shapes that do not fit, a slot outside the cache, a position outside the table.
pub fn append(cache: &Tensor, qkv: &Tensor, batch: &Batch, table: &RopeTable, heads: Heads) -> Result<()> {
    check(cache, qkv, batch, heads)?;
    let slots = &batch.slot_mapping;
    let room = cache.dim(0)? * BLOCK;
    if let Some(slot) = slots.iter().find(|&&slot| slot as usize >= room) {
        return Err(Error::internal(format!("slot {slot} is outside the KV cache of {room} slots")));
    }
    if slots.len() != batch.positions.len() {
        return Err(Error::internal(format!("{} KV cache slots for {} positions", slots.len(), batch.positions.len())));
    }
    #[cfg(feature = "cuda")]
    if qkv.device().is_cuda() {
        return cuda::append(cache, qkv, batch, table, heads);
    }
    rope::apply_rope(qkv, heads.query + heads.kv, &batch.positions, table)?;
    Ok(cache.inplace_op2(qkv, &Append { slots, heads })?)
}

/// Attends each row of `qkv [T, (query + 2·kv)·dim]` to its sequence's keys up to its own position. Scores are divided by
/// `sqrt(dim)`. Returns `[T, query·dim]`; rows outside the spans are zero. f32; on a GPU bf16. [`append`] must have written this
/// step's keys and values. For a sequence with one row, all KV blocks but the last must be older than this step. Errors: a span
/// that does not fit the batch or the cache; on a GPU also rows between spans that belong to none.
pub fn attention(qkv: &Tensor, cache: &Tensor, batch: &Batch, heads: Heads) -> Result<Tensor> {
    check(cache, qkv, batch, heads)?;
    let (rows, blocks) = (qkv.dim(0)?, cache.dim(0)?);
    let mut end = 0;
    for span in &batch.spans {
        let table = batch.block_tables.get(span.table.clone());
        if span.rows.start < end || span.rows.end > rows || span.context_len < span.rows.len() {
            return Err(Error::internal(format!(
                "{span:?} in a batch of {rows} rows, after a span that ends at row {end}"
            )));
        }
        if table.is_none_or(|t| t.len() * BLOCK < span.context_len || t.iter().any(|&b| b as usize >= blocks)) {
            return Err(Error::internal(format!(
                "{span:?} with the block table {table:?} in a cache of {blocks} blocks"
            )));
        }
        end = span.rows.end;
    }
    #[cfg(feature = "cuda")]
    if qkv.device().is_cuda() {
        return cuda::attention(qkv, cache, batch, heads);
    }
    let (spans, block_tables) = (&batch.spans, &batch.block_tables);
    Ok(qkv.apply_op2_no_bwd(cache, &Attention { spans, block_tables, heads })?)
}

fn check(cache: &Tensor, qkv: &Tensor, batch: &Batch, heads: Heads) -> Result<()> {
    if qkv.dims() != [batch.rows(), heads.qkv_width()] || cache.dims().get(1) != Some(&block_len(heads, cache.device()))
    {
        return Err(Error::internal(format!(
            "qkv {:?} for {} rows, cache {:?}, {heads:?}",
            qkv.shape(),
            batch.rows(),
            cache.shape()
        )));
    }
    Ok(())
}

/// Writes keys and values to the cache.
struct Append<'a> {
    slots: &'a [u32],
    heads: Heads,
}

impl InplaceOp2 for Append<'_> {
    fn name(&self) -> &'static str {
        "kv-append"
    }

    fn cpu_fwd(&self, s1: &mut CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> candle_core::Result<()> {
        let heads = self.heads;
        let cache = cpu::slice_mut("kv-append", s1, l1)?;
        let qkv = cpu::slice("kv-append", s2, l2)?;
        // Scattered writes are limited by memory, so one thread is as fast as many.
        for (row, &slot) in qkv.chunks_exact(heads.qkv_width()).zip(self.slots) {
            let (block, offset) = (slot as usize / BLOCK, slot as usize % BLOCK);
            let (k, v) = row[heads.query * heads.dim..].split_at(heads.kv * heads.dim);
            for head in 0..heads.kv {
                let from = head * heads.dim..(head + 1) * heads.dim;
                let keys = cache[key_range(heads, block, head)].chunks_exact_mut(BLOCK);
                keys.zip(&k[from.clone()]).for_each(|(keys, &k)| keys[offset] = k);
                let values = &mut cache[value_range(heads, block, head)][offset * value_dim(heads)..];
                values[..heads.dim].copy_from_slice(&v[from]);
            }
        }
        Ok(())
    }
}

struct Attention<'a> {
    spans: &'a [Span],
    block_tables: &'a [u32],
    heads: Heads,
}

impl CustomOp2 for Attention<'_> {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let heads = self.heads;
        let (qkv, cache) = (cpu::slice("attention", s1, l1)?, cpu::slice("attention", s2, l2)?);
        let rows = l1.shape().dims2()?.0;
        let group = heads.query / heads.kv;
        let step = (QUERY_ROWS / group).max(1);

        let mut tasks = Vec::new();
        let mut multiply_adds = 0;
        for span in self.spans {
            let table = &self.block_tables[span.table.clone()];
            multiply_adds += span.rows.len() * span.context_len * heads.query * heads.dim;
            for first in span.rows.clone().step_by(step) {
                let rows = first..(first + step).min(span.rows.end);
                let position = span.context_len - (span.rows.end - first);
                tasks.extend((0..heads.kv).map(|kv_head| QueryTile { rows: rows.clone(), position, kv_head, table }));
            }
        }
        // Longest first, so that no thread is left alone with a long task at the end.
        tasks.sort_by_key(|task| std::cmp::Reverse(task.rows.len() * (task.position + task.rows.len())));

        let mut out = vec![0.0; rows * heads.query * heads.dim];
        let shared = SharedMut::new(&mut out);
        cpu::for_each(tasks.len(), multiply_adds, |task| {
            simd::run(AttendTile { heads, qkv, cache, tile: &tasks[task], out: shared });
        });
        Ok((CpuStorage::F32(out), (rows, heads.query * heads.dim).into()))
    }
}

/// Consecutive positions of one sequence, under one key-value head.
struct QueryTile<'a> {
    /// Rows of the batch.
    rows: Range<usize>,
    /// Position of the first row.
    position: usize,
    kv_head: usize,
    /// The sequence's blocks.
    table: &'a [u32],
}

/// Attends one [`QueryTile`]. Its query rows are numbered from 0: position by position, and head by head within a position.
struct AttendTile<'a> {
    heads: Heads,
    qkv: &'a [f32],
    cache: &'a [f32],
    tile: &'a QueryTile<'a>,
    out: SharedMut<f32>,
}

impl SimdKernel for AttendTile<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Self { heads, qkv, cache, tile, out } = self;
        let (dim, value_dim) = (heads.dim, value_dim(heads));
        let group = heads.query / heads.kv;
        let rows = tile.rows.len() * group;
        let position = |row: usize| tile.position + row / group;

        let q = pack_queries::<L>(heads, qkv, tile);
        let mut scores = vec![[0.0; TILE]; rows];
        let mut sums = vec![[0.0; LANES]; rows];
        let mut acc = vec![[0.0; LANES]; rows * value_dim / LANES];
        // The maximum of each row so far, and the factor of its earlier sums at the current key tile. Padded to whole vectors.
        let mut maxima = vec![f32::NEG_INFINITY; rows.next_multiple_of(LANES)];
        let mut decay = vec![0.0; rows.next_multiple_of(LANES)];

        let keys = position(rows - 1) + 1;
        for first_key in (0..keys).step_by(TILE) {
            // The last tile may have fewer blocks. The last block takes the place of the missing ones, and is masked.
            let block: [usize; TILE_BLOCKS] =
                std::array::from_fn(|b| tile.table[(first_key / BLOCK + b).min((keys - 1) / BLOCK)] as usize);
            // Keys of this tile that a row sees. Rows before `first_row` see none and are skipped.
            let visible = |row: usize| (position(row) + 1).saturating_sub(first_key).min(TILE);
            let first_row = first_key.saturating_sub(tile.position) * group;

            // Scores of queries and keys, as logarithms to base 2.
            let k = block.map(|b| cache[key_range(heads, b, tile.kv_head)].as_chunks::<LANES>().0);
            for start in (first_row / L::ROWS * L::ROWS..rows).step_by(L::ROWS) {
                let end = (start + L::ROWS).min(rows);
                score::<L>(&q[start * dim..end * dim], k, &mut scores[start..end]);
            }

            // New maxima, and how much earlier sums shrink.
            for row in first_row..rows {
                scores[row][visible(row)..].fill(f32::NEG_INFINITY);
                let s = vectors::<L>(&scores[row]);
                let max = s[0].max(s[1]).max(s[2].max(s[3])).max_lane();
                let max = if max > maxima[row] { max } else { maxima[row] };
                decay[row] = maxima[row] - max;
                maxima[row] = max;
            }
            for decay in decay.as_chunks_mut::<LANES>().0 {
                L::load(decay).exp2().store(decay);
            }
            // Probabilities up to the row's sum, and their sums.
            for row in first_row..rows {
                let max = L::splat(maxima[row]);
                let mut p = vectors::<L>(&scores[row]);
                for (p, to) in p.iter_mut().zip(scores[row].as_chunks_mut::<LANES>().0) {
                    *p = p.sub(max).exp2();
                    p.store(to);
                }
                let sum = p[0].add(p[1]).add(p[2].add(p[3]));
                L::load(&sums[row]).mul_add(L::splat(decay[row]), sum).store(&mut sums[row]);
            }

            // Weighted sums of values.
            let v = block.map(|b| cache[value_range(heads, b, tile.kv_head)].as_chunks::<LANES>().0);
            for start in (first_row..rows).step_by(L::ROWS) {
                let end = (start + L::ROWS).min(rows);
                let acc = &mut acc[start * value_dim / LANES..end * value_dim / LANES];
                accumulate::<L>(&scores[start..end], &decay[start..end], v, visible(end - 1), acc);
            }
        }

        // Divide by the sums and write the output.
        for row in 0..rows {
            let head = tile.kv_head * group + row % group;
            let start = (tile.rows.start + row / group) * heads.query * dim + head * dim;
            // SAFETY: one head of one row of the output; each belongs to one task.
            let out = unsafe { out.slice(start, dim) };
            let sum = L::load(&sums[row]).sum();
            let acc = acc[row * value_dim / LANES..].as_flattened();
            out.iter_mut().zip(acc).for_each(|(out, acc)| *out = acc / sum);
        }
    }
}

/// The query rows in sets of `L::ROWS`, the last of which may be smaller. A set is `[dim][rows of the set]`. Queries are scaled so
/// that scores become logarithms to base 2.
#[inline(always)]
fn pack_queries<L: Lanes>(heads: Heads, qkv: &[f32], tile: &QueryTile) -> Vec<f32> {
    let group = heads.query / heads.kv;
    let rows = tile.rows.len() * group;
    let scale = LOG2_E / (heads.dim as f32).sqrt();
    let mut packed = vec![0.0; rows * heads.dim];
    for row in 0..rows {
        let set = row / L::ROWS * L::ROWS;
        let width = L::ROWS.min(rows - set);
        let start =
            (tile.rows.start + row / group) * heads.qkv_width() + (tile.kv_head * group + row % group) * heads.dim;
        let to = packed[set * heads.dim + row - set..].iter_mut().step_by(width);
        to.zip(&qkv[start..start + heads.dim]).for_each(|(to, q)| *to = q * scale);
    }
    packed
}

#[inline(always)]
fn vectors<L: Lanes>(x: &[f32; TILE]) -> [L; TILE_BLOCKS] {
    let mut v = [L::splat(0.0); TILE_BLOCKS];
    for (v, x) in v.iter_mut().zip(x.as_chunks::<LANES>().0) {
        *v = L::load(x);
    }
    v
}

/// Scores of up to four query rows, packed by [`pack_queries`], with the keys of a tile.
#[inline(always)]
fn score<L: Lanes>(q: &[f32], k: [&[[f32; LANES]]; TILE_BLOCKS], to: &mut [[f32; TILE]]) {
    match to.len() {
        1 => score_rows::<L, 1>(q, k, to),
        2 => score_rows::<L, 2>(q, k, to),
        3 => score_rows::<L, 3>(q, k, to),
        _ => score_rows::<L, 4>(q, k, to),
    }
}

#[inline(always)]
fn score_rows<L: Lanes, const R: usize>(q: &[f32], k: [&[[f32; LANES]]; TILE_BLOCKS], to: &mut [[f32; TILE]]) {
    let mut acc = [[L::splat(0.0); TILE_BLOCKS]; R];
    let (q, _) = q.as_chunks::<R>();
    let k = k.map(|k| &k[..q.len()]);
    for d in 0..q.len() {
        let k = [L::load(&k[0][d]), L::load(&k[1][d]), L::load(&k[2][d]), L::load(&k[3][d])];
        for r in 0..R {
            let q = L::splat(q[d][r]);
            for b in 0..TILE_BLOCKS {
                acc[r][b] = q.mul_add(k[b], acc[r][b]);
            }
        }
    }
    for (to, acc) in to.iter_mut().zip(acc) {
        for (to, acc) in to.as_chunks_mut::<LANES>().0.iter_mut().zip(acc) {
            acc.store(to);
        }
    }
}

/// `acc = acc · decay + p · V` over the first `keys` keys of a tile, for up to four rows.
#[inline(always)]
fn accumulate<L: Lanes>(
    p: &[[f32; TILE]],
    decay: &[f32],
    v: [&[[f32; LANES]]; TILE_BLOCKS],
    keys: usize,
    acc: &mut [[f32; LANES]],
) {
    match p.len() {
        1 => accumulate_rows::<L, 1>(p, decay, v, keys, acc),
        2 => accumulate_rows::<L, 2>(p, decay, v, keys, acc),
        3 => accumulate_rows::<L, 3>(p, decay, v, keys, acc),
        _ => accumulate_rows::<L, 4>(p, decay, v, keys, acc),
    }
}

#[inline(always)]
fn accumulate_rows<L: Lanes, const R: usize>(
    p: &[[f32; TILE]],
    decay: &[f32],
    v: [&[[f32; LANES]]; TILE_BLOCKS],
    keys: usize,
    acc: &mut [[f32; LANES]],
) {
    let width = acc.len() / R;
    let mut column = 0;
    while column + 4 <= width {
        accumulate_columns::<L, R, 4>(p, decay, v, keys, acc, column);
        column += 4;
    }
    while column < width {
        accumulate_columns::<L, R, 1>(p, decay, v, keys, acc, column);
        column += 1;
    }
}

/// [`accumulate`] for `C` vectors of the head's width from `column` on.
#[inline(always)]
fn accumulate_columns<L: Lanes, const R: usize, const C: usize>(
    p: &[[f32; TILE]],
    decay: &[f32],
    v: [&[[f32; LANES]]; TILE_BLOCKS],
    keys: usize,
    acc: &mut [[f32; LANES]],
    column: usize,
) {
    let width = acc.len() / R;
    let p: [&[f32; TILE]; R] = std::array::from_fn(|r| &p[r]);
    let mut sum = [[L::splat(0.0); C]; R];
    for r in 0..R {
        for c in 0..C {
            sum[r][c] = L::load(&acc[r * width + column + c]).mul(L::splat(decay[r]));
        }
    }
    for b in 0..keys.div_ceil(BLOCK) {
        for i in 0..BLOCK.min(keys - b * BLOCK) {
            let row = &v[b][i * width + column..][..C];
            let mut v = [L::splat(0.0); C];
            for c in 0..C {
                v[c] = L::load(&row[c]);
            }
            for r in 0..R {
                let p = L::splat(p[r][b * BLOCK + i]);
                for c in 0..C {
                    sum[r][c] = p.mul_add(v[c], sum[r][c]);
                }
            }
        }
    }
    for r in 0..R {
        for c in 0..C {
            sum[r][c].store(&mut acc[r * width + column + c]);
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::ops::reference::{assert_close, random};

    /// A sequence with random queries, keys and values at each position, and its KV blocks.
    struct TestSequence {
        heads: Heads,
        qkv: Vec<f32>,
        table: Vec<u32>,
    }

    impl TestSequence {
        fn new(seed: u64, len: usize, heads: Heads, table: Vec<u32>) -> Self {
            let qkv = random(seed, len * heads.qkv_width()).iter().map(|x| x * 3.0).collect();
            Self { heads, qkv, table }
        }

        fn rows(&self, positions: Range<usize>) -> &[f32] {
            let width = self.heads.qkv_width();
            &self.qkv[positions.start * width..positions.end * width]
        }

        /// Attention of every position, in f64.
        fn reference(&self) -> Vec<f64> {
            let Heads { query, kv, dim } = self.heads;
            let width = self.heads.qkv_width();
            let at = |position: usize, head: usize, d: usize| f64::from(self.qkv[position * width + head * dim + d]);
            let mut out = Vec::new();
            for position in 0..self.qkv.len() / width {
                for head in 0..query {
                    let kv_head = head / (query / kv);
                    let score = |key: usize| {
                        let dot: f64 = (0..dim).map(|d| at(position, head, d) * at(key, query + kv_head, d)).sum();
                        dot / (dim as f64).sqrt()
                    };
                    let scores: Vec<f64> = (0..=position).map(score).collect();
                    let max = scores.iter().fold(f64::NEG_INFINITY, |m, s| m.max(*s));
                    let p: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
                    let sum: f64 = p.iter().sum();
                    for d in 0..dim {
                        let value = |key: usize| at(key, query + kv + kv_head, d);
                        out.push(p.iter().enumerate().map(|(key, p)| p * value(key)).sum::<f64>() / sum);
                    }
                }
            }
            out
        }
    }

    /// A cache whose blocks hold stale values of other sequences.
    fn stale_cache(blocks: usize, heads: Heads) -> Tensor {
        let stale = Tensor::full(f32::NAN, (blocks, block_len(heads, &Device::Cpu)), &Device::Cpu).unwrap();
        stale.contiguous().unwrap()
    }

    /// A table without rotation.
    fn no_rotation(heads: Heads) -> RopeTable {
        RopeTable::new(&vec![0.0; heads.dim / 2], 1000, &Device::Cpu).unwrap()
    }

    /// Runs ranges of positions of several sequences as one batch.
    fn step(cache: &Tensor, parts: &[(&TestSequence, Range<usize>)]) -> Vec<Vec<f32>> {
        let heads = parts[0].0.heads;
        let (mut qkv, mut batch) = (vec![], Batch::default());
        for (sequence, positions) in parts {
            qkv.extend_from_slice(sequence.rows(positions.clone()));
            batch.push(&vec![0; positions.len()], positions.start, &sequence.table, BLOCK, &[]);
        }
        let qkv = Tensor::from_vec(qkv, (batch.rows(), heads.qkv_width()), &Device::Cpu).unwrap();
        append(cache, &qkv, &batch, &no_rotation(heads), heads).unwrap();
        let out = attention(&qkv, cache, &batch, heads).unwrap().to_vec2::<f32>().unwrap();
        batch.spans.iter().map(|span| out[span.rows.clone()].concat()).collect()
    }

    #[test]
    fn matches_f64_on_odd_shapes() {
        let shapes = [(1, 1, 4), (3, 1, 12), (4, 1, 80), (7, 1, 16), (9, 3, 64), (8, 2, 128), (14, 2, 2)];
        for (query, kv, dim) in shapes {
            let heads = Heads { query, kv, dim };
            for len in [1, 2, 15, 16, 17, 63, 64, 65, 130, 200] {
                let table = (0..13).rev().collect();
                let sequence = TestSequence::new(len as u64, len, heads, table);
                let cache = Tensor::zeros((13, block_len(heads, &Device::Cpu)), DType::F32, &Device::Cpu).unwrap();
                let out = step(&cache, &[(&sequence, 0..len)]);
                assert_close(&out[0], &sequence.reference(), 1e-5);
            }
        }
    }

    #[test]
    fn bits_do_not_depend_on_chunks_or_neighbours() {
        let heads = Heads { query: 6, kv: 2, dim: 20 };
        let len = 150;
        let a = TestSequence::new(1, len, heads, (0..10).map(|b| b * 2).collect());
        let b = TestSequence::new(2, 90, heads, (0..10).map(|b| b * 2 + 1).collect());
        let fresh = || Tensor::zeros((20, block_len(heads, &Device::Cpu)), DType::F32, &Device::Cpu).unwrap();
        let whole = step(&fresh(), &[(&a, 0..len)]).concat();
        for chunk in [1, 3, 7, 16, 61] {
            let cache = fresh();
            let steps = (0..len).step_by(chunk).map(|start| start..(start + chunk).min(len));
            let out: Vec<f32> = steps.flat_map(|part| step(&cache, &[(&a, part)]).concat()).collect();
            assert_eq!(whole, out, "chunks of {chunk}");
        }
        let cache = fresh();
        let mut out = step(&cache, &[(&b, 0..70), (&a, 0..70)])[1].clone();
        out.extend(step(&cache, &[(&a, 70..149), (&b, 70..71)])[0].clone());
        out.extend(step(&cache, &[(&b, 71..72), (&a, 149..150)])[1].clone());
        assert_eq!(whole, out);
    }

    #[test]
    fn stale_values_in_a_block_are_masked() {
        let heads = Heads { query: 3, kv: 1, dim: 16 };
        let sequence = TestSequence::new(1, 70, heads, vec![3, 0, 4, 1, 2]);
        let clean = Tensor::zeros((5, block_len(heads, &Device::Cpu)), DType::F32, &Device::Cpu).unwrap();
        let whole = step(&clean, &[(&sequence, 0..70)]);
        assert_eq!(whole, step(&stale_cache(5, heads), &[(&sequence, 0..70)]));
    }

    #[test]
    fn refuses_tables_that_do_not_hold_the_context() {
        let heads = Heads { query: 2, kv: 1, dim: 4 };
        let cache = Tensor::zeros((2, block_len(heads, &Device::Cpu)), DType::F32, &Device::Cpu).unwrap();
        let qkv = Tensor::zeros((1, heads.qkv_width()), DType::F32, &Device::Cpu).unwrap();
        let attend = |context_len, table, block_tables: &[u32]| {
            let spans = vec![Span { rows: 0..1, context_len, table }];
            let batch = Batch { tokens: vec![0], spans, block_tables: block_tables.to_vec(), ..Batch::default() };
            attention(&qkv, &cache, &batch, heads)
        };
        assert!(attend(17, 0..2, &[0, 1]).is_ok());
        assert!(attend(17, 0..1, &[0, 1]).is_err());
        assert!(attend(1, 0..1, &[2]).is_err());
        assert!(attend(0, 0..0, &[]).is_err());
        let past = Batch { tokens: vec![0], positions: vec![0], slot_mapping: vec![32], ..Batch::default() };
        assert!(append(&cache, &qkv, &past, &no_rotation(heads), heads).is_err());
    }
}
