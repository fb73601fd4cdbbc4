//! One benchmark an op, over the shapes of the default model: `cargo bench --bench ops`.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use quiver::arch::Heads;
use quiver::arch::Site;
use quiver::engine::request::SamplingParams;
use quiver::engine::sampler::{LogitsTask, SamplingMetadata, TokenCounts, run_tasks};
use quiver::lora::delta::{Adapters, LoraPair, add_delta};
use quiver::lora::slots::{SlotPool, SlotWeights};
use quiver::ops::adamw::{AdamwStep, adamw_step, adamw8bit_step, sum_of_squares, zero_moments};
use quiver::ops::attention::{BLOCK, append, attention, block_len, causal, causal_backward};
use quiver::ops::batch::{Batch, Segment};
use quiver::ops::dropout::dropout;
use quiver::ops::gemm::gemm;
use quiver::ops::heads::{QkNorm, bias_and_qk_norm, qk_norm_backward};
use quiver::ops::loss::{LossTarget, cross_entropy};
use quiver::ops::norm::{add_rms_norm, rms_norm, rms_norm_backward};
use quiver::ops::quant::{Codec, QMatrix, Source, gather_rows, matmul, matmul_transposed};
use quiver::ops::rope::{RopeTable, apply_rope};
use quiver::ops::swiglu::{swiglu, swiglu_backward};

/// The attention of the default model, its width, and rows of a decode step, a mixed step and a prompt.
const HEADS: Heads = Heads { query: 9, kv: 3, dim: 64 };
const HIDDEN: usize = 576;
const ROWS: [usize; 3] = [1, 32, 512];

/// An op that refused would look fast.
fn must<T>(result: quiver::Result<T>) {
    result.expect("the shapes fit");
}

/// Values in -1..1.
fn values(shape: impl Into<candle_core::Shape>) -> Tensor {
    let shape = shape.into();
    let values = (0..shape.elem_count()).map(|i| (i * 7 % 255) as f32 / 128.0 - 1.0).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).expect("a tensor")
}

/// Any bytes are valid blocks; small scales keep products finite.
fn matrix(codec: Codec, n: usize, k: usize, block: usize) -> Arc<QMatrix> {
    let mut bytes: Vec<u8> = (0..n * k / 32 * block).map(|i| (i * 7 + i / 13) as u8).collect();
    for block in bytes.chunks_exact_mut(block) {
        block[..4].copy_from_slice(&[0x00, 0x20, 0x00, 0x20]);
    }
    Arc::new(
        QMatrix::pack(&[Source::Blocks { codec, n, k, bytes: bytes.into() }], &Device::Cpu)
            .expect("the shape is whole blocks"),
    )
}

fn quant(c: &mut Criterion) {
    let shapes = [
        ("qkv Q4_1", Codec::Q4_1, 960, 576, 20),
        ("gate_up Q4_1", Codec::Q4_1, 3072, 576, 20),
        ("down Q4_1", Codec::Q4_1, 576, 1536, 20),
        ("head Q8_0", Codec::Q8_0, 49152, 576, 34),
    ];
    let mut group = c.benchmark_group("quant");
    group.sample_size(10);
    for (name, codec, n, k, block) in shapes {
        let w = matrix(codec, n, k, block);
        for m in [1usize, 8, 64, 512] {
            if n > 10_000 && m > 8 {
                continue;
            }
            let x = values((m, k));
            // Elements are multiply-accumulates.
            group.throughput(Throughput::Elements((n * k * m) as u64));
            group.bench_with_input(BenchmarkId::new(name, m), &x, |b, x| b.iter(|| must(matmul(&w, x, DType::F32))));
        }
    }
}

/// Ops that read and write each value about once; their throughput is of the bytes of `x`.
fn rows(c: &mut Criterion) {
    let table = RopeTable::new(&[0.01; HEADS.dim / 2], 2048, &Device::Cpu).expect("a table");
    let embedding = matrix(Codec::Q8_0, 49152, HIDDEN, 34);
    let (weight, head) = (values(HIDDEN), values(HEADS.dim));
    let qk_norm = QkNorm { query: &head, key: &head, eps: 1e-5 };
    let mut group = c.benchmark_group("rows");
    for m in ROWS {
        let (x, gate_up, qkv) = (values((m, HIDDEN)), values((m, 3072)), values((m, HEADS.qkv_width())));
        let positions: Vec<u32> = (0..m as u32).collect();
        let mut bench = |name: &str, x: &Tensor, f: &mut dyn FnMut()| {
            group.throughput(Throughput::Bytes(4 * x.elem_count() as u64));
            group.bench_function(BenchmarkId::new(name, m), |b| b.iter(&mut *f));
        };
        bench("rms_norm", &x, &mut || must(rms_norm(&x, &weight, 1e-5)));
        bench("add_rms_norm", &x, &mut || must(add_rms_norm(&x, &x, &weight, 1e-5)));
        bench("swiglu", &gate_up, &mut || must(swiglu(&gate_up)));
        bench("rope", &qkv, &mut || must(apply_rope(&qkv, HEADS.query + HEADS.kv, &positions, &table)));
        bench("heads", &qkv, &mut || must(bias_and_qk_norm(&qkv, None, Some(qk_norm), HEADS)));
        bench("gather_rows", &x, &mut || must(gather_rows(&embedding, &positions, None)));
    }
}

/// A decode step of some sequences with 512 keys each, and a prompt; writing keys and values is timed with it.
fn attend(c: &mut Criterion) {
    let table = RopeTable::new(&[0.01; HEADS.dim / 2], 2048, &Device::Cpu).expect("a table");
    let mut group = c.benchmark_group("attention");
    for (name, sequences, start, rows) in [("decode", 1, 511usize, 1), ("decode", 32, 511, 1), ("prompt", 1, 0, 512)] {
        let blocks = (start + rows).div_ceil(BLOCK) as u32;
        let mut batch = Batch::default();
        for i in 0..sequences {
            let own: Vec<u32> = (i * blocks..(i + 1) * blocks).collect();
            batch.push(&vec![0; rows], start, &own, BLOCK, &[]);
        }
        let cache = values(((sequences * blocks) as usize, block_len(HEADS, &Device::Cpu)));
        let qkv = values((batch.rows(), HEADS.qkv_width()));
        group.throughput(Throughput::Elements(batch.rows() as u64));
        group.bench_function(BenchmarkId::new(name, batch.rows()), |b| {
            b.iter(|| {
                must(append(&cache, &qkv, &batch, &table, HEADS));
                must(attention(&qkv, &cache, &batch, HEADS));
            });
        });
    }
}

/// Rank-16 deltas on q, k and v: all rows under one adapter, and each under its own.
fn lora(c: &mut Criterion) {
    const RANK: usize = 16;
    let pair = |offset, n| LoraPair {
        offset,
        n,
        k: HIDDEN,
        rank: RANK,
        scale: 1.0,
        a: vec![0.01; RANK * HIDDEN],
        b: vec![0.01; RANK * n],
        bias: None,
        magnitude: None,
    };
    let qkv = || vec![pair(0, 576), pair(576, 192), pair(768, 192)];
    let mut slots = SlotPool::default();
    for _ in 0..32 {
        slots.insert(SlotWeights { layers: vec![[qkv(), vec![], vec![], vec![]]], head: vec![] });
    }
    let mut group = c.benchmark_group("lora");
    for (name, rows, adapters) in
        [("one", 1, 1), ("one", 32, 1), ("distinct", 32, 32), ("one", 512, 1), ("distinct", 512, 32)]
    {
        let (y, x) = (values((rows, HEADS.qkv_width())), values((rows, HIDDEN)));
        let each = rows / adapters;
        let segments: Vec<Segment> =
            (0..adapters).map(|i| Segment { rows: i * each..(i + 1) * each, terms: vec![(i as u32, 1.0)] }).collect();
        let adapters = Adapters { segments: &segments, slots: &slots, step: None, logits: false };
        group.throughput(Throughput::Elements((rows * RANK * (3 * HIDDEN + HEADS.qkv_width())) as u64));
        group.bench_function(BenchmarkId::new(name, rows), |b| {
            b.iter(|| must(add_delta(&y, &x, &adapters, 0, Site::Qkv)))
        });
    }
}

/// From logits to a token, greedy and with everything on.
fn sample(c: &mut Criterion) {
    let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    let full =
        SamplingParams { top_k: 50, top_p: 0.9, min_p: 0.01, repetition_penalty: 1.1, ..SamplingParams::default() };
    let mut group = c.benchmark_group("sample");
    for (name, params) in [("greedy", greedy), ("all filters", full)] {
        let counts = TokenCounts::new(&params, &[1, 2, 3]);
        for rows in [1, 32] {
            let logits = values((rows, 49152));
            let task = |_| {
                LogitsTask::Sample(SamplingMetadata {
                    params: &params,
                    counts: &counts,
                    masked: &[],
                    seed: 1,
                    index: 0,
                })
            };
            let tasks: Vec<LogitsTask> = (0..rows).map(task).collect();
            group.throughput(Throughput::Elements(rows as u64));
            group.bench_function(BenchmarkId::new(name, rows), |b| b.iter(|| must(run_tasks(&logits, &tasks))));
        }
    }
}

/// What training adds, on 512 rows of two sequences; the optimiser on a million parameters.
fn train(c: &mut Criterion) {
    const T: usize = 512;
    const PARAMETERS: usize = 1 << 20;
    let (down, head) = (matrix(Codec::Q4_1, HIDDEN, 1536, 20), matrix(Codec::Q8_0, 49152, HIDDEN, 34));
    let (x, gate_up, h) = (values((T, HIDDEN)), values((T, 3072)), values((T, 1536)));
    let (qkv, dqkv, weight, norm) =
        (values((T, HEADS.qkv_width())), values((T, HEADS.qkv_width())), values(HIDDEN), values(HEADS.dim));
    let sequences = [0..T / 2, T / 2..T];
    let (out, lse) = causal(&qkv, &sequences, HEADS).expect("it fits");
    let targets: Vec<LossTarget> = (0..32).map(|i| LossTarget { row: i * 16, id: i, scale: 1.0 }).collect();
    let (a, shrunk) = (values((16, HIDDEN)), values((T, 16)));
    let at = a.t().expect("a matrix");
    let (params, grads, m, v) = (values(PARAMETERS), values(PARAMETERS), values(PARAMETERS), values(PARAMETERS));
    let moments = || zero_moments(PARAMETERS, &Device::Cpu).expect("memory");
    let (m8, v8) = (moments(), moments());
    let step =
        AdamwStep { step: 1, lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, grad_scale: 1.0 };
    let qk_norm = QkNorm { query: &norm, key: &norm, eps: 1e-5 };
    let mut group = c.benchmark_group("train");
    group.sample_size(20);
    let mut bench = |name: &str, f: &mut dyn FnMut()| {
        group.bench_function(name, |b| b.iter(&mut *f));
    };
    bench("matmul_transposed", &mut || must(matmul_transposed(&down, &x, DType::F32)));
    bench("rms_norm_backward", &mut || must(rms_norm_backward(&x, &weight, &x, Some(&x), 1e-5)));
    bench("swiglu_backward", &mut || must(swiglu_backward(&gate_up, &h)));
    bench("heads_backward", &mut || must(qk_norm_backward(&dqkv, &qkv, qk_norm, HEADS)));
    bench("causal", &mut || must(causal(&qkv, &sequences, HEADS)));
    bench("causal_backward", &mut || must(causal_backward(&qkv, &out, &lse, &out, &sequences, HEADS)));
    bench("cross_entropy of 32", &mut || must(cross_entropy(&head, &x, &targets, true)));
    bench("gemm, shrink to 16", &mut || must(gemm(&shrunk, 0.0, &x, &at, 1.0)));
    bench("dropout", &mut || must(dropout(&x, 0.1, 1)));
    bench("adamw", &mut || must(adamw_step(&params, &grads, &m, &v, &step)));
    bench("adamw8bit", &mut || must(adamw8bit_step(&params, &grads, &m8, &v8, &step)));
    bench("sum_of_squares", &mut || must(sum_of_squares(&grads)));
}

criterion_group!(benches, quant, rows, attend, lora, sample, train);
criterion_main!(benches);
