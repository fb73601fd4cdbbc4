//! Serving's attention over the KV cache, and training's within sequences.

use candle_core::Device;
use criterion::{BenchmarkId, Criterion, Throughput};
use quiver::ops::attention::{BLOCK, append, attention, block_len, causal, causal_backward};
use quiver::ops::batch::Batch;
use quiver::ops::rope::RopeTable;

use crate::{HEADS, TRAIN_ROWS, must, values};

pub fn bench(c: &mut Criterion) {
    serving(c);
    training(c);
}

/// Decode steps of sequences with 512 keys each, and a prompt. Includes writing the step's keys and values.
fn serving(c: &mut Criterion) {
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

/// Two sequences, forward and backward.
fn training(c: &mut Criterion) {
    let qkv = values((TRAIN_ROWS, HEADS.qkv_width()));
    let sequences = [0..TRAIN_ROWS / 2, TRAIN_ROWS / 2..TRAIN_ROWS];
    let (out, lse) = causal(&qkv, &sequences, HEADS).expect("the shapes fit");
    let mut group = c.benchmark_group("attention");
    group.sample_size(20).throughput(Throughput::Elements(TRAIN_ROWS as u64));
    group.bench_function(BenchmarkId::new("causal", TRAIN_ROWS), |b| b.iter(|| must(causal(&qkv, &sequences, HEADS))));
    group.bench_function(BenchmarkId::new("causal_backward", TRAIN_ROWS), |b| {
        b.iter(|| must(causal_backward(&qkv, &out, &lse, &out, &sequences, HEADS)))
    });
}
