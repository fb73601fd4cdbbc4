//! Rank-16 deltas on q, k and v: all rows under one adapter, and rows under 32 distinct adapters.

use criterion::{BenchmarkId, Criterion, Throughput};
use quiver::arch::Site;
use quiver::lora::delta::{Adapters, LoraPair, add_delta};
use quiver::lora::slots::{SlotPool, SlotWeights};
use quiver::ops::batch::Segment;

use crate::{HEADS, HIDDEN, must, values};

const RANK: usize = 16;

pub fn bench(c: &mut Criterion) {
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
        let adapters = Adapters { segments: &segments, slots: &slots, step: None, logit_rows_only: false };
        // Elements are multiply-adds.
        group.throughput(Throughput::Elements((rows * RANK * (3 * HIDDEN + HEADS.qkv_width())) as u64));
        group.bench_function(BenchmarkId::new(name, rows), |b| {
            b.iter(|| must(add_delta(&y, &x, &adapters, 0, Site::Qkv)))
        });
    }
}
