//! Append with RoPE and paged attention on a GPU: against the CPU half and f64, and against themselves in other batches.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use half::bf16;
use quiver::arch::Heads;
use quiver::engine::cuda::{Bucket, StepBuffers};
use quiver::lora::slots::SlotPool;
use quiver::ops::attention::{
    BLOCK, append, attention, block_len, decode_words, decode_work, prefill_words, prefill_work,
};
use quiver::ops::batch::Batch;
use quiver::ops::batch::Capacity;
use quiver::ops::rope::RopeTable;

use crate::common::{device, random, relative_error};

/// Relative error of attention: the output and, on tensor cores, the probabilities are rounded to bf16, each an error of about
/// 2^-9 / sqrt(3) of the values, independent of one another.
const TOLERANCE: f64 = 4e-3;

const CONTEXTS: [usize; 10] = [1, 15, 16, 17, 63, 64, 65, 500, 1030, 4100];

/// A sequence with the rotated queries, keys and values of each position, and its KV blocks.
struct Sequence {
    heads: Heads,
    qkv: Vec<bf16>,
    table: Vec<u32>,
}

impl Sequence {
    fn rows(&self, positions: Range<usize>) -> &[bf16] {
        let width = self.heads.qkv_width();
        &self.qkv[positions.start * width..positions.end * width]
    }

    fn len(&self) -> usize {
        self.qkv.len() / self.heads.qkv_width()
    }

    /// Attention of one position, in f64.
    fn reference(&self, position: usize) -> Vec<f64> {
        let Heads { query, kv, dim } = self.heads;
        let part = |position: usize, head: usize| &self.rows(position..position + 1)[head * dim..(head + 1) * dim];
        let mut out = Vec::new();
        for head in 0..query {
            let kv_head = head / (query / kv);
            let q = part(position, head);
            let dot = |k: &[bf16]| -> f64 { q.iter().zip(k).map(|(q, k)| q.to_f64() * k.to_f64()).sum() };
            let score = |key| dot(part(key, query + kv_head)) / (dim as f64).sqrt();
            let scores: Vec<f64> = (0..=position).map(score).collect();
            let max = scores.iter().fold(f64::NEG_INFINITY, |m, s| m.max(*s));
            let (mut sum, mut values) = (0.0, vec![0.0; dim]);
            for (key, score) in scores.iter().enumerate() {
                let p = (score - max).exp();
                sum += p;
                let v = part(key, query + kv + kv_head);
                values.iter_mut().zip(v).for_each(|(o, v)| *o += p * v.to_f64());
            }
            out.extend(values.iter().map(|o| o / sum));
        }
        out
    }
}

/// Sequences of these lengths with interleaved KV blocks, and the number of blocks.
fn sequences(heads: Heads, lens: &[usize]) -> (Vec<Sequence>, usize) {
    let blocks: usize = lens.iter().map(|len| len.div_ceil(BLOCK)).sum();
    // The stride has no factor in common with any of the counts, so that it reaches all blocks.
    let mut ids = (0..blocks).map(|i| (i * 7919 % blocks) as u32);
    let sequence = |(seed, &len): (usize, &usize)| Sequence {
        heads,
        // Scores with a deviation of 3: some keys matter much more than others.
        qkv: random(seed as u64 + 1, len * heads.qkv_width())
            .iter()
            .map(|x| bf16::from_f32(x.to_f32() * 3.0))
            .collect(),
        table: ids.by_ref().take(len.div_ceil(BLOCK)).collect(),
    };
    (lens.iter().enumerate().map(sequence).collect(), blocks)
}

/// Positions of a sequence that a batch runs.
type Part<'a> = (&'a Sequence, Range<usize>);

/// A KV cache on the GPU, full of NaN, and the buffers to run steps on it.
struct Gpu {
    heads: Heads,
    cache: Tensor,
    still: RopeTable,
    buffers: StepBuffers,
}

impl Gpu {
    fn new(heads: Heads, blocks: usize) -> Self {
        let device = device();
        let shape = (blocks, block_len(heads, &device));
        let cache = Tensor::from_vec(vec![bf16::NAN; shape.0 * shape.1], shape, &device).unwrap();
        // Rotates by zero.
        let still = RopeTable::new(&vec![0.0; heads.dim / 2], 5000, &device).unwrap();
        let capacity = Capacity { rows: 6000, spans: 64, block_table_len: 1000 };
        let buffers = StepBuffers::new(device.as_cuda_device().unwrap(), capacity).unwrap();
        Self { heads, cache, still, buffers }
    }

    /// The parts as a batch on the GPU, padded to `rows`, with its rows of qkv; padding rows are NaN.
    fn batch(&mut self, parts: &[Part], rows: Option<usize>) -> (Batch, Tensor) {
        let (mut batch, mut qkv) = (Batch::default(), Vec::new());
        for (sequence, positions) in parts {
            qkv.extend_from_slice(sequence.rows(positions.clone()));
            batch.push(&vec![0; positions.len()], positions.start, &sequence.table, BLOCK, &[]);
        }
        let bucket = rows.map(|rows| Bucket { rows, adapters: false, gains: false });
        batch.step = Some(self.buffers.upload(&batch, &SlotPool::default(), bucket).unwrap());
        qkv.resize(batch.rows() * self.heads.qkv_width(), bf16::NAN);
        let qkv = Tensor::from_vec(qkv, (batch.rows(), self.heads.qkv_width()), &device()).unwrap();
        (batch, qkv)
    }

    /// Writes keys and values only.
    fn fill(&mut self, sequence: &Sequence, positions: Range<usize>) {
        if !positions.is_empty() {
            let (batch, qkv) = self.batch(&[(sequence, positions)], None);
            append(&self.cache, &qkv, &batch, &self.still, self.heads).unwrap();
            device().synchronize().unwrap();
        }
    }

    /// Runs a step. Returns each part's rows of the output, then the padding rows.
    fn step(&mut self, parts: &[Part], rows: Option<usize>) -> Vec<Vec<f32>> {
        let (batch, qkv) = self.batch(parts, rows);
        append(&self.cache, &qkv, &batch, &self.still, self.heads).unwrap();
        let out = attention(&qkv, &self.cache, &batch, self.heads).unwrap();
        let out = out.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
        let end = batch.spans.last().map_or(0, |span| span.rows.end);
        let spans = batch.spans.iter().map(|span| span.rows.clone());
        spans.chain(std::iter::once(end..out.len())).map(|rows| out[rows].concat()).collect()
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[track_caller]
fn assert_same(have: &[f32], want: &[f32], what: &str) {
    assert_eq!(have.len(), want.len(), "{what}");
    assert!(bits(have) == bits(want), "{what}: {}", have.iter().zip(want).filter(|(h, w)| h != w).count());
    assert!(have.iter().all(|v| v.is_finite()), "{what}");
}

#[test]
fn append_equals_the_cpu() {
    for (query, kv, dim) in
        [(1, 1, 2), (3, 1, 8), (4, 2, 12), (8, 2, 16), (9, 3, 64), (5, 5, 80), (4, 1, 96), (32, 8, 128)]
    {
        let heads = Heads { query, kv, dim };
        let (width, rows, filled, blocks) = (heads.qkv_width(), 37, 48, 9);
        let x = random(1, filled * width);
        let inv_freq: Vec<f32> = (0..dim / 2).map(|i| 1e4f32.powf(-2.0 * i as f32 / dim as f32)).collect();
        let mut batch = Batch {
            tokens: vec![0; rows],
            positions: (0..rows).map(|i| (i * 97 % 3000) as u32).collect(),
            slot_mapping: (0..rows).map(|i| ((i * 29 + 11) % (blocks * BLOCK)) as u32).collect(),
            ..Batch::default()
        };
        let table = |device| RopeTable::new(&inv_freq, 3000, device).unwrap();

        let host =
            Tensor::from_slice(&x[..rows * width], (rows, width), &Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
        let cache = Tensor::zeros((blocks, block_len(heads, &Device::Cpu)), DType::F32, &Device::Cpu).unwrap();
        append(&cache, &host, &batch, &table(&Device::Cpu), heads).unwrap();
        let want: Vec<f64> = host.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f64::from).collect();

        let device = device();
        let capacity = Capacity { rows: filled, spans: 4, block_table_len: 4 };
        let mut buffers = StepBuffers::new(device.as_cuda_device().unwrap(), capacity).unwrap();
        for bucket in [None, Some(Bucket { rows: filled, adapters: false, gains: false })] {
            batch.step = Some(buffers.upload(&batch, &SlotPool::default(), bucket).unwrap());
            let shape = (blocks, block_len(heads, &device));
            let old = bf16::from_f32(7.0);
            let cache = Tensor::from_vec(vec![old; shape.0 * shape.1], shape, &device).unwrap();
            let qkv = Tensor::from_slice(&x[..batch.rows() * width], (batch.rows(), width), &device).unwrap();
            append(&cache, &qkv, &batch, &table(&device), heads).unwrap();
            let got = qkv.flatten_all().unwrap().to_vec1::<bf16>().unwrap();
            let got = &got[..rows * width];
            let floats: Vec<f32> = got.iter().map(|v| v.to_f32()).collect();
            // One rounding to bf16.
            let error = relative_error(&floats, &want);
            assert!(error < 3e-3, "{heads:?}: {error}");

            let mut expected = vec![old; shape.0 * shape.1];
            for (row, slot) in got.chunks(width).zip(&batch.slot_mapping) {
                let (block, token) = (*slot as usize / BLOCK, *slot as usize % BLOCK);
                for (head, values) in row[query * dim..].chunks(dim).enumerate() {
                    let at = block * shape.1 + (head * BLOCK + token) * dim;
                    expected[at..at + dim].copy_from_slice(values);
                }
            }
            for (row, before) in got.chunks(width).zip(x.chunks(width)) {
                assert_eq!(row[(query + kv) * dim..], before[(query + kv) * dim..]);
            }
            assert!(cache.flatten_all().unwrap().to_vec1::<bf16>().unwrap() == expected, "{heads:?} {bucket:?}");
        }
    }
}

#[test]
fn decode_and_prefill_match_f64() {
    for dim in [8, 16, 64, 80, 96, 128] {
        for group in [1, 3, 4, 8] {
            let heads = Heads { query: 2 * group, kv: 2, dim };
            check_f64(heads, &CONTEXTS);
        }
    }
}

#[test]
fn odd_groups_match_f64() {
    for (query, kv, dim) in [(7, 1, 64), (12, 1, 128), (20, 1, 128), (130, 1, 64), (4, 4, 2), (2, 1, 256)] {
        check_f64(Heads { query, kv, dim }, &[1, 17, 33, 300]);
    }
}

/// Runs sequences of these lengths whole, some of them decoding, and then decodes their last rows.
fn check_f64(heads: Heads, lens: &[usize]) {
    let (sequences, blocks) = sequences(heads, lens);
    let mut gpu = Gpu::new(heads, blocks);
    let check = |sequence: &Sequence, first: usize, out: &[f32], what: &str| {
        let len = sequence.len();
        for position in [0, 1, 15, 16, 40, 63, 64, len / 2, len.saturating_sub(2), len - 1] {
            if (first..len).contains(&position) {
                let width = heads.query * heads.dim;
                let row = &out[(position - first) * width..][..width];
                let error = relative_error(row, &sequence.reference(position));
                assert!(error < TOLERANCE, "{heads:?} {what} of {len}: position {position}: {error}");
            }
        }
    };
    // Every third sequence decodes. Of the others, every second one has its first rows in the cache.
    let first = |i: usize, len: usize| {
        if i % 3 == 2 {
            len - 1
        } else if i % 3 == 1 {
            len / 3
        } else {
            0
        }
    };
    for (i, sequence) in sequences.iter().enumerate() {
        gpu.fill(sequence, 0..first(i, sequence.len()));
    }
    let parts: Vec<Part> = sequences.iter().enumerate().map(|(i, s)| (s, first(i, s.len())..s.len())).collect();
    for (out, (sequence, positions)) in gpu.step(&parts, None).iter().zip(&parts) {
        check(sequence, positions.start, out, "mixed");
    }
    let parts: Vec<Part> = sequences.iter().map(|s| (s, s.len() - 1..s.len())).collect();
    for (out, (sequence, positions)) in gpu.step(&parts, None).iter().zip(&parts) {
        check(sequence, positions.start, out, "decode");
    }
}

/// Shapes of each kernel.
const SHAPES: [Heads; 5] = [
    Heads { query: 8, kv: 2, dim: 128 },
    Heads { query: 9, kv: 3, dim: 64 },
    Heads { query: 3, kv: 3, dim: 128 },
    Heads { query: 2, kv: 1, dim: 80 },
    Heads { query: 12, kv: 1, dim: 64 },
];

#[test]
fn chunks_change_no_bit() {
    for heads in SHAPES {
        let (sequences, blocks) = sequences(heads, &[300]);
        let sequence = &sequences[0];
        let whole = Gpu::new(heads, blocks).step(&[(sequence, 0..300)], None).concat();
        for chunk in [2, 15, 16, 61, 64, 100, 128] {
            let mut gpu = Gpu::new(heads, blocks);
            let starts = (0..300).step_by(chunk);
            let out: Vec<f32> =
                starts.flat_map(|s| gpu.step(&[(sequence, s..(s + chunk).min(300))], None).concat()).collect();
            assert_same(&out, &whole, &format!("{heads:?} in chunks of {chunk}"));
        }
    }
}

#[test]
fn padded_steps_equal_plain_ones() {
    for heads in SHAPES {
        let lens = [1, 17, 4100, 500, 1030];
        let (sequences, blocks) = sequences(heads, &lens);
        let mut gpu = Gpu::new(heads, blocks);
        sequences.iter().for_each(|s| gpu.fill(s, 0..s.len() - 1));
        let parts: Vec<Part> = sequences.iter().map(|s| (s, s.len() - 1..s.len())).collect();
        let plain = gpu.step(&parts, None).concat();
        for rows in [5, 8, 64] {
            let out = gpu.step(&parts, Some(rows));
            assert_same(&out[..5].concat(), &plain, &format!("{heads:?} in {rows} rows"));
            assert_eq!(out[5], vec![0.0; (rows - 5) * heads.query * heads.dim]);
        }
        assert_eq!(gpu.step(&[], Some(3)).concat(), vec![0.0; 3 * heads.query * heads.dim]);
        assert_same(&gpu.step(&parts, None).concat(), &plain, "afterwards");
    }
}

#[test]
fn neighbours_change_no_bit() {
    for heads in SHAPES {
        let lens = [700, 130, 65, 1500, 16];
        let (sequences, blocks) = sequences(heads, &lens);
        let mut gpu = Gpu::new(heads, blocks);
        sequences.iter().for_each(|s| gpu.fill(s, 0..s.len()));
        // Decode rows and prompts alternate.
        let part = |i: usize| {
            let s = &sequences[i];
            (s, if i.is_multiple_of(2) { s.len() - 1 } else { s.len() / 2 }..s.len())
        };
        let alone: Vec<_> = (0..lens.len()).map(|i| gpu.step(&[part(i)], None).concat()).collect();
        for order in [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 3, 4, 1]] {
            let out = gpu.step(&order.map(part), None);
            for (i, out) in order.into_iter().zip(&out) {
                assert_same(out, &alone[i], &format!("{heads:?}: sequence {i} in {order:?}"));
            }
        }
    }
}

#[test]
fn repeats_change_no_bit() {
    for heads in SHAPES {
        let lens = [700, 130, 65, 1500, 16, 4000];
        let (sequences, blocks) = sequences(heads, &lens);
        let mut gpu = Gpu::new(heads, blocks);
        sequences.iter().for_each(|s| gpu.fill(s, 0..s.len()));
        let parts: Vec<Part> =
            sequences.iter().map(|s| (s, if s.len() == 130 { 0 } else { s.len() - 1 }..s.len())).collect();
        let first = gpu.step(&parts, None).concat();
        for _ in 0..200 {
            assert_same(&gpu.step(&parts, None).concat(), &first, &format!("{heads:?}"));
        }
    }
}

#[test]
fn work_fits_its_room() {
    for lens in [vec![1; 40], vec![65; 7], vec![4096; 3], vec![1, 100_000, 5, 2049, 63], vec![131_072; 2], vec![64; 64]]
    {
        for rows in [1, 2] {
            let mut batch = Batch::default();
            for &len in &lens {
                let rows = rows.min(len);
                batch.push(&vec![0; rows], len - rows, &vec![0; len.div_ceil(BLOCK)], BLOCK, &[]);
            }
            let capacity =
                Capacity { rows: batch.rows(), spans: batch.spans.len(), block_table_len: batch.block_tables.len() };
            for captured_rows in [None, Some(batch.rows())] {
                assert!(decode_work(&batch, captured_rows, false).len() <= decode_words(capacity), "{lens:?}");
            }
            assert!(prefill_work(&batch, false).len() <= prefill_words(capacity), "{lens:?}");
        }
    }
}
