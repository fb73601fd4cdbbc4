//! RoPE of query and key heads, forward and backward.

use candle_core::Device;
use criterion::Criterion;
use quiver::ops::rope::{RopeTable, apply_rope, apply_rope_backward};

use crate::{HEADS, ROWS, TRAIN_ROWS, bench_bytes, must, values};

pub fn bench(c: &mut Criterion) {
    let table = RopeTable::new(&[0.01; HEADS.dim / 2], 2048, &Device::Cpu).expect("a table");
    let heads = HEADS.query + HEADS.kv;
    let mut group = c.benchmark_group("rope");
    for rows in ROWS {
        let (qkv, positions) = (values((rows, HEADS.qkv_width())), (0..rows as u32).collect::<Vec<_>>());
        bench_bytes(&mut group, "apply_rope", &qkv, || must(apply_rope(&qkv, heads, &positions, &table)));
    }
    let (dqkv, positions) = (values((TRAIN_ROWS, HEADS.qkv_width())), (0..TRAIN_ROWS as u32).collect::<Vec<_>>());
    bench_bytes(&mut group, "apply_rope_backward", &dqkv, || {
        must(apply_rope_backward(&dqkv, heads, &positions, &table))
    });
}
